use super::*;
use crate::capsule::{Environment, Numbers};
use crate::ledger::Step;

/// A run of 6 steps on 4 workers.
fn side() -> Side {
    let step = |step: u64| Step {
        generation: 1,
        step,
        first_sample: 4 * (step - 1),
        samples: 4,
        digest: [step as u8; 32],
        skipped: false,
    };
    let numbers = |step: u64| Numbers {
        generation: 1,
        loss: 3.0 / step as f64,
        grad_norm: 1.0,
        learning_rate: 3e-5,
    };
    let recipe = [
        ("name", "small"),
        ("optimizer.lr", "0.00003"),
        ("seed", "17"),
    ];
    Side {
        run: "small-1".into(),
        recipe: recipe
            .map(|(path, value)| (path.into(), value.into()))
            .into(),
        budget: Some(100),
        manifest: Some([2; 32]),
        base: Some([("config.json".into(), "3 bytes, 00".into())].into()),
        environments: vec![environment(6, "2.11.0")],
        worlds: [(1, 4)].into(),
        steps: (1..=6).map(step).collect(),
        numbers: (1..=6).map(|step| (step, numbers(step))).collect(),
        ..Side::default()
    }
}

fn environment(step: u64, libtorch: &str) -> Environment {
    Environment {
        step,
        generation: 1,
        world: 4,
        of: supra_checkpoint::Environment {
            build: "0.1.0".into(),
            libtorch: libtorch.into(),
            device: "cpu".into(),
            model: "x86_64 avx2".into(),
            threads: 1,
            nccl: String::new(),
        },
    }
}

/// Another loss from this step on.
fn drift(side: &mut Side, from: u64) {
    for (_, numbers) in side.numbers.range_mut(from..) {
        numbers.loss = f64::from_bits(numbers.loss.to_bits() + 1);
    }
}

/// Another generation, of so many workers, from this step on.
fn regroup(side: &mut Side, from: u64, world: u64) {
    side.worlds.insert(2, world);
    for step in &mut side.steps[from as usize - 1..] {
        step.generation = 2;
    }
    for (_, numbers) in side.numbers.range_mut(from..) {
        numbers.generation = 2;
    }
}

fn whats(difference: &Difference) -> Vec<&str> {
    let causes = difference.causes.iter();
    causes.map(|cause| cause.what.as_str()).collect()
}

#[test]
fn a_run_does_not_differ_from_itself() {
    let found = compare(&side(), &side());
    assert_eq!(found.verdict, Verdict::Same);
    assert_eq!(found.sentence, "the same bits in all 6 steps");
    assert_eq!((found.last_common_step, found.compared), (6, 6));
    assert!(found.causes.is_empty() && found.unknown.is_empty());
}

#[test]
fn a_run_that_ends_earlier_is_the_same_up_to_there() {
    let mut short = side();
    short.steps.truncate(4);
    let found = compare(&short, &side());
    assert_eq!(found.verdict, Verdict::Same);
    assert_eq!(
        found.sentence,
        "the same bits up to step 4, where A ends; B has 6"
    );
}

#[test]
fn another_number_of_workers_explains_what_follows_it() {
    let mut other = side();
    regroup(&mut other, 4, 3);
    drift(&mut other, 4);
    // It is there from the beginning, and so does not explain why the first three steps agree.
    other.environments = vec![environment(6, "2.10.0")];
    let found = compare(&side(), &other);
    assert_eq!(found.verdict, Verdict::Different);
    assert_eq!(
        found.sentence,
        "the same bits up to step 3; then step 4 differs in loss: workers 4 (generation 1) in A, 3 (generation 2) \
         in B since step 4"
    );
    assert_eq!(found.b.generations[1].world, Some(3));
    assert_eq!(whats(&found), ["libtorch", "workers"]);
}

#[test]
fn another_generation_of_the_same_size_is_no_difference() {
    let mut other = side();
    regroup(&mut other, 4, 4);
    other.voids = vec![(3, "rank 1 was lost".into())];
    let found = compare(&side(), &other);
    assert_eq!(found.verdict, Verdict::Same);
    assert_eq!(whats(&found), ["steps taken back"]);
    assert_eq!(found.causes[0].since, None);
}

#[test]
fn a_step_that_differs_for_no_known_reason_is_called_so() {
    let mut other = side();
    drift(&mut other, 5);
    other.recipe.insert("name".into(), "other".into());
    let found = compare(&side(), &other);
    assert_eq!(found.last_common_step, 4);
    assert!(
        found
            .sentence
            .ends_with("nothing that is known explains it"),
        "{}",
        found.sentence
    );
    assert_eq!(found.first[0].quantity, Quantity::Loss);
    assert_ne!(found.first[0].a, found.first[0].b);
}

#[test]
fn what_the_runs_were_made_from_is_named_key_by_key_and_file_by_file() {
    let mut other = side();
    other.recipe.insert("optimizer.lr".into(), "0.00001".into());
    other.recipe.insert("workers.max".into(), "8".into());
    other.budget = Some(200);
    other.base = Some([("model.safetensors".into(), "9 bytes, 11".into())].into());
    other.environments = vec![environment(6, "2.10.0")];
    let dataset = |hash: &str, tokenizer: &str| Dataset {
        tokenizer: tokenizer.into(),
        files: vec![DataFile {
            name: "a.parquet".into(),
            blake3: hash.into(),
        }],
        settings: [("append_eot".to_owned(), true.into())].into(),
    };
    let mut left = side();
    left.dataset = Some(dataset("00", "t"));
    other.dataset = Some(dataset("11", "t"));
    other.manifest = Some([3; 32]);
    drift(&mut other, 1);
    let found = compare(&left, &other);
    assert_eq!(
        whats(&found),
        [
            "optimizer.lr",
            "budget",
            "dataset",
            "file a.parquet",
            "file config.json",
            "file model.safetensors",
            "libtorch",
            "workers.max",
        ]
    );
    assert_eq!(found.causes[5].a, None);
    assert_eq!(
        found.sentence,
        "step 1 differs in loss: optimizer.lr 0.00003 in A, 0.00001 in B; budget 100 tokens in A, 200 tokens in B; dataset \
         020202020202 in A, 030303030303 in B; and 4 more"
    );
}

#[test]
fn a_skip_explains_the_steps_behind_it_but_not_itself() {
    let mut other = side();
    other.steps[2].skipped = true;
    drift(&mut other, 4);
    let found = compare(&side(), &other);
    assert_eq!(
        found.sentence,
        "the same bits up to step 2; then step 3 differs in whether it was skipped: nothing that is known explains it"
    );
    assert_eq!(found.first[1].step, 4);
}

#[test]
fn what_is_not_kept_is_not_compared_and_that_is_said() {
    let mut other = side();
    other.numbers.clear();
    other.environments.clear();
    other.base = None;
    let found = compare(&side(), &other);
    assert_eq!((found.verdict, found.compared), (Verdict::Same, 0));
    assert!(
        found.sentence.contains("losses are not kept"),
        "{}",
        found.sentence
    );
    assert_eq!(found.unknown.len(), 2, "{:?}", found.unknown);
    let mut untrained = side();
    untrained.steps.clear();
    let found = compare(&side(), &untrained);
    assert_eq!(found.verdict, Verdict::Untrained);
    assert!(
        found.sentence.contains("B has not trained yet"),
        "{}",
        found.sentence
    );
}

#[test]
fn numbers_of_a_voided_attempt_are_not_those_of_the_step() {
    let mut other = side();
    regroup(&mut other, 4, 4);
    // Metrics of the generation before are still there.
    for (_, numbers) in other.numbers.range_mut(4..) {
        numbers.generation = 1;
    }
    drift(&mut other, 4);
    let found = compare(&side(), &other);
    assert_eq!((found.verdict, found.compared), (Verdict::Same, 3));
}

#[test]
fn an_unknown_environment_is_taken_from_the_next_checkpoint() {
    let mut other = side();
    other.environments = vec![environment(3, "2.11.0"), environment(6, "2.10.0")];
    drift(&mut other, 4);
    let found = compare(&side(), &other);
    assert_eq!(
        found.sentence,
        "the same bits up to step 3; then step 4 differs in loss: libtorch 2.11.0 in A, 2.11.0, then 2.10.0 in B \
         since step 4"
    );
}
