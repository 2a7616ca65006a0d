//! The device a worker computes on: chosen by name, opened or refused, never silently replaced.
//!
//! The program links only libtorch's CPU half. CUDA comes in at run time: `libtorch_cuda.so` has to
//! be loaded *before* anything asks libtorch about CUDA, because libtorch remembers the first answer
//! for the life of the process. [`open`] is therefore the first libtorch-related call of every
//! command. NCCL comes in with it, and has to be taken from there: a second copy would disturb both.

use std::{
    collections::BTreeSet,
    env,
    ffi::c_int,
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
    thread,
};

use thiserror::Error;

use crate::failure::chain;

/// The half of libtorch that holds CUDA.
const CUDA_LIBRARY: &str = "libtorch_cuda.so";

/// The version of libtorch that this program is built against; tch is pinned to the same one.
pub const LIBTORCH: &str = "2.11.0";

/// Variables that say which one of its machine's processes this one is, in the order in which they count.
const LOCAL_RANK: [&str; 2] = ["SLURM_LOCALID", "LOCAL_RANK"];

/// Which device the user asked for: `cpu`, `cuda:N` or `cuda`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// The processor.
    Cpu,
    /// The GPU with this CUDA index.
    Cuda(usize),
    /// The GPU of this process's local rank.
    LocalCuda,
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceName, String> {
        let wrong =
            || format!("{text:?} is not a device: write cpu, cuda:N (for example cuda:0), or cuda");
        match text.split_once(':') {
            None if text == "cpu" => Ok(DeviceName::Cpu),
            None if text == "cuda" => Ok(DeviceName::LocalCuda),
            Some(("cuda", index)) => index.parse().map(DeviceName::Cuda).map_err(|_| wrong()),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::Cpu => f.write_str("cpu"),
            DeviceName::Cuda(index) => write!(f, "cuda:{index}"),
            DeviceName::LocalCuda => f.write_str("cuda"),
        }
    }
}

/// Why a device cannot be used.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// libtorch_cuda.so or something that it needs cannot be loaded.
    #[error(
        "{device}: cannot load {CUDA_LIBRARY} ({cause}). This libtorch has no CUDA part; install it with \
         `scripts/setup --cuda`, or run with --device cpu"
    )]
    NoCudaLibrary {
        /// The device asked for.
        device: DeviceName,
        /// The loader's words, with its sources.
        cause: String,
    },
    /// The library is there, but it finds no GPU.
    #[error(
        "{device}: libtorch finds no usable GPU. Check that `nvidia-smi` lists one, that the driver is new enough for \
         CUDA 13 (580 or later) and that CUDA_VISIBLE_DEVICES does not hide it"
    )]
    NoGpu {
        /// The device asked for.
        device: DeviceName,
    },
    /// The index is beyond the last GPU.
    #[error("{device}: this machine shows {count} GPU(s), so the last one is cuda:{}", count - 1)]
    NoSuchGpu {
        /// The device asked for.
        device: DeviceName,
        /// GPUs that libtorch sees.
        count: i64,
    },
    /// It is unknown how much of its memory is free.
    #[error(
        "{device}: the driver does not say how much memory is free: {cause}. Check with `nvidia-smi` that it works"
    )]
    NoMemory {
        /// The device.
        device: DeviceName,
        /// What it says instead.
        cause: String,
    },
    /// A variable of the environment that should hold the local rank does not.
    #[error(
        "{device}: {variable} is {value:?}, which is no local rank. Name the GPU: --device cuda:N"
    )]
    NoLocalRank {
        /// The device asked for.
        device: DeviceName,
        /// The variable.
        variable: &'static str,
        /// What it holds.
        value: String,
    },
    /// libtorch's own NCCL cannot be used.
    #[error("{device}: {cause}")]
    NoNccl {
        /// The device asked for.
        device: DeviceName,
        /// Why, and what to install.
        cause: nccl::LoadError,
    },
    /// CUDA does not let this thread use the device.
    #[error(
        "{device}: CUDA cannot make it the current one: {cause}. Check with `nvidia-smi` that it works"
    )]
    NotCurrent {
        /// The device.
        device: DeviceName,
        /// What it says.
        cause: String,
    },
    /// The environment turns TF32 on, and fp32 has to mean fp32.
    #[error(
        "{device}: TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set, which makes fp32 matrix products inexact. Unset it"
    )]
    Tf32Forced {
        /// The device asked for.
        device: DeviceName,
    },
}

/// An opened device and what has to be equal for results to be equal to the bit.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where tensors live.
    pub device: tch::Device,
    /// On a GPU: the NCCL that libtorch has loaded.
    pub nccl: Option<nccl::Library>,
    /// Intra-op threads that libtorch uses on the processor.
    pub threads: u32,
    /// GPU model, or the processor's architecture and vector instructions.
    pub model: String,
    /// Bytes of the GPU's memory that were free when it was opened; none on the processor. Later the driver's answer says
    /// less: libtorch gives nothing back, and fills what it keeps again.
    pub free_memory: Option<u64>,
}

impl Place {
    /// Bytes of the GPU's memory that are in use, by whomever; none on the processor. libtorch gives nothing back, so after
    /// some work this is the most that was ever in use.
    pub fn memory_in_use(&self) -> Option<u64> {
        if !self.device.is_cuda() {
            return None;
        }
        let (free, total) = cudarc::driver::result::mem_get_info().ok()?;
        Some((total - free) as u64)
    }
}

/// Intra-op threads when the user does not say: the cores shared fairly among the workers here, at least one.
pub fn default_threads(local_workers: u32) -> u32 {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
    (cores / local_workers.max(1)).max(1)
}

impl Place {
    /// The device's name, with its index.
    pub fn name(&self) -> DeviceName {
        name(self.device)
    }
}

fn name(device: tch::Device) -> DeviceName {
    match device {
        tch::Device::Cuda(index) => DeviceName::Cuda(index),
        _ => DeviceName::Cpu,
    }
}

/// Opens a device, or says what to install. Must run before anything else asks libtorch about CUDA.
pub fn open(asked: DeviceName, threads: u32) -> Result<Place, DeviceError> {
    let (device, nccl, model, free_memory) = match asked {
        DeviceName::Cpu => (tch::Device::Cpu, None, processor_model(), None),
        DeviceName::Cuda(_) | DeviceName::LocalCuda => {
            let device = open_cuda(asked)?;
            let nccl = nccl::Library::load(None).map_err(|cause| DeviceError::NoNccl {
                device: asked,
                cause,
            })?;
            (device, Some(nccl), gpu_model(), Some(free_memory(device)?))
        }
    };
    tch::set_num_threads(threads.try_into().unwrap_or(i32::MAX));
    Ok(Place {
        device,
        nccl,
        threads,
        model,
        free_memory,
    })
}

/// Bytes of a GPU's memory that are free.
fn free_memory(device: tch::Device) -> Result<u64, DeviceError> {
    // The driver speaks of the GPU whose context is current.
    make_current(device)?;
    match cudarc::driver::result::mem_get_info() {
        Ok((free, _)) => Ok(free as u64),
        Err(error) => Err(DeviceError::NoMemory {
            device: name(device),
            cause: chain(&error),
        }),
    }
}

fn open_cuda(asked: DeviceName) -> Result<tch::Device, DeviceError> {
    let device = asked;
    // libtorch's default for fp32 matrix products is exact; only this variable overrides it from outside.
    if env::var("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE").is_ok_and(|value| value == "1") {
        return Err(DeviceError::Tf32Forced { device });
    }
    load_cuda_library().map_err(|cause| DeviceError::NoCudaLibrary { device, cause })?;
    if !tch::Cuda::is_available() {
        return Err(DeviceError::NoGpu { device });
    }
    let count = tch::Cuda::device_count();
    let index = match asked {
        DeviceName::Cuda(index) => index,
        _ => local_index(count, |variable| env::var(variable).ok())?,
    };
    if index as i64 >= count {
        let device = DeviceName::Cuda(index);
        return Err(DeviceError::NoSuchGpu { device, count });
    }
    // Benchmarked algorithm choice would differ from run to run.
    tch::Cuda::cudnn_set_benchmark(false);
    Ok(tch::Device::Cuda(index))
}

/// The GPU of this process among `count` visible ones: that of its local rank, the first without one. A launcher that
/// shows each process its own GPU alone has chosen already.
fn local_index(
    count: i64,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<usize, DeviceError> {
    let found = LOCAL_RANK
        .into_iter()
        .find_map(|name| Some((name, variable(name)?)));
    match found {
        Some((variable, value)) => match value.parse() {
            Ok(_) if count == 1 => Ok(0),
            Ok(index) => Ok(index),
            Err(_) => Err(DeviceError::NoLocalRank {
                device: DeviceName::LocalCuda,
                variable,
                value,
            }),
        },
        None => Ok(0),
    }
}

/// Makes a GPU the calling thread's current one, for libraries that take it from there.
#[allow(unsafe_code)]
pub fn make_current(device: tch::Device) -> Result<(), DeviceError> {
    use libloading::os::unix::Library;
    let tch::Device::Cuda(index) = device else {
        return Ok(());
    };
    // SAFETY: this is the function of CUDA's runtime, with its type. The runtime came in with libtorch_cuda.so, whose
    // symbols and those of what it needs are visible in the whole process.
    let result = unsafe {
        Library::this()
            .get::<unsafe extern "C" fn(c_int) -> c_int>(b"cudaSetDevice")
            .map(|set| set(index as c_int))
    };
    let cause = match result {
        Ok(0) => return Ok(()),
        Ok(code) => format!("cudaSetDevice fails with error {code}"),
        Err(error) => chain(&error),
    };
    Err(DeviceError::NotCurrent {
        device: name(device),
        cause,
    })
}

/// Loads libtorch_cuda.so for the life of the process: beside the libtorch in use, or by the loader's path.
fn load_cuda_library() -> Result<(), String> {
    let beside = loaded_libtorch().and_then(|path| path.parent().map(|dir| dir.join(CUDA_LIBRARY)));
    let path = beside
        .filter(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from(CUDA_LIBRARY));
    load_global(&path)
}

#[allow(unsafe_code)]
fn load_global(path: &Path) -> Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: loading runs the library's static initialisers. It is libtorch's own second half, of the same wheel as
    // the libtorch_cpu.so that already runs in this process, and made to be loaded exactly so: its initialisers
    // register CUDA with libtorch. It is never unloaded, so no code of it can vanish while in use.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }
        .map_err(|error| chain(&error))?;
    std::mem::forget(library);
    Ok(())
}

/// The path of the libtorch_cpu.so in this process, from its memory map.
pub(crate) fn loaded_libtorch() -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps
        .lines()
        .find(|line| line.ends_with("/libtorch_cpu.so"))?;
    line.find('/').map(|start| PathBuf::from(&line[start..]))
}

/// Architecture and the widest vector instructions: sums differ in their last bits between them.
fn processor_model() -> String {
    #[cfg(target_arch = "x86_64")]
    let vectors = if std::is_x86_feature_detected!("avx512f") {
        "avx512"
    } else if std::is_x86_feature_detected!("avx2") {
        "avx2"
    } else {
        "sse"
    };
    #[cfg(not(target_arch = "x86_64"))]
    let vectors = "default";
    format!("{} {vectors}", std::env::consts::ARCH)
}

/// The models of the GPUs here, as the driver names them.
fn gpu_model() -> String {
    let cards = fs::read_dir("/proc/driver/nvidia/gpus")
        .into_iter()
        .flatten()
        .flatten();
    let models: BTreeSet<String> = cards
        .filter_map(|card| fs::read_to_string(card.path().join("information")).ok())
        .filter_map(|text| {
            text.lines()
                .find_map(|line| Some(line.strip_prefix("Model:")?.trim().to_owned()))
        })
        .collect();
    if models.is_empty() {
        "unknown GPU".to_owned()
    } else {
        models.into_iter().collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_read_and_written() {
        assert_eq!("cpu".parse(), Ok(DeviceName::Cpu));
        assert_eq!("cuda:3".parse(), Ok(DeviceName::Cuda(3)));
        assert_eq!(DeviceName::Cuda(3).to_string(), "cuda:3");
        assert_eq!("cuda".parse(), Ok(DeviceName::LocalCuda));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cpu:0"] {
            assert!(wrong.parse::<DeviceName>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_local_rank_chooses_the_gpu() {
        let index = |count, set: &[(&str, &str)]| {
            local_index(count, |asked| {
                let found = set.iter().find(|(name, _)| *name == asked)?;
                Some(found.1.to_owned())
            })
        };
        assert_eq!(index(8, &[("LOCAL_RANK", "5")]).unwrap(), 5);
        let both = [("LOCAL_RANK", "5"), ("SLURM_LOCALID", "3")];
        assert_eq!(index(8, &both).unwrap(), 3);
        assert_eq!(index(1, &both).unwrap(), 0, "it sees no other");
        assert_eq!(index(8, &[]).unwrap(), 0);
        let error = index(8, &[("LOCAL_RANK", "x")]).unwrap_err().to_string();
        assert!(error.contains("LOCAL_RANK is \"x\""), "{error}");
    }

    #[test]
    fn there_is_always_a_thread() {
        assert_eq!(default_threads(u32::MAX), 1);
        assert!(default_threads(0) >= default_threads(2));
    }

    #[test]
    fn a_library_that_is_not_there_is_named() {
        let error = load_global(Path::new("libtorch_nowhere.so")).unwrap_err();
        assert!(error.contains("libtorch_nowhere.so"), "{error}");
    }
}
