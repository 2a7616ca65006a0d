//! Whether this host has the memory that snapshots and copies take.

use std::fs;

use supra_recipes::{
    Recipe,
    plan::{self, ModelShape},
};

use super::TrainError;

/// Where Linux says what memory there is.
const MEMINFO: &str = "/proc/meminfo";

/// Refuses to train one of `world` ranks whose snapshots this host has no room for. Where the system does not say what is
/// available nothing is refused. Other workers of the host count as far as they have taken theirs.
///
/// # Errors
/// What is planned and what is available.
pub fn check(recipe: &Recipe, shape: &ModelShape, world: u32) -> Result<(), TrainError> {
    let planned = plan::Snapshots::new(recipe, shape, world).bytes;
    let text = fs::read_to_string(MEMINFO).unwrap_or_default();
    match available(&text) {
        Some(available) if planned > available => {
            Err(TrainError::NoHostRoom { planned, available })
        }
        _ => Ok(()),
    }
}

/// Whether this host has room for so many bytes more and a quarter of them, which is for whatever else runs there. Where the
/// system does not say what is available it has.
pub fn has(bytes: u64) -> bool {
    let text = fs::read_to_string(MEMINFO).unwrap_or_default();
    available(&text).is_none_or(|available| bytes + bytes / 4 <= available)
}

/// Bytes that programs can still have, from the text of `/proc/meminfo`.
fn available(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_linux_calls_available_is_read() {
        let text = "MemTotal:       131072000 kB\nMemAvailable:    1024 kB\nBuffers: 1 kB\n";
        assert_eq!(available(text), Some(1 << 20));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
        assert_eq!(available("MemAvailable: many kB\n"), None);
    }

    #[test]
    fn more_than_any_host_has_is_refused_with_both_numbers_and_the_remedy() {
        let shape = ModelShape {
            layers: 1 << 20,
            ..ModelShape::MISTRAL_7B
        };
        let text = "name: t\nbase: { path: b }\ndata: { train: d }\nbudget: { tokens: 20B }\n\
                    optimizer: { sharding: zero1 }";
        let recipe = Recipe::parse(text, "t.yaml").unwrap();
        let error = check(&recipe, &shape, 2).unwrap_err().to_string();
        for part in [
            "snapshots take",
            "GiB are available",
            "recovery.snapshot_every: 0",
        ] {
            assert!(error.contains(part), "{part} is not in {error}");
        }
        assert!(check(&recipe, &shape, 1).is_ok(), "alone there are none");
    }
}
