//! Compiles the protocol with protox: no protoc is needed. Finds out which build this is.

use std::process::Command;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["supra/v1/worker.proto", "supra/v1/runs.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(
        out.join("supra.v1.bin"),
        prost::Message::encode_to_vec(&descriptors),
    )?;
    tonic_prost_build::configure()
        // Rare and large: every message would take its room.
        .boxed(".supra.v1.Hello.place")
        .compile_fds(descriptors)?;
    println!("cargo:rustc-env=SUPRA_BUILD={}", build()?);
    Ok(())
}

/// Version and commit. A debug build names no commit: with one, every commit would rebuild every crate that has this one.
fn build() -> Result<String, std::env::VarError> {
    let version = std::env::var("CARGO_PKG_VERSION")?;
    if std::env::var("PROFILE")? != "release" {
        return Ok(format!("{version} (debug build)"));
    }
    Ok(match commit() {
        Some(commit) => format!("{version} ({commit})"),
        None => version,
    })
}

/// The commit that is checked out here; none in sources without their history, such as an archive.
fn commit() -> Option<String> {
    // Sources unpacked below somebody else's repository are not of that one's commit.
    git(&["ls-files", "--error-unmatch", "build.rs"])?;
    // The reflog grows when HEAD moves and not otherwise: work between two commits does not run this again.
    let moves = git(&["rev-parse", "--git-path", "logs/HEAD"])?;
    println!("cargo:rerun-if-changed={moves}");
    git(&["rev-parse", "--short=12", "HEAD"])
}

/// What git answers in this directory; none when it fails or is not installed.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let answer = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| answer.trim().to_owned())
}
