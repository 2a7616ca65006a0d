//! Damage at random places of every kind of file that has to be right, and whether it is found.
//!
//! What is read of a damaged file is what programs read, by the same functions. It has to be an error, or to be exactly what it
//! was: then the damage met bytes that mean nothing. Anything else is a wrong value that was taken for a right one.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

mod beside;
mod damage;
mod journal;
mod material;

use damage::Damage;

use crate::failure::{Failure, Result};
use crate::programs::Programs;
use crate::report::Row;

/// What the report says above its table.
pub const ABOUT: &str = "A small run trains, and what it has written is damaged, one file at a time: a bit turns (four of ten cases), a \
    byte becomes another (two), up to 512 bytes become zeros, the file is cut, grows by up to 512 random bytes, or is another \
    one of the same directory or of an older checkpoint. Then it is read as the programs read it. Checkpoints: the journalled \
    hash of the manifest, and the hashes in the manifest. Dataset: the hash that the run was opened with; every window, compared with \
    the checksums in the manifest. Journal: opened as by a coordinator, every ledger read and audited. Exported model: as by `supra-worker verify`, \
    which compares every file with the list of hashes beside them, the list among the damaged. Receipt: its own hash, as by `supra audit`. \
    Capsule: as by `supra audit --capsule`. `found` says no by an error. \
    `harmless` was read as exactly what was written, value by value, for the damage met nothing that means anything. Of token parquet: \
    statistics, the writer's name, the embedded schema, settings that no reader needs. Of the journal: free space of pages, \
    SQLite's counters and the fields of its header that it does not use, words of the tables' definitions that nothing depends on, the \
    snapshot (everything is replayed then), the log behind its last commit, and the file that says how far the journal has \
    come when nothing is left of it; such a journal was also written to, opened again, and held what it should. Of a capsule file: settings \
    of its compression. Not damaged here, for no hash of it is kept by itself: the manifest of held-out data, and that of training data \
    before a run is opened with it; what they say of tokens is checked against the data when it is read. A wrong value that \
    is taken for a right one ends the campaign, as does a panic.";

/// How many cases, and which.
#[derive(Clone, Copy, Debug)]
pub struct Corruption {
    /// Of each kind of file.
    pub cases: u32,
    /// Seed of places and damages.
    pub seed: u64,
}

/// What became of a damaged file.
enum Verdict {
    /// It is said.
    Found,
    /// Everything that was written is read.
    Harmless,
    /// Something else was read and nobody noticed: this.
    Taken(String),
}

/// A kind of file, and how it is read.
struct Kind {
    name: &'static str,
    /// Holds them, and what is needed to read them.
    directory: PathBuf,
    /// Those that are damaged.
    files: Vec<String>,
    /// Contents that may stand in the place of any of them.
    others: Vec<Vec<u8>>,
    read: Box<dyn Fn(&Path) -> Verdict>,
}

impl Kind {
    /// Files of `directory`, each of which may be swapped with any other file there or in `elsewhere`.
    fn new(
        name: &'static str,
        directory: &Path,
        files: Vec<String>,
        elsewhere: &[&Path],
        read: impl Fn(&Path) -> Verdict + 'static,
    ) -> Result<Kind> {
        if files.is_empty() {
            return Err(Failure::new(format!("there are no files of {name}")));
        }
        let mut others = Vec::new();
        for directory in elsewhere.iter().copied().chain([directory]) {
            for entry in fs::read_dir(directory)? {
                let path = entry?.path();
                if path.is_file() {
                    others.push(fs::read(path)?);
                }
            }
        }
        Ok(Kind {
            name,
            directory: directory.to_owned(),
            files,
            others,
            read: Box::new(read),
        })
    }

    /// Damages the files so often.
    fn damage(&self, cases: u32, scratch: &Path, random: &mut ChaCha8Rng) -> Result<Row> {
        let whole = Whole::read(&self.directory)?;
        whole.restore(scratch)?;
        if matches!((self.read)(scratch), Verdict::Found) {
            return Err(Failure::new(format!(
                "{} is damaged from the start",
                self.name
            )));
        }
        let (mut found, mut harmless) = (0, 0);
        for _ in 0..cases {
            let name = &self.files[random.random_range(0..self.files.len())];
            let bytes = whole.file(name)?;
            let (damage, changed) = loop {
                let damage = Damage::any(bytes.len(), self.others.len(), random);
                let changed = damage.of(bytes, &self.others);
                if changed != bytes {
                    break (damage, changed);
                }
            };
            whole.restore(scratch)?;
            fs::write(scratch.join(name), changed)?;
            match catch_unwind(AssertUnwindSafe(|| (self.read)(scratch))) {
                Ok(Verdict::Found) => found += 1,
                Ok(Verdict::Harmless) => harmless += 1,
                Ok(Verdict::Taken(what)) => {
                    return Err(Failure::new(format!(
                        "{}: {name}: {damage}: {what}",
                        self.name
                    )));
                }
                Err(_) => {
                    return Err(Failure::new(format!(
                        "{}: {name}: {damage}: panic",
                        self.name
                    )));
                }
            }
        }
        fs::remove_dir_all(scratch)?;
        Ok(Row::new()
            .with("kind", self.name)
            .with("cases", cases)
            .with("found", found)
            .with("harmless", harmless))
    }
}

/// The files of a directory as they were.
struct Whole(Vec<(String, Vec<u8>)>);

impl Whole {
    fn read(directory: &Path) -> Result<Whole> {
        let mut files = Vec::new();
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_file() {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                files.push((name.into_owned(), fs::read(&path)?));
            }
        }
        Ok(Whole(files))
    }

    fn file(&self, name: &str) -> Result<&[u8]> {
        let file = self.0.iter().find(|(known, _)| known == name);
        let file = file.ok_or_else(|| Failure::new(format!("{name} is not there")))?;
        Ok(&file.1)
    }

    /// Makes `directory` hold just these.
    fn restore(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        for entry in fs::read_dir(directory)? {
            fs::remove_file(entry?.path())?;
        }
        for (name, bytes) in &self.0 {
            fs::write(directory.join(name), bytes)?;
        }
        Ok(())
    }
}

impl Corruption {
    /// Runs the campaign.
    ///
    /// # Errors
    /// At the first damage that is neither found nor harmless.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let kinds = material::make(programs, directory)?;
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let scratch = directory.join("damaged");
        let damaged = kinds
            .iter()
            .map(|kind| kind.damage(self.cases, &scratch, &mut random));
        damaged.collect()
    }
}
