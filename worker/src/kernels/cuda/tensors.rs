//! What kernels ask of tensors before they are given their addresses.

use tch::{Device, Kind, Tensor};

use super::{error::KernelError, launch::Argument};

/// Bytes that one thread loads at once, and that such tensors are aligned to.
const ALIGNMENT: usize = 16;

/// bf16 numbers in one load: what widths are multiples of.
pub const VECTOR: i64 = 8;

/// The GPU whose tensors are taken.
#[derive(Clone, Copy, Debug)]
pub struct Tensors {
    /// Where they have to be.
    pub device: Device,
}

impl Tensors {
    /// A contiguous tensor that is read or written in vectors.
    pub fn vectors(
        self,
        name: &'static str,
        tensor: &Tensor,
        kind: Kind,
        shape: &[i64],
    ) -> Result<Argument, KernelError> {
        aligned(name, tensor)?;
        self.numbers(name, tensor, kind, shape)
    }

    /// A contiguous tensor that is read or written number by number.
    pub fn numbers(
        self,
        name: &'static str,
        tensor: &Tensor,
        kind: Kind,
        shape: &[i64],
    ) -> Result<Argument, KernelError> {
        self.common(name, tensor, kind, shape)?;
        if !tensor.is_contiguous() {
            let strides = tensor.stride();
            return Err(wrong(
                name,
                format!("it is not contiguous: its strides are {strides:?}"),
            ));
        }
        Ok(Argument::pointer(tensor))
    }

    /// Rows of bf16 vectors that may be slices of a wider matrix: where they begin, and from one to the next.
    pub fn rows(
        self,
        name: &'static str,
        tensor: &Tensor,
        shape: [i64; 2],
    ) -> Result<(Argument, Argument), KernelError> {
        self.common(name, tensor, Kind::BFloat16, &shape)?;
        aligned(name, tensor)?;
        match tensor.stride()[..] {
            [row, 1] if row >= shape[1] && row % VECTOR == 0 => {
                Ok((Argument::pointer(tensor), row.into()))
            }
            ref strides => Err(wrong(
                name,
                format!(
                    "its strides are {strides:?}; rows have to be a multiple of {VECTOR} numbers apart, and the numbers \
                     of a row together"
                ),
            )),
        }
    }

    fn common(
        self,
        name: &'static str,
        tensor: &Tensor,
        kind: Kind,
        shape: &[i64],
    ) -> Result<(), KernelError> {
        let problem = if tensor.device() != self.device {
            format!("it is on {:?}, not on {:?}", tensor.device(), self.device)
        } else if tensor.kind() != kind {
            format!("it is {:?}, not {kind:?}", tensor.kind())
        } else if tensor.size() != shape {
            format!("its shape is {:?}, not {shape:?}", tensor.size())
        } else {
            return Ok(());
        };
        Err(wrong(name, problem))
    }
}

/// The two lengths of a matrix.
pub fn matrix(name: &'static str, tensor: &Tensor) -> Result<[i64; 2], KernelError> {
    let size = tensor.size();
    size.as_slice()
        .try_into()
        .map_err(|_| wrong(name, format!("its shape is {size:?}, not that of a matrix")))
}

/// The four lengths of a heads-first tensor.
pub fn heads_first(name: &'static str, tensor: &Tensor) -> Result<[i64; 4], KernelError> {
    let size = tensor.size();
    size.as_slice().try_into().map_err(|_| {
        wrong(
            name,
            format!("its shape is {size:?}, not [batch, heads, tokens, channels]"),
        )
    })
}

/// A length as kernels count: in 32 bits.
pub fn length(name: &'static str, length: i64) -> Result<i32, KernelError> {
    i32::try_from(length).map_err(|_| wrong(name, format!("{length} is too long for a kernel")))
}

/// A width that rows of vectors can have.
pub fn width(name: &'static str, width: i64, multiple: i64) -> Result<i32, KernelError> {
    if width <= 0 || width % multiple != 0 {
        return Err(wrong(
            name,
            format!("a row of {width} numbers is no multiple of {multiple}"),
        ));
    }
    length(name, width)
}

/// An error about a tensor.
pub fn wrong(tensor: &'static str, problem: String) -> KernelError {
    KernelError::Tensor { tensor, problem }
}

fn aligned(name: &'static str, tensor: &Tensor) -> Result<(), KernelError> {
    if (tensor.data_ptr() as usize).is_multiple_of(ALIGNMENT) {
        Ok(())
    } else {
        Err(wrong(
            name,
            format!("its address is no multiple of {ALIGNMENT}"),
        ))
    }
}
