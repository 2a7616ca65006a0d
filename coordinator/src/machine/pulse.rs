//! What the run at the head of the queue is doing, for the account of its time.

use supra_proto::v1::Phase;

use super::Machine;
use super::generation::Stage;
use super::state::RunNumber;
use crate::goodput::Doing;

impl Machine {
    /// The run that has the workers, or is to get them, and what it is doing; all others idle.
    pub fn pulse(&self) -> Option<(RunNumber, Doing)> {
        let Some(generation) = &self.generation else {
            let run = self.state.run(*self.state.queue.front()?)?;
            let enough = self.able().count() >= run.workers.min as usize;
            let doing = if enough { Doing::Forming } else { Doing::Idle };
            return Some((run.number, doing));
        };
        let doing = match generation.stage {
            // Nobody knows better, while the coordinator was away.
            Stage::Training | Stage::Away { .. } => Doing::Training,
            Stage::Leaving { .. } => Doing::Forming,
            Stage::Forming => {
                let connected = generation.members.iter().all(|member| {
                    let phase = self.workers.get(&member.conn).map(|worker| worker.phase);
                    member.formed.is_some() || phase == Some(Phase::Loading)
                });
                if connected {
                    Doing::Restoring
                } else {
                    Doing::Forming
                }
            }
        };
        Some((generation.run, doing))
    }
}
