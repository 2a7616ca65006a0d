//! Where the workers of `supra up` compute, and how many GPUs there are.

use std::fmt;
use std::fs;
use std::str::FromStr;

/// Where workers compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Device {
    /// On the processor.
    Cpu,
    /// Each on its own GPU, in order.
    Cuda,
    /// All on the GPU of this index.
    OneGpu(u32),
}

impl Device {
    /// That of the worker of this number.
    pub fn of_worker(self, number: u32) -> Device {
        match self {
            Device::Cuda => Device::OneGpu(number),
            Device::Cpu | Device::OneGpu(_) => self,
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Device, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Device::Cpu),
            ("cuda", _) => Ok(Device::Cuda),
            (_, Some(Ok(index))) => Ok(Device::OneGpu(index)),
            _ => Err("write cpu, cuda (every worker its own GPU), or cuda:N".to_owned()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda => f.write_str("cuda"),
            Device::OneGpu(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// GPUs that a worker will see, as far as one can tell without CUDA, which only workers load.
pub(super) fn visible_gpus() -> u32 {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let nodes = fs::read_dir("/dev").into_iter().flatten().flatten();
    let nodes = nodes.filter_map(|node| node.file_name().into_string().ok());
    count(nodes, visible.as_deref())
}

/// The driver has a node `nvidiaN` for every GPU; CUDA shows those that `visible` lists, up to the first one that does
/// not exist.
fn count(nodes: impl Iterator<Item = String>, visible: Option<&str>) -> u32 {
    let number = |name: &str| name.strip_prefix("nvidia")?.parse::<u32>().ok();
    let gpus = nodes.filter_map(|name| number(&name)).count();
    let shown = match visible {
        // Others name GPUs or parts of them by their UUID.
        Some(list) => list
            .split(',')
            .map(str::trim)
            .take_while(|entry| match entry.parse::<i64>() {
                Ok(index) => usize::try_from(index).is_ok_and(|index| index < gpus),
                Err(_) => gpus > 0 && !entry.is_empty(),
            })
            .count(),
        None => gpus,
    };
    u32::try_from(shown).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_written() {
        for text in ["cpu", "cuda", "cuda:3"] {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), text);
        }
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cpu:0"] {
            assert!(wrong.parse::<Device>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn gpus_are_those_that_cuda_shows() {
        let seen = |visible| {
            let nodes = [
                "nvidia0",
                "nvidia1",
                "nvidiactl",
                "nvidia-uvm",
                "null",
                "nvidia2",
            ];
            count(nodes.into_iter().map(str::to_owned), visible)
        };
        assert_eq!(seen(None), 3);
        assert_eq!(seen(Some("2, 0")), 2);
        assert_eq!(seen(Some("0,7,1")), 1, "CUDA stops at the first wrong one");
        assert_eq!(seen(Some("")), 0);
        assert_eq!(seen(Some("-1")), 0);
        assert_eq!(seen(Some("MIG-0f2e,GPU-8a1c")), 2);
        assert_eq!(count(std::iter::empty(), Some("GPU-8a1c")), 0);
    }
}
