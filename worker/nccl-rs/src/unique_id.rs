//! The id by which ranks find each other.

use std::fmt;

use crate::symbols::RawId;

/// Names one new communicator; see [`Library::unique_id`](crate::Library::unique_id). It is enough to
/// join, so it travels only where the ranks are trusted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; 128]);

impl UniqueId {
    /// The bytes to be sent to the other ranks.
    pub fn to_bytes(self) -> [u8; 128] {
        self.0
    }

    pub(crate) fn raw(self) -> RawId {
        RawId(self.0)
    }
}

impl From<[u8; 128]> for UniqueId {
    fn from(bytes: [u8; 128]) -> UniqueId {
        UniqueId(bytes)
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(..)")
    }
}
