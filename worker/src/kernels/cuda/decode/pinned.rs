//! Numbers in host memory that the GPU reads and writes itself, as part of a recorded step.

use std::slice;

use cudarc::driver::{
    result::{self, DriverError},
    sys::CUdeviceptr,
};
use tch::Tensor;

use crate::kernels::cuda::{
    error::KernelError,
    launch::{Argument, Gpu, Queue, refused},
};

/// i32 numbers in pinned memory.
#[derive(Debug)]
pub struct Pinned {
    index: usize,
    start: *mut i32,
    count: usize,
}

impl Pinned {
    /// So many zeros.
    #[allow(unsafe_code)]
    pub fn new(gpu: &Gpu, count: usize) -> Result<Pinned, KernelError> {
        gpu.make_current()?;
        // SAFETY: the driver gives as many bytes or an error, and zeros are numbers.
        let start = unsafe {
            result::malloc_host(count * size_of::<i32>(), 0)
                .inspect(|start| start.cast::<i32>().write_bytes(0, count))
        };
        let start =
            start.map_err(|error| refused(gpu.index(), "pin host memory".to_owned(), &error))?;
        Ok(Pinned {
            index: gpu.index(),
            start: start.cast(),
            count,
        })
    }

    /// The numbers. No copy may be under way.
    #[allow(unsafe_code)]
    pub fn numbers(&mut self) -> &mut [i32] {
        // SAFETY: the memory is this one's, as long, and was written. Decoder::step waits for the GPU before it comes here.
        unsafe { slice::from_raw_parts_mut(self.start, self.count) }
    }

    /// Puts a copy to `to`, i32 and as long, on a stream.
    #[allow(unsafe_code)]
    pub fn send(&self, queue: &Queue, to: &Tensor) -> Result<(), KernelError> {
        let address: CUdeviceptr = Argument::pointer(to).address();
        // SAFETY: both are as long, and live as long as their owner, who waits for the stream.
        let copied = unsafe {
            let from = slice::from_raw_parts(self.start, self.count);
            result::memcpy_htod_async(address, from, queue.0)
        };
        copied.map_err(|error| self.refused(&error))
    }

    /// Puts a copy of `from`, i32 and as long, on a stream.
    #[allow(unsafe_code)]
    pub fn fetch(&self, queue: &Queue, from: &Tensor) -> Result<(), KernelError> {
        let address: CUdeviceptr = Argument::pointer(from).address();
        // SAFETY: both are as long, and live as long as their owner, who waits for the stream before it reads.
        let copied = unsafe {
            let to = slice::from_raw_parts_mut(self.start, self.count);
            result::memcpy_dtoh_async(to, address, queue.0)
        };
        copied.map_err(|error| self.refused(&error))
    }

    fn refused(&self, error: &DriverError) -> KernelError {
        refused(self.index, "copy to or from the host".to_owned(), error)
    }
}

impl Drop for Pinned {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the driver gave it, and this is its last use. That it cannot be freed changes nothing.
        let _ = unsafe { result::free_host(self.start.cast()) };
    }
}
