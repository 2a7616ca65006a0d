//! Matrix products by cuBLASLt, on any stream, by an algorithm of one's choice.

use std::{ffi::c_void, mem::MaybeUninit, ptr};

use cudarc::{
    cublaslt::{
        result::{self, CublasError},
        sys,
    },
    driver::sys::CUstream_st,
};
use tch::{Device, Kind, Tensor};

use crate::kernels::cuda::{
    error::KernelError,
    launch::{Argument, Queue},
};

/// Memory for algorithms that divide the sum.
const WORKSPACE: i64 = 64 << 20;
/// The library's `CUBLAS_OP_T`.
const TRANSPOSED: i32 = 1;
/// Algorithms that are offered, at most.
const OFFERS: usize = 24;

/// The library, on one GPU.
pub struct Library {
    index: usize,
    handle: sys::cublasLtHandle_t,
    workspaces: [Tensor; 2],
}

/// The lengths of a product y [n, out] = x [n, in] W^T of bf16 tensors; rows of x and y may be further apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// n.
    pub rows: i64,
    /// Columns of x and W.
    pub inner: i64,
    /// Columns of y, rows of W.
    pub outer: i64,
    /// From one row of x to the next.
    pub x_stride: i64,
    /// From one row of y to the next.
    pub y_stride: i64,
}

/// A shape as the library describes it.
#[derive(Debug)]
pub struct Described {
    description: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
}

/// A way to compute a product.
#[derive(Clone, Copy, Debug)]
pub struct Algorithm(sys::cublasLtMatmulAlgo_t);

impl Library {
    /// On the GPU with this index, whose context is current. libtorch has loaded the library already.
    #[allow(unsafe_code)]
    pub fn open(index: usize) -> Result<Library, KernelError> {
        // SAFETY: the library is made to be loaded so. cudarc panics where it is missing, so it is asked first.
        if !unsafe { sys::is_culib_present() } {
            return Err(KernelError::Driver {
                device: index,
                what: "multiply matrices".to_owned(),
                cause: "libcublasLt.so.13 cannot be loaded; run scripts/setup --cuda again"
                    .to_owned(),
            });
        }
        let handle = result::create_handle().map_err(|error| failed(index, error))?;
        Ok(Library {
            index,
            handle,
            workspaces: [0, 1]
                .map(|_| Tensor::empty([WORKSPACE], (Kind::Uint8, Device::Cuda(index)))),
        })
    }

    /// Describes a product.
    #[allow(unsafe_code)]
    pub fn describe(&self, shape: Shape) -> Result<Described, KernelError> {
        use sys::{
            cublasComputeType_t::CUBLAS_COMPUTE_32F, cublasLtMatmulDescAttributes_t as Attribute,
            cudaDataType::CUDA_R_16BF, cudaDataType::CUDA_R_32F,
        };
        let layout = |rows: i64, columns: i64, stride: i64| {
            result::create_matrix_layout(
                CUDA_R_16BF,
                rows.cast_unsigned(),
                columns.cast_unsigned(),
                stride,
            )
        };
        let described = || -> Result<Described, CublasError> {
            let description = result::create_matmul_desc(CUBLAS_COMPUTE_32F, CUDA_R_32F)?;
            let transposed = TRANSPOSED;
            // SAFETY: the description is alive; the attribute is as long as is said, and copied.
            unsafe {
                result::set_matmul_desc_attribute(
                    description,
                    Attribute::CUBLASLT_MATMUL_DESC_TRANSA,
                    ptr::from_ref(&transposed).cast(),
                    size_of_val(&transposed),
                )?;
            }
            // The library counts by columns: to it our matrices are transposed, and y^T = W x^T.
            Ok(Described {
                description,
                weight: layout(shape.inner, shape.outer, shape.inner)?,
                x: layout(shape.inner, shape.rows, shape.x_stride)?,
                y: layout(shape.outer, shape.rows, shape.y_stride)?,
            })
        };
        described().map_err(|error| failed(self.index, error))
    }

    /// Algorithms for it, the one that the library thinks is the fastest first.
    #[allow(unsafe_code)]
    pub fn algorithms(&self, product: &Described) -> Result<Vec<Algorithm>, KernelError> {
        use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as BYTES;
        let most = WORKSPACE as usize;
        let mut offers = [MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit(); OFFERS];
        let mut count = 0;
        let mut asked = || -> Result<(), CublasError> {
            let preference = result::create_matmul_pref()?;
            // SAFETY: all that is passed is alive; `offers` has room for as many as are asked for.
            unsafe {
                let answer = result::set_matmul_pref_attribute(
                    preference,
                    BYTES,
                    ptr::from_ref(&most).cast(),
                    size_of_val(&most),
                )
                .and_then(|()| {
                    sys::cublasLtMatmulAlgoGetHeuristic(
                        self.handle,
                        product.description,
                        product.weight,
                        product.x,
                        product.y,
                        product.y,
                        preference,
                        OFFERS as i32,
                        offers.as_mut_ptr().cast(),
                        &mut count,
                    )
                    .result()
                });
                let _ = result::destroy_matmul_pref(preference);
                answer
            }
        };
        asked().map_err(|error| failed(self.index, error))?;
        let offers = &offers[..count.clamp(0, OFFERS as i32) as usize];
        // SAFETY: the library has written `count` of them.
        let offers = offers
            .iter()
            .map(|offer| unsafe { offer.assume_init_ref() });
        let usable = offers.filter(|offer| offer.state.result().is_ok());
        Ok(usable.map(|offer| Algorithm(offer.algo)).collect())
    }

    /// The error that there is no algorithm for a product.
    pub fn offers_nothing(&self) -> KernelError {
        failed(
            self.index,
            CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED),
        )
    }

    /// Puts a product on a stream. Products that run beside each other have a place each, 0 or 1.
    #[allow(unsafe_code)]
    pub fn multiply(
        &self,
        queue: &Queue,
        place: usize,
        product: &Described,
        algorithm: &Algorithm,
        [weight, x, y]: [Argument; 3],
    ) -> Result<(), KernelError> {
        let (one, zero) = (1f32, 0f32);
        let [weight, x, y] = [weight, x, y].map(|argument| argument.address() as *mut c_void);
        // SAFETY: the tensors were checked by the caller to have the lengths that were described, and live as long as the
        // stream works on them; the factors are read before the call returns.
        unsafe {
            result::matmul(
                self.handle,
                product.description,
                ptr::from_ref(&one).cast(),
                ptr::from_ref(&zero).cast(),
                weight,
                product.weight,
                x,
                product.x,
                y,
                product.y,
                y,
                product.y,
                &algorithm.0,
                self.workspaces[place].data_ptr(),
                WORKSPACE as usize,
                queue.raw().cast::<CUstream_st>().cast(),
            )
        }
        .map_err(|error| failed(self.index, error))
    }
}

impl Drop for Library {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the handle is alive, and this is its last use.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Drop for Described {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: all are alive, and this is their last use.
        unsafe {
            for layout in [self.weight, self.x, self.y] {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.description);
        }
    }
}

fn failed(device: usize, error: CublasError) -> KernelError {
    KernelError::Driver {
        device,
        what: "multiply matrices".to_owned(),
        cause: error.to_string(),
    }
}
