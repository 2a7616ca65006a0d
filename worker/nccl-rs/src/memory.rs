//! Device memory that operations read and write, and the streams that they are enqueued on.
//!
//! An operation goes on after its call has returned, so no borrow can guard its memory. Whoever makes
//! a [`DeviceSlice`], a [`DeviceSliceMut`] or a [`Stream`] from a pointer promises, in `unsafe`, what a
//! borrow would; everything after that is safe.

use std::ffi::{c_int, c_void};
use std::ptr;

use crate::symbols::RawStream;

/// The type of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataType {
    /// Signed, 8 bits.
    I8,
    /// Unsigned, 8 bits.
    U8,
    /// Signed, 32 bits.
    I32,
    /// Unsigned, 32 bits.
    U32,
    /// Signed, 64 bits.
    I64,
    /// Unsigned, 64 bits.
    U64,
    /// IEEE half precision.
    F16,
    /// Single precision.
    F32,
    /// Double precision.
    F64,
    /// bfloat16.
    Bf16,
}

impl DataType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DataType::I8 | DataType::U8 => 1,
            DataType::F16 | DataType::Bf16 => 2,
            DataType::I32 | DataType::U32 | DataType::F32 => 4,
            DataType::I64 | DataType::U64 | DataType::F64 => 8,
        }
    }

    /// `ncclDataType_t`.
    pub(crate) fn raw(self) -> c_int {
        match self {
            DataType::I8 => 0,
            DataType::U8 => 1,
            DataType::I32 => 2,
            DataType::U32 => 3,
            DataType::I64 => 4,
            DataType::U64 => 5,
            DataType::F16 => 6,
            DataType::F32 => 7,
            DataType::F64 => 8,
            DataType::Bf16 => 9,
        }
    }
}

/// Elements in device memory that operations read.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSlice {
    pub(crate) pointer: *const c_void,
    pub(crate) elements: usize,
    pub(crate) data_type: DataType,
}

impl DeviceSlice {
    /// `elements` values of `data_type` from `pointer` on.
    ///
    /// # Safety
    ///
    /// From the first operation that gets this slice until the last one is done on its stream, or its
    /// communicator is aborted or dropped:
    ///
    /// * the memory is allocated and can be reached from the communicator's device;
    /// * nothing writes to it but work that is ordered on the same stream.
    pub unsafe fn new(pointer: *const c_void, elements: usize, data_type: DataType) -> DeviceSlice {
        DeviceSlice {
            pointer,
            elements,
            data_type,
        }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Their type.
    pub fn data_type(&self) -> DataType {
        self.data_type
    }
}

/// Elements in device memory that operations write, or read and write.
#[derive(Debug)]
pub struct DeviceSliceMut {
    pub(crate) pointer: *mut c_void,
    pub(crate) elements: usize,
    pub(crate) data_type: DataType,
}

impl DeviceSliceMut {
    /// `elements` values of `data_type` from `pointer` on.
    ///
    /// # Safety
    ///
    /// As for [`DeviceSlice::new`], and nothing else reads the memory either but work that is ordered
    /// on the same stream.
    pub unsafe fn new(
        pointer: *mut c_void,
        elements: usize,
        data_type: DataType,
    ) -> DeviceSliceMut {
        DeviceSliceMut {
            pointer,
            elements,
            data_type,
        }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Their type.
    pub fn data_type(&self) -> DataType {
        self.data_type
    }

    /// The same elements, to be read.
    pub fn as_slice(&self) -> DeviceSlice {
        DeviceSlice {
            pointer: self.pointer,
            elements: self.elements,
            data_type: self.data_type,
        }
    }

    /// Part `index` of `parts` equal ones; the caller has checked that they are.
    pub(crate) fn part(&self, index: u32, parts: u32) -> DeviceSliceMut {
        let elements = self.elements / parts as usize;
        let bytes = elements * self.data_type.size() * index as usize;
        DeviceSliceMut {
            pointer: self.pointer.wrapping_byte_add(bytes),
            elements,
            data_type: self.data_type,
        }
    }
}

/// A CUDA stream: operations on it run in order.
#[derive(Clone, Copy, Debug)]
pub struct Stream(pub(crate) RawStream);

impl Stream {
    /// The legacy default stream, ordered with all other blocking streams. libtorch works on it.
    pub const DEFAULT: Stream = Stream(ptr::null_mut());

    /// A stream by its `cudaStream_t` or `CUstream`.
    ///
    /// # Safety
    ///
    /// It is a stream of the communicator's device and lives until everything enqueued on it is done.
    pub unsafe fn from_raw(stream: *mut c_void) -> Stream {
        Stream(stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_behind_each_other() {
        let whole = DeviceSliceMut {
            pointer: ptr::without_provenance_mut(4096),
            elements: 12,
            data_type: DataType::Bf16,
        };
        let part = whole.part(2, 3);
        assert_eq!((part.pointer.addr(), part.elements), (4096 + 16, 4));
    }
}
