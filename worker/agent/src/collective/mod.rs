//! Collectives: how the ranks of one generation exchange data.
//!
//! All ranks call the same operations in the same order. Sums are formed in one fixed order
//! ([`chunk`]), so every rank gets the same bits, and a repeat gets them again.

mod abort;
mod apart;
mod connect;
mod handshake;
mod in_process;
mod ring;
mod solo;
mod waiting;

pub use abort::AbortHandle;
pub use apart::apart;
pub use in_process::InProcess;
pub use ring::{RingPlan, TcpRing};
pub use solo::Solo;
pub(crate) use waiting::Watched;
pub use waiting::{Wait, Waiting};

use std::ops::Range;

/// The operations that training needs of its peers. Blocking; called from the compute thread only.
///
/// After an error a collective is of no more use: drop it and leave the generation.
pub trait Collective: Send {
    /// This rank, `0..world`.
    fn rank(&self) -> u32;

    /// Number of ranks.
    fn world(&self) -> u32;

    /// Replaces `buffer` by its sum over all ranks: same length, and same bits, on every rank.
    fn all_reduce_f32(&mut self, buffer: &mut [f32]) -> Result<(), CollectiveError>;

    /// As [`all_reduce_f32`](Self::all_reduce_f32). Adds in f32 and rounds once, at the end.
    fn all_reduce_bf16(&mut self, buffer: &mut [half::bf16]) -> Result<(), CollectiveError>;

    /// The bytes of every rank, in rank order. Lengths may differ.
    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// Replaces `buffer` by that of rank `root`.
    fn broadcast(&mut self, root: u32, buffer: &mut Vec<u8>) -> Result<(), CollectiveError>;

    /// Sends `mine` to the next rank, modulo the number of ranks, and fills `theirs` with what the rank before sends: as
    /// many bytes on every rank.
    fn pass(&mut self, mine: &[u8], theirs: &mut [u8]) -> Result<(), CollectiveError>;

    /// Returns after every rank has called it.
    fn barrier(&mut self) -> Result<(), CollectiveError>;
}

/// Why a collective broke.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// The control thread aborted it, because the generation is void.
    #[error("the collective was aborted: the generation is void")]
    Aborted,

    /// The connection to a neighbour broke in the middle of an operation.
    #[error("lost rank {rank} at {address}: {cause}")]
    Peer {
        /// Rank of the neighbour.
        rank: u32,
        /// Its data-plane address, `host:port`.
        address: String,
        /// What happened.
        cause: String,
    },

    /// A neighbour answered, but is not the expected rank of this generation.
    #[error("rank {rank} at {address} did not prove to be of this generation: {cause}")]
    Handshake {
        /// Rank that was expected there.
        rank: u32,
        /// Its data-plane address, `host:port`.
        address: String,
        /// What happened.
        cause: String,
    },

    /// A neighbour could not be reached, or did not come, in time.
    #[error("no data connection with rank {rank} at {address} within {seconds:.0} s: {cause}")]
    Timeout {
        /// Rank of the neighbour.
        rank: u32,
        /// Its data-plane address, `host:port`.
        address: String,
        /// How long was tried.
        seconds: f64,
        /// The last failure and the remedy.
        cause: String,
    },
}

/// Elements of part `index` when `len` elements are cut into `world` parts that differ by at most
/// one element.
///
/// Part `i` is summed in the order of ranks `i`, `i + 1`, … (modulo `world`): that is the way the
/// part takes around the ring, and every implementation keeps to it.
pub fn chunk(len: usize, world: u32, index: u32) -> Range<usize> {
    let (world, index) = (world as usize, index as usize);
    let (share, rest) = (len / world, len % world);
    let start = index * share + index.min(rest);
    start..start + share + usize::from(index < rest)
}
