//! Loading `libnccl.so.2`.

use std::ffi::{CStr, OsStr, c_char};
use std::fmt;
use std::path::Path;
use std::ptr;
use std::sync::Arc;

use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};

use crate::error::{Error, LoadError, Status, chain};
use crate::symbols::{IN_PROGRESS, RawId, RawResult, SUCCESS, Symbols};
use crate::unique_id::UniqueId;

/// The name by which the loader knows NCCL. The 2 is NCCL's major version, not CUDA's.
const SONAME: &str = "libnccl.so.2";

/// `RTLD_NOLOAD` of Linux: finds a library that is loaded already, and loads nothing.
const RTLD_NOLOAD: i32 = 4;

/// NCCL, loaded and checked. Cheap to clone; stays loaded for the life of the process.
#[derive(Clone)]
pub struct Library {
    pub(crate) symbols: Arc<Symbols>,
    version: Version,
}

impl Library {
    /// Loads NCCL: from `path` if one is given, else the copy that is in this process already, else
    /// `libnccl.so.2` as the loader finds it.
    ///
    /// In a process with libtorch's CUDA half give no path, and load that half first: two copies of
    /// NCCL in one process disturb each other.
    ///
    /// # Errors
    ///
    /// Says what was tried and what to install.
    pub fn load(path: Option<&Path>) -> Result<Library, LoadError> {
        let handle = match path {
            Some(path) => {
                open(path.as_os_str(), RTLD_NOW | RTLD_LOCAL).map_err(|error| vec![error])
            }
            None => open(SONAME.as_ref(), RTLD_NOW | RTLD_NOLOAD).or_else(|_| {
                open(SONAME.as_ref(), RTLD_NOW | RTLD_LOCAL)
                    .map_err(|error| vec!["this process has none".to_owned(), error])
            }),
        };
        let handle = handle.map_err(|tried| LoadError::NotFound { tried })?;
        let symbols = Symbols::resolve(handle)?;
        let mut code = 0;
        // SAFETY: the function writes one int.
        unsafe { (symbols.get_version)(&mut code) };
        let version = Version { code };
        if version < Version::OLDEST {
            return Err(LoadError::TooOld { found: version });
        }
        Ok(Library {
            symbols: Arc::new(symbols),
            version,
        })
    }

    /// The version of the library that was loaded.
    pub fn version(&self) -> Version {
        self.version
    }

    /// A new id, by which the ranks of one new communicator find each other: one rank makes it, all
    /// of them use it, once. It needs no GPU. The process that makes it answers the others, so it has
    /// to live until all of them have started.
    ///
    /// # Errors
    ///
    /// When NCCL finds no network interface (`NCCL_SOCKET_IFNAME` chooses one).
    pub fn unique_id(&self) -> Result<UniqueId, Error> {
        let mut id = RawId([0; 128]);
        // SAFETY: the function writes 128 bytes.
        let result = unsafe { (self.symbols.get_unique_id)(&mut id) };
        self.check("ncclGetUniqueId", result)?;
        Ok(UniqueId::from(id.0))
    }

    /// Turns a result into an error with NCCL's own words. Work that goes on is no error.
    pub(crate) fn check(&self, call: &'static str, result: RawResult) -> Result<(), Error> {
        if result == SUCCESS || result == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both functions take any value; NCCL ignores the communicator of the second one.
        let (message, last_error) = unsafe {
            (
                text((self.symbols.get_error_string)(result)),
                text((self.symbols.get_last_error)(ptr::null_mut())),
            )
        };
        Err(Error::Nccl {
            call,
            status: Status::new(result),
            message,
            last_error,
        })
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NCCL {}", self.version)
    }
}

fn open(name: &OsStr, flags: i32) -> Result<Handle, String> {
    // SAFETY: loading runs the library's initialisers. Those of NCCL set up its own data and nothing
    // else; whoever names another file by path answers for it.
    unsafe { Handle::open(Some(name), flags) }
        .map_err(|error| format!("{}: {}", name.display(), chain(&error)))
}

/// A copy of one of NCCL's strings.
///
/// # Safety
///
/// `words` is null or points to a string that ends with a zero byte and lives during the call.
unsafe fn text(words: *const c_char) -> String {
    if words.is_null() {
        return String::new();
    }
    // SAFETY: as the caller says.
    unsafe { CStr::from_ptr(words) }
        .to_string_lossy()
        .trim()
        .to_owned()
}

/// A version of NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    code: i32,
}

impl Version {
    /// The oldest one that has non-blocking communicators.
    pub const OLDEST: Version = Version { code: 21400 };

    /// Major, minor and patch number.
    pub fn numbers(self) -> (i32, i32, i32) {
        // Before 2.9 a code had one digit less.
        let unit = if self.code < 10_000 { 1_000 } else { 10_000 };
        (self.code / unit, self.code % unit / 100, self.code % 100)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor, patch) = self.numbers();
        write!(f, "{major}.{minor}.{patch}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_codes_are_read_in_both_forms() {
        assert_eq!(Version { code: 22809 }.to_string(), "2.28.9");
        assert_eq!(Version { code: 2708 }.to_string(), "2.7.8");
        assert!(Version { code: 2708 } < Version::OLDEST);
    }

    #[test]
    fn a_library_that_is_not_there_is_named_with_the_remedy() {
        let error = Library::load(Some(Path::new("/nowhere/libnccl.so.2"))).unwrap_err();
        let said = error.to_string();
        assert!(said.contains("/nowhere/libnccl.so.2"), "{said}");
        assert!(said.contains("No such file"), "{said}");
        assert!(said.contains("pip install nvidia-nccl-cu13"), "{said}");
    }

    #[test]
    fn a_library_that_is_no_nccl_is_refused() {
        let error = Library::load(Some(Path::new("libc.so.6"))).unwrap_err();
        let said = error.to_string();
        assert!(said.contains("no function ncclGetVersion"), "{said}");
    }
}
