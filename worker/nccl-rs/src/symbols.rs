//! The functions of `libnccl.so.2` that this crate calls, with the types that they take.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::error::{LoadError, chain};

/// `ncclComm_t`.
pub(crate) type RawComm = *mut c_void;

/// `cudaStream_t`.
pub(crate) type RawStream = *mut c_void;

/// `ncclResult_t`.
pub(crate) type RawResult = c_int;

pub(crate) const SUCCESS: RawResult = 0;
pub(crate) const IN_PROGRESS: RawResult = 7;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawId(pub [u8; 128]);

/// `ncclConfig_t` as of NCCL 2.14: newer libraries read `size` and `version` and take their own
/// defaults for what they have added since.
#[repr(C)]
pub(crate) struct RawConfig {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

impl RawConfig {
    /// Calls return at once and go on in the background.
    pub fn non_blocking() -> RawConfig {
        RawConfig {
            size: size_of::<RawConfig>(),
            magic: 0xcafe_beef,
            version: 21400,
            blocking: 0,
        }
    }
}

/// Declares the table of functions, and how it is filled from a library.
macro_rules! symbols {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        pub(crate) struct Symbols {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Symbols {
            /// Looks all of them up and keeps the library loaded for the life of the process: it
            /// runs threads of its own, which must not lose their code.
            pub fn resolve(library: libloading::os::unix::Library) -> Result<Symbols, LoadError> {
                let symbols = Symbols {
                    $($field: {
                        // SAFETY: the type is that of the function of this name in nccl.h, which has not
                        // changed since 2.14. A symbol of another kind under this name would be no NCCL.
                        let found = unsafe { library.get($symbol) };
                        *found.map_err(|error| LoadError::MissingFunction {
                            name: String::from_utf8_lossy($symbol).into_owned(),
                            cause: chain(&error),
                        })?
                    },)*
                };
                std::mem::forget(library);
                Ok(symbols)
            }
        }
    };
}

symbols! {
    get_version = b"ncclGetVersion": fn(*mut c_int) -> RawResult;
    get_unique_id = b"ncclGetUniqueId": fn(*mut RawId) -> RawResult;
    get_error_string = b"ncclGetErrorString": fn(RawResult) -> *const c_char;
    get_last_error = b"ncclGetLastError": fn(RawComm) -> *const c_char;
    comm_init_rank_config = b"ncclCommInitRankConfig":
        fn(*mut RawComm, c_int, RawId, c_int, *mut RawConfig) -> RawResult;
    comm_get_async_error = b"ncclCommGetAsyncError": fn(RawComm, *mut RawResult) -> RawResult;
    comm_finalize = b"ncclCommFinalize": fn(RawComm) -> RawResult;
    comm_destroy = b"ncclCommDestroy": fn(RawComm) -> RawResult;
    comm_abort = b"ncclCommAbort": fn(RawComm) -> RawResult;
    group_start = b"ncclGroupStart": fn() -> RawResult;
    group_end = b"ncclGroupEnd": fn() -> RawResult;
    all_reduce = b"ncclAllReduce":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> RawResult;
    reduce_scatter = b"ncclReduceScatter":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> RawResult;
    all_gather = b"ncclAllGather":
        fn(*const c_void, *mut c_void, usize, c_int, RawComm, RawStream) -> RawResult;
    broadcast = b"ncclBroadcast":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> RawResult;
    send = b"ncclSend": fn(*const c_void, usize, c_int, c_int, RawComm, RawStream) -> RawResult;
    recv = b"ncclRecv": fn(*mut c_void, usize, c_int, c_int, RawComm, RawStream) -> RawResult;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_header() {
        assert_eq!((size_of::<RawId>(), align_of::<RawId>()), (128, 1));
        assert_eq!((size_of::<RawConfig>(), align_of::<RawConfig>()), (24, 8));
        assert_eq!(std::mem::offset_of!(RawConfig, blocking), 16);
    }
}
