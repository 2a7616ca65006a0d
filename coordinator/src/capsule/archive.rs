//! A capsule on disk: a tar file compressed by zstd, or a folder. Times, owners and order are fixed, so that the same capsule
//! has the same bytes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::{Capsule, CapsuleError, INDEX, plain};

/// Ends the name of a capsule file.
const EXTENSION: &str = ".tar.zst";

/// Compression level of zstd.
const LEVEL: i32 = 9;

/// Of an archive in memory. Its checksum covers the index, too, which no hash in it does.
fn encoder() -> io::Result<zstd::Encoder<'static, Vec<u8>>> {
    let mut encoder = zstd::Encoder::new(Vec::new(), LEVEL)?;
    encoder.include_checksum(true)?;
    Ok(encoder)
}

impl Capsule {
    /// The bytes of a capsule file.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Writing to memory cannot fail, and a member's name is shorter than what a header takes, or gets a header of its own.
        self.pack()
            .expect("invariant: a capsule in memory can be packed into memory")
    }

    fn pack(&self) -> io::Result<Vec<u8>> {
        let mut archive = tar::Builder::new(encoder()?);
        let index = self.index_bytes();
        for (name, bytes) in std::iter::once((INDEX, index.as_slice())).chain(self.members()) {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_mtime(0);
            archive.append_data(&mut header, name, bytes)?;
        }
        archive.into_inner()?.finish()
    }

    /// Reads the bytes of a capsule file; `path` is for errors.
    ///
    /// # Errors
    /// They are not what was packed.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Capsule, CapsuleError> {
        let mut members = unpack(bytes).map_err(|error| CapsuleError::Damaged {
            path: path.to_owned(),
            problem: format!("it is no capsule, or a part of one: {error}"),
        })?;
        let index = members.remove(INDEX).unwrap_or_default();
        Capsule::checked(path, &index, members)
    }

    /// Reads a capsule file, or a folder.
    ///
    /// # Errors
    /// It cannot be read, or is not what was packed.
    pub fn read(path: &Path) -> Result<Capsule, CapsuleError> {
        if path.is_dir() {
            let mut members = BTreeMap::new();
            collect(path, Path::new(""), &mut members)?;
            let index = members.remove(INDEX).unwrap_or_default();
            return Capsule::checked(path, &index, members);
        }
        let bytes = fs::read(path).map_err(failed("read", path))?;
        Capsule::from_bytes(&bytes, path)
    }

    /// Writes it as a file if `out` ends with `.tar.zst`, else as a folder: whole, or not at all. Gives the bytes of all files.
    ///
    /// # Errors
    /// `out` exists, or the disk's.
    pub fn write(&self, out: &Path) -> Result<u64, CapsuleError> {
        if out.symlink_metadata().is_ok() {
            return Err(CapsuleError::Taken(out.to_owned()));
        }
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        let partial = out.with_file_name(format!(".{name}.partial"));
        let bytes = if name.ends_with(EXTENSION) {
            let bytes = self.to_bytes();
            write(&partial, &bytes)?;
            bytes.len() as u64
        } else {
            if partial.exists() {
                fs::remove_dir_all(&partial).map_err(failed("remove", &partial))?;
            }
            self.write_folder(&partial)?
        };
        fs::rename(&partial, out).map_err(failed("create", out))?;
        Ok(bytes)
    }

    fn write_folder(&self, folder: &Path) -> Result<u64, CapsuleError> {
        let index = self.index_bytes();
        let mut sum = 0;
        for (name, bytes) in std::iter::once((INDEX, index.as_slice())).chain(self.members()) {
            let path = folder.join(name);
            let parent = path.parent().unwrap_or(folder);
            fs::create_dir_all(parent).map_err(failed("create", parent))?;
            write(&path, bytes)?;
            sum += bytes.len() as u64;
        }
        Ok(sum)
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CapsuleError {
    move |source| CapsuleError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), CapsuleError> {
    let write = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file: File = options.write(true).create(true).truncate(true).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(failed("write", path))
}

fn unpack(bytes: &[u8]) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let mut members = BTreeMap::new();
    let mut archive = tar::Archive::new(zstd::Decoder::new(bytes)?);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let name = path.to_str().filter(|_| plain(&path)).ok_or_else(|| {
            io::Error::other(format!("it names {}, outside of itself", path.display()))
        })?;
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        if members.insert(name.to_owned(), content).is_some() {
            return Err(io::Error::other(format!("it holds {name} twice")));
        }
    }
    // Behind the end of the archive is the checksum.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    Ok(members)
}

/// The files below `folder`/`below`, by their names relative to `folder`.
fn collect(
    folder: &Path,
    below: &Path,
    members: &mut BTreeMap<String, Vec<u8>>,
) -> Result<(), CapsuleError> {
    let directory = folder.join(below);
    let entries = fs::read_dir(&directory).map_err(failed("read", &directory))?;
    for entry in entries {
        let entry = entry.map_err(failed("read", &directory))?;
        let name: PathBuf = below.join(entry.file_name());
        let path = entry.path();
        if path.is_dir() {
            collect(folder, &name, members)?;
            continue;
        }
        let bytes = fs::read(&path).map_err(failed("read", &path))?;
        members.insert(name.to_string_lossy().into_owned(), bytes);
    }
    Ok(())
}
