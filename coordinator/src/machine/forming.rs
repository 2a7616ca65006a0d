//! How the next generation forms: who gets a place, and where it starts.

use supra_proto::v1::{Assignment, RestoreFrom, coordinator_message::Body as Down};

use super::evaluations::Measured;
use super::fact::{Fact, Outcome};
use super::generation::{Generation, Member, Stage};
use super::recovery::{self, Start};
use super::state::RunNumber;
use super::worker::Conn;
use super::{Machine, verify};

/// A worker that is to have a place.
struct Chosen {
    conn: Conn,
    name: String,
    data_address: String,
    /// It holds the state that the generation starts from, or a part of it.
    holds: bool,
}

impl Machine {
    /// Forms the next generation of the first run in the queue, if it can.
    pub(super) fn form(&mut self) {
        let Some(number) = self.state.queue.front().copied() else {
            return;
        };
        if self.workers.is_empty() {
            return;
        }
        let Some(run) = self.state.run(number) else {
            return;
        };
        if self.proofs.doubt(number).is_some() {
            return;
        }
        let Ok(world) = self.muster(run) else { return };
        let holders: Vec<recovery::Holder> = self
            .idle()
            .filter_map(|(_, worker)| Some((worker.hello.name.as_str(), worker.held.as_ref()?)))
            .collect();
        match recovery::start(run, self.unapplied.as_ref(), &holders) {
            Ok(start) => {
                let chosen = self.choose(world as usize, &start);
                self.recover_to(number, &start);
                self.assign(number, chosen, &start);
            }
            Err(cause) => self.end_run(number, Outcome::Failed, cause),
        }
    }

    /// The workers that get a place, in rank order, which is that of their names. Those that hold the state to start from
    /// go before others.
    fn choose(&self, world: usize, start: &Start) -> Vec<Chosen> {
        let idle = self.idle();
        let mut chosen: Vec<Chosen> = idle
            .map(|(conn, worker)| Chosen {
                conn,
                name: worker.hello.name.clone(),
                data_address: worker.hello.data_address.clone(),
                holds: start.needs(&worker.hello.name, worker.held.as_ref()),
            })
            .collect();
        chosen.sort_by(|left, right| {
            let holders_first = right.holds.cmp(&left.holds);
            holders_first.then_with(|| left.name.cmp(&right.name))
        });
        chosen.truncate(world);
        chosen.sort_by(|left, right| left.name.cmp(&right.name));
        chosen
    }

    /// Brings the ledger to where the next generation starts: what survivors hold is applied, what nobody holds is void.
    fn recover_to(&mut self, number: RunNumber, start: &Start) {
        let unapplied = self.unapplied.take();
        let reason = self.state.run(number).map(|run| run.reason.clone());
        let reason = reason.unwrap_or_default();
        let Some(there) = start.step() else {
            return self.roll_back(number, &reason);
        };
        if let Some(mut unapplied) = unapplied {
            // In this order: a crash may keep any beginning of it, and nobody measures a state again that is behind.
            for accounted in unapplied.steps {
                let step = accounted.0.step;
                if step > there {
                    break;
                }
                let before = unapplied.measured.up_to(step - 1);
                self.write_down_measured(number, unapplied.generation, before);
                self.apply(number, accounted, unapplied.verify_steps);
            }
            let measured = unapplied.measured.up_to(there);
            self.write_down_measured(number, unapplied.generation, measured);
        }
        self.roll_back_to(number, there, &reason);
    }

    /// Gives the chosen workers their ranks, in order.
    fn assign(&mut self, number: RunNumber, chosen: Vec<Chosen>, start: &Start) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        let (generation, from_step) = (run.generation + 1, run.step);
        let restores = run.recovery().map(|checkpoint| checkpoint.path.clone());
        let restore = run.recovery().map(|checkpoint| RestoreFrom {
            step: checkpoint.step,
            path: checkpoint.path.clone(),
            manifest_hash: checkpoint.manifest_hash.to_vec(),
        });
        let held = start.state(run);
        let members: Vec<String> = chosen.iter().map(|chosen| chosen.name.clone()).collect();
        let template = Assignment {
            recipe: run.recipe.clone(),
            rank: 0,
            world: chosen.len() as u32,
            next_address: String::new(),
            data_key: self.moment.key.to_vec(),
            restore,
            checkpoint_root: run.checkpoint_root.display().to_string(),
            held: held.clone().map(|state| {
                let holders = (0..).zip(&chosen).filter(|(_, chosen)| chosen.holds);
                start.assigned(state, holders.map(|(rank, _)| rank).collect(), &members)
            }),
        };
        let first = chosen.iter().find(|chosen| chosen.holds);
        let from = match (start, first) {
            (Start::Divided(parts), _) => {
                format!("step {from_step}, whose parts {} hold", parts.names())
            }
            (Start::Whole(_), Some(holder)) => {
                format!("step {from_step}, which {} holds", holder.name)
            }
            _ => format!("step {from_step}"),
        };
        let text = format!(
            "generation {generation} forms from {from}: {}",
            members.join(", ")
        );
        self.log(Some(number), "INFO", text);
        let workers = chosen.iter();
        let workers = workers.filter_map(|chosen| self.workers.get(&chosen.conn));
        let circumstances = verify::circumstances(&self.identity, workers);
        self.decide(Fact::Formed {
            run: number,
            generation,
            members,
            from_step,
            circumstances,
        });
        let addresses: Vec<String> = chosen
            .iter()
            .map(|chosen| chosen.data_address.clone())
            .collect();
        let ranks = chosen.iter().enumerate();
        let ranks = ranks.map(|(rank, chosen)| (chosen.conn, rank)).collect();
        self.generation = Some(Generation {
            run: number,
            number: generation,
            ranks,
            members: self.members(chosen),
            stage: Stage::Forming,
            from_step,
            from_held: held,
            restores,
            plan: None,
            whole: false,
            verify_steps: 0,
            snapshots: Default::default(),
            regroup: None,
            pacing: None,
            chaos: None,
            reports: Default::default(),
            repeated: 0,
            target_loss: None,
            measured: Measured::default(),
            begun: Default::default(),
            held: Vec::new(),
        });
        for rank in 0..addresses.len() {
            let next_address = addresses[(rank + 1) % addresses.len()].clone();
            self.tell(
                rank,
                Down::Assignment(Assignment {
                    rank: rank as u32,
                    next_address,
                    ..template.clone()
                }),
            );
        }
    }

    /// Ranks of a new generation. What they hold is theirs to use up.
    fn members(&mut self, chosen: Vec<Chosen>) -> Vec<Member> {
        let member = |Chosen { conn, name, .. }| {
            if let Some(worker) = self.workers.get_mut(&conn) {
                worker.held = None;
            }
            Member {
                conn,
                name,
                formed: None,
                left: None,
                lost: false,
            }
        };
        chosen.into_iter().map(member).collect()
    }
}
