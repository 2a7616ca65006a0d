//! Weights in files that PyTorch wrote (`torch.save`: `.pt`, `.pth`, `.bin`), read without PyTorch and without trust.
//!
//! Such a file is a zip archive of stored records: one pickle, which is a program that builds the dictionary of weights, and the
//! bytes of every storage. [`zip`] finds the records, [`pickle`] runs the program on a machine that knows a short list of
//! functions ([`globals`]) and executes nothing else, [`view`] proves every tensor to lie inside its storage, and [`listing`] gives
//! names, kinds and shapes. Values are read tensor by tensor, and compared with the CRC-32 that the archive keeps of them.
//!
//! Memory is bounded by the input: the pickle, and one tensor with the part of its storage that it spans.

pub mod fault;
pub mod globals;
pub mod listing;
pub mod pickle;
#[cfg(test)]
mod tests;
pub mod value;
pub mod view;
pub mod zip;

pub use fault::{Fault, PyTorchError};
pub use listing::{Listing, StoredTensor};
pub use view::Dtype;
