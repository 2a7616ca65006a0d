//! Why a kernel cannot be had, or cannot run.

use std::path::PathBuf;

use thiserror::Error;

/// Why kernels cannot be compiled, loaded or launched.
#[derive(Clone, Debug, Error)]
pub enum KernelError {
    /// NVRTC is not where libtorch's own libraries are.
    #[error(
        "cannot load NVRTC, which compiles the CUDA kernels ({}: {cause}). Run scripts/setup again: it installs NVRTC \
         beside libtorch",
        path.display()
    )]
    NoNvrtc {
        /// Where it was looked for.
        path: PathBuf,
        /// The loader's words.
        cause: String,
    },
    /// NVRTC refused a source.
    #[error("{source_file} does not compile for {architecture} with NVRTC {version}:\n{log}")]
    Compile {
        /// The kernels' file.
        source_file: &'static str,
        /// What it was compiled for, as `sm_90a`.
        architecture: String,
        /// NVRTC's version.
        version: String,
        /// The compiler's words.
        log: String,
    },
    /// There is no driver to ask.
    #[error(
        "the NVIDIA driver's library libcuda.so.1 cannot be loaded. Install a driver of version 580 or later, or run with \
         --device cpu"
    )]
    NoDriver,
    /// The driver refused.
    #[error("cuda:{device}: cannot {what}: {cause}")]
    Driver {
        /// The GPU's index.
        device: usize,
        /// What was tried.
        what: String,
        /// The driver's words.
        cause: String,
    },
    /// The GPU cannot compute in bf16.
    #[error(
        "cuda:{device} is of architecture sm_{architecture}; the kernels need sm_80 or newer. Run with --device cpu, or \
         on an A100 or newer"
    )]
    Architecture {
        /// The GPU's index.
        device: usize,
        /// Compute capability without its dot.
        architecture: u32,
    },
    /// A tensor is none that the kernels can read or write.
    #[error("the kernels cannot take {tensor}: {problem}")]
    Tensor {
        /// Its name in the contract.
        tensor: &'static str,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// A kernel was given arguments of another form than it declares.
    #[error(
        "the kernel {kernel} takes arguments of {declared:?} bytes, not of {given:?}: this is an error of ours"
    )]
    Arguments {
        /// The kernel.
        kernel: &'static str,
        /// Sizes that it declares.
        declared: Vec<usize>,
        /// Sizes that it was given.
        given: Vec<usize>,
    },
}
