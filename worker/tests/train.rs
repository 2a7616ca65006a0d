//! The training loop, without a coordinator: ranks are threads.

use supra_agent::{FaultKind, Outcome};
use supra_checkpoint::{Store, verify};
use supra_data::Reader;
use supra_recipes::{
    Digest, Plan, Recipe,
    schema::{Activations, Attention, Base, Budget, Decay, Precision, Sharding, Tokens},
};
use supra_worker::device::DeviceName;

use crate::fixture::{Generation, Rank, World, fault, losses, restore};

fn plan(world: &World, recipe: &Recipe) -> (Plan, Reader) {
    let reader = Reader::open(&world.data(), 16).unwrap();
    let plan = Plan::new(recipe, reader.windows(), reader.manifest().hash()).unwrap();
    (plan, reader)
}

fn final_hash(rank: &Rank) -> &[u8] {
    &rank.steps.last().unwrap().replica_hash
}

#[test]
fn the_loss_does_not_depend_on_the_number_of_ranks() {
    let world = World::new(120);
    let recipe = world.recipe("");
    let alone = &Generation::new(&recipe, &world.checkpoints("1")).run(1)[0];
    assert_eq!(alone.outcome, Outcome::Finished);
    assert_eq!(alone.steps.len(), 4);
    // World 4: the last step has two samples, so two ranks feed nothing.
    for size in [2, 4] {
        let ranks = Generation::new(&recipe, &world.checkpoints(&size.to_string())).run(size);
        for rank in &ranks {
            assert_eq!(rank.outcome, Outcome::Finished);
            assert_eq!(
                final_hash(rank),
                final_hash(&ranks[0]),
                "replicas are equal to the bit"
            );
            for (mine, single) in losses(&rank.steps).iter().zip(losses(&alone.steps)) {
                assert!(
                    (mine - single).abs() < 1e-5,
                    "{mine} against {single} with {size} ranks"
                );
            }
        }
        assert!(size == 2 || ranks[3].steps[3].fed_samples == 0);
    }
}

#[test]
fn what_is_reported_is_what_the_plan_says() {
    let world = World::new(120);
    let recipe = world.recipe("");
    let (plan, mut reader) = plan(&world, &recipe);
    let ranks = Generation::new(&recipe, &world.checkpoints("a")).run(2);
    for step in 1..=plan.steps {
        let samples = plan.step_samples(step);
        let reports: Vec<_> = ranks
            .iter()
            .map(|rank| &rank.steps[step as usize - 1])
            .collect();
        let mut digest = Digest::ZERO;
        let mut targets = 0;
        for sample in samples.clone() {
            let (tokens, starts) = reader.window(plan.window(sample)).unwrap();
            digest += Digest::of_sample(sample, &tokens);
            targets += 16 - starts.iter().filter(|&&start| start > 0).count() as u64;
        }
        let fed: Digest = reports
            .iter()
            .map(|report| Digest::from_bytes(report.fed_digest.as_slice().try_into().unwrap()))
            .sum();
        assert_eq!(fed, digest);
        for report in reports {
            assert_eq!(
                (report.first_sample, report.samples),
                (samples.start, samples.end - samples.start)
            );
            assert_eq!(
                report.targets, targets,
                "targets that begin a document do not count"
            );
            assert_eq!(report.step_digest, digest.as_bytes());
            assert_eq!(report.learning_rate, plan.learning_rate(step));
            assert!(!report.skipped && report.grad_norm > 0.0 && report.seconds > 0.0);
        }
    }
    let formed = ranks[1].formed.as_ref().unwrap();
    assert_eq!((formed.step, formed.windows), (0, reader.windows()));
    assert_eq!(formed.manifest_hash, reader.manifest().hash());
    assert_eq!(
        formed.replica_hash,
        ranks[0].formed.as_ref().unwrap().replica_hash
    );
}

#[test]
fn what_the_forward_pass_keeps_is_reported_and_changes_no_bit() {
    let world = World::new(120);
    let mut recipe = world.recipe("");
    let everything = &Generation::new(&recipe, &world.checkpoints("auto")).run(1)[0];
    assert_eq!(everything.notes.len(), 1, "{:?}", everything.notes);
    assert!(everything.notes[0].starts_with("activations: save"));
    for (activations, name) in [
        (Activations::Lean, "lean"),
        (Activations::Recompute, "recompute"),
    ] {
        recipe.batch.activations = activations;
        let rank = &Generation::new(&recipe, &world.checkpoints(name)).run(1)[0];
        assert!(rank.notes[0].contains(name), "{:?}", rank.notes);
        assert_eq!(final_hash(rank), final_hash(everything), "{name}");
    }
}

#[test]
fn a_gpu_with_too_little_memory_is_refused_before_training() {
    let world = World::new(120);
    let recipe = world.recipe("");
    let root = world.checkpoints("a");
    let small = Generation {
        free_memory: Some(1 << 20),
        ..Generation::new(&recipe, &root)
    };
    let rank = &small.run(1)[0];
    assert!(rank.formed.is_none());
    assert!(matches!(
        rank.outcome,
        Outcome::Fault {
            kind: FaultKind::Input,
            ..
        }
    ));
    let message = fault(rank);
    for part in [
        "0.0 GiB free",
        "CUDA and its libraries 0.7 GiB",
        "micro_batch",
    ] {
        assert!(message.contains(part), "{part} is not in {message}");
    }
}

#[test]
fn an_interrupted_run_ends_with_the_same_bits_in_every_form_of_its_state() {
    for (precision, moments) in [
        (Precision::Fp32, Precision::Fp32),
        (Precision::Bf16, Precision::Fp32),
        (Precision::Bf16, Precision::Bf16),
    ] {
        let world = World::new(120);
        let mut recipe = world.recipe("");
        recipe.model.precision = precision;
        recipe.optimizer.moments = moments;
        interrupt(&world, &recipe);
    }
}

fn interrupt(world: &World, recipe: &Recipe) {
    let whole = Generation::new(recipe, &world.checkpoints("whole")).run(2);

    let root = world.checkpoints("interrupted");
    let first = Generation {
        stop_after: Some(1),
        ..Generation::new(recipe, &root)
    }
    .run(2);
    assert_eq!(first[0].outcome, Outcome::Stopped);
    assert_eq!(first[1].outcome, Outcome::Stopped);
    let stopped = first[0].checkpoints.last().unwrap();
    assert_eq!(
        stopped.step,
        first[1].steps.last().unwrap().step,
        "ranks stop after the same step"
    );
    assert!(first[1].checkpoints.is_empty(), "rank 0 writes");

    let second = Generation::new(recipe, &root)
        .from(restore(&root, stopped))
        .run(2);
    assert_eq!(second[0].outcome, Outcome::Finished);
    assert_eq!(
        second[0].formed.as_ref().unwrap().replica_hash,
        first[0].steps.last().unwrap().replica_hash
    );
    assert_eq!(final_hash(&second[0]), final_hash(&whole[0]));
    let interrupted: Vec<f64> = losses(&first[0].steps)
        .into_iter()
        .chain(losses(&second[0].steps))
        .collect();
    assert_eq!(interrupted, losses(&whole[0].steps));
    assert!(second[0].warnings.is_empty(), "{:?}", second[0].warnings);
}

/// Every world and form of the numbers; runs cut in the middle go on under the other choice.
#[test]
fn who_keeps_the_optimizers_state_changes_no_bit() {
    let world = World::new(120);
    let kinds = [Precision::Fp32, Precision::Bf16].into_iter();
    for (precision, size) in kinds.flat_map(|kind| (1..=4).map(move |size| (kind, size))) {
        let recipe = |sharding| {
            let mut recipe = world.recipe("");
            recipe.model.precision = precision;
            recipe.optimizer.moments = precision;
            recipe.optimizer.sharding = sharding;
            recipe
        };
        let name = |what: &str| world.checkpoints(&format!("{precision:?}-{size}-{what}"));
        let [none, zero1] = [Sharding::None, Sharding::Zero1].map(recipe);
        let (none_root, zero1_root) = (name("none"), name("zero1"));
        let whole = Generation::new(&none, &none_root).run(size);
        let parts = Generation::new(&zero1, &zero1_root).run(size);
        for (rank, other) in whole.iter().zip(&parts) {
            assert_eq!(other.outcome, Outcome::Finished);
            assert_eq!(losses(&other.steps), losses(&rank.steps));
            for (step, other) in rank.steps.iter().zip(&other.steps) {
                assert_eq!(other.replica_hash, step.replica_hash, "step {}", step.step);
                assert_eq!(other.grad_norm, step.grad_norm);
            }
        }
        for (there, here) in whole[0].checkpoints.iter().zip(&parts[0].checkpoints) {
            let [there, here] = [none_root.join(&there.path), zero1_root.join(&here.path)]
                .map(|folder| Store::open(folder.to_str().unwrap()).unwrap())
                .map(|store| verify::manifest(&store, "", None).unwrap());
            assert_eq!((there.files, there.tensors), (here.files, here.tensors));
        }
        let middle = restore(&zero1_root, &parts[0].checkpoints[0]);
        let resumed = Generation::new(&none, &name("resumed"))
            .from(middle.clone())
            .run(size);
        assert_eq!(final_hash(&resumed[0]), final_hash(&whole[0]));
        // Another number of ranks gives other bits, but the same ones under either choice.
        let other_size = size % 4 + 1;
        let [there, here] = [(&none, "none"), (&zero1, "zero1")].map(|(recipe, what)| {
            let root = name(&format!("{what}-{other_size}"));
            let ranks = Generation::new(recipe, &root)
                .from(middle.clone())
                .run(other_size);
            assert_eq!(ranks[0].outcome, Outcome::Finished);
            ranks
        });
        assert_eq!(final_hash(&there[0]), final_hash(&here[0]));
    }
}

#[test]
fn exposed_communication_is_reported_for_every_step() {
    let world = World::new(120);
    let mut recipe = world.recipe("");
    for sharding in [Sharding::None, Sharding::Zero1] {
        recipe.optimizer.sharding = sharding;
        let root = world.checkpoints(&format!("{sharding:?}"));
        for rank in Generation::new(&recipe, &root).run(2) {
            for step in &rank.steps {
                let exposed = step.exposed_comm_ms;
                assert!(
                    exposed > 0.0 && exposed < step.seconds * 1e3,
                    "{exposed} ms of {} s",
                    step.seconds
                );
            }
        }
    }
}

#[test]
fn a_resume_with_fewer_ranks_goes_on_and_says_that_bits_differ() {
    let world = World::new(120);
    let recipe = world.recipe("");
    let root = world.checkpoints("a");
    let whole = Generation::new(&recipe, &root).run(2);
    let early = restore(&root, &whole[0].checkpoints[0]);
    assert_eq!(early.step, 2);

    let other = world.checkpoints("b");
    let resumed = Generation::new(&recipe, &other).from(early).run(1);
    assert_eq!(resumed[0].outcome, Outcome::Finished);
    for (mine, before) in losses(&resumed[0].steps)
        .iter()
        .zip(&losses(&whole[0].steps)[2..])
    {
        assert!((mine - before).abs() < 1e-5);
    }
    assert!(
        resumed[0].warnings[0].contains("workers 2 -> 1"),
        "{:?}",
        resumed[0].warnings
    );
}

#[test]
fn bf16_and_softmax_train_too() {
    let world = World::new(120);
    for more in ["attention: softmax", "seed: 3"] {
        let mut recipe = world.recipe(&format!(
            "{more}\noptimizer: {{ lr: 3e-2, final_lr: 3e-2, warmup: 0 steps }}"
        ));
        recipe.model.precision = Precision::Bf16;
        recipe.optimizer.z_loss = 1e-4;
        recipe.budget = Budget::exactly(Tokens(1600));
        let rank = &Generation::new(&recipe, &world.checkpoints(more)).run(1)[0];
        assert_eq!(rank.outcome, Outcome::Finished);
        let losses = losses(&rank.steps);
        assert!(
            losses[losses.len() - 1] < losses[0] - 0.3,
            "{more}: {losses:?}"
        );
    }
}

#[test]
fn steps_that_are_not_finite_are_skipped_and_too_many_stop_the_run() {
    let world = World::new(120);
    // The first update throws the weights out of the range of fp32.
    let recipe = world
        .recipe("optimizer: { lr: 1e38, final_lr: 1e38, warmup: 0 steps }\nnonfinite: { max: 1 }");
    let ranks = Generation::new(&recipe, &world.checkpoints("a")).run(2);
    for rank in &ranks {
        assert!(
            matches!(
                rank.outcome,
                Outcome::Fault {
                    kind: FaultKind::Diverged,
                    ..
                }
            ),
            "{:?}",
            rank.outcome
        );
        assert!(
            fault(rank).contains("2 steps in a row, up to step 3"),
            "{}",
            fault(rank)
        );
        let skipped: Vec<bool> = rank.steps.iter().map(|step| step.skipped).collect();
        assert_eq!(skipped, [false, true, true]);
        assert_eq!(
            rank.steps[1].replica_hash, rank.steps[0].replica_hash,
            "a skipped step changes nothing"
        );
    }
}

#[test]
fn a_void_generation_ends_at_once() {
    let world = World::new(120);
    let mut recipe = world.recipe("");
    recipe.budget = Budget::exactly(Tokens(1600));
    let rank = &Generation {
        void_after: Some(1),
        ..Generation::new(&recipe, &world.checkpoints("a"))
    }
    .run(1)[0];
    assert_eq!(rank.outcome, Outcome::Voided);
    assert!(rank.steps.len() < 17);
}

#[test]
fn data_of_another_tokenizer_is_refused() {
    let world = World::new(120);
    let tokenizer = world.base().join("tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    std::fs::write(&tokenizer, text + "\n").unwrap();
    let recipe = world.recipe("");
    let rank = &Generation::new(&recipe, &world.checkpoints("a")).run(1)[0];
    assert!(matches!(
        rank.outcome,
        Outcome::Fault {
            kind: FaultKind::Input,
            ..
        }
    ));
    assert!(fault(rank).contains("another tokenizer"), "{}", fault(rank));
}

#[test]
fn a_supra_base_trains_on_as_what_it_is() {
    let world = World::new(120);
    let mut recipe = world.recipe("");
    let root = world.checkpoints("a");
    let first = Generation::new(&recipe, &root).run(1);
    recipe.base = Base::Pretrained(root.join(&first[0].checkpoints.last().unwrap().path));
    let second = Generation::new(&recipe, &world.checkpoints("b")).run(1);
    assert_eq!(second[0].outcome, Outcome::Finished);
    assert!(losses(&second[0].steps)[0] < losses(&first[0].steps)[0] - 0.1);

    recipe.model.decay = Decay::Retnet;
    let rank = &Generation::new(&recipe, &world.checkpoints("c")).run(1)[0];
    assert!(
        fault(rank).contains("is a SUPRA model with"),
        "{}",
        fault(rank)
    );
    recipe.attention = Attention::Softmax;
    let rank = &Generation::new(&recipe, &world.checkpoints("d")).run(1)[0];
    assert!(
        fault(rank).contains("attention: softmax"),
        "{}",
        fault(rank)
    );
}

#[test]
fn a_dataset_smaller_than_the_budget_is_refused() {
    let world = World::new(60);
    let mut recipe = world.recipe("");
    recipe.budget = Budget::exactly(Tokens(1 << 20));
    let rank = &Generation::new(&recipe, &world.checkpoints("a")).run(1)[0];
    assert!(fault(rank).contains("data.repeat"), "{}", fault(rank));
}

/// Runs only where there is a GPU, and needs a process of its own: the first question about CUDA decides for all.
#[test]
fn a_gpu_trains_like_the_processor() {
    if !std::path::Path::new("/dev/nvidia0").exists() {
        return;
    }
    let world = World::new(120);
    for (precision, tolerance) in [(Precision::Fp32, 1e-4), (Precision::Bf16, 3e-2)] {
        for more in ["attention: supra", "attention: softmax"] {
            let mut recipe = world.recipe(more);
            recipe.model.precision = precision;
            let name = format!("{more}-{precision:?}");
            let (gpu_root, cpu_root) = (
                world.checkpoints(&name),
                world.checkpoints(&format!("{name}-cpu")),
            );
            let on_gpu = || Generation {
                device: DeviceName::Cuda(0),
                ..Generation::new(&recipe, &gpu_root)
            };
            // First, before anything asks about CUDA.
            let gpu = on_gpu().run(1);
            let cpu = Generation::new(&recipe, &cpu_root).run(1);
            assert_eq!(gpu[0].outcome, Outcome::Finished);
            let told = gpu[0]
                .warnings
                .iter()
                .any(|line| line.contains("no multiple of 16"));
            assert_eq!(
                told,
                precision == Precision::Bf16,
                "{name}: {:?}",
                gpu[0].warnings
            );
            for (mine, reference) in losses(&gpu[0].steps).iter().zip(losses(&cpu[0].steps)) {
                assert!(
                    (mine - reference).abs() < tolerance,
                    "{name}: {mine} against {reference}"
                );
            }
            let moved_root = world.checkpoints(&format!("{name}-moved"));
            let moved = Generation {
                root: &moved_root,
                ..on_gpu()
            };
            let moved = moved
                .from(restore(&cpu_root, &cpu[0].checkpoints[0]))
                .run(1);
            assert_eq!(moved[0].outcome, Outcome::Finished);
            assert!(
                moved[0].warnings[0].contains("device cpu -> cuda"),
                "{:?}",
                moved[0].warnings
            );
        }
    }
}
