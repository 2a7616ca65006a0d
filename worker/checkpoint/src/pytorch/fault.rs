//! What can be wrong with a file of PyTorch's.

use std::{
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// A file of PyTorch's that is not read, and why.
#[derive(Debug, Error)]
#[error("{path}: {fault}", path = path.display())]
pub struct PyTorchError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with a file of PyTorch's, and the remedy.
#[derive(Debug, Error)]
pub enum Fault {
    /// The operating system refused.
    #[error("cannot read it: {0}")]
    Io(#[from] io::Error),
    /// The file is not what was written.
    #[error("damaged: {0}. Copy or download it again")]
    Damaged(String),
    /// The pickle asks for something that building tensors does not need.
    #[error(
        "refused: {what} (byte {at} of its pickle). A pickle is a program, and this one wants more than a dictionary of \
         tensors; nothing of it was executed. If you trust its origin, load it with PyTorch and save the weights alone, \
         as safetensors"
    )]
    Refused {
        /// Byte of the pickle.
        at: usize,
        /// What it asks for.
        what: String,
    },
    /// Written by PyTorch before 1.6, or by the switch that asks for that format.
    #[error(
        "the format of PyTorch before 1.6 (no zip archive), which is not read. Load it with PyTorch (torch.load with \
         weights_only=True) and save it again with torch.save"
    )]
    Legacy,
    /// A sound file of another content.
    #[error("{0}")]
    Unfit(String),
}

impl Fault {
    /// Names the file.
    pub fn of(self, path: &Path) -> PyTorchError {
        PyTorchError {
            path: path.to_owned(),
            fault: self,
        }
    }
}
