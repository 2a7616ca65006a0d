//! Checkpoint folders that cannot be written, are not shared, are full or hold rubbish.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use supra_tests::{Cluster, Result, TinyRecipe};

use crate::{LIMIT, Stage};

/// A recipe whose checkpoints go to `directory`.
fn checkpoints_to(directory: &Path, workers: u32) -> TinyRecipe {
    let every = TinyRecipe::default().checkpoint_every;
    let to = directory.display();
    TinyRecipe {
        workers: (workers, workers),
        checkpoint: Some(format!("{{ every_tokens: {every}, to: {to} }}")),
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
    let mut wrapped = unshare(&["sh", "-ec", &format!("{setup}\nexec \"$@\""), "sh"]);
    wrapped.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    Some(wrapped)
}

/// Waits until somebody who asks `supra status` or `supra logs` finds all `words`.
fn wait_told(cluster: &Cluster, run: &str, words: &[&str]) -> Result<()> {
    let mut told = String::new();
    let deadline = std::time::Instant::now() + LIMIT;
    while std::time::Instant::now() < deadline {
        let logs = cluster.supra(&["logs", run])?.expect_code(0)?.stdout;
        told = format!("{}\n{logs}", cluster.status(run)?.reason).to_lowercase();
        if words.iter().all(|word| told.contains(&word.to_lowercase())) {
            return Ok(());
        }
        std::thread::sleep(supra_tests::process::POLL);
    }
    panic!("{words:?} is not said, only: {told}\n{}", cluster.logs());
}

#[test]
fn a_checkpoint_folder_that_cannot_be_written_is_named() -> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 1)?;
    // Even root makes no directories in /proc.
    let run = stage.submit(&cluster, &checkpoints_to(Path::new("/proc/checkpoints"), 1))?;
    wait_told(&cluster, &run, &["/proc/checkpoints"])
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
    // A worker with room finishes the run.
    cluster.remove_worker("w0")?;
    cluster.start_worker("w1")?;
    if cluster.supra_json(&["status", &run])?["state"] == "failed" {
        cluster.supra(&["resume", &run])?.expect_code(0)?;
    }
    cluster.wait_finished(&run, LIMIT)?;
    cluster.audit(&run)?;
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
