//! What all simulated runs train: a small recipe, its plan, and the state that training leads to.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use rand::RngExt;
use supra_coordinator::machine::{Identity, Submission, Workers};
use supra_proto::v1;
use supra_recipes::plan::{Digest, Plan};
use supra_recipes::schema::{CheckpointInterval, Recipe};

/// What a run may say instead of when checkpoints are due: the coordinator asks for each.
const AUTO: (&str, &str) = ("every_tokens: 440", "every_tokens: auto");

/// 10 tokens per sample, 11 samples per step, 268 samples: 24 steps and a smaller one. A checkpoint every 4 steps, the
/// held-out loss every 3.
pub(super) const RECIPE: &str = "\
name: simulated
base: { path: /base }
data: { train: /data, heldout: /heldout }
budget: { tokens: 2685 }
batch: { tokens: 110, micro_batch: 1, sequence_length: 10 }
optimizer: { warmup: 2 steps }
checkpoint: { every_tokens: 440, keep: 2 }
workers: { min: 2, max: 8 }
replica_check: { every_steps: 3 }
eval: { every_tokens: 330, windows: 8, target_loss: 1.5 }
coordinator: { away: 8 s }
";

/// The same where ranks divide the state.
pub(super) const DIVIDED: &str = "\
optimizer: { warmup: 2 steps, sharding: zero1 }
recovery: { snapshot_every: 2 }
";

const WINDOWS: u64 = 500;
const MANIFEST: [u8; 32] = [2; 32];

/// The evaluated recipe.
pub(super) struct Ground {
    pub plan: Plan,
    /// Digest of each sample.
    digests: Vec<Digest>,
}

/// The plan that all simulated runs share.
pub(super) fn ground() -> &'static Ground {
    static GROUND: OnceLock<Ground> = OnceLock::new();
    GROUND.get_or_init(|| {
        let recipe = Recipe::parse(RECIPE, "simulated").expect("invariant: the recipe is right");
        let plan = Plan::new(&recipe, WINDOWS, MANIFEST)
            .expect("invariant: the windows suffice for the budget");
        let sample = |sample: u64| Digest::of_sample(sample, &[plan.window(sample) as u32]);
        let digests = (0..plan.samples).map(sample).collect();
        Ground { plan, digests }
    })
}

impl Ground {
    /// Whether a checkpoint is due after a step that nobody has to ask for.
    pub fn due(&self, recipe: &Recipe, step: u64) -> bool {
        match recipe.checkpoint.every_tokens {
            CheckpointInterval::Tokens(_) => self.plan.checkpoint_due(step),
            CheckpointInterval::Auto => step == self.plan.steps,
        }
    }

    /// Sum of the digests of a range of samples.
    pub fn digest(&self, samples: std::ops::Range<u64>) -> Digest {
        let places = samples.start as usize..samples.end as usize;
        self.digests
            .get(places)
            .map_or(Digest::ZERO, |digests| digests.iter().copied().sum())
    }

    /// What an honest rank reports when it is behind `state`.
    pub fn report(&self, state: &Model, rank: u32, world: u32, skipped: bool) -> v1::StepReport {
        let (plan, step) = (&self.plan, state.step);
        let all = plan.step_samples(step);
        let mine = plan.rank_samples(step, rank, world);
        v1::StepReport {
            step,
            first_sample: all.start,
            samples: all.end - all.start,
            fed_samples: mine.end - mine.start,
            fed_digest: self.digest(mine).as_bytes().to_vec(),
            loss_sum: loss_sum(all.end - all.start),
            targets: (all.end - all.start) * plan.sequence_length,
            grad_norm: 1.0,
            learning_rate: plan.learning_rate(step),
            skipped,
            replica_hash: if plan.replica_check_due(step) {
                state.hash.to_vec()
            } else {
                Vec::new()
            },
            seconds: 0.3,
            data_seconds: 0.01,
            exposed_comm_ms: 5.0,
            step_digest: self.digest(all).as_bytes().to_vec(),
            bucket_hashes: Vec::new(),
        }
    }
}

/// What all ranks say of the held-out loss behind a step.
pub(super) fn evaluated(step: u64) -> v1::Evaluated {
    v1::Evaluated {
        step,
        windows: 8,
        loss_sum: 200.0 - step as f64,
        targets: 80,
        seconds: 0.05,
    }
}

/// Sum of the loss over so many samples, where nothing is wrong.
pub(super) fn loss_sum(samples: u64) -> f64 {
    3.5 * samples as f64
}

/// Parameters and moments of a rank, as far as they matter here: which generation trained which step, in a hash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Model {
    /// Step that it is behind; 0 = the base.
    pub step: u64,
    /// Names its whole lineage.
    pub hash: [u8; 32],
}

impl Model {
    /// The state after `generation` trained one more step.
    pub fn trained(self, generation: u64) -> Model {
        let step = self.step + 1;
        let mut lineage = [0; 48];
        lineage[..32].copy_from_slice(&self.hash);
        lineage[32..40].copy_from_slice(&step.to_le_bytes());
        lineage[40..].copy_from_slice(&generation.to_le_bytes());
        Model {
            step,
            hash: *blake3::hash(&lineage).as_bytes(),
        }
    }

    /// What a rank says that has loaded it.
    pub fn formed(&self) -> v1::Formed {
        v1::Formed {
            step: self.step,
            replica_hash: self.hash.to_vec(),
            windows: WINDOWS,
            manifest_hash: MANIFEST.to_vec(),
        }
    }
}

/// What workers have to match.
pub(super) fn identity() -> Identity {
    Identity {
        build: "simulated".into(),
        plan_version: supra_recipes::plan::VERSION,
        plan_probe: vec![5; 32],
    }
}

/// A run for between `workers.0` and `workers.1` workers, which divide the state, or each of which has all of it. Some leave
/// checkpoints to the coordinator, some break their workers.
pub(super) fn submission(
    number: usize,
    workers: (u32, u32),
    divided: bool,
    random: &mut impl RngExt,
) -> Submission {
    let plan = &ground().plan;
    let mut recipe = match divided {
        true => RECIPE.replace("optimizer: { warmup: 2 steps }\n", DIVIDED),
        false => RECIPE.to_owned(),
    };
    if random.random_bool(0.5) {
        recipe = recipe.replace(AUTO.0, AUTO.1);
    }
    if random.random_bool(0.4) {
        let (faults, seed) = (random.random_range(1..5), random.random_range(0..1000));
        recipe.push_str(&format!(
            "chaos: {{ faults: {faults}, every: 1 s, seed: {seed} }}\n"
        ));
    }
    let id = format!("run-{number}");
    Submission {
        checkpoint_root: PathBuf::from("/checkpoints").join(&id),
        id,
        name: "simulated".into(),
        recipe,
        keep: 2,
        keep_every: 0,
        strict: false,
        budget_tokens: plan.samples * plan.sequence_length,
        workers: Workers {
            min: workers.0,
            max: workers.1,
            grace: Duration::from_secs(1),
        },
    }
}
