//! What a run measures of itself between two steps: the loss on held-out text, all ranks together, each on its part of the
//! windows; and before a checkpoint the linearisation gates of a SUPRA model, which rank 0 measures while the others wait.
//!
//! The windows are those that `supra-worker eval --windows` takes, the same every time, so two results of a run differ by its
//! parameters alone. Nothing that training reads is written to: parameters and optimizer state are only read, the order of the
//! training data is another reader's, and nothing is drawn at random. So a run that is evaluated has the bits of one that is not.

use std::time::Instant;

use supra_agent::{Collective, CollectiveError, Evaluated, Gates, Job, Phase, Voided};
use supra_data::{DataError, Reader, Sample};
use tch::Tensor;

use super::{TrainError, Trainer, start::check_data};
use crate::{
    failure::chain,
    inference::gates::{self, Start, Unmeasured},
    model::ModelConfig,
};

/// The held-out text of a run.
pub struct Heldout {
    /// Windows that all ranks read together.
    windows: u64,
    /// Those of this rank: contiguous, the remainder goes to the first ranks.
    mine: Vec<Sample>,
    /// The newest result.
    pub newest: Option<Evaluated>,
    /// Of a SUPRA model, on rank 0.
    gates: Option<Gating>,
}

/// What linearisation gates are measured with.
struct Gating {
    /// The sample, [rows, tokens], in host memory.
    ids_bt: Tensor,
    /// None before it is needed, and when the base cannot be read.
    start: Option<Start>,
    /// Whether that was tried.
    tried: bool,
    newest: Option<Gates>,
}

impl Heldout {
    /// Opens the held-out text of a recipe with `eval`, and reads this rank's windows of it. None without `eval`, and in a
    /// replay, which measures nothing.
    ///
    /// # Errors
    ///
    /// The text cannot be read, or another tokenizer made it than the model's.
    pub fn open(job: &Job, config: &ModelConfig) -> Result<Option<Heldout>, TrainError> {
        let recipe = &job.recipe;
        let (Some(eval), Some(path), None) = (&recipe.eval, &recipe.data.heldout, job.until) else {
            return Ok(None);
        };
        let mut reader = Reader::open(path, u64::from(recipe.batch.sequence_length))?;
        let (name, directory) = (recipe.base.to_string(), recipe.base.directory());
        check_data(reader.manifest(), config, &name, directory).map_err(TrainError::Mismatch)?;
        let windows = eval.windows.min(reader.windows());
        let first = |rank: u32| share(windows, rank, job.world);
        let mut sample = |id| {
            let (tokens, starts) = reader.window(id)?;
            Ok(Sample { id, tokens, starts })
        };
        let mine = (first(job.rank)..first(job.rank + 1)).map(&mut sample);
        let mine = mine.collect::<Result<_, DataError>>()?;
        let gated = job.rank == 0 && config.supra().is_some();
        let gates = gated.then(|| {
            let rows = (0..windows.min(gates::ROWS)).map(&mut sample);
            rows.collect::<Result<Vec<_>, DataError>>()
                .map(|rows| Gating::on(&rows))
        });
        Ok(Some(Heldout {
            windows,
            mine,
            newest: None,
            gates: gates.transpose()?,
        }))
    }

    /// The newest gates.
    pub fn gates(&self) -> Option<&Gates> {
        self.gates.as_ref()?.newest.as_ref()
    }
}

impl Gating {
    fn on(rows: &[Sample]) -> Gating {
        let length = rows.first().map_or(0, |row| row.tokens.len() as i64 - 1);
        let length = length.min(gates::TOKENS);
        let ids = rows.iter().flat_map(|row| &row.tokens[..length as usize]);
        let ids: Vec<i64> = ids.map(|&token| i64::from(token)).collect();
        Gating {
            ids_bt: Tensor::from_slice(&ids).view([-1, length]),
            start: None,
            tried: false,
            newest: None,
        }
    }
}

/// First of the windows that rank `rank` of `world` reads.
fn share(windows: u64, rank: u32, world: u32) -> u64 {
    let (rank, world) = (u64::from(rank), u64::from(world.max(1)));
    rank * (windows / world) + rank.min(windows % world)
}

/// Loss over some windows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sum {
    /// Of the cross-entropy over targets, nats.
    loss: f64,
    targets: u64,
}

impl Sum {
    /// That of all ranks, added in rank order: equal on all of them.
    fn gather(self, host: &mut dyn Collective) -> Result<Sum, CollectiveError> {
        let mut mine = [0; 16];
        mine[..8].copy_from_slice(&self.loss.to_le_bytes());
        mine[8..].copy_from_slice(&self.targets.to_le_bytes());
        let mut all = Sum::default();
        for (rank, bytes) in (0..).zip(host.all_gather(&mine)?) {
            let Some((loss, &targets)) = bytes
                .split_first_chunk()
                .and_then(|(loss, rest)| Some((loss, rest.first_chunk()?)))
            else {
                return Err(CollectiveError::Peer {
                    rank,
                    address: "in this generation".to_owned(),
                    cause: format!("sent {} bytes that are no held-out loss", bytes.len()),
                });
            };
            all.loss += f64::from_le_bytes(*loss);
            all.targets += u64::from_le_bytes(targets);
        }
        Ok(all)
    }
}

impl Trainer<'_> {
    /// Measures the held-out loss of the state behind the step just done, or of the one that this generation starts from,
    /// where that is due; all ranks together. Whoever starts from such a state measures it again: what came of the generation
    /// before may be lost, and a repeat changes nothing.
    ///
    /// # Errors
    ///
    /// As training: the generation is void, a rank is gone.
    pub(super) fn evaluate(&mut self) -> Result<(), TrainError> {
        let Some(heldout) = self.heldout.as_mut() else {
            return Ok(());
        };
        if !self.plan.evaluation_due(self.step) {
            return Ok(());
        }
        let (clock, link) = (Instant::now(), &self.job.link);
        link.phase(Phase::Evaluating, self.step);
        // Where ranks keep parts, the update's may still be on their way.
        self.exchange.all_gathered()?;
        let mut mine = Sum::default();
        for samples in heldout.mine.chunks(self.layout.rows) {
            let batch = self.layout.lay_out(samples)?;
            mine.targets += batch.targets;
            for input in batch.micro_batches() {
                if link.void() {
                    return Err(Voided.into());
                }
                let params = self.replica.params();
                self.passes.evaluate(params, &input, &mut || link.void())?;
            }
        }
        mine.loss = self.passes.take_loss().cross_entropy;
        let all = mine.gather(self.exchange.host())?;
        let evaluated = Evaluated {
            step: self.step,
            windows: heldout.windows,
            loss_sum: all.loss,
            targets: all.targets,
            seconds: clock.elapsed().as_secs_f64(),
        };
        heldout.newest = Some(evaluated);
        link.evaluated(evaluated);
        // Nobody trained meanwhile: this is no part of a step.
        self.exchange.forget_waits();
        Ok(())
    }

    /// Measures the linearisation gates of the state that a checkpoint is about to be written of; all ranks together.
    ///
    /// # Errors
    ///
    /// As training. That the base cannot be read any more is worth a line: then the gates are those that do without.
    pub(super) fn gate(&mut self) -> Result<(), TrainError> {
        let Some(heldout) = self.heldout.as_mut() else {
            return Ok(());
        };
        if self.config.supra().is_none() {
            return Ok(());
        }
        let (clock, job) = (Instant::now(), self.job);
        job.link.phase(Phase::Evaluating, self.step);
        self.exchange.all_gathered()?;
        if let Some(gating) = &mut heldout.gates {
            let stop = || job.link.void();
            let params = self.replica.params();
            let ids_bt = gating.ids_bt.to_device(params.device());
            if !std::mem::replace(&mut gating.tried, true) {
                let read = Start::read(&job.recipe, &self.config, &ids_bt, params.kind(), &stop);
                match read {
                    Ok(start) => gating.start = Some(start),
                    Err(error) => job.link.log(
                        "WARN",
                        format!("linearisation gates do without the base: {}", chain(&error)),
                    ),
                }
            }
            let start = gating.start.as_ref();
            match gates::measure(&self.config, params, &ids_bt, start, &stop) {
                Err(Unmeasured::Stopped) => return Err(Voided.into()),
                Err(error) => {
                    let text = format!("linearisation gates are not measured: {error}");
                    job.link.log("WARN", text);
                }
                Ok(measured) => {
                    let gates = Gates {
                        step: self.step,
                        seconds: clock.elapsed().as_secs_f64(),
                        ..measured
                    };
                    gating.newest = Some(gates.clone());
                    job.link.gates(gates);
                }
            }
        }
        // Whoever waits here for rank 0 says so.
        self.exchange.host().barrier()?;
        self.exchange.forget_waits();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use supra_agent::collective::InProcess;

    use super::*;

    #[test]
    fn every_window_is_read_by_one_rank() {
        for (windows, world) in [(0, 1), (1, 3), (7, 3), (64, 8), (5, 5)] {
            let firsts: Vec<u64> = (0..=world)
                .map(|rank| share(windows, rank, world))
                .collect();
            assert_eq!((firsts[0], firsts[world as usize]), (0, windows));
            let sizes = firsts.windows(2).map(|pair| pair[1] - pair[0]);
            let sizes: Vec<u64> = sizes.collect();
            assert!(sizes.is_sorted_by(|left, right| left >= right), "{sizes:?}");
            assert!(sizes[0] - sizes[sizes.len() - 1] <= 1, "{sizes:?}");
        }
    }

    #[test]
    fn all_ranks_get_the_same_sum() {
        let mine = [1.5, f64::NAN, 2.0].map(|loss| Sum { loss, targets: 3 });
        let sums: Vec<Sum> = std::thread::scope(|scope| {
            let ranks: Vec<_> = InProcess::group(3)
                .into_iter()
                .zip(mine)
                .map(|(mut rank, mine)| scope.spawn(move || mine.gather(&mut rank).unwrap()))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        for sum in sums {
            assert!(sum.loss.is_nan() && sum.targets == 9, "{sum:?}");
        }
    }
}
