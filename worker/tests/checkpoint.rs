//! Checkpoints on disk: what is written, what is refused.

use std::{fs, path::Path, thread};

use supra_agent::{
    FaultKind, Outcome, StepReport,
    collective::{InProcess, Solo},
};
use supra_checkpoint::{Manifest, Store, StoredError, verify};
use supra_recipes::{Recipe, plan::CheckpointCopy, schema::Precision};
use supra_worker::{
    checkpoint,
    collective::{DeviceCollective, Host},
    kernels::Twin,
    model::{self, AttentionKind, ModelConfig, NewWeights, SupraConfig},
    optim::{HostRoom, Kinds, Layout, Part, Replica},
};
use tch::{Device, Kind};

use crate::fixture::{BUILD, Generation, LEDGER_HEAD, Rank, World, fault, restore, store};

#[test]
fn a_checkpoint_says_what_it_is_and_is_a_model_directory() {
    let world = World::new(120);
    let recipe = world.recipe("");
    let root = world.checkpoints("a");
    let ranks = Generation::new(&recipe, &root).run(2);
    let written = ranks[0].checkpoints.last().unwrap();
    assert_eq!(written.path, "step-00000004-gen-1");
    let dir = root.join(&written.path);
    let store = store(&root);
    let manifest = verify::manifest(
        &store,
        &written.path,
        Some(&written.manifest_hash.as_slice().try_into().unwrap()),
    )
    .unwrap();
    assert_eq!(
        (
            manifest.step,
            manifest.tokens,
            manifest.next_sample,
            manifest.updates
        ),
        (4, 320, 20, 4)
    );
    assert_eq!(
        (manifest.run.as_str(), manifest.generation, manifest.world),
        ("run-1", 1, 2)
    );
    assert_eq!(
        (
            manifest.environment.build.as_str(),
            manifest.environment.threads
        ),
        (BUILD, 1)
    );
    assert_eq!(
        manifest.ledger_head,
        blake3::Hash::from_bytes(LEDGER_HEAD).to_hex().as_str()
    );
    assert_eq!(Recipe::parse(&manifest.recipe, "recipe").unwrap(), recipe);
    let bytes: u64 = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    assert_eq!(bytes, written.bytes);

    let config = ModelConfig::load(&dir).unwrap();
    let (params, report) = model::load_params(&dir, &config, NewWeights::Refuse).unwrap();
    assert!(report.missing.is_empty());
    let layout = Layout::new(&config.params(), false, 1);
    let kinds = Kinds {
        parameters: Kind::Float,
        moments: Kind::Float,
    };
    let mut replica = Replica::new(layout, Part::WHOLE, kinds, Device::Cpu);
    let mut alone = Host::new(Box::new(Solo));
    checkpoint::read::replica(&store, &written.path, &manifest, &mut replica, &mut alone).unwrap();
    for (name, tensor) in params.iter() {
        assert_eq!(tensor, replica.params().get(name), "{name}");
    }
    assert_eq!(
        blake3::Hash::from_bytes(replica.hash(&Twin, &mut Solo).unwrap())
            .to_hex()
            .as_str(),
        manifest.replica_hash
    );
    assert!(dir.join("tokenizer.json").exists());
    assert!(fs::read_dir(&root).unwrap().all(|entry| {
        !entry
            .unwrap()
            .file_name()
            .to_string_lossy()
            .starts_with('.')
    }));
}

#[test]
fn damage_is_found_before_anything_is_used() {
    let world = World::new(120);
    let recipe = world.recipe("");
    let root = world.checkpoints("a");
    let ranks = Generation::new(&recipe, &root).run(1);
    let start = restore(&root, &ranks[0].checkpoints[0]);
    let resume = || {
        Generation::new(&recipe, &world.checkpoints("b"))
            .from(start.clone())
            .run(1)
            .remove(0)
    };
    let refused = |file: &str, damage: &dyn Fn(&Path)| {
        let path = root.join(&start.path).join(file);
        let whole = fs::read(&path).unwrap();
        damage(&path);
        let rank = resume();
        assert!(matches!(
            rank.outcome,
            Outcome::Fault {
                kind: FaultKind::CheckpointDamaged,
                ..
            }
        ));
        assert!(
            fault(&rank).contains(file) && fault(&rank).contains("damaged"),
            "{}",
            fault(&rank)
        );
        assert!(rank.formed.is_none());
        fs::write(&path, whole).unwrap();
    };
    for file in [
        "model-rank-000-of-001-00001.safetensors",
        "optimizer-rank-000-of-001-00001.safetensors",
        "config.json",
        "tokenizer.json",
        "manifest.json",
    ] {
        refused(file, &|path| {
            let mut bytes = fs::read(path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(path, bytes).unwrap();
        });
    }
    refused("optimizer-rank-000-of-001-00001.safetensors", &|path| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() - 100]).unwrap();
    });
    refused("model-rank-000-of-001-00001.safetensors", &|path| {
        fs::remove_file(path).unwrap()
    });
    assert_eq!(resume().outcome, Outcome::Finished);
}

#[test]
fn a_checkpoint_of_another_model_or_dataset_is_refused() {
    let world = World::new(120);
    let recipe = world.recipe("");
    let root = world.checkpoints("a");
    let ranks = Generation::new(&recipe, &root).run(1);
    let start = restore(&root, &ranks[0].checkpoints[0]);
    let other = world.recipe("attention: softmax");
    let rank = &Generation::new(&other, &world.checkpoints("b"))
        .from(start.clone())
        .run(1)[0];
    assert!(
        fault(rank).contains("does not fit this run"),
        "{}",
        fault(rank)
    );

    let mut elsewhere = world.recipe("");
    elsewhere.data.train = world.data().join("heldout.json");
    elsewhere.data.repeat = true;
    let rank = &Generation::new(&elsewhere, &world.checkpoints("c"))
        .from(start)
        .run(1)[0];
    assert!(fault(rank).contains("dataset"), "{}", fault(rank));
}

#[test]
fn leftovers_are_replaced_and_published_checkpoints_are_left_to_the_coordinator() {
    let world = World::new(120);
    let mut recipe = world.recipe("");
    recipe.checkpoint.keep = 1;
    let root = world.checkpoints("a");
    let leftover = root.join("step-00000002-gen-1");
    fs::create_dir_all(&leftover).unwrap();
    fs::write(
        leftover.join("model-rank-000-of-001-00001.safetensors"),
        b"half",
    )
    .unwrap();
    let ranks = Generation::new(&recipe, &root).run(1);
    assert_eq!(ranks[0].outcome, Outcome::Finished);
    let mut left: Vec<_> = fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["step-00000002-gen-1", "step-00000004-gen-1"]);
    assert!(leftover.join("manifest.json").exists());
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let world = World::new(120);
    let recipe = world.recipe("");
    let file = world.dir.path().join("file");
    fs::write(&file, b"").unwrap();
    let rank = &Generation::new(&recipe, &file.join("checkpoints")).run(1)[0];
    assert!(matches!(
        rank.outcome,
        Outcome::Fault {
            kind: FaultKind::Input,
            ..
        }
    ));
    assert!(
        fault(rank).contains("cannot write") && fault(rank).contains("checkpoint.to"),
        "{}",
        fault(rank)
    );
}

#[test]
fn a_folder_that_is_not_shared_is_found_when_the_generation_forms() {
    let world = World::new(120);
    let recipe = world.recipe("");
    let roots = [world.checkpoints("here"), world.checkpoints("there")];
    let ranks = Generation::new(&recipe, &roots[0]).run_with_roots(&[&roots[0], &roots[1]]);
    for rank in &ranks {
        assert!(matches!(
            rank.outcome,
            Outcome::Fault {
                kind: FaultKind::Input,
                ..
            }
        ));
        assert!(
            fault(rank).contains("not shared") && fault(rank).contains("rank 1"),
            "{}",
            fault(rank)
        );
    }
}

#[test]
fn a_manifest_of_another_format_or_with_foreign_paths_is_refused() {
    let path = Path::new("manifest.json");
    let error = Manifest::parse(br#"{"format": 99}"#, path).unwrap_err();
    assert!(
        matches!(&error, StoredError::Foreign { .. }) && error.to_string().contains("99"),
        "{error}"
    );
    let error = Manifest::parse(b"{", path).unwrap_err();
    assert!(matches!(error, StoredError::Damaged { .. }), "{error}");
}

/// The state behind a checkpoint, read by each of so many ranks.
fn read_by(dir: &Path, world: u32, zero1: bool, precision: Kind) -> Vec<[u8; 32]> {
    let store = Store::open(dir.to_str().unwrap()).unwrap();
    let manifest = verify::manifest(&store, "", None).unwrap();
    let config = ModelConfig::load(dir).unwrap();
    let ranks = InProcess::group(world).into_iter().zip(0..);
    thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .map(|(group, rank)| {
                let (store, manifest, config) = (&store, &manifest, &config);
                scope.spawn(move || {
                    let part = match zero1 {
                        true => Part::of_rank(rank, world),
                        false => Part::WHOLE,
                    };
                    let kinds = Kinds {
                        parameters: precision,
                        moments: Kind::Float,
                    };
                    let layout = Layout::new(&config.params(), false, world);
                    let mut replica = Replica::new(layout, part, kinds, Device::Cpu);
                    let mut host = Host::new(Box::new(group));
                    checkpoint::read::replica(store, "", manifest, &mut replica, &mut host)
                        .unwrap();
                    replica.hash(&Twin, host.host()).unwrap()
                })
            })
            .collect();
        let threads = threads.into_iter();
        threads.map(|thread| thread.join().unwrap()).collect()
    })
}

/// Shardings of the optimizer's state.
const SHARDINGS: [&str; 2] = ["none", "zero1"];

fn sharded(world: &World, sharding: &str) -> Recipe {
    world.recipe(&format!(
        "optimizer: {{ lr: 1e-2, warmup: 2 steps, sharding: {sharding} }}"
    ))
}

/// How far apart, relatively, the losses of steps and the gradient norms of the next one are that other numbers of ranks added
/// up: in fp32, of up to 96 targets and some thousand gradients. Later gradients come after a division by small moments.
const SUMMATION: f64 = 1e-5;

/// Goes on from the first checkpoint, to the end, in as many ranks and with each sharding.
fn expect_the_same_next_steps(world: &World, written_by: u32, root: &Path, before: &[Rank]) {
    let middle = restore(root, &before[0].checkpoints[0]);
    let there = &before[0].steps[middle.step as usize..];
    for size in RANKS {
        let [whole, parts] = SHARDINGS.map(|sharding| {
            let recipe = sharded(world, sharding);
            let elsewhere = world.checkpoints(&format!("{written_by}-{size}-{sharding}"));
            let from = Generation::new(&recipe, &elsewhere).from(middle.clone());
            let mut ranks = from.run(size);
            assert_eq!(ranks[0].outcome, Outcome::Finished);
            ranks.swap_remove(0).steps
        });
        assert_eq!(whole.len(), there.len());
        for ((whole, parts), there) in whole.iter().zip(&parts).zip(there) {
            let came_to = |step: &StepReport| {
                let sums = [step.loss_sum, step.grad_norm].map(f64::to_bits);
                (sums, step.targets, step.replica_hash.clone())
            };
            let which = format!("{written_by} wrote, {size} went on: step {}", there.step);
            assert_eq!(came_to(whole), came_to(parts), "{which}, both shardings");
            if size == written_by {
                assert_eq!(came_to(whole), came_to(there), "{which}, uninterrupted");
            }
            assert_eq!(whole.targets, there.targets, "{which}");
            let near = |mine: f64, before: f64| {
                let error = (mine / before - 1.0).abs();
                assert!(error <= SUMMATION, "{which}: {mine} against {before}");
            };
            near(whole.loss_sum, there.loss_sum);
            if there.step == middle.step + 1 {
                near(whole.grad_norm, there.grad_norm);
            }
        }
    }
}

/// Numbers of ranks that write and go on.
const RANKS: [u32; 5] = [1, 2, 3, 4, 8];

#[test]
fn any_number_of_ranks_reads_what_any_number_wrote_and_goes_on_with_the_same_losses() {
    let world = World::new(120);
    for (written_by, sharding) in RANKS.into_iter().zip(SHARDINGS.into_iter().cycle()) {
        let recipe = sharded(&world, sharding);
        let root = world.checkpoints(&format!("by-{written_by}"));
        let ranks = Generation::new(&recipe, &root).run(written_by);
        let dir = root.join(&ranks[0].checkpoints.last().unwrap().path);
        let store = Store::open(dir.to_str().unwrap()).unwrap();
        let expected = verify::manifest(&store, "", None).unwrap().replica_hash;
        for (read_by_so_many, zero1) in [(1, false), (2, true), (3, false), (4, true), (8, true)] {
            for hash in read_by(&dir, read_by_so_many, zero1, Kind::Float) {
                let hash = blake3::Hash::from_bytes(hash).to_hex();
                assert_eq!(
                    hash.as_str(),
                    expected,
                    "{written_by} wrote, {read_by_so_many} read"
                );
            }
        }
        let [alone] = read_by(&dir, 1, false, Kind::BFloat16)[..] else {
            panic!("one rank")
        };
        for hash in read_by(&dir, 4, true, Kind::BFloat16) {
            assert_eq!(hash, alone, "bf16 parameters come from all ranks");
        }
        expect_the_same_next_steps(&world, written_by, &root, &ranks);
    }
}

#[test]
fn the_copy_of_a_checkpoint_takes_what_is_planned() {
    let world = World::new(40);
    let config = ModelConfig::load(&world.base()).unwrap();
    for (size, precision) in [(1, Precision::Fp32), (3, Precision::Bf16)] {
        let mut recipe = world.recipe("");
        recipe.model.precision = precision;
        recipe.optimizer.moments = precision;
        let kind = match precision {
            Precision::Fp32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        };
        let config = config
            .clone()
            .with_attention(AttentionKind::Supra(SupraConfig::default()));
        let kinds = Kinds {
            parameters: kind,
            moments: kind,
        };
        let layout = Layout::new(&config.params(), false, size);
        let replica = Replica::new(layout, Part::WHOLE, kinds, Device::Cpu);
        let planned = CheckpointCopy::new(&recipe, &config.shape(), size).bytes;
        let room = HostRoom::of(&replica, Part::of_rank(0, size));
        assert_eq!(room.bytes(), planned, "{precision:?}, {size} ranks");
    }
}

/// Checkpoints of every released version stay readable. See tests/checkpoints/README.md.
#[test]
fn a_checkpoint_of_every_older_format_is_read_to_the_bit_and_still_a_model() {
    for format in [1, 2] {
        let dir = format!("../tests/checkpoints/format-{format}");
        let dir = &Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
        let store = Store::open(dir.to_str().unwrap()).unwrap();
        let manifest = verify::manifest(&store, "", None).unwrap();
        assert_eq!(manifest.format, format);
        for (world, zero1) in [(1, false), (3, true)] {
            for hash in read_by(dir, world, zero1, Kind::Float) {
                let hash = blake3::Hash::from_bytes(hash).to_hex();
                assert_eq!(hash.as_str(), manifest.replica_hash);
            }
        }
        verify::model(&store, "", &manifest).unwrap();
        let config = ModelConfig::load(dir).unwrap();
        let (_, report) = model::load_params(dir, &config, NewWeights::Refuse).unwrap();
        assert!(report.missing.is_empty());
    }
}
