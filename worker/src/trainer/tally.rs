//! What the ranks tell each other at the end of a step, so that all decide alike.

use supra_agent::{Collective, CollectiveError, Link};
use supra_recipes::Digest;

/// One rank's share of a step; also, summed, the whole step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Sum of the loss over targets.
    pub loss_sum: f64,
    /// Number of targets.
    pub targets: u64,
    /// Sum of the squares of the reduced gradient sum, of this rank's part of it.
    pub squares: f64,
    /// Sum of the digests of the samples that were fed.
    pub digest: Digest,
    /// What this rank was asked for.
    pub wish: Wish,
    /// A snapshot that it has begun is not whole yet.
    pub unsettled: bool,
    /// Its part of a checkpoint is not written yet.
    pub unsaved: bool,
}

/// What is to come after the step. Of what ranks were asked for, the greatest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wish {
    /// The next step.
    #[default]
    GoOn,
    /// A checkpoint, then the next step.
    Checkpoint,
    /// Another membership.
    Regroup,
    /// A checkpoint, and the end.
    Stop,
}

impl Wish {
    const ALL: [Wish; 4] = [Wish::GoOn, Wish::Checkpoint, Wish::Regroup, Wish::Stop];

    /// What the coordinator has asked this rank for by now.
    pub fn of(link: &Link) -> Wish {
        if link.stop_requested() {
            Wish::Stop
        } else if link.regroup_requested() {
            Wish::Regroup
        } else if link.checkpoint_requested() {
            Wish::Checkpoint
        } else {
            Wish::GoOn
        }
    }
}

const BYTES: usize = 59;

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
                    cause: format!(
                        "sent {} bytes that are no tally, which has {BYTES}",
                        bytes.len()
                    ),
                });
            };
            sum.loss_sum += tally.loss_sum;
            sum.targets += tally.targets;
            sum.squares += tally.squares;
            sum.digest += tally.digest;
            sum.wish = sum.wish.max(tally.wish);
            sum.unsettled |= tally.unsettled;
            sum.unsaved |= tally.unsaved;
        }
        Ok(sum)
    }

    /// L2 norm of the gradient of the mean loss, of a whole step.
    pub fn grad_norm(&self) -> f64 {
        self.squares.sqrt() * (1.0 / self.targets as f64)
    }

    /// Whether the mean loss and the gradient's norm are finite, of a whole step; without targets they are not.
    pub fn is_finite(&self) -> bool {
        let loss = self.loss_sum * (1.0 / self.targets as f64);
        loss.is_finite() && self.grad_norm().is_finite()
    }

    fn to_bytes(self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..8].copy_from_slice(&self.loss_sum.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.targets.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.squares.to_le_bytes());
        bytes[24..56].copy_from_slice(self.digest.as_bytes());
        bytes[56] = self.wish as u8;
        bytes[57] = self.unsettled.into();
        bytes[58] = self.unsaved.into();
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
            digest: Digest::from_bytes(*bytes[24..].first_chunk()?),
            wish: *Wish::ALL.get(usize::from(bytes[56]))?,
            unsettled: bytes[57] != 0,
            unsaved: bytes[58] != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use supra_agent::collective::InProcess;

    use super::*;

    #[test]
    fn the_greatest_wish_of_any_rank_is_that_of_all() {
        let wishes = [Wish::Regroup, Wish::Stop, Wish::GoOn];
        let sums: Vec<Tally> = std::thread::scope(|scope| {
            let ranks: Vec<_> = InProcess::group(3)
                .into_iter()
                .zip(wishes)
                .map(|(mut rank, wish)| {
                    let mine = Tally {
                        digest: Digest::of_sample(u64::from(rank.rank()), &[]),
                        wish,
                        ..Tally::default()
                    };
                    scope.spawn(move || mine.gather(&mut rank).unwrap())
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        let digest = (0..3).map(|rank| Digest::of_sample(rank, &[])).sum();
        for sum in sums {
            assert_eq!((sum.wish, sum.digest), (Wish::Stop, digest));
        }
    }

    #[test]
    fn a_tally_survives_the_wire() {
        let tally = Tally {
            loss_sum: -1.5e300,
            targets: u64::MAX,
            squares: f64::INFINITY,
            digest: Digest::of_sample(7, &[1, 2]),
            wish: Wish::Stop,
            unsettled: true,
            unsaved: false,
        };
        let bytes = tally.to_bytes();
        assert_eq!(Tally::from_bytes(&bytes), Some(tally));
        let mut unknown = bytes;
        unknown[BYTES - 3] = Wish::ALL.len() as u8;
        assert_eq!(Tally::from_bytes(&unknown), None);
        assert_eq!(Tally::from_bytes(&[0; 3]), None);
    }
}
