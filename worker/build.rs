//! Tells the loader where libtorch lies. Link arguments do not propagate from torch-sys, and one in config `rustflags`
//! would vanish when a user sets `RUSTFLAGS`, so every package with an executable that links libtorch does this itself.

use std::env;
use std::path::{Component, Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    let Some(lib) = env::var_os("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from) else {
        println!(
            "cargo:warning=torch-sys did not say where libtorch lies; the programs may not find it"
        );
        return;
    };
    // torch-sys passes on LIBTORCH as it was given; behind `..` components no prefix of OUT_DIR would match.
    let lib = lib.canonicalize().unwrap_or(lib);
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    if let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) {
        let out = out.canonicalize().unwrap_or(out);
        // Programs lie in <profile>, tests in <profile>/deps: $ORIGIN has to work from both.
        for directory in profile_directory(&out)
            .into_iter()
            .flat_map(|profile| [profile.join("deps"), profile])
        {
            if let Some(relative) = relative_path(&directory, &lib) {
                println!(
                    "cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/{}",
                    relative.display()
                );
            }
        }
    }
}

/// `OUT_DIR` is `<profile>/build/<package>-<hash>/out`.
fn profile_directory(out: &Path) -> Option<PathBuf> {
    Some(out.ancestors().nth(3)?.to_path_buf())
}

/// The way from `from` to `to`, so that a checkout keeps working when it is moved as a whole. None where both share
/// nothing but the root.
fn relative_path(from: &Path, to: &Path) -> Option<PathBuf> {
    let (from, to): (Vec<Component>, Vec<Component>) =
        (from.components().collect(), to.components().collect());
    let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    if shared <= 1 {
        return None;
    }
    let up = from[shared..].iter().map(|_| Component::ParentDir);
    Some(up.chain(to[shared..].iter().copied()).collect())
}
