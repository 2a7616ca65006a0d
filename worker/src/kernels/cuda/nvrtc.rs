//! NVRTC, NVIDIA's compiler of CUDA C++ as a library, loaded from beside libtorch.
//!
//! It finds its builtins only if a library of that name is loaded already: the folder is in no search path. So both are
//! loaded by absolute path.

use std::{
    ffi::{CStr, CString, c_char, c_int},
    fs,
    path::{Path, PathBuf},
    ptr,
};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};

use super::error::KernelError;
use crate::failure::chain;

/// The library; its number is CUDA's.
const LIBRARY: &str = "libnvrtc.so.13";

/// How the file of builtins begins; its number has a minor part.
const BUILTINS: &str = "libnvrtc-builtins.so.";

/// A program in NVRTC's hands.
type Program = *mut std::ffi::c_void;

type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Bytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// The functions that are used, of a library that is never unloaded.
pub struct Nvrtc {
    version: (c_int, c_int),
    include: PathBuf,
    create: Symbol<Create>,
    destroy: Symbol<unsafe extern "C" fn(*mut Program) -> c_int>,
    compile: Symbol<Compile>,
    log_size: Symbol<Size>,
    log: Symbol<Bytes>,
    cubin_size: Symbol<Size>,
    cubin: Symbol<Bytes>,
    error: Symbol<unsafe extern "C" fn(c_int) -> *const c_char>,
}

/// What NVRTC made of a source.
pub struct Compiled {
    /// Machine code of one architecture.
    pub cubin: Vec<u8>,
    /// The compiler's words: warnings and, if asked for, what each kernel uses.
    pub log: String,
}

impl Nvrtc {
    /// Loads NVRTC from `folder`, the `lib` of the CUDA wheels.
    #[allow(unsafe_code)]
    pub fn open(folder: &Path) -> Result<Nvrtc, KernelError> {
        let path = folder.join(LIBRARY);
        let missing = |cause: String| KernelError::NoNvrtc {
            path: path.clone(),
            cause,
        };
        let builtins = fs::read_dir(folder)
            .map_err(|error| missing(error.to_string()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| file_name(path).starts_with(BUILTINS))
            .ok_or_else(|| missing(format!("there is no {BUILTINS}* beside it")))?;
        let loaded = load(&builtins).and_then(|builtins| {
            std::mem::forget(builtins);
            load(&path)
        });
        let library = loaded.map_err(|error| missing(chain(&error)))?;
        // SAFETY: the types above are those of nvrtc.h, version 13.
        let functions = unsafe { Nvrtc::functions(&library, &folder.join("../include")) };
        let nvrtc = functions.map_err(|error| missing(chain(&error)))?;
        std::mem::forget(library);
        Ok(nvrtc)
    }

    #[allow(unsafe_code)]
    unsafe fn functions(library: &Library, include: &Path) -> Result<Nvrtc, libloading::Error> {
        // SAFETY: the caller vouches for the types.
        unsafe {
            let version: Symbol<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int> =
                library.get(b"nvrtcVersion\0")?;
            let mut number = (0, 0);
            version(&mut number.0, &mut number.1);
            Ok(Nvrtc {
                version: number,
                include: include.to_owned(),
                create: library.get(b"nvrtcCreateProgram\0")?,
                destroy: library.get(b"nvrtcDestroyProgram\0")?,
                compile: library.get(b"nvrtcCompileProgram\0")?,
                log_size: library.get(b"nvrtcGetProgramLogSize\0")?,
                log: library.get(b"nvrtcGetProgramLog\0")?,
                cubin_size: library.get(b"nvrtcGetCUBINSize\0")?,
                cubin: library.get(b"nvrtcGetCUBIN\0")?,
                error: library.get(b"nvrtcGetErrorString\0")?,
            })
        }
    }

    /// Its version, as `13.0`.
    pub fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// The folder of CUDA's own headers.
    pub fn include(&self) -> &Path {
        &self.include
    }

    /// Compiles `text`, called `name` in messages, with `headers` (name and text) for it to include. The error is the
    /// compiler's log.
    #[allow(unsafe_code)]
    pub fn compile(
        &self,
        name: &str,
        text: &str,
        headers: &[(&str, &str)],
        options: &[String],
    ) -> Result<Compiled, String> {
        let name = c_string(name)?;
        let text = c_string(text)?;
        let header_names = c_strings(headers.iter().map(|header| header.0))?;
        let header_texts = c_strings(headers.iter().map(|header| header.1))?;
        let options = c_strings(options.iter().map(String::as_str))?;
        let mut program = ptr::null_mut();
        // SAFETY: all strings end in NUL and outlive the call, which copies them; both arrays have as many entries as
        // there are headers.
        self.done(unsafe {
            (self.create)(
                &mut program,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                pointers(&header_texts).as_ptr(),
                pointers(&header_names).as_ptr(),
            )
        })?;
        // SAFETY: the program was created just above and is destroyed once, after its last use.
        let status =
            unsafe { (self.compile)(program, options.len() as c_int, pointers(&options).as_ptr()) };
        let result = self
            .read(program, &self.log_size, &self.log)
            .and_then(|log| {
                let log = String::from_utf8_lossy(&log)
                    .trim_end_matches('\0')
                    .to_owned();
                self.done(status)
                    .map_err(|error| format!("{error}\n{log}"))?;
                let cubin = self.read(program, &self.cubin_size, &self.cubin)?;
                Ok(Compiled { cubin, log })
            });
        // SAFETY: as above.
        unsafe { (self.destroy)(&mut program) };
        result
    }

    /// Something of a program that NVRTC hands out as size and bytes.
    #[allow(unsafe_code)]
    fn read(
        &self,
        program: Program,
        size: &Symbol<Size>,
        bytes: &Symbol<Bytes>,
    ) -> Result<Vec<u8>, String> {
        let mut length = 0;
        // SAFETY: the program is alive.
        self.done(unsafe { size(program, &mut length) })?;
        let mut buffer = vec![0u8; length];
        // SAFETY: the buffer is as long as NVRTC said just now.
        self.done(unsafe { bytes(program, buffer.as_mut_ptr().cast()) })?;
        Ok(buffer)
    }

    #[allow(unsafe_code)]
    fn done(&self, status: c_int) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NVRTC has a static text for every number.
        let text = unsafe { CStr::from_ptr((self.error)(status)) };
        Err(text.to_string_lossy().into_owned())
    }
}

#[allow(unsafe_code)]
fn load(path: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: it is NVIDIA's library from libtorch's own wheels, whose initialisers are made to be run by loading. It is
    // never unloaded, so no code of it can vanish while in use.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }
}

fn file_name(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
}

fn c_string(text: &str) -> Result<CString, String> {
    CString::new(text).map_err(|error| error.to_string())
}

fn c_strings<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<CString>, String> {
    texts.map(c_string).collect()
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}
