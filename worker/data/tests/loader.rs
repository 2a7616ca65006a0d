//! Samples and batches in the plan's order.

use std::collections::BTreeMap;

use supra_data::{Loader, Prefetch, Reader, Sample, batch};
use supra_recipes::{Plan, Recipe};

use crate::support::{Place, assert_error, documents};

pub fn recipe(length: u64, samples: u64, batch: u64) -> Recipe {
    let text = format!(
        "name: test\nbase: {{ path: base }}\ndata: {{ train: data, seed: 3 }}\nbudget: {{ tokens: {} }}\n\
         batch: {{ tokens: {}, micro_batch: 1, sequence_length: {length} }}\noptimizer: {{ warmup: 1 steps }}\n",
        length * samples,
        length * batch
    );
    Recipe::parse(&text, "test.yaml").unwrap()
}

fn dataset() -> Place {
    let place = Place::new();
    for (name, seed) in [("a.parquet", 31), ("b.parquet", 32)] {
        let documents = documents(seed, 600, 60);
        crate::support::Parquet::default().write(
            &place.data().join(name),
            &documents.chunks(70).collect::<Vec<_>>(),
        );
    }
    place.index().unwrap();
    place
}

fn loader(place: &Place) -> Loader {
    let reader = Reader::open(&place.data(), 8).unwrap();
    let plan = Plan::new(
        &recipe(8, 2203, 50),
        reader.windows(),
        reader.manifest().hash(),
    )
    .unwrap();
    Loader::new(reader, plan)
}

#[test]
fn over_changing_world_sizes_every_sample_appears_once_and_is_the_same() {
    let place = dataset();
    let mut one = loader(&place);
    let mut many = loader(&place);
    let mut seen: BTreeMap<u64, Sample> = BTreeMap::new();
    for step in 1..=one.plan().steps {
        let world = [1, 3, 4, 2, 7][step as usize % 5];
        let whole = batch(&mut one, step, 0, 1).unwrap().samples;
        let parts: Vec<Sample> = (0..world)
            .flat_map(|rank| batch(&mut many, step, rank, world).unwrap().samples)
            .collect();
        assert_eq!(parts, whole);
        for sample in parts {
            assert_eq!(sample.tokens.len(), 9);
            assert!(seen.insert(sample.id, sample).is_none());
        }
    }
    assert!(seen.keys().copied().eq(0..2203));
    let past = one.plan().steps + 1;
    assert_eq!(batch(&mut one, past, 0, 1).unwrap().samples, []);
    let mut reader = Reader::open(&place.data(), 8).unwrap();
    for (id, sample) in seen {
        let window = one.plan().window(id);
        assert_eq!(
            reader.window(window).unwrap(),
            (sample.tokens, sample.starts)
        );
    }
}

#[test]
fn reading_ahead_yields_the_same_batches_and_ends_with_the_plan() {
    let place = dataset();
    let mut plain = loader(&place);
    let ahead = Prefetch::start(loader(&place), 5, 1, 3, 2, |batch| batch);
    let mut next = 5;
    for item in ahead {
        let (step, found) = item.unwrap();
        assert_eq!(
            (step, &found),
            (next, &batch(&mut plain, step, 1, 3).unwrap())
        );
        next += 1;
    }
    assert_eq!(next, plain.plan().steps + 1);
}

#[test]
fn reading_ahead_reports_an_error_once_and_stops_when_dropped() {
    let place = dataset();
    drop(Prefetch::start(loader(&place), 1, 0, 1, 1, drop));
    let broken = loader(&place);
    for name in ["a.parquet", "b.parquet"] {
        std::fs::write(place.data().join(name), b"gone").unwrap();
    }
    let mut ahead = Prefetch::start(broken, 1, 0, 1, 1, drop);
    assert_error(
        ahead.next().unwrap(),
        &[".parquet: cannot be read as parquet"],
    );
    assert!(ahead.next().is_none());
}

#[test]
fn a_plan_for_another_dataset_is_refused() {
    let place = dataset();
    let reader = Reader::open(&place.data(), 8).unwrap();
    let plan = Plan::new(
        &recipe(16, 100, 10),
        reader.windows(),
        reader.manifest().hash(),
    )
    .unwrap();
    assert_error(
        Loader::new(reader, plan).sample(0),
        &["the plan is for", "of 16 tokens"],
    );
}
