//! What the ranks tell each other at the end of a step, so that all decide alike.

use supra_agent::{Collective, CollectiveError};

/// One rank's share of a step; also, summed, the whole step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Sum of the loss over targets.
    pub loss_sum: f64,
    /// Number of targets.
    pub targets: u64,
    /// Sum of the squares of the reduced gradient sum, of this rank's part of it.
    pub squares: f64,
    /// Whether this rank was asked to stop.
    pub stop: bool,
}

const BYTES: usize = 25;

impl Tally {
    /// Sums the tallies of all ranks, in rank order; equal on all of them.
    pub fn gather(self, collective: &mut dyn Collective) -> Result<Tally, CollectiveError> {
        let all = collective.all_gather(&self.to_bytes())?;
        let mut sum = Tally::default();
        for (rank, bytes) in all.iter().enumerate() {
            let Some(tally) = Tally::from_bytes(bytes) else {
                return Err(CollectiveError::Peer {
                    rank: rank as u32,
                    address: "in this generation".to_owned(),
                    cause: format!("sent {} bytes where {BYTES} were due", bytes.len()),
                });
            };
            sum.loss_sum += tally.loss_sum;
            sum.targets += tally.targets;
            sum.squares += tally.squares;
            sum.stop |= tally.stop;
        }
        Ok(sum)
    }

    fn to_bytes(self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..8].copy_from_slice(&self.loss_sum.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.targets.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.squares.to_le_bytes());
        bytes[24] = u8::from(self.stop);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Tally> {
        let bytes: &[u8; BYTES] = bytes.try_into().ok()?;
        let word = |at: usize| {
            bytes[at..at + 8]
                .try_into()
                .expect("invariant: eight bytes")
        };
        Some(Tally {
            loss_sum: f64::from_le_bytes(word(0)),
            targets: u64::from_le_bytes(word(8)),
            squares: f64::from_le_bytes(word(16)),
            stop: bytes[24] != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_survives_the_wire() {
        let tally = Tally {
            loss_sum: -1.5e300,
            targets: u64::MAX,
            squares: f64::INFINITY,
            stop: true,
        };
        assert_eq!(Tally::from_bytes(&tally.to_bytes()), Some(tally));
        assert_eq!(Tally::from_bytes(&[0; 3]), None);
    }
}
