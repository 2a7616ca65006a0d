//! `scripts/setup`, interrupted and repeated, with a stand-in for pip: no network.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use supra_tests::Result;
use supra_tests::process::run;
use supra_tests::programs::repository;

use crate::LIMIT;

/// A checkout with nothing but what the set-up reads, and a `python3` whose pip "installs" the
/// libtorch of the real checkout; with the file `interrupt` there it is killed half way.
fn checkout(root: &Path) -> Result<()> {
    fs::create_dir_all(root.join("scripts"))?;
    fs::create_dir_all(root.join("bin"))?;
    for file in [
        "rust-toolchain.toml",
        "scripts/setup",
        "scripts/libtorch-cpu.lock",
    ] {
        fs::copy(repository().join(file), root.join(file))?;
    }
    let torch = repository().join(".libtorch/torch");
    let python = format!(
        "#!/bin/sh\n\
         case \"$*\" in *--version*) exit 0 ;; esac\n\
         while [ \"$1\" != --target ]; do shift; done\n\
         mkdir -p \"$2/torch\"\n\
         if [ -e interrupt ]; then rm interrupt; kill -9 $PPID; exit 1; fi\n\
         ln -s {torch}/lib {torch}/include \"$2/torch/\"\n",
        torch = torch.display()
    );
    let stand_in = root.join("bin/python3");
    fs::write(&stand_in, python)?;
    fs::set_permissions(&stand_in, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn setup(root: &Path) -> Command {
    let mut command = Command::new(root.join("scripts/setup"));
    let path = std::env::var("PATH").unwrap_or_default();
    command
        .arg("--cpu")
        .current_dir(root)
        .env("PATH", format!("{}:{path}", root.join("bin").display()));
    command
}

/// Names in the checkout that begin like libtorch's folder.
fn folders(root: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(".libtorch") && name != ".libtorch.busy" {
            names.push(name);
        }
    }
    Ok(names)
}

#[test]
fn an_interrupted_setup_leaves_nothing_usable_and_the_next_call_finishes() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let root = scratch.path();
    checkout(root)?;
    fs::write(root.join("interrupt"), "")?;
    run(setup(root), LIMIT)?.expect_code(137)?;
    assert!(
        !root.join(".libtorch").exists(),
        "half an installation looks like a whole one"
    );

    run(setup(root), LIMIT)?.expect_code(0)?;
    assert_eq!(folders(root)?, [".libtorch"], "left-overs are removed");
    assert_eq!(
        fs::read_to_string(root.join(".libtorch/torch/build-version"))?,
        "2.11.0\n"
    );

    // A finished one is left alone, even without pip.
    fs::write(root.join("interrupt"), "")?;
    run(setup(root), LIMIT)?.expect_code(0)?;
    assert!(root.join("interrupt").exists());
    Ok(())
}

#[test]
fn what_is_missing_is_named_with_the_command_that_installs_it() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let root = scratch.path();
    checkout(root)?;
    // Only what a bare system has.
    let bare = root.join("bare");
    fs::create_dir(&bare)?;
    for tool in ["bash", "dirname", "uname", "env"] {
        symlink(Path::new("/usr/bin").join(tool), bare.join(tool))?;
    }
    let mut setup = setup(root);
    setup.env("PATH", &bare);
    run(setup, LIMIT)?.expect_code(2)?.expect_words(&[
        "Rust 1.95.0",
        "rustup toolchain install 1.95.0",
        "apt-get install g++",
        "apt-get install python3 python3-pip",
    ])?;
    Ok(())
}
