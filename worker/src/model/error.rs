//! What can be wrong with a model on disk.

use std::fmt;
use std::path::PathBuf;

use safetensors::SafeTensorError;
use supra_checkpoint::pytorch::PyTorchError;
use tch::TchError;

/// A model that cannot be read, written or used. Every message names the file, the cause and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The operating system refused.
    #[error("{path}: cannot {action}")]
    Io {
        /// What could not be done: "read", "create", …
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A JSON file that is none, or lacks a field, or has one of the wrong type.
    #[error("{path}: not the JSON that is expected here")]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        source: serde_json::Error,
    },
    /// A model of a kind that this program does not implement.
    #[error("{path}: `{field}` is {found}, which is not supported; supported: {supported}")]
    Unsupported {
        /// The configuration file.
        path: PathBuf,
        /// Its field.
        field: String,
        /// What it says.
        found: String,
        /// What it may say.
        supported: String,
    },
    /// A configuration that contradicts itself.
    #[error("{path}: {reason}")]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A directory without weights that can be read.
    #[error("{path}: {reason}")]
    NoWeights {
        /// The directory.
        path: PathBuf,
        /// What was looked for, and what to do.
        reason: String,
    },
    /// A file of PyTorch's that is damaged, or holds something else than weights.
    #[error(transparent)]
    PyTorch(#[from] PyTorchError),
    /// A damaged safetensors file.
    #[error("{path}: not a whole safetensors file; copy or download it again")]
    SafeTensors {
        /// The file.
        path: PathBuf,
        /// What the format's reader says.
        source: SafeTensorError,
    },
    /// A safetensors file that ends early or late.
    #[error(
        "{path}: {found} bytes, but its header speaks of {expected}; the file is truncated or damaged: copy or download it again"
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes that the header promises, header included.
        expected: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// A tensor of a type that is no floating-point type of a model.
    #[error("{path}: tensor `{tensor}` is {found}; supported: F32, F16, BF16")]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        found: String,
    },
    /// The tensors of a directory are not those of its configuration.
    #[error(
        "{path}: the tensors do not fit the configuration ({matched} of the {layout} layout do){difference}"
    )]
    Tensors {
        /// The directory.
        path: PathBuf,
        /// Whose names were expected.
        layout: String,
        /// How many tensors fit.
        matched: usize,
        /// Every tensor that does not fit.
        difference: Box<Difference>,
    },
    /// NaN or infinity among the weights.
    #[error(
        "{path}: tensor `{tensor}` holds {count} values that are NaN or infinite; the weights are damaged: copy or download them again"
    )]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// How many.
        count: i64,
    },
    /// The place to write to is taken.
    #[error("{path}: exists and is not an empty directory; choose another place or remove it")]
    Occupied {
        /// The directory.
        path: PathBuf,
    },
    /// A softmax layout was asked of a SUPRA model or the other way round, or longer sequences than a model allows.
    #[error("{0}")]
    Unfit(String),
    /// libtorch refused.
    #[error("libtorch")]
    Torch(#[from] TchError),
}

/// How the tensors of a directory differ from those that its configuration asks for.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Asked for, not there.
    pub missing: Vec<String>,
    /// There, not asked for.
    pub unexpected: Vec<String>,
    /// There in another shape: name, shape asked for, shape found.
    pub misshapen: Vec<(String, Vec<i64>, Vec<i64>)>,
    /// What to do about it.
    pub remedy: Option<&'static str>,
}

impl Difference {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.misshapen.is_empty()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (title, names) in [("missing", &self.missing), ("unexpected", &self.unexpected)] {
            if !names.is_empty() {
                write!(f, "\n  {title} ({}):", names.len())?;
                names
                    .iter()
                    .try_for_each(|name| write!(f, "\n    {name}"))?;
            }
        }
        if !self.misshapen.is_empty() {
            write!(f, "\n  wrong shape ({}):", self.misshapen.len())?;
            for (name, expected, found) in &self.misshapen {
                write!(f, "\n    {name}: {found:?}, expected {expected:?}")?;
            }
        }
        self.remedy
            .map_or(Ok(()), |remedy| write!(f, "\n  {remedy}"))
    }
}
