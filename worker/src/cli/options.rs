//! Options that several commands share.

use clap::{Args, ValueEnum};
use supra_worker::device::{self, DeviceError, DeviceName, Place};
use tch::Kind;

/// Where to compute.
#[derive(Debug, Args)]
pub struct DeviceOptions {
    /// Device to compute on: cpu, cuda:N, or cuda for the GPU of this process's local rank (SLURM_LOCALID, else
    /// LOCAL_RANK, else 0; the only visible one, where it is). It is used or the command fails; nothing else is taken
    /// in its place
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: DeviceName,
    /// Threads of one operation on the processor [default: cores divided by local workers]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: Option<u32>,
    /// Workers on this machine, which share its cores
    #[arg(long, env = "SUPRA_LOCAL_WORKERS", default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub local_workers: u32,
}

impl DeviceOptions {
    /// Opens the device.
    pub fn open(&self) -> Result<Place, DeviceError> {
        device::open(
            self.device,
            self.threads
                .unwrap_or_else(|| device::default_threads(self.local_workers)),
        )
    }
}

/// Number format of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// 32-bit floating point
    #[default]
    Fp32,
    /// bfloat16
    Bf16,
}

impl Dtype {
    /// As it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Fp32 => "fp32",
            Dtype::Bf16 => "bf16",
        }
    }
}

impl From<Dtype> for Kind {
    fn from(dtype: Dtype) -> Kind {
        match dtype {
            Dtype::Fp32 => Kind::Float,
            Dtype::Bf16 => Kind::BFloat16,
        }
    }
}
