//! What a checkpoint of a 7B model costs: for how long training stands still, and how fast files are written and read.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::cluster::Device;
use crate::failure::{Failure, Result, While};
use crate::models::Shape;
use crate::process;
use crate::programs::Programs;
use crate::report::{Row, rounded, table};

/// What the report says above its table.
pub const ABOUT: &str = "A checkpoint of Mistral-7B-SUPRA (7.81 B parameters; bf16, fp32 masters and moments) by `supra-worker bench \
    checkpoint`, medians of three. `stall_s` is what the training loop waits for when a checkpoint begins: fingerprints of all state, \
    the directory, and the copy of all state (`state_gb`) to pinned host memory; `copy_s` is that copy alone. Everything else goes on \
    beside training. `room_s` is getting that memory, once, beside training too. `bytes` are what one of four ranks writes, to a disk \
    (TMPDIR) and to a file system in memory (/dev/shm): masters and moments put together from the copy, hashed (BLAKE3), written and \
    synced, several files at the same time, at `write_gb_s`; `raw_write_gb_s` is the rate of as many plain bytes in as many files by \
    as many threads, synced, in turns with it. `read_gb_s` is reading them again, every byte proved and taken by a replica on the \
    device; `raw_read_gb_s` the plain files. What the system had of the disk's files in memory was given up before. The campaign fails \
    if the stall is more than twice the copy, or if the disk's files are written or read at less than 80 % of the plain rates. In \
    memory plain files cost little more than copying the bytes, so that hashing them shows.";

/// Longest stall, in copies.
const STALL: f64 = 2.0;
/// Lowest rate, as a share of that of plain files.
const SHARE: f64 = 0.8;
/// A file system in memory.
const MEMORY: &str = "/dev/shm";
const LIMIT: Duration = Duration::from_secs(560);

/// Measures; with a small model if `quick`, and then only that there are figures.
///
/// # Errors
/// When training stands still for too long, or files on the disk take too long.
pub fn run(programs: &Programs, directory: &Path, device: Device, quick: bool) -> Result<Vec<Row>> {
    let memory = tempfile::tempdir_in(MEMORY).while_doing(format_args!("using {MEMORY}"))?;
    let places = [("disk", directory), ("memory", memory.path())];
    let shape = directory.join("shape");
    Shape::TINY.write(&shape)?;
    // One after the other: a host may not hold the memory of both.
    let measure = |ranks: &str, directories: &[PathBuf]| -> Result<Value> {
        let mut command = programs.worker();
        command.args(["bench", "checkpoint", "--json", "--ranks", ranks]);
        command.args(["--device", &device.of_worker(0, 1)]);
        if quick {
            command.arg("--model").arg(&shape);
        }
        for directory in directories {
            command.arg("--directory").arg(directory);
        }
        let output = process::run(command, LIMIT)?.expect_code(0)?;
        let answer = serde_json::from_str(&output.stdout);
        answer.while_doing(format_args!("reading {:?}", output.stdout))
    };
    let whole = measure("1", &[])?;
    let part = measure("4", &places.map(|(_, place)| place.join("checkpoints")))?;
    let (stall, copy) = (
        number(&whole, "stall_seconds")?,
        number(&whole, "copy_seconds")?,
    );
    let (mut rows, mut slow) = (Vec::new(), stall > STALL * copy);
    for (at, (place, _)) in places.into_iter().enumerate() {
        let files = &part["files"][at];
        let bytes = number(files, "bytes")?;
        let rate = |key: &str| Ok::<_, Failure>(bytes / number(files, key)? / 1e9);
        let (write, raw_write) = (rate("write_seconds")?, rate("raw_write_seconds")?);
        let (read, raw_read) = (rate("read_seconds")?, rate("raw_read_seconds")?);
        slow |= place == "disk" && (write < SHARE * raw_write || read < SHARE * raw_read);
        rows.push(
            Row::new()
                .with("device", whole["device"].clone())
                .with("files", place)
                .with("state_gb", rounded(number(&whole, "state_bytes")? / 1e9, 2))
                .with("room_s", rounded(number(&whole, "room_seconds")?, 2))
                .with("stall_s", rounded(stall, 3))
                .with("copy_s", rounded(copy, 3))
                .with("bytes", bytes)
                .with("write_gb_s", rounded(write, 2))
                .with("raw_write_gb_s", rounded(raw_write, 2))
                .with("read_gb_s", rounded(read, 2))
                .with("raw_read_gb_s", rounded(raw_read, 2)),
        );
    }
    if slow && !quick {
        let failure = Failure::new("training stands still, or files take, for too long");
        return Err(failure).while_doing(table(&rows));
    }
    Ok(rows)
}

fn number(of: &Value, key: &str) -> Result<f64> {
    let found = of[key].as_f64().filter(|number| *number > 0.0);
    found.ok_or_else(|| Failure::new(format!("no `{key}` in {of}")))
}
