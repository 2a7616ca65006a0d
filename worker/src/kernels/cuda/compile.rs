//! From sources to machine code of one architecture, kept on disk for the next start.
//!
//! A file of the cache is named by the BLAKE3 of everything that its content depends on and begins with the BLAKE3 of that
//! content, so an old, torn or damaged one is never used, only replaced.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process,
};

use super::{
    error::KernelError,
    nvrtc::{Compiled, Nvrtc},
};

/// CUDA C++ that is compiled as a whole.
pub struct Source {
    /// The file's name.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
    /// The kernels in it that are launched.
    pub kernels: &'static [&'static str],
}

/// What the sources include of ours.
const HEADERS: [(&str, &str); 8] = [
    (
        "attention_warpgroups.cuh",
        include_str!("attention_warpgroups.cuh"),
    ),
    ("attention_warps.cuh", include_str!("attention_warps.cuh")),
    ("bits.cuh", include_str!("bits.cuh")),
    ("common.cuh", include_str!("common.cuh")),
    ("relay.cuh", include_str!("relay.cuh")),
    ("rms.cuh", include_str!("rms.cuh")),
    ("warp.cuh", include_str!("warp.cuh")),
    ("warpgroup.cuh", include_str!("warpgroup.cuh")),
];

/// Bytes of a BLAKE3 hash.
const HASH: usize = 32;

/// Compiles for `architecture`, as `sm_90a`. The log says what each kernel uses of registers and memory.
pub fn compile(
    nvrtc: &Nvrtc,
    source: &Source,
    architecture: &str,
) -> Result<Compiled, KernelError> {
    let mut options = flags(architecture);
    options.push(format!("--include-path={}", nvrtc.include().display()));
    let compiled = nvrtc
        .compile(source.name, source.text, &HEADERS, &options)
        .map_err(|log| KernelError::Compile {
            source_file: source.name,
            architecture: architecture.to_owned(),
            version: nvrtc.version(),
            log,
        })?;
    tracing::debug!(source.name, architecture, compiled.log, "compiled kernels");
    Ok(compiled)
}

/// The machine code from the cache, or compiled and kept. A cache that cannot be written costs time at the next start and
/// nothing else, so that is a warning.
pub fn cubin(
    nvrtc: &Nvrtc,
    source: &Source,
    architecture: &str,
    cache: Option<&Path>,
) -> Result<Vec<u8>, KernelError> {
    let Some(cache) = cache else {
        return Ok(compile(nvrtc, source, architecture)?.cubin);
    };
    let path = cache.join(format!("{}.cubin", key(nvrtc, source, architecture)));
    if let Some(kept) = read(&path) {
        return Ok(kept);
    }
    let cubin = compile(nvrtc, source, architecture)?.cubin;
    if let Err(error) = write(&path, &cubin) {
        let path = path.display();
        tracing::warn!(%path, %error, "cannot keep a compiled kernel; the next start compiles it again");
    }
    Ok(cubin)
}

/// Where compiled kernels are kept: `$XDG_CACHE_HOME/supra/kernels`, or `~/.cache/supra/kernels`. None without a home.
pub fn cache_folder() -> Option<PathBuf> {
    let absolute = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base =
        absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    Some(base?.join("supra").join("kernels"))
}

fn flags(architecture: &str) -> Vec<String> {
    vec![
        "--std=c++17".to_owned(),
        format!("--gpu-architecture={architecture}"),
        "--ptxas-options=-v".to_owned(),
    ]
}

/// Names what `source` compiles to. The text of CUDA's own headers belongs to the version.
fn key(nvrtc: &Nvrtc, source: &Source, architecture: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut part = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    part(source.text);
    HEADERS.iter().for_each(|(_, text)| part(text));
    flags(architecture).iter().for_each(|flag| part(flag));
    part(&nvrtc.version());
    hasher.finalize().to_hex().to_string()
}

/// The content of a file that is whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let cubin = bytes.split_off(bytes.len().min(HASH));
    (bytes == blake3::hash(&cubin).as_bytes()).then_some(cubin)
}

/// Writes beside and renames, so that another process sees all or nothing.
fn write(path: &Path, cubin: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let beside = path.with_extension(process::id().to_string());
    let bytes = [blake3::hash(cubin).as_bytes().as_slice(), cubin].concat();
    fs::write(&beside, bytes)
        .and_then(|()| fs::rename(&beside, path))
        .inspect_err(|_| {
            let _ = fs::remove_file(&beside);
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_what_was_damaged_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a").join("b.cubin");
        assert_eq!(read(&path), None);
        write(&path, b"machine code").unwrap();
        assert_eq!(read(&path).unwrap(), b"machine code");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path), None, "a changed bit");
        fs::write(&path, &bytes[..7]).unwrap();
        assert_eq!(read(&path), None, "a torn file");
    }
}
