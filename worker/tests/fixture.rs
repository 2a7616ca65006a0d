//! A world small enough to train in a test: a tiny Llama-shaped base with a tokenizer, tokens, and ranks as threads.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    thread,
};

use arrow::{
    array::{ArrayRef, ListBuilder, RecordBatch, UInt32Builder},
    datatypes::{DataType, Field},
};
use parquet::arrow::ArrowWriter;
use serde_json::json;
use supra_agent::{
    CheckpointWritten, CollectiveError, Donation, Evaluated, Formed, Gates, Held, Job, Outcome,
    PartHolder, Restore, SnapshotTaken, StepReport,
    collective::{Collective, InProcess},
    link::{self, Report},
};
use supra_checkpoint::Store;
use supra_data::{Auto3, IndexOptions};
use supra_recipes::{Recipe, schema::Attention};
use supra_worker::{
    device::{self, DeviceName},
    kernels::Kernels,
    trainer::{self, Kept},
};
use tempfile::TempDir;

/// Tokens of the vocabulary.
pub const VOCABULARY: u32 = 61;

/// What `train` says the program is.
pub const BUILD: &str = "test-build";

/// Head of the ledger that no coordinator keeps here.
pub const LEDGER_HEAD: [u8; 32] = [0xa5; 32];

/// What stands for the ledger there.
const LEDGER: &[u8] = b"{}\n";

/// Base, data and a place for checkpoints.
pub struct World {
    pub dir: TempDir,
}

impl World {
    /// `documents` documents of 5 to 40 tokens in which each token mostly determines the next.
    pub fn new(documents: u32) -> World {
        let world = World {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(world.base()).unwrap();
        fs::create_dir_all(world.data()).unwrap();
        write_base(&world.base());
        write_tokens(&world.data().join("part-0.parquet"), documents);
        let options = IndexOptions {
            dir: world.data(),
            column: "input_ids".to_owned(),
            tokenizer: world.base(),
            append_eot: Auto3::Always,
            prepend_bos: Auto3::Never,
            heldout: 20,
        };
        supra_data::index(&options, &()).unwrap();
        world
    }

    pub fn base(&self) -> PathBuf {
        self.dir.path().join("base")
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn checkpoints(&self, name: &str) -> PathBuf {
        self.dir.path().join("checkpoints").join(name)
    }

    /// 20 samples in steps of 6, 6, 6 and 2, checkpoints after steps 2 and 4; `more` is YAML at the top level.
    pub fn recipe(&self, more: &str) -> Recipe {
        let text = format!(
            "name: tiny\n\
             base: {{ path: {}, weights: random }}\n\
             model: {{ precision: fp32 }}\n\
             data: {{ train: {} }}\n\
             budget: {{ tokens: 325 }}\n\
             batch: {{ tokens: 96, micro_batch: 2, sequence_length: 16 }}\n\
             checkpoint: {{ every_tokens: 192 }}\n\
             replica_check: {{ every_steps: 1 }}\n\
             {more}\n",
            self.base().display(),
            self.data().display()
        );
        let optimizer = "optimizer: { lr: 1e-2, final_lr: 1e-3, warmup: 2 steps }\n";
        let text = if more.contains("optimizer:") {
            text
        } else {
            text + optimizer
        };
        let mut recipe =
            Recipe::parse(&text, "tiny.yaml").unwrap_or_else(|error| panic!("{error}"));
        if recipe.attention == Attention::Supra {
            // Two chunks per sequence.
            recipe.model.chunk = 8;
        }
        recipe
    }
}

fn write_base(dir: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 32,
        "intermediate_size": 48, "max_position_embeddings": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "torch_dtype": "float32", "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 0
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let special = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    let mut vocabulary = serde_json::Map::new();
    for (id, word) in ["</s>", "<s>", "<unk>"].into_iter().enumerate() {
        vocabulary.insert(word.to_owned(), json!(id));
    }
    (3..VOCABULARY).for_each(|id| drop(vocabulary.insert(format!("w{id}"), json!(id))));
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "</s>"), special(1, "<s>"), special(2, "<unk>")],
        "normalizer": null, "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>" }
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(
        dir.join("tokenizer_config.json"),
        json!({ "eos_token": "</s>", "bos_token": "<s>" }).to_string(),
    )
    .unwrap();
}

fn write_tokens(path: &Path, documents: u32) {
    let item = Arc::new(Field::new("item", DataType::UInt32, true));
    let mut column = ListBuilder::new(UInt32Builder::new()).with_field(item);
    let mut noise = 12345u32;
    for document in 0..documents {
        let mut token = document % 50;
        for _ in 0..5 + document * 7 % 36 {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            token = (token * 3 + 1 + (noise >> 30)) % (VOCABULARY - 3);
            column.values().append_value(token + 3);
        }
        column.append(true);
    }
    let batch =
        RecordBatch::try_from_iter([("input_ids", Arc::new(column.finish()) as ArrayRef)]).unwrap();
    let mut writer =
        ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

/// A rank that dies in the middle of something: its collective is gone after so many operations.
struct Mortal {
    rank: u32,
    world: u32,
    alive: Option<InProcess>,
    operations: u64,
}

impl Mortal {
    fn new(collective: InProcess, operations: u64) -> Mortal {
        Mortal {
            rank: collective.rank(),
            world: collective.world(),
            alive: Some(collective),
            operations,
        }
    }

    fn next(&mut self) -> Result<&mut InProcess, CollectiveError> {
        if self.operations == 0 {
            self.alive = None;
        }
        self.operations = self.operations.saturating_sub(1);
        self.alive.as_mut().ok_or(CollectiveError::Aborted)
    }
}

impl Collective for Mortal {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world(&self) -> u32 {
        self.world
    }

    fn all_reduce_f32(&mut self, buffer: &mut [f32]) -> Result<(), CollectiveError> {
        self.next()?.all_reduce_f32(buffer)
    }

    fn all_reduce_bf16(&mut self, buffer: &mut [half::bf16]) -> Result<(), CollectiveError> {
        self.next()?.all_reduce_bf16(buffer)
    }

    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.next()?.all_gather(mine)
    }

    fn broadcast(&mut self, root: u32, buffer: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.next()?.broadcast(root, buffer)
    }

    fn pass(&mut self, mine: &[u8], theirs: &mut [u8]) -> Result<(), CollectiveError> {
        self.next()?.pass(mine, theirs)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.next()?.barrier()
    }
}

/// What one rank said and how it ended.
pub struct Rank {
    pub outcome: Outcome,
    pub formed: Option<Formed>,
    pub steps: Vec<StepReport>,
    pub checkpoints: Vec<CheckpointWritten>,
    pub snapshots: Vec<SnapshotTaken>,
    pub evaluated: Vec<Evaluated>,
    pub gates: Vec<Gates>,
    /// Log lines of level WARN.
    pub warnings: Vec<String>,
    /// Log lines of level INFO.
    pub notes: Vec<String>,
    /// What it says that it keeps.
    pub held: Option<Held>,
    /// What it keeps.
    pub kept: Option<Kept>,
}

/// One generation to run.
pub struct Generation<'a> {
    pub recipe: &'a Recipe,
    pub root: &'a Path,
    pub number: u64,
    pub restore: Option<Restore>,
    pub donation: Option<Donation>,
    /// Stop is asked of one rank when it reports this step.
    pub stop_after: Option<u64>,
    /// The generation is voided when this step is reported.
    pub void_after: Option<u64>,
    /// Another membership is asked for, of the last rank, when it reports this step; 0: before it begins.
    pub regroup_after: Option<u64>,
    /// A rank, and after how many operations of its collective it dies.
    pub dies: Option<(u32, u64)>,
    pub device: DeviceName,
    /// Memory that the device is said to have, instead of its own.
    pub free_memory: Option<u64>,
    /// What computes on a rank in place of the device's own kernels.
    pub kernels: fn(u32, Rc<dyn Kernels>) -> Rc<dyn Kernels>,
}

impl<'a> Generation<'a> {
    pub fn new(recipe: &'a Recipe, root: &'a Path) -> Generation<'a> {
        Generation {
            recipe,
            root,
            number: 1,
            restore: None,
            donation: None,
            stop_after: None,
            void_after: None,
            regroup_after: None,
            dies: None,
            device: DeviceName::Cpu,
            free_memory: None,
            kernels: |_, own| own,
        }
    }

    pub fn from(self, restore: Restore) -> Generation<'a> {
        Generation {
            restore: Some(restore),
            ..self
        }
    }

    /// Generation 2, from the state that the ranks `holders` of it keep.
    pub fn starting_from_memory(self, state: &Held, holders: &[u32]) -> Generation<'a> {
        let donation = Donation {
            state: state.clone(),
            holders: holders.to_vec(),
            parts: Vec::new(),
        };
        Generation {
            number: 2,
            donation: Some(donation),
            ..self
        }
    }

    /// Generation 2, from the newest state whose every part somebody holds; none where there is no such state.
    pub fn starting_from_parts(self, held: &[Option<Held>]) -> Option<Generation<'a>> {
        let each = held.iter().flatten().flat_map(|held| &held.snapshots);
        let mut names: Vec<_> = each.map(|it| (it.step, it.generation, it.of)).collect();
        names.sort_unstable();
        let donation = names.iter().rev().find_map(|&(step, generation, of)| {
            let holder = |index: u32| {
                let ranks = (0..).zip(held).filter_map(|(rank, held)| {
                    let snapshots = &held.as_ref()?.snapshots;
                    let named = snapshots
                        .iter()
                        .find(|it| (it.step, it.generation, it.of) == (step, generation, of))?;
                    let part = named.parts.iter().find(|part| part.index == index)?;
                    let hash = part.hash.as_slice().try_into().unwrap();
                    Some(PartHolder { rank, hash })
                });
                // Of several the last, which has it of its neighbour as often as not.
                ranks.last()
            };
            let state = Held {
                run: "run-1".to_owned(),
                generation,
                step,
                ..Held::default()
            };
            let parts: Option<Vec<PartHolder>> = (0..of).map(holder).collect();
            Some(Donation {
                state,
                holders: Vec::new(),
                parts: parts?,
            })
        });
        Some(Generation {
            number: 2,
            donation: Some(donation?),
            ..self
        })
    }

    /// Runs all ranks as threads, with checkpoint roots that may differ.
    pub fn run_with_roots(&self, roots: &[&Path]) -> Vec<Rank> {
        let ranks = roots.iter().map(|root| (*root, None)).collect();
        self.run_ranks(ranks)
    }

    /// Runs a rank as a thread for each of what they keep.
    pub fn run_on(&self, kept: Vec<Option<Kept>>) -> Vec<Rank> {
        self.run_ranks(kept.into_iter().map(|kept| (self.root, kept)).collect())
    }

    fn run_ranks(&self, each: Vec<(&Path, Option<Kept>)>) -> Vec<Rank> {
        let world = each.len() as u32;
        let ranks = InProcess::group(world)
            .into_iter()
            .zip(InProcess::group(world));
        thread::scope(|scope| {
            let running: Vec<_> = ranks
                .zip(each)
                .map(|(rank, (root, kept))| scope.spawn(move || self.run_rank(rank, root, kept)))
                .collect();
            running
                .into_iter()
                .map(|rank| rank.join().unwrap())
                .collect()
        })
    }

    /// Runs `world` ranks as threads.
    pub fn run(&self, world: u32) -> Vec<Rank> {
        self.run_with_roots(&vec![self.root; world as usize])
    }

    /// The training loop in one thread, its coordinator in this one.
    fn run_rank(
        &self,
        (collective, aside): (InProcess, InProcess),
        root: &Path,
        mut kept: Option<Kept>,
    ) -> Rank {
        let (link, control, mut reports) = link::pair();
        let first = collective.rank() == 0;
        let last = collective.rank() + 1 == collective.world();
        let dies = self.dies.filter(|(rank, _)| *rank == collective.rank());
        let collective: Box<dyn Collective> = match dies {
            Some((_, operations)) => Box::new(Mortal::new(collective, operations)),
            None => Box::new(collective),
        };
        let mut job = Job::local(
            "run-1",
            self.recipe.clone(),
            self.restore.clone(),
            store(root),
            link,
            collective,
        )
        .with_aside(Box::new(aside));
        job.generation = self.number;
        job.donation = self.donation.clone();
        if last && self.regroup_after == Some(0) {
            control.request_regroup();
        }
        let (device, free_memory) = (self.device, self.free_memory);
        let (kernels, rank) = (self.kernels, job.rank);
        let compute = thread::spawn(move || {
            let mut place = device::open(device, 1).unwrap();
            place.free_memory = free_memory.or(place.free_memory);
            let wrap = |own| kernels(rank, own);
            let outcome = trainer::train_with(job, &place, BUILD, &mut kept, wrap);
            (outcome, kept)
        });
        let mut rank = Rank {
            outcome: Outcome::Voided,
            formed: None,
            steps: vec![],
            checkpoints: vec![],
            snapshots: vec![],
            evaluated: vec![],
            gates: vec![],
            warnings: vec![],
            notes: vec![],
            held: None,
            kept: None,
        };
        while let Some(report) = reports.recv() {
            match report {
                Report::Formed(formed) => rank.formed = Some(formed),
                Report::Step(step) => {
                    if first && self.stop_after == Some(step.step) {
                        control.request_stop();
                    }
                    if last && self.regroup_after == Some(step.step) {
                        control.request_regroup();
                    }
                    if self.void_after == Some(step.step) {
                        control.void();
                    }
                    rank.steps.push(step);
                }
                Report::CheckpointFilled(unfinished) => {
                    let root = store(root);
                    let written = unfinished.finish(&root, LEDGER_HEAD, LEDGER).unwrap();
                    let hash = written.manifest_hash.as_slice().try_into().unwrap();
                    root.publish(&written.path, hash).unwrap();
                    control.published(written.step);
                    rank.checkpoints.push(written);
                }
                Report::Evaluated(evaluated) => rank.evaluated.push(evaluated),
                Report::Gates(gates) => rank.gates.push(gates),
                Report::SnapshotTaken(taken) => rank.snapshots.push(taken),
                Report::Held(held) => rank.held = Some(held),
                Report::Log(line) if line.level == "INFO" => rank.notes.push(line.text),
                Report::Log(line) => rank.warnings.push(line.text),
                Report::Phase(..) | Report::Done(_) => {}
            }
        }
        (rank.outcome, rank.kept) = compute.join().unwrap();
        rank
    }
}

/// The checkpoints in a folder.
pub fn store(root: &Path) -> Store {
    Store::open(root.to_str().unwrap()).unwrap()
}

/// Where the next generation starts.
pub fn restore(root: &Path, written: &CheckpointWritten) -> Restore {
    Restore {
        step: written.step,
        store: store(root),
        path: written.path.clone(),
        manifest_hash: written.manifest_hash.as_slice().try_into().unwrap(),
    }
}

/// Mean losses of the steps.
pub fn losses(steps: &[StepReport]) -> Vec<f64> {
    steps
        .iter()
        .map(|step| step.loss_sum / step.targets as f64)
        .collect()
}

/// The message of a fault.
pub fn fault(rank: &Rank) -> &str {
    match &rank.outcome {
        Outcome::Fault { message, .. } | Outcome::Hardware { message, .. } => message,
        other => panic!("no fault: {other:?}"),
    }
}
