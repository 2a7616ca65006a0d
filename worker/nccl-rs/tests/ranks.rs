//! Ranks that are processes of this executable, and the board on which they leave words for each other.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nccl::{Comm, Library, Starting, UniqueId};
use tempfile::TempDir;

const RANK: &str = "NCCL_RS_TEST_RANK";
const WORLD: &str = "NCCL_RS_TEST_WORLD";
const BOARD: &str = "NCCL_RS_TEST_BOARD";

/// A directory of files that say something by being there.
pub struct Board(PathBuf);

/// The ranks that a test has started. Dropping them kills what still runs.
pub struct Ranks {
    pub board: Board,
    children: Vec<Option<Child>>,
    _directory: TempDir,
}

/// This process, when it is a rank.
pub struct Rank {
    pub rank: u32,
    pub world: u32,
    pub board: Board,
}

impl Board {
    /// Puts `word` up with `content`, all at once.
    pub fn say(&self, word: &str, content: &[u8]) {
        let unfinished = self.0.join(format!("{word}.new"));
        fs::write(&unfinished, content).unwrap();
        fs::rename(&unfinished, self.0.join(word)).unwrap();
    }

    /// The content of `word`, as soon as it is there.
    pub fn hear(&self, word: &str) -> Vec<u8> {
        let start = Instant::now();
        loop {
            if let Ok(content) = fs::read(self.0.join(word)) {
                return content;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "no {word:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Ranks {
    /// Runs the test `name` again in `world` processes, where [`Rank::here`] is something.
    pub fn start(name: &str, world: u32) -> Ranks {
        let directory = tempfile::tempdir().unwrap();
        let start = |rank: u32| {
            let child = Command::new(env::current_exe().unwrap())
                .args([name, "--exact", "--nocapture"])
                .env(RANK, rank.to_string())
                .env(WORLD, world.to_string())
                .env(BOARD, directory.path())
                .env("NCCL_HOSTID", format!("{name}-{rank}"))
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn();
            Some(child.unwrap())
        };
        Ranks {
            board: Board(directory.path().to_owned()),
            children: (0..world).map(start).collect(),
            _directory: directory,
        }
    }

    /// Sends SIGKILL to a rank.
    pub fn kill(&mut self, rank: usize) {
        let mut child = self.children[rank].take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Waits for all ranks that are left and holds them to success.
    pub fn join(mut self) {
        for child in self.children.iter_mut().filter_map(Option::take) {
            let Output {
                status,
                stdout,
                stderr,
            } = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&stdout);
            let complained = String::from_utf8_lossy(&stderr);
            assert!(status.success(), "{said}\n{complained}");
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in self.children.iter_mut().flatten() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

impl Rank {
    /// None in the process that runs the tests.
    pub fn here() -> Option<Rank> {
        let number = |name| Some(env::var(name).ok()?.parse().unwrap());
        Some(Rank {
            rank: number(RANK)?,
            world: number(WORLD)?,
            board: Board(env::var_os(BOARD)?.into()),
        })
    }

    /// Starts a communicator with the other ranks.
    pub fn begin(&self, library: &Library) -> Starting {
        if self.rank == 0 {
            self.board
                .say("id", &library.unique_id().unwrap().to_bytes());
        }
        let id: [u8; 128] = self.board.hear("id").try_into().unwrap();
        Comm::start(library, &UniqueId::from(id), self.rank, self.world).unwrap()
    }
}
