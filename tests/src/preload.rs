//! Libraries that come between our programs and the C library, for what no test may do to a machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::failure::Result;
use crate::process::run;

/// For the compiler.
const LIMIT: Duration = Duration::from_secs(90);

/// Compiles a C++ library that is put before the C library of a program (`LD_PRELOAD`), in `directory`.
pub fn preloaded(directory: &Path, name: &str, source: &str) -> Result<PathBuf> {
    let (library, file) = (
        directory.join(format!("{name}.so")),
        directory.join(format!("{name}.cpp")),
    );
    fs::write(&file, source)?;
    let mut compile = Command::new("c++");
    compile
        .args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(&file);
    run(compile, LIMIT)?.expect_code(0)?;
    Ok(library)
}
