//! A storage for checkpoints that can be slow, full, closed or stuck, whoever writes to it: see `storage.cpp`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use crate::failure::Result;
use crate::preload::preloaded;
use crate::programs::Programs;

/// Longest time that a slow storage takes for anything but bytes; the shortest is half of it. It makes a checkpoint take some
/// tenths of a second, so that whoever looks every millisecond meets each of its phases.
const SLOW: Duration = Duration::from_millis(16);

/// What the storage does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mood {
    /// What storage does.
    Fast,
    /// Everything takes longer.
    Slow,
    /// All but reading fails.
    Refuses(Errno),
    /// Nothing can be added: half of what is written is taken, and then nothing.
    Full,
    /// No call returns before the mood is another one.
    Hangs,
}

/// The library between programs and C library, compiled once.
pub(super) struct Shim(PathBuf);

impl Shim {
    pub fn compile(directory: &Path) -> Result<Self> {
        preloaded(directory, "storage", include_str!("storage.cpp")).map(Self)
    }
}

/// A directory and what happens in it.
pub(super) struct Storage {
    directory: PathBuf,
    mood: PathBuf,
    library: PathBuf,
}

impl Storage {
    /// Makes a fast one below `folder`.
    pub fn create(shim: &Shim, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder.join("storage"))?;
        // The library compares with the names that the system has for open files.
        let folder = folder.canonicalize()?;
        let storage = Self {
            directory: folder.join("storage"),
            mood: folder.join("storage.mood"),
            library: shim.0.clone(),
        };
        storage.set(Mood::Fast)?;
        Ok(storage)
    }

    /// Where checkpoints go to.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Programs to which this storage happens.
    pub fn happens_to(&self, programs: &Programs) -> Programs {
        programs
            .with("LD_PRELOAD", &self.library)
            .with("STORAGE", &self.directory)
            .with("STORAGE_MOOD", &self.mood)
    }

    /// Changes what it does from the next call on, and for those that hang.
    pub fn set(&self, mood: Mood) -> Result<()> {
        let words = match mood {
            Mood::Fast => "fast".to_owned(),
            Mood::Slow => format!("slow {}", SLOW.as_micros()),
            Mood::Refuses(error) => format!("refuses {}", error as i32),
            Mood::Full => "full".to_owned(),
            Mood::Hangs => "hangs".to_owned(),
        };
        // Nobody may read half of it.
        let next = self.mood.with_extension("next");
        fs::write(&next, words)?;
        Ok(fs::rename(&next, &self.mood)?)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::process::run;

    #[test]
    fn a_storage_does_to_programs_what_it_is_told_and_nothing_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::create(&Shim::compile(folder.path()).unwrap(), folder.path());
        let storage = storage.unwrap();
        let elsewhere = folder.path().join("elsewhere");
        let attempt = |mood, to: &Path, limit| {
            storage.set(mood).unwrap();
            let mut copy = Command::new("dd");
            copy.args(["if=/dev/zero", "bs=1000", "count=1", "conv=notrunc"])
                .arg(format!("of={}", to.display()))
                .env("LD_PRELOAD", &storage.library)
                .env("STORAGE", &storage.directory)
                .env("STORAGE_MOOD", &storage.mood);
            run(copy, limit)
        };
        let file = storage.directory().join("file");
        let ends = |mood, to: &Path, words: &[&str]| {
            let output = attempt(mood, to, Duration::from_secs(30)).unwrap();
            output.expect_words(words).unwrap();
        };
        ends(Mood::Slow, &file, &["1000 bytes"]);
        ends(Mood::Refuses(Errno::EROFS), &file, &["Read-only"]);
        ends(Mood::Refuses(Errno::EACCES), &file, &["Permission denied"]);
        ends(Mood::Full, &file, &["No space left"]);
        ends(Mood::Full, &elsewhere, &["1000 bytes"]);
        assert!(attempt(Mood::Hangs, &file, Duration::from_millis(300)).is_err());
        ends(Mood::Fast, &file, &["1000 bytes"]);
    }
}
