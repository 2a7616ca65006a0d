//! Folders of checkpoints that are whole, damaged, and not what they seem.

use std::collections::BTreeMap;
use std::fs;

use proptest::prelude::*;
use supra_checkpoint::Manifest;
use supra_checkpoint::manifest::{FORMAT, StoredFile};
use supra_checkpoint::tree::TreeHasher;
use tempfile::TempDir;

use super::*;
use crate::ledger::{Open, Step, Tail, hex};

/// 10 tokens per sample, 4 samples per step, 10 samples: steps of 4, 4 and 2.
const RECIPE: &str = "\
name: rig
base: { path: /base }
data: { train: /data }
budget: { tokens: 105 }
batch: { tokens: 40, micro_batch: 1, sequence_length: 10 }
optimizer: { warmup: 1 steps }
checkpoint: { keep: 2 }
";

fn chain(bodies: impl IntoIterator<Item = Body>) -> Vec<Record> {
    let mut tail = Tail::default();
    let link = |body| {
        let record = tail.next(body);
        tail.advance(&record);
        record
    };
    bodies.into_iter().map(link).collect()
}

fn opening(run: &str) -> Body {
    Body::Open(Open {
        run: run.to_owned(),
        recipe_hash: *blake3::hash(RECIPE.as_bytes()).as_bytes(),
        manifest_hash: [2; 32],
        windows: 50,
        sequence_length: 10,
        batch_samples: 4,
        samples: 10,
        steps: 3,
    })
}

fn step(generation: u64, step: u64) -> Body {
    Body::Step(Step {
        generation,
        step,
        first_sample: 4 * (step - 1),
        samples: if step == 3 { 2 } else { 4 },
        digest: [step as u8; 32],
        skipped: false,
    })
}

fn void(generation: u64, after_step: u64) -> Body {
    Body::Void {
        generation,
        after_step,
        reason: "rank 1 vanished".to_owned(),
    }
}

/// A run that lost step 2 and trained it again.
fn bodies() -> Vec<Body> {
    vec![
        opening("rig-1"),
        step(1, 1),
        step(1, 2),
        void(1, 1),
        step(2, 2),
    ]
}

fn manifest(run: &str, step: u64, generation: u64, ledger: &[Record]) -> Manifest {
    Manifest {
        format: FORMAT,
        plan_version: VERSION,
        run: run.to_owned(),
        generation,
        world: 1,
        step,
        tokens: 40 * step,
        next_sample: (4 * step).min(10),
        recipe: RECIPE.to_owned(),
        dataset: hex(&[2; 32]),
        replica_hash: hex(&[1; 32]),
        ledger_head: hex(&ledger.last().unwrap().hash),
        ..Manifest::default()
    }
}

/// A folder of checkpoints.
struct Place(TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    fn url(&self) -> String {
        self.0.path().display().to_string()
    }

    fn at(&self, step: u64, generation: u64) -> PathBuf {
        let name = store::directory_name(step, generation);
        self.0.path().join(name)
    }

    /// Writes a checkpoint with this manifest, a file and the ledger; returns the hash of its manifest.
    fn write(&self, mut manifest: Manifest, ledger: &[Record]) -> [u8; 32] {
        let dir = self.at(manifest.step, manifest.generation);
        fs::create_dir(&dir).unwrap();
        let mut text = Vec::new();
        for record in ledger {
            lines::append(&mut text, record.clone());
        }
        let files = BTreeMap::from([("model", b"weights".to_vec()), (LEDGER, text)]);
        for (name, bytes) in files {
            fs::write(dir.join(name), &bytes).unwrap();
            manifest.files.insert(name.to_owned(), stored(&bytes));
        }
        let bytes = manifest.to_bytes();
        fs::write(dir.join(PUBLISHED), &bytes).unwrap();
        *blake3::hash(&bytes).as_bytes()
    }

    /// Checkpoints of steps 1 and 2 of one run.
    fn two() -> Place {
        let place = Place::new();
        let mut bodies = bodies();
        let early = chain(bodies[..2].to_vec());
        let manifest_hash = place.write(manifest("rig-1", 1, 1, &early), &early);
        let durable = Body::Durable {
            generation: 1,
            step: 1,
            manifest_hash,
        };
        bodies.insert(2, durable);
        let ledger = chain(bodies);
        place.write(manifest("rig-1", 2, 2, &ledger), &ledger);
        place
    }

    fn read(&self) -> Result<Adoption, AdoptError> {
        from(&self.url())
    }
}

fn stored(bytes: &[u8]) -> StoredFile {
    let mut hasher = TreeHasher::default();
    hasher.update(bytes);
    hasher.finish()
}

fn from(url: &str) -> Result<Adoption, AdoptError> {
    read(url, false, &BTreeSet::new(), &mut |_| true)
}

#[test]
fn the_newest_checkpoint_of_a_folder_is_taken_and_the_older_ones_stay() {
    let place = Place::two();
    // Of a generation that the ledger does not know, and not published.
    fs::create_dir(place.at(3, 7)).unwrap();
    fs::write(place.0.path().join("receipt.json"), "{}").unwrap();
    let adoption = place.read().unwrap();
    let Submission {
        id,
        name,
        recipe,
        checkpoint_root,
        keep,
        budget_tokens,
        ..
    } = adoption.submission;
    assert_eq!((id.as_str(), name.as_str(), keep), ("rig-1", "rig", 2));
    assert_eq!((recipe.as_str(), budget_tokens), (RECIPE, 100));
    assert_eq!(checkpoint_root, place.0.path());
    assert_eq!(adoption.checkpoint.step, 2);
    let older: Vec<u64> = adoption.older.iter().map(|it| it.step).collect();
    assert_eq!((older, adoption.ledger.len()), (vec![1], 6));
    assert!(adoption.passed_over.is_empty());
    assert_eq!(adoption.generation, 7, "whoever wrote there may still live");
}

#[test]
fn an_older_checkpoint_can_be_named_and_newer_ones_are_passed_over() {
    let place = Place::two();
    let adoption = from(&place.at(1, 1).display().to_string()).unwrap();
    assert_eq!((adoption.checkpoint.step, adoption.older.len()), (1, 0));
    assert_eq!(adoption.ledger.len(), 2);
    let [newer] = &adoption.passed_over[..] else {
        panic!("{:?}", adoption.passed_over);
    };
    assert_eq!(newer.checkpoint.step, 2);
    assert!(newer.problem.contains("newer than that of step 1"));
    assert_eq!(adoption.generation, 2);
}

#[test]
fn a_damaged_checkpoint_gives_way_to_an_older_one_unless_it_is_named_or_strict() {
    for file in ["model", LEDGER, PUBLISHED] {
        let place = Place::two();
        let newest = place.at(2, 2);
        let mut bytes = fs::read(newest.join(file)).unwrap();
        bytes[3] ^= 4;
        fs::write(newest.join(file), bytes).unwrap();
        let adoption = place.read().unwrap();
        assert_eq!(adoption.checkpoint.step, 1);
        let problem = &adoption.passed_over[0].problem;
        assert!(problem.contains(file), "{problem}");
        let strict = read(&place.url(), true, &BTreeSet::new(), &mut |_| true);
        for refused in [strict, from(&newest.display().to_string())] {
            let error = refused.unwrap_err();
            assert!(matches!(error, AdoptError::Broken(_)), "{error}");
            assert!(error.to_string().contains(file), "{error}");
        }
    }
}

#[test]
fn what_cannot_be_adopted_says_why() {
    let refused = |place: &Place, words: &str| {
        let error = place.read().unwrap_err();
        assert!(matches!(error, AdoptError::Input(_)), "{error}");
        assert!(error.to_string().contains(words), "{words}: {error}");
    };
    let place = Place::new();
    refused(&place, "no published checkpoint");
    let ledger = chain(bodies());
    let bare = |manifest: Manifest| {
        let dir = place.at(manifest.step, manifest.generation);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(PUBLISHED), manifest.to_bytes()).unwrap();
    };
    let other = || manifest("rig-1", 2, 2, &ledger);
    bare(Manifest {
        format: 2,
        ..other()
    });
    refused(&place, "carries no ledger");
    fs::remove_dir_all(place.at(2, 2)).unwrap();
    place.write(
        Manifest {
            plan_version: VERSION + 1,
            ..other()
        },
        &ledger,
    );
    refused(&place, "version");
    bare(manifest("rig-2", 1, 1, &ledger));
    refused(&place, "rig-1, rig-2");
    let error = from("checkpoints").unwrap_err();
    assert!(error.to_string().contains("absolute"), "{error}");
}

#[test]
fn a_known_run_is_not_read_at_all() {
    let place = Place::two();
    let known = BTreeSet::from(["rig-1".to_owned()]);
    let error = read(&place.url(), false, &known, &mut |_| false).unwrap_err();
    assert!(matches!(error, AdoptError::Known(_)), "{error}");
    let error = read(&place.url(), false, &BTreeSet::new(), &mut |_| false).unwrap_err();
    assert!(matches!(error, AdoptError::Stopped), "{error}");
}

#[test]
fn a_ledger_has_to_be_that_of_its_manifest() {
    let ledger = chain(bodies());
    let right = manifest("rig-1", 2, 2, &ledger);
    proof::prove(&ledger, &right).unwrap();
    // The head may be that of a later step.
    let at_one = manifest("rig-1", 1, 1, &ledger);
    proof::prove(&ledger, &at_one).unwrap();
    type Change = fn(&mut Manifest);
    let changes: [(&str, Change); 6] = [
        ("another recipe", |it| it.recipe.push('\n')),
        ("opened for the data", |it| it.dataset = hex(&[3; 32])),
        ("that of run rig-1", |it| it.run = "rig-2".to_owned()),
        ("accounts for 2 steps", |it| it.step = 3),
        ("goes on with sample 9", |it| it.next_sample = 9),
        ("remembers no head", |it| it.ledger_head.clear()),
    ];
    for (words, change) in changes {
        let mut wrong = right.clone();
        change(&mut wrong);
        let error = proof::prove(&ledger, &wrong).unwrap_err();
        assert!(error.contains(words), "{words}: {error}");
    }
    let mut later = bodies();
    later.push(Body::Durable {
        generation: 2,
        step: 2,
        manifest_hash: [8; 32],
    });
    let later = chain(later);
    let error = proof::prove(&later, &manifest("rig-1", 1, 1, &later)).unwrap_err();
    assert!(error.contains("later steps are durable"), "{error}");
}

proptest! {
    /// A record is dropped, repeated, altered or moved; and, as a forger would, the chain is made anew from there.
    #[test]
    fn an_altered_ledger_is_refused(
        place in 0usize..5, kind in 0usize..4, again in any::<bool>(), digit in 0usize..32,
    ) {
        let ledger = chain(bodies());
        let manifest = manifest("rig-1", 2, 2, &ledger);
        let mut altered = ledger.clone();
        match kind {
            0 => drop(altered.remove(place)),
            1 => altered.insert(place, ledger[place].clone()),
            2 => altered.swap(place, (place + 1) % ledger.len()),
            _ => match &mut altered[place].body {
                Body::Open(open) => open.recipe_hash[digit] ^= 1,
                Body::Step(step) => step.digest[digit] ^= 1,
                Body::Void { reason, .. } => reason.push('!'),
                _ => unreachable!("there are no others"),
            },
        }
        let head = |ledger: &[Record]| ledger.last().map(|record| hex(&record.hash));
        if again {
            altered = chain(altered.into_iter().map(|record| record.body));
            prop_assert_ne!(head(&altered), head(&ledger));
        }
        prop_assert!(proof::prove(&altered, &manifest).is_err());
        // Even with the manifest's word for it, samples are there once. The step that a void takes back need not be there.
        let taken_back = place == 2 && kind == 0;
        if again && kind < 2 && !taken_back && matches!(ledger[place].body, Body::Step(_)) {
            let ledger_head = head(&altered).unwrap_or_default();
            let forged = Manifest { ledger_head, ..manifest };
            prop_assert!(proof::prove(&altered, &forged).is_err());
        }
    }
}
