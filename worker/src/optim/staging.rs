//! Host memory through which stored bytes reach the device.

use std::{marker::PhantomData, slice};

use tch::{Device, Kind, Tensor};

/// Some bytes in host memory, pinned beside a GPU: from there copies run at the speed of the bus, and those of several threads
/// at the same time. libtorch keeps pinned memory that is given back, so the next is there at once.
pub struct Staging {
    /// Nobody else has it, or a view of it that outlives a borrow.
    bytes: Tensor,
}

/// Numbers that lie in a [`Staging`], as one tensor.
pub struct Staged<'a>(pub(super) Tensor, PhantomData<&'a Staging>);

impl Staging {
    /// Of `bytes` bytes, on the way to `device`.
    pub fn new(bytes: u64, device: Device) -> Staging {
        let bytes = Tensor::zeros([bytes as i64], (Kind::Uint8, Device::Cpu));
        Staging {
            bytes: match device {
                Device::Cpu => bytes,
                device => bytes.pin_memory(device),
            },
        }
    }

    /// The first of its bytes, all of which are there to be written.
    pub fn bytes_mut(&mut self, length: u64) -> &mut [u8] {
        let first = self.bytes.narrow(0, 0, length as i64);
        let (start, length) = (first.data_ptr().cast::<u8>(), length as usize);
        // SAFETY: `narrow` has checked that so many bytes are there; the tensor is contiguous, in host memory and initialised,
        // and lives as long as the borrow. No other tensor has this memory: it is private, and views of it (`Staged`) end
        // before it can be borrowed to be changed. The device reads it in copies that are over when they return.
        #[allow(unsafe_code)]
        unsafe {
            slice::from_raw_parts_mut(start, length)
        }
    }

    /// `length` numbers from byte `start` on, which is a multiple of their size.
    pub fn values(&self, start: u64, length: i64, kind: Kind) -> Staged<'_> {
        let bytes = length * kind.elt_size_in_bytes() as i64;
        let values = self.bytes.narrow(0, start as i64, bytes).view_dtype(kind);
        Staged(values, PhantomData)
    }
}
