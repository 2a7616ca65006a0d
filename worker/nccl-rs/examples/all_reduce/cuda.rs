//! The least of CUDA that an example needs: device memory through the driver's own library, which is
//! on every machine with a GPU and is loaded at run time.

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::ptr;

use bytemuck::Pod;
use libloading::os::unix::{Library, Symbol};

type Function<T> = Symbol<T>;

/// A GPU, current on the thread that opened it.
pub struct Cuda {
    allocate: Function<unsafe extern "C" fn(*mut u64, usize) -> c_int>,
    free: Function<unsafe extern "C" fn(u64) -> c_int>,
    to_device: Function<unsafe extern "C" fn(u64, *const c_void, usize) -> c_int>,
    to_host: Function<unsafe extern "C" fn(*mut c_void, u64, usize) -> c_int>,
    synchronize: Function<unsafe extern "C" fn() -> c_int>,
    /// Keeps the functions loaded.
    _library: Library,
}

impl Cuda {
    /// Makes GPU `device` current, or says why there is none.
    pub fn open(device: c_int) -> Result<Cuda, String> {
        // SAFETY: the driver's library sets up its own data when it is loaded, and nothing else. The
        // types of its functions are those of cuda.h.
        unsafe {
            let library = Library::new("libcuda.so.1")
                .map_err(|_| "there is no libcuda.so.1: install the GPU's driver".to_owned())?;
            let init: Function<unsafe extern "C" fn(u32) -> c_int> = find(&library, b"cuInit")?;
            check("cuInit", init(0))?;
            let get: Function<unsafe extern "C" fn(*mut c_int, c_int) -> c_int> =
                find(&library, b"cuDeviceGet")?;
            let mut handle = 0;
            check("cuDeviceGet", get(&mut handle, device))?;
            let retain: Function<unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int> =
                find(&library, b"cuDevicePrimaryCtxRetain")?;
            let mut context = ptr::null_mut();
            check("cuDevicePrimaryCtxRetain", retain(&mut context, handle))?;
            let set: Function<unsafe extern "C" fn(*mut c_void) -> c_int> =
                find(&library, b"cuCtxSetCurrent")?;
            check("cuCtxSetCurrent", set(context))?;
            Ok(Cuda {
                allocate: find(&library, b"cuMemAlloc_v2")?,
                free: find(&library, b"cuMemFree_v2")?,
                to_device: find(&library, b"cuMemcpyHtoD_v2")?,
                to_host: find(&library, b"cuMemcpyDtoH_v2")?,
                synchronize: find(&library, b"cuCtxSynchronize")?,
                _library: library,
            })
        }
    }

    /// Device memory that holds a copy of `values`.
    pub fn buffer<T: Pod>(&self, values: &[T]) -> Result<Buffer<'_, T>, String> {
        let mut address = 0;
        // SAFETY: the functions write one address, and read `values` while they are borrowed.
        unsafe {
            check(
                "cuMemAlloc",
                (self.allocate)(&mut address, size_of_val(values)),
            )?;
            let buffer = Buffer {
                cuda: self,
                address,
                elements: values.len(),
                kind: PhantomData,
            };
            let copied = (self.to_device)(address, values.as_ptr().cast(), size_of_val(values));
            check("cuMemcpyHtoD", copied)?;
            Ok(buffer)
        }
    }

    /// Waits until the GPU has done everything.
    pub fn synchronize(&self) -> Result<(), String> {
        // SAFETY: the function takes nothing.
        check("cuCtxSynchronize", unsafe { (self.synchronize)() })
    }
}

/// Values in device memory.
pub struct Buffer<'a, T> {
    cuda: &'a Cuda,
    address: u64,
    elements: usize,
    kind: PhantomData<T>,
}

impl<T: Pod> Buffer<'_, T> {
    /// Where they lie.
    pub fn pointer(&self) -> *mut c_void {
        ptr::with_exposed_provenance_mut(self.address as usize)
    }

    /// A copy of the values, as they are when the default stream has done its work.
    pub fn values(&self) -> Result<Vec<T>, String> {
        let mut values = vec![T::zeroed(); self.elements];
        let bytes = size_of_val(values.as_slice());
        // SAFETY: `values` has room for what is copied.
        let copied =
            unsafe { (self.cuda.to_host)(values.as_mut_ptr().cast(), self.address, bytes) };
        check("cuMemcpyDtoH", copied)?;
        Ok(values)
    }
}

impl<T> Drop for Buffer<'_, T> {
    fn drop(&mut self) {
        // SAFETY: the memory is ours. That it cannot be freed is of no matter any more.
        let _ = unsafe { (self.cuda.free)(self.address) };
    }
}

/// # Safety
///
/// `T` is the type of the function `name`.
unsafe fn find<T>(library: &Library, name: &[u8]) -> Result<Function<T>, String> {
    // SAFETY: as the caller says.
    unsafe { library.get(name) }
        .map_err(|_| format!("the driver has no {}", String::from_utf8_lossy(name)))
}

fn check(call: &str, result: c_int) -> Result<(), String> {
    match result {
        0 => Ok(()),
        code => Err(format!("{call} failed with CUDA error {code}")),
    }
}
