//! What is damaged: the files of a small real run, and how each kind is read.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use supra_checkpoint::{EXP_AVG, EXP_AVG_SQ, Manifest, PUBLISHED, Store, verify};
use supra_data::Reader;

use super::beside;
use super::journal::{self, Known};
use super::{Kind, Verdict};
use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::fixture::{Fixture, TinyRecipe};
use crate::process;
use crate::programs::Programs;

const SEQUENCE_LENGTH: u64 = 32;
pub const LIMIT: Duration = Duration::from_secs(120);
const JOURNAL: &str = "journal.db";
const LOG: &str = "journal.db-wal";
const HEAD: &str = "journal.head";

/// Trains a run and sorts what it left.
///
/// # Errors
/// The run does not train.
pub fn make(programs: &Programs, directory: &Path) -> Result<Vec<Kind>> {
    let fixture = Fixture::create(programs, directory)?;
    let recipe = TinyRecipe {
        name: "corruption".to_owned(),
        budget: 8 * 512,
        checkpoint_every: 4 * 512,
        workers: (1, 1),
        ..TinyRecipe::default()
    };
    let mut cluster = Cluster::with_workers(programs, &directory.join("cluster"), 1)?;
    let run = cluster.submit(&recipe.write(&fixture)?)?;
    cluster.wait_finished(&run, LIMIT)?;
    let mut kinds = checkpoints(&cluster, &run)?;
    kinds.extend(beside::make(programs, &cluster, &run, directory)?);
    let packed = directory.join("packed");
    let mut pack = programs.supra();
    pack.args(["data", "pack"]).arg(&fixture.data);
    pack.arg("--output").arg(&packed);
    process::run(pack, LIMIT)?.expect_code(0)?;
    kinds.push(dataset_manifest(&fixture.data)?);
    kinds.push(tokens("token parquet", &fixture.data, ".parquet")?);
    kinds.push(tokens("packed store", &packed, ".bin")?);

    // As kill -9 leaves it: what the run decided is in the log.
    cluster.coordinator()?.kill()?;
    let killed = directory.join("killed");
    copy(&cluster.state(), &killed, &[JOURNAL, LOG, HEAD])?;
    kinds.push(journal("journal, its log", &killed, &[LOG])?);
    kinds.push(journal("journal, how far it came", &killed, &[HEAD])?);
    let closed = directory.join("closed");
    copy(&killed, &closed, &[JOURNAL, LOG, HEAD])?;
    drop(supra_coordinator::journal::Journal::open(&closed)?);
    kinds.push(journal("journal", &closed, &[JOURNAL])?);
    let long = directory.join("long");
    journal::write_long(&long)?;
    kinds.push(journal("journal with a snapshot", &long, &[JOURNAL])?);
    Ok(kinds)
}

pub fn copy(from: &Path, to: &Path, names: &[&str]) -> Result<()> {
    fs::create_dir_all(to)?;
    for name in names {
        let path = from.join(name);
        fs::copy(&path, to.join(name)).while_doing(path.display())?;
    }
    Ok(())
}

/// Names of the files in a directory.
pub fn names(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// The manifest of the newest checkpoint and its files, each of which may be swapped with any other and with those of an older
/// checkpoint.
fn checkpoints(cluster: &Cluster, run: &str) -> Result<Vec<Kind>> {
    let published: Vec<_> = cluster
        .checkpoints(run)?
        .into_iter()
        .filter(|checkpoint| checkpoint.published)
        .collect();
    let [.., older, newest] = published.as_slice() else {
        return Err(Failure::new("the run has no two checkpoints"));
    };
    let directory = PathBuf::from(&newest.path);
    let hash: [u8; 32] = newest.manifest_hash.as_slice().try_into()?;
    let store = Store::open(&newest.path)?;
    let manifest = verify::manifest(&store, "", Some(&hash))?;
    let is_moment = |key: &str| key.starts_with(EXP_AVG) || key.starts_with(EXP_AVG_SQ);
    let holds = |name: &str, moments: bool| {
        let tensors = manifest.tensors.iter();
        let mut of_kind = tensors.filter(|(key, _)| is_moment(key) == moments);
        of_kind.any(|(_, tensor)| tensor.slices.iter().any(|slice| slice.file == name))
    };
    let mut files: [Vec<String>; 3] = Default::default();
    for name in manifest.files.keys() {
        let kind = match (holds(name, false), holds(name, true)) {
            (true, _) => 0,
            (_, true) => 1,
            _ => 2,
        };
        files[kind].push(name.clone());
    }
    let [weights, moments, companions] = files;
    let of = |name, files| {
        Kind::new(
            name,
            &directory,
            files,
            &[Path::new(&older.path)],
            move |directory| checkpoint(directory, &hash),
        )
    };
    Ok(vec![
        of("checkpoint manifest", vec![PUBLISHED.to_owned()])?,
        of("checkpoint, weights", weights)?,
        of("checkpoint, moments", moments)?,
        of("checkpoint, configuration and tokenizer", companions)?,
    ])
}

/// What whoever starts from a checkpoint makes of it.
fn checkpoint(directory: &Path, journalled: &[u8; 32]) -> Verdict {
    let proved = || -> std::result::Result<Manifest, supra_checkpoint::StoredError> {
        let store = Store::open(&directory.to_string_lossy())?;
        let manifest = verify::manifest(&store, "", Some(journalled))?;
        for (name, stored) in &manifest.files {
            verify::file(&store, name, stored)?;
        }
        Ok(manifest)
    };
    match proved() {
        Err(_) => Verdict::Found,
        Ok(_) => Verdict::Taken("every hash is right".to_owned()),
    }
}

/// A run remembers the hash of the manifest that it was opened with.
fn dataset_manifest(data: &Path) -> Result<Kind> {
    let opened = supra_data::Manifest::load(data)?.hash();
    let files = vec!["dataset.json".to_owned()];
    Kind::new("dataset manifest", data, files, &[], move |directory| {
        match supra_data::Manifest::load(directory) {
            Ok(manifest) if manifest.hash() == opened => {
                Verdict::Taken("the hash is right".to_owned())
            }
            _ => Verdict::Found,
        }
    })
}

type Window = (Vec<u32>, Vec<u32>);

/// Every window of a dataset.
fn windows(directory: &Path) -> std::result::Result<Vec<Window>, supra_data::DataError> {
    let mut reader = Reader::open(directory, SEQUENCE_LENGTH)?;
    (0..reader.windows())
        .map(|window| reader.window(window))
        .collect()
}

/// The files of a dataset whose names end so.
fn tokens(name: &'static str, data: &Path, ending: &str) -> Result<Kind> {
    let whole = windows(data)?;
    let files = names(data)?
        .into_iter()
        .filter(|name| name.ends_with(ending));
    Kind::new(
        name,
        data,
        files.collect(),
        &[],
        move |directory| match windows(directory) {
            Err(_) => Verdict::Found,
            Ok(read) if read == whole => Verdict::Harmless,
            Ok(_) => Verdict::Taken("other tokens".to_owned()),
        },
    )
}

fn journal(name: &'static str, directory: &Path, files: &[&str]) -> Result<Kind> {
    let scratch = directory.with_extension("known");
    copy(
        directory,
        &scratch,
        &names(directory)?
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>(),
    )?;
    let known = Known::of(&scratch)?;
    fs::remove_dir_all(&scratch)?;
    let files = files.iter().map(|file| (*file).to_owned()).collect();
    Kind::new(name, directory, files, &[], move |directory| {
        known.compare(directory)
    })
}
