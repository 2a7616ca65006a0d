//! Whether a result that is not finite is the samples' doing or a device's: all samples of the step once more, by the rank
//! that they belong to and by the next one.
//!
//! A broken device gives something else than another one does from the same samples; samples or weights that overflow do so
//! wherever they are fed. What is computed here is never applied.

use supra_agent::{Collective, CollectiveError, Voided};
use supra_data::{Loader, Reader, batch};

use super::{HostBatch, Tally, TrainError, Trainer};
use crate::optim::Part;

/// What one rank has seen: whether loss and gradient were finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Testimony {
    /// From its own samples, in the step itself: the loss alone, since gradients are added up over the ranks as they come.
    first: bool,
    /// From the same samples once more.
    again: bool,
    /// From those of the rank before.
    neighbours: bool,
}

/// What the ranks have seen together.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// Some samples give nothing finite, whoever feeds them.
    Samples,
    /// These ranks, ascending, got nothing finite where another one did.
    Devices(Vec<u32>),
    /// No rank by itself sees anything that is not finite, if it looks again.
    Nothing,
}

impl Trainer<'_> {
    /// The result of a step over all ranks is not finite: returns when that is because of samples and weights, so that the
    /// update is to be skipped. `mine` is this rank's part of it. All ranks have to call it, and all decide alike.
    ///
    /// # Errors
    /// [`TrainError::Hardware`] when it is not; what goes wrong meanwhile.
    pub(super) fn witness(
        &mut self,
        own: &HostBatch,
        mine: &Tally,
        step: u64,
    ) -> Result<(), TrainError> {
        // A norm that could not be had is not finite either.
        self.kernels.check()?;
        let (link, world) = (&self.job.link, self.job.world);
        if world == 1 {
            let text = format!(
                "loss or gradient of step {step} is not finite, and there is no other rank to feed the same samples: whether a \
                 device is at fault cannot be told"
            );
            link.log("WARN", text);
            return Ok(());
        }
        let (_, neighbours) = self.alone(&self.samples_of_the_rank_before(step)?)?;
        // Last, since its gradient may be needed.
        let (loss_sum, again) = self.alone(own)?;
        let testimony = Testimony {
            first: mine.loss_sum.is_finite(),
            again,
            neighbours,
        };
        let culprits = match judge(&testimony.gather(self.exchange.host())?) {
            Verdict::Samples => return Ok(()),
            Verdict::Devices(ranks) => ranks,
            // The sum over the ranks may be too large where no part of it is.
            Verdict::Nothing if !self.sum_is_finite(mine, loss_sum)? => return Ok(()),
            Verdict::Nothing => Vec::new(),
        };
        Err(TrainError::Hardware { culprits })
    }

    /// The samples that the rank before this one was fed in `step`, read anew.
    fn samples_of_the_rank_before(&self, step: u64) -> Result<HostBatch, TrainError> {
        let recipe = &self.job.recipe;
        let reader = Reader::open(&recipe.data.train, u64::from(recipe.batch.sequence_length))?;
        let mut loader = Loader::new(reader, self.plan.clone());
        let (rank, world) = (self.job.rank, self.job.world);
        let batch = batch(&mut loader, step, (rank + world - 1) % world, world)?;
        Ok(self.layout.lay_out(&batch.samples)?)
    }

    /// Forward and backward without the other ranks: leaves the gradient of these samples alone. Returns the sum of the loss
    /// over targets, and whether it and the gradient are finite.
    fn alone(&mut self, batch: &HostBatch) -> Result<(f64, bool), TrainError> {
        let super::Job { recipe, link, .. } = self.job;
        self.replica.zero_gradient();
        for input in batch.micro_batches() {
            if link.void() {
                return Err(Voided.into());
            }
            self.passes.accumulate(
                self.replica.params(),
                self.replica.gradients(),
                &input,
                recipe.optimizer.z_loss,
                &mut || link.void(),
            )?;
        }
        let loss_sum = self.passes.take_loss().cross_entropy;
        let squares = self
            .kernels
            .squared_norm(&self.replica.gradient_of(Part::WHOLE));
        self.kernels.check()?;
        Ok((loss_sum, loss_sum.is_finite() && squares.is_finite()))
    }

    /// Adds the gradients of all ranks up once more, and decides about the sum as the step did.
    fn sum_is_finite(&mut self, mine: &Tally, loss_sum: f64) -> Result<bool, TrainError> {
        self.exchange.reduced()?;
        let again = Tally {
            loss_sum,
            squares: self.kernels.squared_norm(&self.squared),
            ..*mine
        };
        self.kernels.check()?;
        Ok(again.gather(self.exchange.host())?.is_finite())
    }
}

impl Testimony {
    /// Those of all ranks, in rank order.
    fn gather(self, host: &mut dyn Collective) -> Result<Vec<Testimony>, CollectiveError> {
        let mine = [self.first, self.again, self.neighbours].map(u8::from);
        let all = host.all_gather(&mine)?;
        (0..)
            .zip(&all)
            .map(|(rank, bytes)| match bytes.as_slice() {
                &[first, again, neighbours] => Ok(Testimony {
                    first: first != 0,
                    again: again != 0,
                    neighbours: neighbours != 0,
                }),
                other => Err(CollectiveError::Peer {
                    rank,
                    address: "in this generation".to_owned(),
                    cause: format!("sent {} bytes where three were due", other.len()),
                }),
            })
            .collect()
    }
}

/// What testimonies, in rank order, say together.
fn judge(all: &[Testimony]) -> Verdict {
    let world = all.len();
    let mut culprits = Vec::new();
    let mut overflow = false;
    for (rank, own) in all.iter().enumerate() {
        let next = (rank + 1) % world;
        match (own.first && own.again, all[next].neighbours) {
            (true, true) => {}
            (false, false) => overflow = true,
            (false, true) => culprits.push(rank as u32),
            (true, false) => culprits.push(next as u32),
        }
    }
    culprits.sort_unstable();
    culprits.dedup();
    // What another device disproves is the device's, whatever else is wrong.
    match (culprits.is_empty(), overflow) {
        (false, _) => Verdict::Devices(culprits),
        (true, true) => Verdict::Samples,
        (true, false) => Verdict::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use supra_agent::collective::InProcess;

    use super::*;

    const FINE: Testimony = Testimony {
        first: true,
        again: true,
        neighbours: true,
    };

    /// What each rank of a world sees when these samples overflow, and these devices give nothing finite.
    fn seen(bad_samples: &[bool], broken: &[bool]) -> Vec<Testimony> {
        let world = bad_samples.len();
        let finite = |rank: usize, samples: usize| !bad_samples[samples] && !broken[rank];
        (0..world)
            .map(|rank| Testimony {
                first: finite(rank, rank),
                again: finite(rank, rank),
                neighbours: finite(rank, (rank + world - 1) % world),
            })
            .collect()
    }

    #[test]
    fn a_loss_that_another_rank_does_not_confirm_is_its_ranks_fault() {
        let mut all = [FINE; 3];
        all[1].first = false;
        assert_eq!(judge(&all), Verdict::Devices(vec![1]));
    }

    #[test]
    fn a_rank_that_fails_with_samples_which_were_fine_elsewhere_is_the_culprit() {
        let mut all = [FINE; 3];
        all[0].neighbours = false;
        assert_eq!(judge(&all), Verdict::Devices(vec![0]));
    }

    #[test]
    fn an_error_that_does_not_show_again_is_nobodys() {
        assert_eq!(judge(&[FINE; 2]), Verdict::Nothing);
    }

    #[test]
    fn weights_that_overflow_do_so_everywhere() {
        let all = seen(&[true; 4], &[false; 4]);
        assert_eq!(judge(&all), Verdict::Samples);
    }

    #[test]
    fn every_rank_hears_what_all_have_seen() {
        let heard: Vec<Vec<Testimony>> = std::thread::scope(|scope| {
            let ranks: Vec<_> = InProcess::group(3)
                .into_iter()
                .map(|mut rank| {
                    let mine = Testimony {
                        again: rank.rank() != 1,
                        ..FINE
                    };
                    scope.spawn(move || mine.gather(&mut rank).unwrap())
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        let silent = Testimony {
            again: false,
            ..FINE
        };
        assert_eq!(heard, vec![vec![FINE, silent, FINE]; 3]);
    }

    proptest! {
        #[test]
        fn bad_samples_alone_blame_nobody_and_one_broken_device_alone_is_found(
            bad in prop::collection::vec(any::<bool>(), 2..9),
            broken in 0..8usize,
        ) {
            let world = bad.len();
            let expected = if bad.contains(&true) { Verdict::Samples } else { Verdict::Nothing };
            prop_assert_eq!(judge(&seen(&bad, &vec![false; world])), expected);
            let mut devices = vec![false; world];
            devices[broken % world] = true;
            let fine = vec![false; world];
            prop_assert_eq!(judge(&seen(&fine, &devices)), Verdict::Devices(vec![(broken % world) as u32]));
        }
    }
}
