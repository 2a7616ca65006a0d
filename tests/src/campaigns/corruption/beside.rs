//! What a run leaves beside its checkpoints, and what leaves it: the receipt, a capsule, an exported model.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use supra_checkpoint::{seal, sums};
use supra_coordinator::capsule::{Capsule, INDEX, RECEIPT, SEALED_RECEIPT};

use super::material::{LIMIT, copy, names};
use super::{Kind, Verdict};
use crate::cluster::Cluster;
use crate::failure::{Failure, Result};
use crate::process;
use crate::programs::Programs;

/// Makes them of a run that has finished, below `directory`.
///
/// # Errors
/// A command fails.
pub fn make(
    programs: &Programs,
    cluster: &Cluster,
    run: &str,
    directory: &Path,
) -> Result<Vec<Kind>> {
    let checkpoint = cluster.last_checkpoint(run)?;
    let mut kinds = vec![
        model(programs, &checkpoint, &directory.join("model"))?,
        receipt(&checkpoint, &directory.join("receipt"))?,
    ];
    kinds.extend(capsule(cluster, run, directory)?);
    Ok(kinds)
}

/// Whatever differs in such a file is found by a hash.
fn proved<E>(result: std::result::Result<(), E>) -> Verdict {
    match result {
        Err(_) => Verdict::Found,
        Ok(()) => Verdict::Taken("every hash is right".to_owned()),
    }
}

/// As `supra-worker verify` reads it.
fn model(programs: &Programs, checkpoint: &Path, to: &Path) -> Result<Kind> {
    let mut export = programs.worker();
    export.arg("export").arg("--checkpoint").arg(checkpoint);
    export.arg("--out").arg(to);
    process::run(export, LIMIT)?.expect_code(0)?;
    Kind::new("exported model", to, names(to)?, &[], |directory| {
        proved(sums::verify(directory).map(drop))
    })
}

/// As `supra audit` reads it.
fn receipt(checkpoint: &Path, to: &Path) -> Result<Kind> {
    let root = checkpoint.parent().unwrap_or(checkpoint);
    // It is written after the run is called finished.
    let end = Instant::now() + LIMIT;
    while !root.join(RECEIPT).exists() {
        if Instant::now() > end {
            return Err(Failure::new("the run has no receipt"));
        }
        thread::sleep(Duration::from_millis(50));
    }
    copy(root, to, &[RECEIPT])?;
    let files = vec![RECEIPT.to_owned()];
    Kind::new("receipt", to, files, &[checkpoint], |directory| {
        proved(match fs::read(directory.join(RECEIPT)) {
            Ok(bytes) => seal::check(&bytes, SEALED_RECEIPT),
            Err(error) => Err(error.to_string()),
        })
    })
}

/// As `supra audit --capsule` and `supra diff` read it: the file, and the index of a folder.
fn capsule(cluster: &Cluster, run: &str, directory: &Path) -> Result<Vec<Kind>> {
    const FILE: &str = "run.tar.zst";
    let place = directory.join("capsule");
    fs::create_dir_all(&place)?;
    let path = place.join(FILE);
    let out = path.to_string_lossy();
    cluster
        .supra(&["capsule", run, "--out", &out])?
        .expect_code(0)?;
    let whole = Capsule::read(&path)?;
    let members: BTreeMap<String, Vec<u8>> = whole
        .members()
        .map(|(name, bytes)| (name.to_owned(), bytes.to_vec()))
        .collect();
    let folder = directory.join("unpacked");
    whole.write(&folder)?;
    let index = directory.join("index");
    copy(&folder, &index, &[INDEX])?;
    let read = move |directory: &Path| match Capsule::read(&directory.join(FILE)) {
        Err(_) => Verdict::Found,
        Ok(read) if read == whole => Verdict::Harmless,
        Ok(_) => Verdict::Taken("another capsule".to_owned()),
    };
    let listed = move |directory: &Path| {
        let path = directory.join(INDEX);
        proved(match fs::read(&path) {
            Ok(bytes) => match Capsule::checked(&path, &bytes, members.clone()) {
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            },
            Err(error) => Err(error.to_string()),
        })
    };
    Ok(vec![
        Kind::new("capsule", &place, vec![FILE.to_owned()], &[], read)?,
        Kind::new(
            "capsule, index of a folder",
            &index,
            vec![INDEX.to_owned()],
            &[&folder.join("data")],
            listed,
        )?,
    ])
}
