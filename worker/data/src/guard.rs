//! The parquet library on files that somebody else wrote.

use parquet::errors::{ParquetError, Result};
use supra_recipes::panic;

/// Has the library read something. Where it panics, as it says it does for some damage, that is an error like its others.
pub(crate) fn guarded<T>(read: impl FnOnce() -> Result<T>) -> Result<T> {
    panic::catch(read).unwrap_or_else(|message| Err(ParquetError::General(message)))
}
