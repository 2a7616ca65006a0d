//! Where training starts: dataset, plan, what the device has room for, and the state of the base or of a checkpoint.

use std::{fs, path::Path, rc::Rc};

use supra_agent::Job;
use supra_checkpoint::{Environment, Manifest, StoredError, verify};
use supra_data::{Manifest as DataManifest, Reader};
use supra_recipes::{
    Plan,
    plan::{Policy, VERSION},
    schema::{self, Attention, Base, Precision, Recipe, Sharding},
};
use tch::{Device, Kind, Tensor};

use super::{Kept, TrainError, evaluation::Heldout, host_memory, kept, policy};
use crate::{
    checkpoint,
    collective::DeviceCollective,
    device::Place,
    kernels::{self, Choice, Kernels},
    model::{self, AttentionKind, ModelConfig, NewWeights, ParamSpec, SupraConfig},
    optim::{Kinds, Layout, Part, Replica, Section},
};

/// Everything that a generation begins with.
pub struct Start {
    /// The order of the data and the schedule.
    pub plan: Plan,
    /// The training data.
    pub reader: Reader,
    /// The model that is trained.
    pub config: ModelConfig,
    /// What its forward pass keeps.
    pub policy: Policy,
    /// What computes it.
    pub kernels: Rc<dyn Kernels>,
    /// Its state.
    pub replica: Replica,
    /// Step that this state is behind.
    pub step: u64,
    /// What people should know about this start.
    pub notes: Vec<String>,
    /// What it is evaluated on; none where nothing is measured.
    pub heldout: Option<Heldout>,
}

impl Start {
    /// Loads data, plan and state of a job. `kept` is what this rank has in memory: it is the state, or goes before there is
    /// another one. After an error it is still there unless another one was begun.
    pub fn load(
        job: &Job,
        place: &Place,
        environment: &Environment,
        kept: &mut Option<Kept>,
        collective: &mut dyn DeviceCollective,
    ) -> Result<Start, TrainError> {
        let recipe = &job.recipe;
        let reader = Reader::open(&recipe.data.train, u64::from(recipe.batch.sequence_length))?;
        let plan = Plan::new(recipe, reader.windows(), reader.manifest().hash())?;
        let config = trained_config(recipe)?;
        check_data(
            reader.manifest(),
            &config,
            &recipe.base.to_string(),
            recipe.base.directory(),
        )
        .map_err(TrainError::Mismatch)?;
        let heldout = Heldout::open(job, &config)?;
        // Before anything is on the device.
        let (policy, why) = policy::choose(recipe, &config.shape(), job.world, place.free_memory)?;
        job.link.log("INFO", why);
        if kept.is_none() {
            // Later ones take the place of those that are there.
            host_memory::check(recipe, &config.shape(), job.world)?;
        }
        let room = Room::of(job, place, &config);
        let Choice { kernels, note } = kernels::on(place.device, room.kinds.parameters, &config)?;
        let mut notes = Vec::new();
        let (replica, step) = match (&job.donation, &job.restore) {
            (Some(donation), _) => {
                let before = |world| {
                    let decay_all = recipe.optimizer.decay_norms_and_biases;
                    Layout::new(&config.params(), decay_all, world)
                };
                let replica = kept::start(job, donation, kept, room, before, collective)?;
                (replica, donation.state.step)
            }
            (None, None) => {
                *kept = None;
                let mut replica = room.empty();
                load_base(recipe, &config, &mut replica)?;
                (replica, 0)
            }
            (None, Some(restore)) => {
                let store = &restore.store;
                let hash = &restore.manifest_hash;
                let manifest = verify::manifest(store, &restore.path, Some(hash))?;
                let path = store.at(&restore.path);
                check_checkpoint(&manifest, &path, &plan, &reader, restore.step)?;
                notes.extend(resumed(&differences(&manifest, environment, job.world)));
                *kept = None;
                let mut replica = room.empty();
                checkpoint::read::replica(
                    store,
                    &restore.path,
                    &manifest,
                    &mut replica,
                    collective,
                )?;
                (replica, restore.step)
            }
        };
        notes.extend(note);
        Ok(Start {
            plan,
            reader,
            config,
            policy,
            kernels,
            replica,
            step,
            notes,
            heldout,
        })
    }
}

/// The configuration that a recipe trains: the base's, with the recipe's attention.
fn trained_config(recipe: &Recipe) -> Result<ModelConfig, TrainError> {
    let base = match &recipe.base {
        Base::Pretrained(path) | Base::Untrained(path) => ModelConfig::load(path)?,
        Base::Random(shape) => ModelConfig::named(*shape),
    };
    base.check_sequence_length(i64::from(recipe.batch.sequence_length))?;
    let attention = match recipe.attention {
        Attention::Softmax => AttentionKind::Softmax,
        Attention::Supra => {
            let schema::Model {
                decay,
                qk_norm,
                rope_frequencies,
                chunk,
                ..
            } = recipe.model;
            AttentionKind::Supra(SupraConfig {
                decay,
                qk_norm,
                rope_frequencies,
                chunk: i64::from(chunk),
            })
        }
    };
    match (&base.attention, &attention) {
        (AttentionKind::Supra(there), AttentionKind::Supra(asked))
            if there
                != &(SupraConfig {
                    chunk: there.chunk,
                    ..*asked
                }) =>
        {
            Err(TrainError::Mismatch(format!(
                "{} is a SUPRA model with {there:?}, but the recipe's `model` says {asked:?}. Change the recipe",
                recipe.base
            )))
        }
        (AttentionKind::Supra(_), AttentionKind::Softmax) => Err(TrainError::Mismatch(format!(
            "{} is a SUPRA model already, but the recipe says attention: softmax. Write attention: supra, or take a \
             softmax base",
            recipe.base
        ))),
        _ => Ok(base.with_attention(attention)),
    }
}

/// What a rank's replica looks like.
pub struct Room {
    /// Where each parameter lies.
    pub layout: Layout,
    /// What the rank keeps of the optimizer's state.
    pub part: Part,
    kinds: Kinds,
    device: Device,
}

impl Room {
    /// That of the rank that has this job.
    fn of(job: &Job, place: &Place, config: &ModelConfig) -> Room {
        let optimizer = &job.recipe.optimizer;
        let kind = |precision| match precision {
            Precision::Bf16 => Kind::BFloat16,
            Precision::Fp32 => Kind::Float,
        };
        Room {
            layout: Layout::new(
                &config.params(),
                optimizer.decay_norms_and_biases,
                job.world,
            ),
            part: match optimizer.sharding {
                Sharding::None => Part::WHOLE,
                Sharding::Zero1 => Part::of_rank(job.rank, job.world),
            },
            kinds: Kinds {
                parameters: kind(job.recipe.model.precision),
                moments: kind(optimizer.moments),
            },
            device: place.device,
        }
    }

    /// A replica of zeros.
    pub fn empty(self) -> Replica {
        Replica::new(self.layout, self.part, self.kinds, self.device)
    }
}

/// First values of all weights: from the base, with new ones drawn from the recipe's seed, or all from the seed.
fn load_base(
    recipe: &Recipe,
    config: &ModelConfig,
    replica: &mut Replica,
) -> Result<(), TrainError> {
    let seed = recipe.seed;
    let mut take = |spec: &ParamSpec, values: Tensor| {
        let slot = replica.layout().slot(&spec.name);
        let offset = slot
            .expect("invariant: the layout is that of the configuration")
            .offset;
        replica.load(Section::Masters, offset, &values);
    };
    match &recipe.base {
        Base::Untrained(_) | Base::Random(_) => {
            for spec in config.params() {
                take(&spec, model::init_one(config, seed, &spec));
            }
        }
        Base::Pretrained(path) => {
            model::load_each(path, config, NewWeights::Seeded(seed), take)?;
        }
    }
    Ok(())
}

/// Refuses data that does not fit the vocabulary of the model called `name`, or that another tokenizer made than the one
/// in the model's directory.
pub fn check_data(
    manifest: &DataManifest,
    config: &ModelConfig,
    name: &str,
    directory: Option<&Path>,
) -> Result<(), String> {
    let data = manifest.path().display();
    if i64::from(manifest.vocabulary()) > config.vocab {
        return Err(format!(
            "{data} was made with a vocabulary of {} tokens, the model {name} has {}. Tokenize the text with the model's \
             own tokenizer",
            manifest.vocabulary(),
            config.vocab
        ));
    }
    let found = directory.and_then(|directory| {
        let path = directory.join("tokenizer.json");
        Some((fs::read(&path).ok()?, path))
    });
    let Some((bytes, tokenizer)) = found else {
        // A model without a tokenizer can be trained; nothing can be compared.
        return Ok(());
    };
    let hash = blake3::hash(&bytes).to_hex();
    if hash.as_str() != manifest.tokenizer_hash() {
        return Err(format!(
            "{data} was made with another tokenizer than {} (BLAKE3 {} against {hash}). Tokenize the text with this one",
            tokenizer.display(),
            manifest.tokenizer_hash()
        ));
    }
    Ok(())
}

/// Refuses a checkpoint whose sample numbers mean something else.
fn check_checkpoint(
    manifest: &Manifest,
    path: &Path,
    plan: &Plan,
    reader: &Reader,
    step: u64,
) -> Result<(), StoredError> {
    let dataset = blake3::Hash::from_bytes(reader.manifest().hash())
        .to_hex()
        .to_string();
    let problem = if manifest.plan_version != VERSION {
        format!(
            "its samples were ordered by plan version {}, this program has version {VERSION}",
            manifest.plan_version
        )
    } else if manifest.dataset != dataset {
        format!(
            "it was trained on the dataset with hash {}, the recipe's has {dataset}",
            manifest.dataset
        )
    } else if (manifest.step, manifest.next_sample) != (step, plan.step_samples(step).end) {
        format!(
            "it is at step {} and sample {}, the plan is at step {step} and sample {}",
            manifest.step,
            manifest.next_sample,
            plan.step_samples(step).end
        )
    } else {
        return Ok(());
    };
    Err(StoredError::Foreign {
        path: path.to_owned(),
        problem,
    })
}

/// What keeps training from being equal to the bit to that of the checkpoint's generation; empty if nothing does.
pub fn differences(manifest: &Manifest, here: &Environment, world: u32) -> Vec<String> {
    let mut differences = manifest.environment.differences(here);
    if manifest.world != world {
        differences.push(format!("workers {} -> {world}", manifest.world));
    }
    differences
}

/// What people are told about them.
fn resumed(differences: &[String]) -> Option<String> {
    (!differences.is_empty()).then(|| {
        format!(
            "resumed in other circumstances ({}): the bits will differ from those of an uninterrupted run",
            differences.join(", ")
        )
    })
}
