//! `versions.json`: what a run was computed with, as far as its checkpoints and its receipt say.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// What a run was computed with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// Versions of the programs.
    pub builds: BTreeSet<String>,
    /// Git commits of the programs, for builds that name theirs.
    pub commits: BTreeSet<String>,
    /// One for each checkpoint that there is, in the order of steps.
    pub environments: Vec<Environment>,
}

/// What rank 0 computed with when it wrote a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// Step of the checkpoint.
    pub step: u64,
    /// Generation that wrote it.
    pub generation: u64,
    /// Workers of that generation.
    pub world: u32,
    /// Build, libtorch, NCCL, device, hardware, threads.
    #[serde(flatten)]
    pub of: supra_checkpoint::Environment,
}

impl Versions {
    /// Those of these environments, and of a receipt's build.
    pub fn new(environments: Vec<Environment>, build: Option<String>) -> Versions {
        let named = environments
            .iter()
            .map(|environment| environment.of.build.clone());
        let builds: BTreeSet<String> = named.chain(build).collect();
        Versions {
            commits: builds.iter().filter_map(|build| commit(build)).collect(),
            builds,
            environments,
        }
    }
}

/// The commit in `0.1.0 (1a2b3c4d5e6f)`.
fn commit(build: &str) -> Option<String> {
    let (_, inside) = build.strip_suffix(')')?.split_once('(')?;
    let digits = inside.bytes().all(|byte| byte.is_ascii_hexdigit());
    (digits && !inside.is_empty()).then(|| inside.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_what_looks_like_one() {
        let of = |build: &str| commit(build);
        assert_eq!(of("0.1.0 (1a2b3c4d5e6f)").as_deref(), Some("1a2b3c4d5e6f"));
        for none in ["0.1.0", "0.1.0 (debug build)", "0.1.0 ()"] {
            assert_eq!(of(none), None, "{none}");
        }
    }
}
