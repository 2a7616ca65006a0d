//! Who dies by SIGKILL.

use crate::cluster::Cluster;
use crate::failure::Result;

/// Who is killed. Workers are meant by the number in their name, `w0` and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Victim {
    /// The computing process of a worker; its supervisor starts another.
    Compute(u32),
    /// The supervisor; the computing process notices and ends, we start the worker again.
    Supervisor(u32),
    Coordinator,
    /// Everything at once, as in a power cut.
    Everything,
}

impl Victim {
    /// Kills it.
    pub fn kill(self, cluster: &mut Cluster) -> Result<()> {
        match self {
            Self::Compute(worker) => cluster.worker(&name(worker))?.kill_children(),
            Self::Supervisor(worker) => cluster.worker(&name(worker))?.kill(),
            Self::Coordinator => cluster.coordinator()?.kill(),
            Self::Everything => {
                cluster.coordinator()?.kill()?;
                let mut names = cluster.worker_names().into_iter();
                names.try_for_each(|name| cluster.worker(&name)?.kill_tree())
            }
        }
    }

    /// Starts again what nobody else starts again.
    pub fn restart(self, cluster: &mut Cluster) -> Result<()> {
        match self {
            Self::Compute(_) => Ok(()),
            Self::Supervisor(worker) => cluster.start_worker(&name(worker)),
            Self::Coordinator => cluster.start_coordinator(),
            Self::Everything => {
                cluster.start_coordinator()?;
                let mut names = cluster.worker_names().into_iter();
                names.try_for_each(|name| cluster.start_worker(&name))
            }
        }
    }
}

impl std::fmt::Display for Victim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Compute(worker) => write!(f, "worker {worker}"),
            Self::Supervisor(worker) => write!(f, "supervisor {worker}"),
            Self::Coordinator => f.write_str("coordinator"),
            Self::Everything => f.write_str("everything"),
        }
    }
}

fn name(worker: u32) -> String {
    format!("w{worker}")
}
