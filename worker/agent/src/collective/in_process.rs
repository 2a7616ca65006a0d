//! Ranks that are threads of one process: for tests.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytemuck::Pod;
use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::{Collective, CollectiveError, chunk};

/// One rank of a group of threads. Sums in the same order as the ring: same bits. When one rank is
/// dropped, the others get `Peer`.
#[derive(Debug)]
pub struct InProcess {
    rank: u32,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    world: u32,
    round: Mutex<Round>,
    changed: Condvar,
}

/// What all ranks brought, in rank order.
type Brought = Arc<Vec<Vec<u8>>>;

/// One exchange: everybody brings bytes, everybody takes all of them.
#[derive(Debug, Default)]
struct Round {
    brought: Vec<Option<Vec<u8>>>,
    /// Set when all have brought theirs; unset when all have taken it.
    complete: Option<Brought>,
    taken: u32,
    /// A rank that was dropped.
    gone: Option<u32>,
}

impl InProcess {
    /// All ranks of a world, in order.
    pub fn group(world: u32) -> Vec<InProcess> {
        let round = Round {
            brought: vec![None; world as usize],
            ..Round::default()
        };
        let group = Arc::new(Group {
            world,
            round: Mutex::new(round),
            changed: Condvar::new(),
        });
        (0..world)
            .map(|rank| InProcess {
                rank,
                group: Arc::clone(&group),
            })
            .collect()
    }

    fn exchange(&self, mine: &[u8]) -> Result<Brought, CollectiveError> {
        let group = &self.group;
        // The round before may still be taken by others.
        let mut round = group
            .wait(group.lock(), |round| round.complete.is_none().then_some(()))?
            .0;
        round.brought[self.rank as usize] = Some(mine.to_vec());
        if round.brought.iter().all(Option::is_some) {
            let all = round.brought.iter_mut().filter_map(Option::take).collect();
            round.complete = Some(Arc::new(all));
            group.changed.notify_all();
        }
        let (mut round, all) = group.wait(round, |round| round.complete.clone())?;
        round.taken += 1;
        if round.taken == group.world {
            round.taken = 0;
            round.complete = None;
            group.changed.notify_all();
        }
        Ok(all)
    }

    /// The sum over all ranks, every part in the order of the ring.
    fn sums<T: Pod + Into<f32>>(&self, mine: &[T]) -> Result<Vec<f32>, CollectiveError> {
        let all = self.exchange(bytemuck::cast_slice(mine))?;
        // Bytes of a Vec<u8> need not be aligned for T.
        let ranks: Vec<Vec<T>> = all
            .iter()
            .map(|bytes| bytemuck::pod_collect_to_vec(bytes))
            .collect();
        let world = self.group.world;
        let mut sums = Vec::with_capacity(mine.len());
        for first in 0..world {
            for i in chunk(mine.len(), world, first) {
                let mut sum: f32 = ranks[first as usize][i].into();
                for rank in (first + 1..world).chain(0..first) {
                    sum += ranks[rank as usize][i].into();
                }
                sums.push(sum);
            }
        }
        Ok(sums)
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.group.lock().gone = Some(self.rank);
        self.group.changed.notify_all();
    }
}

impl Group {
    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` gives something; fails when a rank is gone before that.
    fn wait<'a, T>(
        &'a self,
        mut round: MutexGuard<'a, Round>,
        ready: impl Fn(&Round) -> Option<T>,
    ) -> Result<(MutexGuard<'a, Round>, T), CollectiveError> {
        loop {
            if let Some(value) = ready(&round) {
                return Ok((round, value));
            }
            if let Some(rank) = round.gone {
                return Err(CollectiveError::Peer {
                    rank,
                    address: "this process".to_owned(),
                    cause: "its thread has left".to_owned(),
                });
            }
            round = self
                .changed
                .wait(round)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Collective for InProcess {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world(&self) -> u32 {
        self.group.world
    }

    fn all_reduce_f32(&mut self, buffer: &mut [f32]) -> Result<(), CollectiveError> {
        let sums = self.sums(buffer)?;
        buffer.copy_from_slice(&sums);
        Ok(())
    }

    fn all_reduce_bf16(&mut self, buffer: &mut [bf16]) -> Result<(), CollectiveError> {
        let sums = self.sums(buffer)?;
        buffer.convert_from_f32_slice(&sums);
        Ok(())
    }

    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        Ok(self.exchange(mine)?.to_vec())
    }

    fn broadcast(&mut self, root: u32, buffer: &mut Vec<u8>) -> Result<(), CollectiveError> {
        let mine: &[u8] = if self.rank == root { buffer } else { &[] };
        let all = self.exchange(mine)?;
        buffer.clone_from(&all[root as usize]);
        Ok(())
    }

    fn pass(&mut self, mine: &[u8], theirs: &mut [u8]) -> Result<(), CollectiveError> {
        let all = self.exchange(mine)?;
        let before = (self.rank + self.group.world - 1) % self.group.world;
        theirs.copy_from_slice(&all[before as usize]);
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.exchange(&[]).map(drop)
    }
}
