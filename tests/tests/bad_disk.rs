//! Checkpoint folders that cannot be written, are not shared, are full or hold rubbish.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Instant;

use supra_proto::v1::Checkpoint;
use supra_tests::process::{POLL, run};
use supra_tests::{Cluster, Process, Result, TinyRecipe, weights};

use crate::{LIMIT, Stage};

/// A recipe whose checkpoints go to `directory`.
fn checkpoints_to(directory: &Path, workers: u32) -> TinyRecipe {
    let every = TinyRecipe::default().checkpoint_every;
    let to = directory.display();
    TinyRecipe {
        workers: (workers, workers),
        // All are kept: tests look back.
        checkpoint: Some(format!("{{ every_tokens: {every}, keep: 100, to: {to} }}")),
        ..TinyRecipe::default()
    }
}

/// The command in a mount namespace of its own, in which `setup` was run first; none where the
/// system does not allow that.
fn in_own_mounts(setup: &str, command: &Command) -> Option<Command> {
    let unshare = |arguments: &[&str]| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--map-root-user", "--mount"]).args(arguments);
        unshare
    };
    let mut probe = unshare(&["true"]);
    let allowed = probe
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !allowed {
        eprintln!("skipped: this system does not allow mount namespaces");
        return None;
    }
    let outer = unshare(&["sh", "-ec", &format!("{setup}\nexec \"$@\""), "sh"]);
    Some(wrapped(outer, command))
}

/// The command in the mount namespace of a process.
fn in_mounts_of(process: u32, command: &Command) -> Command {
    let mut nsenter = Command::new("nsenter");
    nsenter.args(["--user", "--mount", "--preserve-credentials", "--target"]);
    nsenter.arg(process.to_string());
    wrapped(nsenter, command)
}

/// The command as what another one starts.
fn wrapped(mut outer: Command, command: &Command) -> Command {
    outer.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => outer.env(name, value),
            None => outer.env_remove(name),
        };
    }
    outer
}

/// Waits until somebody who asks `supra status` or `supra logs` finds all `words`.
fn wait_told(cluster: &Cluster, run: &str, words: &[&str]) -> Result<()> {
    let mut told = String::new();
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        let logs = cluster.supra(&["logs", run])?.expect_code(0)?.stdout;
        told = format!("{}\n{logs}", cluster.status(run)?.reason).to_lowercase();
        if words.iter().all(|word| told.contains(&word.to_lowercase())) {
            return Ok(());
        }
        sleep(POLL);
    }
    panic!("{words:?} is not said, only: {told}\n{}", cluster.logs());
}

/// Fails unless every checkpoint in `directory` is published and its files are whole; returns how many there are.
fn whole_checkpoints(directory: &Path) -> Result<usize> {
    let mut whole = 0;
    for entry in fs::read_dir(directory)? {
        let checkpoint = entry?.path();
        if checkpoint.is_file() {
            continue; // The receipt of the run.
        }
        let names = checkpoint.display();
        assert!(checkpoint.join("manifest.json").exists(), "half: {names}");
        weights::hashes(&checkpoint)?;
        whole += 1;
    }
    Ok(whole)
}

/// Waits until the run has a published checkpoint and gives its directory.
fn first_checkpoint(cluster: &Cluster, run: &str) -> Result<PathBuf> {
    let published = |status: &supra_proto::v1::RunStatus| {
        status
            .checkpoint
            .as_ref()
            .is_some_and(|known| known.published)
    };
    cluster.wait(run, "past a checkpoint", LIMIT, published)?;
    cluster.last_checkpoint(run)
}

#[test]
fn a_checkpoint_folder_that_cannot_be_written_is_named() -> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 1)?;
    // Even root makes no directories in /proc.
    let run = stage.submit(&cluster, &checkpoints_to(Path::new("/proc/checkpoints"), 1))?;
    wait_told(&cluster, &run, &["/proc/checkpoints", "checkpoint.to"])
}

#[test]
fn a_checkpoint_folder_that_is_read_only_is_named() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 0)?;
    let to = stage.directory.path().join("sealed");
    fs::create_dir_all(&to)?;
    let setup = format!("mount -t tmpfs -o ro none '{}'", to.display());
    let Some(worker) = in_own_mounts(&setup, &cluster.worker_command("w0")) else {
        return Ok(());
    };
    cluster.adopt_worker("w0", worker)?;
    let run = stage.submit(&cluster, &checkpoints_to(&to, 1))?;
    let place = to.to_string_lossy();
    wait_told(&cluster, &run, &["read-only", &place, "checkpoint.to"])
}

#[test]
fn a_full_disk_is_told_and_costs_nothing_that_was_saved() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 0)?;
    let to = stage.directory.path().join("small");
    fs::create_dir_all(&to)?;
    let setup = format!("mount -t tmpfs -o size=100k none '{}'", to.display());
    let Some(worker) = in_own_mounts(&setup, &cluster.worker_command("w0")) else {
        return Ok(());
    };
    cluster.adopt_worker("w0", worker)?;
    let run = stage.submit(&cluster, &checkpoints_to(&to, 1))?;
    wait_told(&cluster, &run, &["no room", &to.to_string_lossy()])?;
    // A worker with room finishes the run. The loss of the other one may be what the run fails of.
    cluster.remove_worker("w0")?;
    cluster.wait_attached(0, LIMIT)?;
    cluster.start_worker("w1")?;
    if cluster.supra_json(&["status", &run])?["state"] == "failed" {
        cluster.supra(&["resume", &run])?.expect_code(0)?;
    }
    cluster.wait_finished(&run, LIMIT)?;
    cluster.audit(&run)?;
    Ok(())
}

/// A limit of file sizes breaks the write off in the middle of a file, on any system.
#[test]
fn a_file_that_cannot_grow_is_told_and_costs_nothing_that_was_saved() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 1)?;
    let recipe = TinyRecipe {
        budget: 60_010,
        ..checkpoints_to(&stage.directory.path().join("checkpoints"), 1)
    };
    let run = stage.submit(&cluster, &recipe)?;
    let saved = first_checkpoint(&cluster, &run)?;
    let before = weights::hashes(&saved)?;
    // The model fits, the twice as large state of the optimizer does not.
    let length = fs::metadata(saved.join("model-rank-000-of-001-00001.safetensors"))?.len();
    cluster.worker("w0")?.limit_files(Some(length * 3 / 2))?;
    let reason = cluster.wait_failed(&run, LIMIT)?;
    for word in [
        "3 generations",
        "optimizer-rank-000-of-001-00001.safetensors",
        "File too large",
        "ulimit -f",
    ] {
        assert!(reason.contains(word), "{word} is not said, only: {reason}");
    }
    let root = saved.parent().unwrap_or(&saved);
    assert!(whole_checkpoints(root)? > 0);
    assert_eq!(weights::hashes(&saved)?, before);

    cluster.worker("w0")?.limit_files(None)?;
    cluster.supra(&["resume", &run])?.expect_code(0)?;
    cluster.wait_finished(&run, LIMIT)?;
    cluster.audit(&run)?;
    Ok(())
}

/// A file system that has room for one checkpoint and half of the next.
#[test]
fn a_disk_that_fills_up_in_mid_checkpoint_is_told_and_costs_nothing_that_was_saved() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 0)?;
    let to = stage.directory.path().join("small");
    fs::create_dir_all(&to)?;
    // Two directories; seven files and directories per checkpoint; and three more of the second one's.
    let setup = format!(
        "mount -t tmpfs -o size=100m,nr_inodes=12 none '{}'",
        to.display()
    );
    let Some(worker) = in_own_mounts(&setup, &cluster.worker_command("w0")) else {
        return Ok(());
    };
    cluster.adopt_worker("w0", worker)?;
    let run_id = stage.submit(&cluster, &checkpoints_to(&to, 1))?;
    let reason = cluster.wait_failed(&run_id, LIMIT)?;
    for word in ["3 generations", "No space left on device", "checkpoint.to"] {
        assert!(reason.contains(word), "{word} is not said, only: {reason}");
    }
    let saved = cluster.last_checkpoint(&run_id)?;
    let pid = cluster.worker("w0")?.pid();
    let inside = Path::new("/proc").join(pid.to_string()).join("root");
    let within = |path: &Path| inside.join(path.strip_prefix("/").unwrap_or(path));
    assert_eq!(whole_checkpoints(&within(&to.join(&run_id)))?, 1);
    weights::hashes(&within(&saved))?;

    let mut grow = Command::new("mount");
    grow.args(["-o", "remount,nr_inodes=1000"]).arg(&to);
    run(in_mounts_of(pid, &grow), LIMIT)?.expect_code(0)?;
    cluster.supra(&["resume", &run_id])?.expect_code(0)?;
    cluster.wait_finished(&run_id, LIMIT)?;
    cluster.audit(&run_id)?;
    Ok(())
}

#[test]
fn a_coordinator_without_room_for_its_journal_says_so_and_loses_nothing_that_it_told() -> Result<()>
{
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 1)?;
    cluster.coordinator()?.kill()?;
    let state = cluster.state();
    let setup = format!("mount -t tmpfs -o size=400k none '{}'", state.display());
    // The small disk outlives the coordinator.
    let mut keeper = Command::new("sleep");
    keeper.arg("600");
    let Some(keeper) = in_own_mounts(&setup, &keeper) else {
        return Ok(());
    };
    let keeper = Process::spawn("keeper", keeper, stage.directory.path())?;
    let name = Path::new("/proc").join(keeper.pid().to_string());
    while fs::read_to_string(name.join("comm"))?.trim() != "sleep" {
        sleep(POLL);
    }
    let coordinator = in_mounts_of(keeper.pid(), &cluster.coordinator_command());
    let mut small = Process::spawn("small", coordinator, stage.directory.path())?;
    while small.ended()?.is_none() && !small.output().contains("listening on") {
        sleep(POLL);
    }
    let recipe = TinyRecipe {
        budget: 60_010,
        ..checkpoints_to(&stage.directory.path().join("checkpoints"), 1)
    };
    let id = stage.submit(&cluster, &recipe)?;
    let (mut ledger, mut checkpoints) = (Vec::new(), Vec::new());
    let deadline = Instant::now() + LIMIT;
    while small.ended()?.is_none() && Instant::now() < deadline {
        ledger = cluster.ledger(&id).unwrap_or(ledger);
        checkpoints = cluster.checkpoints(&id).unwrap_or(checkpoints);
        sleep(POLL);
    }
    assert_eq!(small.wait(LIMIT)?.code(), Some(1), "{}", small.output());
    for word in ["journal.db", "disk is full", "free space on that disk"] {
        assert!(small.output().contains(word), "{}", small.output());
    }

    let mut grow = Command::new("mount");
    grow.args(["-o", "remount,size=100m"]).arg(&state);
    run(in_mounts_of(keeper.pid(), &grow), LIMIT)?.expect_code(0)?;
    let coordinator = in_mounts_of(keeper.pid(), &cluster.coordinator_command());
    let _large = Process::spawn("large", coordinator, stage.directory.path())?;
    let deadline = Instant::now() + LIMIT;
    while cluster.status(&id).is_err() && Instant::now() < deadline {
        sleep(POLL);
    }
    cluster.wait_finished(&id, LIMIT)?;
    let (whole, kept) = (cluster.ledger(&id)?, cluster.checkpoints(&id)?);
    assert!(!ledger.is_empty() && whole.starts_with(&ledger));
    for known in &checkpoints {
        let same = |other: &Checkpoint| other.manifest_hash == known.manifest_hash;
        assert!(kept.iter().any(same), "{known:?} is not among {kept:?}");
    }
    cluster.audit(&id)?;
    Ok(())
}

#[test]
fn a_checkpoint_folder_that_is_not_shared_is_told() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 1)?;
    let to = stage.directory.path().join("unshared");
    fs::create_dir_all(&to)?;
    let setup = format!("mount -t tmpfs none '{}'", to.display());
    let Some(worker) = in_own_mounts(&setup, &cluster.worker_command("w1")) else {
        return Ok(());
    };
    cluster.adopt_worker("w1", worker)?;
    let run = stage.submit(&cluster, &checkpoints_to(&to, 2))?;
    wait_told(&cluster, &run, &["shared", &to.to_string_lossy()])
}

#[test]
fn what_a_crash_left_in_the_checkpoint_folder_is_no_obstacle() -> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 1)?;
    let to = stage.directory.path().join("checkpoints");
    let recipe = checkpoints_to(&to, 1);
    // Half a checkpoint of the very name that the run will want, beside other rubbish.
    for name in ["step-00000008-gen-1", "step-00000040-gen-1", ".probe-old"] {
        fs::create_dir_all(to.join(name))?;
        fs::write(to.join(name).join("model.safetensors"), "rubbish")?;
        fs::write(to.join(name).join("manifest.pending"), "{")?;
    }
    let run = stage.submit(&cluster, &recipe)?;
    cluster.wait_finished(&run, LIMIT)?;
    supra_tests::weights::hashes(&cluster.last_checkpoint(&run)?)?;
    cluster.audit(&run)?;
    Ok(())
}
