//! Checkpoints without libtorch: everything that training changes, in a directory that is complete or not there.
//!
//! [`manifest`] says what a checkpoint holds, [`store`] where it lies and what may go, [`publish`] what makes it exist, [`verify`]
//! whether it is what was written, by the hashes of [`tree`], [`examine`] all that is not, and [`fetch`] gets the model out of it.
//! Coordinator and worker use the same code; tensors are the worker's. [`header`] reads what a file of tensors says of itself,
//! [`pytorch`] the weights of others. Files beside checkpoints prove themselves: [`seal`]; models that left them: [`sums`].

#![forbid(unsafe_code)]

pub mod error;
pub mod examine;
pub mod fetch;
pub mod header;
pub mod manifest;
pub mod publish;
pub mod pytorch;
pub mod seal;
pub mod store;
pub mod sums;
pub mod tree;
pub mod verify;

pub use error::StoredError;
pub use manifest::{Environment, LEDGER, Manifest};
pub use publish::{PENDING, PUBLISHED};
pub use store::Store;

/// Prefix of the first moments' names.
pub const EXP_AVG: &str = "exp_avg.";

/// Prefix of the second moments' names.
pub const EXP_AVG_SQ: &str = "exp_avg_sq.";
