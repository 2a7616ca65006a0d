//! When and how the training loop writes checkpoints: every rank its own part, beside the training that goes on.

use supra_agent::{CollectiveError, Job, LayerGates, Phase, Unfinished, Voided};
use supra_checkpoint::{
    Manifest,
    manifest::{FORMAT, HeldoutLoss, Measured, MeasuredGates, Seeds},
    store,
};
use supra_recipes::plan::{VERSION, memory::gib};
use tch::Kind;

use super::{TrainError, Trainer, host_memory};
use crate::{
    checkpoint::{
        saver::{Order, Saver, Written, left_bytes},
        shard, write,
    },
    optim::{HostRoom, Part, Replica},
};

/// A checkpoint whose files are being written, and what its manifest will say beside them: on rank 0.
pub struct Begun {
    relative: String,
    manifest: Manifest,
}

/// What writes this rank's part of checkpoints of a state like that of `replica`: beside training where the host has memory for
/// a copy. A replay writes none.
///
/// # Errors
///
/// There is no room for a thread.
pub fn saver(job: &Job, replica: &Replica) -> Result<Saver, TrainError> {
    let part = Part::of_rank(job.rank, job.world);
    let copy = HostRoom::of(replica, part);
    let writes = job.until.is_none();
    // What the generation before leaves is taken over.
    let more = copy.bytes().saturating_sub(left_bytes());
    let beside = writes && host_memory::has(more);
    if writes && !beside {
        let text = format!(
            "a copy of this rank's part of the state takes {}, more than the host has: training stands still while checkpoints \
             are written",
            gib(copy.bytes())
        );
        job.link.log("WARN", text);
    }
    Saver::start(beside.then_some(copy), part, &job.link).map_err(TrainError::Thread)
}

impl Trainer<'_> {
    /// Writes the checkpoint that was due where this generation took a state over, if the one before did not get to it.
    pub(super) fn catch_up(&mut self) -> Result<(), TrainError> {
        let Job {
            donation, restore, ..
        } = self.job;
        let there = restore.as_ref().map_or(0, |restore| restore.step);
        if donation.is_some() && there < self.step && self.plan.checkpoint_due(self.step) {
            self.checkpoint()?;
        }
        Ok(())
    }

    /// Begins a checkpoint of the step just done; all ranks together. One at a time: one that is under way is waited for.
    pub(super) fn checkpoint(&mut self) -> Result<(), TrainError> {
        let Job { link, rank, .. } = self.job;
        self.gate()?;
        link.phase(Phase::Checkpointing, self.step);
        if let Some(before) = self.saver.under_way() {
            if *rank == 0 {
                let text = format!(
                    "the checkpoint of step {} waits for that of step {before}: make checkpoint.every_tokens larger, or the \
                     store faster",
                    self.step
                );
                link.log("WARN", text);
            }
            self.collect_checkpoint()?;
        }
        let replica_hash = self.prints()?.whole;
        let relative = store::directory_name(self.step, self.job.generation);
        if *rank == 0 {
            self.sweep();
            let bytes = shard::bytes(self.replica.layout(), Part::WHOLE, self.moments());
            write::begin(&self.job.checkpoint_root, &relative, bytes)?;
            self.begun = Some(Begun {
                relative: relative.clone(),
                manifest: self.manifest(replica_hash),
            });
            link.checkpoint_begun(self.step);
        }
        // Nobody writes before what was there is gone.
        self.exchange.host().barrier()?;
        let order = self.order(relative);
        self.saver.begin(order, &self.replica)?;
        // Nobody trained meanwhile: this is no part of a step.
        self.exchange.forget_waits();
        Ok(())
    }

    /// Puts the checkpoint that is under way together, as soon as all ranks have written their parts; all ranks together.
    pub(super) fn collect_checkpoint(&mut self) -> Result<(), TrainError> {
        let Some(mine) = self.saver.take()? else {
            return Err(Voided.into());
        };
        let bytes = serde_json::to_vec(&mine).expect("invariant: what was written is JSON");
        let all = self.exchange.host().all_gather(&bytes)?;
        let Some(begun) = self.begun.take() else {
            return Ok(());
        };
        let mut parts = Vec::with_capacity(all.len());
        for (rank, bytes) in (0..).zip(&all) {
            let written: Written =
                serde_json::from_slice(bytes).map_err(|error| CollectiveError::Peer {
                    rank,
                    address: "in this generation".to_owned(),
                    cause: format!("sent no list of what it has written: {error}"),
                })?;
            parts.push(written);
        }
        self.tell_of(begun, parts);
        Ok(())
    }

    /// Waits until the checkpoint that is under way, if one is, is published; all ranks together.
    pub(super) fn finish_checkpoint(&mut self) -> Result<(), TrainError> {
        if let Some(step) = self.saver.under_way() {
            self.job.link.phase(Phase::Checkpointing, self.step);
            self.collect_checkpoint()?;
            if self.job.rank == 0 {
                self.job.link.await_published(step)?;
            }
            self.exchange.host().barrier()?;
            self.exchange.forget_waits();
        }
        Ok(())
    }

    fn tell_of(&self, begun: Begun, parts: Vec<Written>) {
        let seconds = parts.iter().map(|part| part.seconds);
        let seconds = seconds.fold(0.0, f64::max);
        let companions = parts[0].companions.clone();
        let files = parts.into_iter().map(|part| part.files).collect();
        let Begun {
            relative,
            mut manifest,
        } = begun;
        let (layout, moments) = (self.replica.layout(), self.moments());
        write::fill(&mut manifest, layout, moments, files, companions);
        self.job.link.checkpoint_filled(Unfinished {
            step: manifest.step,
            path: relative,
            bytes: manifest.files.values().map(|file| file.bytes).sum(),
            manifest: Box::new(manifest),
            seconds,
        });
    }

    /// What this rank is to write of the step just done.
    fn order(&self, dir: String) -> Order {
        let Job {
            rank,
            world,
            recipe,
            ..
        } = self.job;
        let part = Part::of_rank(*rank, *world);
        Order {
            step: self.step,
            store: self.job.checkpoint_root.clone(),
            dir,
            files: shard::files(self.replica.layout(), part, self.moments()),
            companions: (*rank == 0).then(|| write::Companions {
                config: self.config.clone(),
                base: recipe.base.directory().map(ToOwned::to_owned),
            }),
        }
    }

    fn moments(&self) -> Kind {
        self.replica.exp_avg.kind()
    }

    /// All that the manifest says beside tensors and files.
    fn manifest(&self, replica_hash: [u8; 32]) -> Manifest {
        let (job, recipe) = (self.job, &self.job.recipe);
        Manifest {
            format: FORMAT,
            plan_version: VERSION,
            run: job.run.clone(),
            generation: job.generation,
            world: job.world,
            step: self.step,
            tokens: self.plan.tokens_after(self.step),
            next_sample: self.plan.step_samples(self.step).end,
            updates: self.replica.updates,
            seeds: Seeds {
                init: recipe.seed,
                data: recipe.data.seed,
            },
            replica_hash: blake3::Hash::from_bytes(replica_hash).to_hex().to_string(),
            // The agent puts it in, with the ledger: nobody knows it yet.
            ledger_head: String::new(),
            recipe: job.recipe_text.clone(),
            dataset: self.dataset.hash.clone(),
            tokenizer: self.dataset.tokenizer.clone(),
            environment: self.environment.clone(),
            measured: self.measured(),
            tensors: Default::default(),
            files: Default::default(),
        }
    }

    /// What was measured of this state.
    fn measured(&self) -> Option<Measured> {
        let heldout = self.heldout.as_ref()?;
        let evaluated = heldout.newest.filter(|it| it.step == self.step);
        let finite = |number: f64| number.is_finite().then_some(number);
        let gates = heldout.gates().filter(|gates| gates.step == self.step);
        let gates = gates.map(|gates| {
            let worst = |of: fn(&LayerGates) -> Option<f64>| {
                let values = gates.layers.iter().filter_map(of);
                values.max_by(f64::total_cmp).and_then(finite)
            };
            MeasuredGates {
                form_error: finite(gates.form_error),
                drift: worst(|layer| layer.drift),
                dead_features: worst(|layer| Some(layer.dead_queries.max(layer.dead_keys))),
                norm_growth: worst(|layer| Some(layer.norm_input / layer.norm_input_at_start?)),
            }
        });
        (evaluated.is_some() || gates.is_some()).then(|| Measured {
            heldout: evaluated.map(|it| HeldoutLoss {
                loss: finite(it.loss_sum / it.targets as f64),
                windows: it.windows,
                targets: it.targets,
            }),
            gates,
        })
    }

    /// Removes what crashed writers left. That it could not is worth a line, not the run.
    fn sweep(&self) {
        let job = self.job;
        if job.donation.is_some() && job.restore.is_none() {
            // One of them may be journalled, and this generation was not told.
            return;
        }
        let restore = job.restore.as_ref();
        let spare = restore.filter(|restore| restore.store == job.checkpoint_root);
        let spare = spare.map(|restore| restore.path.as_str());
        if let Err(error) = store::sweep(&job.checkpoint_root, job.generation, spare) {
            let root = job.checkpoint_root.url();
            job.link.log(
                "WARN",
                format!("cannot remove unfinished checkpoints in {root}: {error}"),
            );
        }
    }
}
