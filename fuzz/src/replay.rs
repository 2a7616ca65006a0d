//! Every corpus, as it is and with blind changes.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::TARGETS;

/// For how long each target is fed with changed inputs.
const TIME: Duration = Duration::from_secs(2);
/// Changes that an input gets.
const CHANGES: usize = 4;
const NUMBERS: [&[u8]; 8] = [
    &[0xff; 8],
    &[0; 8],
    &[0xff, 0xff, 0xff, 0x7f],
    b"18446744073709551615",
    b"-1",
    b"1e999",
    b"\"",
    b"[",
];

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let mut files: Vec<_> = fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn change(bytes: &mut Vec<u8>, others: &[Vec<u8>], random: &mut ChaCha8Rng) {
    let place = random.random_range(0..=bytes.len());
    let length = random.random_range(0..=(bytes.len() - place).min(64));
    match random.random_range(0..6) {
        0 => {
            if let Some(byte) = bytes.get_mut(place) {
                *byte ^= 1 << random.random_range(0..8);
            }
        }
        1 => {
            if let Some(byte) = bytes.get_mut(place) {
                *byte = random.random();
            }
        }
        2 => drop(bytes.drain(place..place + length)),
        3 => {
            let piece = bytes[place..place + length].to_vec();
            bytes.splice(place..place, piece);
        }
        4 => {
            let number = NUMBERS[random.random_range(0..NUMBERS.len())];
            let end = bytes.len().min(place + number.len());
            bytes.splice(place..end, number.iter().copied());
        }
        _ => {
            let other = &others[random.random_range(0..others.len())];
            let from = random.random_range(0..=other.len());
            let end = other.len().min(from + 256);
            bytes.splice(place..place + length, other[from..end].iter().copied());
        }
    }
}

fn replay(name: &str) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    let seeds = corpus(name);
    seeds.iter().for_each(|seed| target(seed));
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let end = Instant::now() + TIME;
    while Instant::now() < end {
        let mut bytes = seeds[random.random_range(0..seeds.len())].clone();
        for _ in 0..random.random_range(1..=CHANGES) {
            change(&mut bytes, &seeds, &mut random);
        }
        let outcome = std::panic::catch_unwind(|| target(&bytes));
        if outcome.is_err() {
            let path = std::env::temp_dir().join(format!("supra-fuzz-{name}"));
            fs::write(&path, &bytes).unwrap();
            panic!("{name} breaks on {}", path.display());
        }
    }
}

#[test]
fn no_corpus_and_no_blind_change_of_it_breaks_a_reader() {
    std::thread::scope(|scope| {
        for (name, _) in TARGETS {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn_scoped(scope, move || replay(name))
                .unwrap();
        }
    });
}
