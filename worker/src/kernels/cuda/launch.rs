//! The driver's side: one GPU, the kernels loaded on it, and their launches on the legacy default stream, which is the one
//! that libtorch works on; so a launch comes after everything that libtorch was asked for before it.
//!
//! What makes a launch safe is checked by its callers: that pointers are of this GPU and what lies behind them is as long as
//! the kernel believes. What can be checked here is: number and sizes of the arguments, against what the kernel declares.

use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    mem::size_of,
    ptr,
};

use cudarc::driver::{
    result::{self, DriverError},
    sys,
};
use sys::CUfunction_attribute_enum::{
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC_SHARED,
    CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES as STATIC_SHARED,
};
use tch::Tensor;

use super::error::KernelError;

/// Shared memory that a block gets without asking for more, the kernel's own arrays included.
const PLAIN_SHARED_BYTES: u32 = 48 << 10;

/// One GPU's context, the one that libtorch uses, and the kernels loaded into it.
pub struct Gpu {
    index: usize,
    context: sys::CUcontext,
    processors: u32,
    architecture: u32,
    kernels: HashMap<&'static str, Kernel>,
}

struct Kernel {
    function: sys::CUfunction,
    /// Shared memory of the arrays that it declares.
    static_shared_bytes: u32,
    /// Bytes of each argument.
    arguments: Vec<usize>,
}

/// A stream that is alive.
#[derive(Debug)]
pub struct Queue(pub(super) sys::CUstream);

impl Queue {
    /// The legacy default stream.
    pub const DEFAULT: Queue = Queue(ptr::null_mut());

    /// Its `CUstream`, for other libraries.
    pub fn raw(&self) -> *mut c_void {
        self.0.cast()
    }
}

/// How many threads run a kernel. Axes that are not named have the length 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks along x and y.
    pub blocks: (u32, u32),
    /// Threads of a block along x and y.
    pub threads: (u32, u32),
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

/// One argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Argument {
    bits: u64,
    bytes: usize,
}

impl Argument {
    /// A null pointer: what is optional and not there.
    pub const NULL: Argument = Argument {
        bits: 0,
        bytes: size_of::<u64>(),
    };

    /// Where a tensor begins.
    pub fn pointer(tensor: &Tensor) -> Argument {
        Argument {
            bits: tensor.data_ptr() as u64,
            ..Argument::NULL
        }
    }

    /// What a pointer points to.
    pub(super) fn address(self) -> u64 {
        self.bits
    }

    /// A pointer so many bytes further on.
    pub fn offset(self, bytes: i64) -> Argument {
        Argument {
            bits: self.bits + bytes.cast_unsigned(),
            ..self
        }
    }
}

impl From<i32> for Argument {
    fn from(number: i32) -> Argument {
        Argument {
            bits: u64::from(number.cast_unsigned()),
            bytes: size_of::<i32>(),
        }
    }
}

impl From<i64> for Argument {
    fn from(number: i64) -> Argument {
        Argument {
            bits: number.cast_unsigned(),
            bytes: size_of::<i64>(),
        }
    }
}

impl From<f32> for Argument {
    fn from(number: f32) -> Argument {
        Argument {
            bits: u64::from(number.to_bits()),
            bytes: size_of::<f32>(),
        }
    }
}

impl Gpu {
    /// The GPU with this index, in the context that libtorch uses too.
    #[allow(unsafe_code)]
    pub fn open(index: usize) -> Result<Gpu, KernelError> {
        let context = primary_context(index)?;
        let opened = || -> Result<Gpu, DriverError> {
            use sys::CUdevice_attribute::{
                CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
                CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
                CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as PROCESSORS,
            };
            let device = result::device::get(ordinal(index))?;
            // SAFETY: the device is the driver's own answer.
            let attribute = |name| unsafe { result::device::get_attribute(device, name) };
            Ok(Gpu {
                index,
                context,
                processors: attribute(PROCESSORS)?.cast_unsigned(),
                architecture: (attribute(MAJOR)? * 10 + attribute(MINOR)?).cast_unsigned(),
                kernels: HashMap::new(),
            })
        };
        opened().map_err(|error| refused(index, "open the GPU".to_owned(), &error))
    }

    /// Its index among the visible ones.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Makes its context the calling thread's.
    #[allow(unsafe_code)]
    pub fn make_current(&self) -> Result<(), KernelError> {
        // SAFETY: the context is retained for ever.
        unsafe { result::ctx::set_current(self.context) }
            .map_err(|error| refused(self.index, "use the GPU".to_owned(), &error))
    }

    /// Waits for all that the legacy default stream was asked for.
    #[allow(unsafe_code)]
    pub fn wait(&self) -> Result<(), KernelError> {
        self.make_current()?;
        // SAFETY: the default stream is always alive.
        unsafe { result::stream::synchronize(Queue::DEFAULT.0) }
            .map_err(|error| refused(self.index, "finish its work".to_owned(), &error))
    }

    /// Bytes per second between memory and processors, at most.
    #[allow(unsafe_code)]
    pub fn bandwidth(&self) -> Result<f64, KernelError> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH as BITS,
            CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE as KILOHERTZ,
        };
        let attribute = |name| {
            let device = result::device::get(self.index.try_into().unwrap_or(i32::MAX))?;
            // SAFETY: the device is the driver's own answer.
            unsafe { result::device::get_attribute(device, name) }
        };
        let read = || Ok((attribute(KILOHERTZ)?, attribute(BITS)?));
        let (kilohertz, bits) = read()
            .map_err(|error| refused(self.index, "read the memory's speed".to_owned(), &error))?;
        // Two transfers per cycle.
        Ok(f64::from(kilohertz) * 1e3 * 2.0 * f64::from(bits) / 8.0)
    }

    /// Multiprocessors.
    pub fn processors(&self) -> u32 {
        self.processors
    }

    /// What to compile for, as `sm_90a`: with all that this very architecture has, where it has such things.
    pub fn architecture(&self) -> Result<String, KernelError> {
        match self.architecture {
            ..80 => Err(KernelError::Architecture {
                device: self.index,
                architecture: self.architecture,
            }),
            80..90 => Ok(format!("sm_{}", self.architecture)),
            90.. => Ok(format!("sm_{}a", self.architecture)),
        }
    }

    /// Loads machine code and finds `names` in it.
    #[allow(unsafe_code)]
    pub fn load(&mut self, cubin: &[u8], names: &[&'static str]) -> Result<(), KernelError> {
        let index = self.index;
        let refused =
            |what: &str, error: DriverError| refused(index, format!("load {what}"), &error);
        // SAFETY: the context is retained for ever.
        unsafe { result::ctx::set_current(self.context) }
            .map_err(|error| refused("kernels", error))?;
        // SAFETY: the bytes are a whole cubin, from NVRTC or out of the cache with its hash right; the driver copies
        // them. The module is never unloaded, so functions of it stay valid.
        let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }
            .map_err(|error| refused("kernels", error))?;
        for &name in names {
            let c_name = CString::new(name).expect("invariant: kernels' names hold no NUL");
            // SAFETY: the module is loaded.
            let function = unsafe { result::module::get_function(module, c_name) }
                .map_err(|error| refused(name, error))?;
            // SAFETY: likewise.
            let own = unsafe { result::function::get_function_attribute(function, STATIC_SHARED) }
                .map_err(|error| refused(name, error))?;
            let kernel = Kernel {
                function,
                static_shared_bytes: own.cast_unsigned(),
                arguments: declared(function),
            };
            self.kernels.insert(name, kernel);
        }
        Ok(())
    }

    /// Launches a kernel that was loaded, on the legacy default stream.
    pub fn launch(
        &self,
        name: &'static str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<(), KernelError> {
        self.launch_on(&Queue::DEFAULT, name, grid, arguments)
    }

    /// Launches a kernel that was loaded, on a stream of this GPU.
    #[allow(unsafe_code)]
    pub fn launch_on(
        &self,
        queue: &Queue,
        name: &'static str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<(), KernelError> {
        self.start(queue, name, grid, arguments, &mut [])
    }

    /// Likewise a kernel that may begin before what is before it on the stream has ended, and waits for that itself. GPUs that
    /// cannot do so begin it in its turn.
    #[allow(unsafe_code)]
    pub fn launch_early(
        &self,
        queue: &Queue,
        name: &'static str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<(), KernelError> {
        use sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let mut early = [sys::CUlaunchAttribute {
            id: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        }];
        let attributes: &mut [_] = match self.architecture {
            ..90 => &mut [],
            90.. => &mut early,
        };
        self.start(queue, name, grid, arguments, attributes)
    }

    #[allow(unsafe_code)]
    fn start(
        &self,
        queue: &Queue,
        name: &'static str,
        grid: Grid,
        arguments: &[Argument],
        attributes: &mut [sys::CUlaunchAttribute],
    ) -> Result<(), KernelError> {
        let kernel = self
            .kernels
            .get(name)
            .expect("invariant: what is launched is in a source's list of kernels");
        let given: Vec<usize> = arguments.iter().map(|argument| argument.bytes).collect();
        if given != kernel.arguments {
            return Err(KernelError::Arguments {
                kernel: name,
                declared: kernel.arguments.clone(),
                given,
            });
        }
        let mut pointers: Vec<_> = arguments
            .iter()
            .map(|argument| ptr::from_ref(&argument.bits).cast_mut().cast())
            .collect();
        let (blocks, threads) = (grid.blocks, grid.threads);
        let launch = sys::CUlaunchConfig {
            gridDimX: blocks.0,
            gridDimY: blocks.1,
            gridDimZ: 1,
            blockDimX: threads.0,
            blockDimY: threads.1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared_bytes,
            hStream: queue.0,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: context and function are never given up. The kernel's arguments are as many and as long as it declares,
        // and the driver copies them, and the attributes, before it returns. What they point to was checked by the caller.
        let launched = unsafe {
            result::ctx::set_current(self.context)
                .and_then(|()| allow_shared(kernel, grid.shared_bytes))
                .and_then(|()| {
                    sys::cuLaunchKernelEx(
                        &launch,
                        kernel.function,
                        pointers.as_mut_ptr(),
                        ptr::null_mut(),
                    )
                    .result()
                })
        };
        launched.map_err(|error| refused(self.index, format!("launch {name} as {grid:?}"), &error))
    }
}

/// The context of the GPU with this index that libtorch uses, too. It is never released: libtorch keeps it for the life of
/// the process anyway.
#[allow(unsafe_code)]
pub fn primary_context(index: usize) -> Result<sys::CUcontext, KernelError> {
    // SAFETY: the driver's library is made to be loaded so. cudarc panics where it is missing, so it is asked first.
    if !unsafe { sys::is_culib_present() } {
        return Err(KernelError::NoDriver);
    }
    let retained = || -> Result<sys::CUcontext, DriverError> {
        result::init()?;
        let device = result::device::get(ordinal(index))?;
        // SAFETY: the device is the driver's own answer.
        unsafe { result::primary_ctx::retain(device) }
    };
    retained().map_err(|error| refused(index, "open the GPU".to_owned(), &error))
}

fn ordinal(index: usize) -> i32 {
    i32::try_from(index).unwrap_or(i32::MAX)
}

/// Bytes of each argument that a kernel declares.
#[allow(unsafe_code)]
fn declared(function: sys::CUfunction) -> Vec<usize> {
    let argument = |place| {
        let (mut offset, mut bytes) = (0, 0);
        // SAFETY: the function is loaded; a place beyond the last argument is answered with an error.
        unsafe { sys::cuFuncGetParamInfo(function, place, &mut offset, &mut bytes) }
            .result()
            .ok()?;
        Some(bytes)
    };
    (0..).map_while(argument).collect()
}

/// Lets a kernel have more shared memory than every one gets.
///
/// # Safety
///
/// The function is loaded, and its context current.
#[allow(unsafe_code)]
unsafe fn allow_shared(kernel: &Kernel, bytes: u32) -> Result<(), DriverError> {
    if kernel.static_shared_bytes + bytes <= PLAIN_SHARED_BYTES {
        return Ok(());
    }
    let (function, bytes) = (kernel.function, bytes.cast_signed());
    // SAFETY: the caller vouches for it.
    unsafe { result::function::set_function_attribute(function, DYNAMIC_SHARED, bytes) }
}

/// The driver's refusal to do `what`.
pub(super) fn refused(device: usize, what: String, error: &DriverError) -> KernelError {
    let cause = error.error_string().map_or_else(
        |_| error.to_string(),
        |text| text.to_string_lossy().into_owned(),
    );
    KernelError::Driver {
        device,
        what,
        cause,
    }
}
