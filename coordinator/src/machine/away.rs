//! A generation that outlived its coordinator.
//!
//! Workers train on for `coordinator.away` of their recipe while nobody coordinates them. A coordinator that
//! starts again finds their generation alive in its journal, and waits for them instead of voiding it. Each comes back with
//! its place and says again what the journal may lack. Once all are there, the generation goes on as if nothing had happened.
//! It is over when one of them has left it, or has not come within that time, or three seconds if that is less; what those
//! that came have said is then accounted for as ever, so that the next generation can go on from what they hold.
//!
//! None of this decides what may be applied: only the generation in hand applies steps, and its end is in the journal
//! before another one begins. A rank that trains on unknowingly wastes its time, and nothing else.

use std::time::Duration;

use supra_proto::AWAITED_PAUSE;
use supra_proto::v1::{Left, Place, StopAfterStep, Void, coordinator_message::Body as Down};
use supra_recipes::plan::Plan;
use supra_recipes::schema::Recipe;

use super::Machine;
use super::ending::Severity;
use super::evaluations::Measured;
use super::fact::Fact;
use super::generation::{Generation, Member, Stage};
use super::state::RunNumber;
use super::worker::{Conn, NO_CONN};

/// What to wait at least: not to give workers the time for another look would lose what they hold.
const RETURN: Duration = AWAITED_PAUSE.saturating_add(Duration::from_secs(1));

impl Machine {
    /// Waits for the members of the generation that the last coordinator left alive. False when there is nothing to wait
    /// for.
    pub(super) fn await_members(&mut self, number: RunNumber) -> bool {
        let Some(run) = self.state.run(number).filter(|_| self.generation.is_none()) else {
            return false;
        };
        let Ok(recipe) = Recipe::parse(&run.recipe, &run.id) else {
            return false;
        };
        let away = recipe.coordinator.away.duration();
        if away.is_zero() || run.members.is_empty() {
            return false;
        }
        let limit = away.max(RETURN);
        let plan = run.open.as_ref();
        let plan = plan.and_then(|open| Plan::new(&recipe, open.windows, open.manifest_hash).ok());
        let member = |name: &String| Member {
            conn: NO_CONN,
            name: name.clone(),
            formed: None,
            left: None,
            lost: false,
        };
        let generation = Generation {
            run: number,
            number: run.generation,
            members: run.members.iter().map(member).collect(),
            ranks: Default::default(),
            stage: Stage::Away {
                since: self.moment.now,
                limit,
            },
            from_step: run.from_step,
            from_held: None,
            restores: None,
            plan,
            whole: false,
            verify_steps: recipe.resume.verify_steps.into(),
            snapshots: Default::default(),
            regroup: None,
            pacing: None,
            chaos: None,
            reports: Default::default(),
            repeated: 0,
            target_loss: recipe.eval.and_then(|eval| eval.target_loss),
            measured: Measured::default(),
            begun: Default::default(),
            held: Vec::new(),
        };
        let text = format!(
            "generation {} may still train: waiting for {} to come back",
            generation.number,
            run.members.join(", ")
        );
        self.generation = Some(generation);
        self.log(Some(number), "INFO", text);
        true
    }

    /// The last step on which a worker that comes back with this place need not report again.
    pub(super) fn known_step(&self, name: &str, place: Option<&Place>) -> u64 {
        let awaited = place.and_then(|place| self.awaited(name, place));
        let run = awaited.and_then(|_| self.state.run(self.generation.as_ref()?.run));
        run.map_or(u64::MAX, |run| run.step)
    }

    /// Rank of a worker in the generation in hand, if that waits for it to come back with this place.
    fn awaited(&self, name: &str, place: &Place) -> Option<usize> {
        let generation = self.generation.as_ref()?;
        let rank = place.rank as usize;
        let member = generation.members.get(rank)?;
        let awaited = member.absent()
            && member.name == name
            && generation.number == place.generation
            && self.state.run(generation.run)?.id == place.run;
        awaited.then_some(rank)
    }

    /// A worker has attached. With its place in the generation in hand it has it again; another place is void. A member
    /// without one has left it.
    pub(super) fn comes_back(&mut self, conn: Conn) {
        let Some(worker) = self.workers.get_mut(&conn) else {
            return;
        };
        let (name, place) = (worker.hello.name.clone(), worker.place.take());
        let awaited = place.as_ref().and_then(|place| self.awaited(&name, place));
        match (place, awaited) {
            (Some(place), Some(rank)) => self.take_in(conn, rank, *place),
            (Some(place), None) => {
                self.desert(&name);
                self.turn_away(conn, place);
            }
            (None, _) => self.desert(&name),
        }
    }

    /// Tells a worker that its generation is over. No other takes it before it has left.
    fn turn_away(&mut self, conn: Conn, place: Box<Place>) {
        if place.left {
            return;
        }
        let (run, generation) = (place.run.clone(), place.generation);
        if let Some(worker) = self.workers.get_mut(&conn) {
            worker.place = Some(place);
        }
        let reason = format!("generation {generation} ended while this worker was away");
        self.out.push(super::Action::Send {
            conn,
            run,
            generation,
            body: Down::Void(Void { reason }),
        });
    }

    /// A worker has left a generation that is not in hand any more.
    pub(super) fn left_elsewhere(&mut self, conn: Conn, run: &str, generation: u64, left: Left) {
        let Some(worker) = self.workers.get_mut(&conn) else {
            return;
        };
        let there = |place: &mut Box<Place>| place.run == run && place.generation == generation;
        if worker.place.take_if(there).is_some() {
            worker.held = left.held;
        }
    }

    /// A worker of this name is attached and does not have the place that a member of this name should have.
    fn desert(&mut self, name: &str) {
        let Some(generation) = &mut self.generation else {
            return;
        };
        let named = |member: &&mut Member| member.name == name && member.absent();
        let members = generation.members.iter_mut();
        let Some(member) = members.into_iter().find(named) else {
            return;
        };
        member.lost = true;
        let cause = format!("{name} left generation {} meanwhile", generation.number);
        self.give_up(&cause);
    }

    /// A member has its place again; the generation goes on when it was the last one.
    fn take_in(&mut self, conn: Conn, rank: usize, place: Place) {
        let Some(generation) = &mut self.generation else {
            return;
        };
        let member = &mut generation.members[rank];
        member.conn = conn;
        generation.ranks.insert(conn, rank);
        if place.left {
            // Why, it is about to say.
            return;
        }
        member.formed = place.formed;
        generation.from_held = generation.from_held.take().or(place.from);
        let run = generation.run;
        if generation.leaving() {
            let reason = self.state.run(run).map(|run| run.reason.clone());
            let reason = reason.unwrap_or_default();
            return self.tell(rank, Down::Void(Void { reason }));
        }
        if let Some(reason) = self.state.run(run).and_then(|run| run.stop.clone()) {
            self.tell(rank, Down::Stop(StopAfterStep { reason }));
        }
        if place.step_seconds > 0.0 {
            self.step_took(place.step_seconds);
        }
        self.take_up();
    }

    /// Goes on with a generation whose members are all back.
    fn take_up(&mut self) {
        let Some(generation) = &mut self.generation else {
            return;
        };
        if generation.all_formed().is_none() {
            return;
        }
        generation.stage = Stage::Forming;
        let newest = generation.reports.last_key_value();
        generation.repeated = newest.map_or(0, |(step, _)| *step);
        let (run, number) = (generation.run, generation.number);
        let at = self.moment.unix_ms;
        self.decide(Fact::TakenUp {
            run,
            generation: number,
            at,
        });
        let text = format!("generation {number} goes on: all its workers are back");
        self.log(Some(run), "INFO", text);
        self.agree();
    }

    /// The stream of a member that came back is gone again: it is waited for as before.
    pub(super) fn strays(&mut self, rank: usize) -> bool {
        let Some(generation) = &mut self.generation else {
            return false;
        };
        let away = generation.away();
        let member = &mut generation.members[rank];
        if !away || member.left.is_some() {
            return false;
        }
        generation.ranks.remove(&member.conn);
        (member.conn, member.formed) = (NO_CONN, None);
        true
    }

    /// Waits no longer for members that do not come back.
    pub(super) fn watch_for_members(&mut self) {
        let now = self.moment.now;
        let Some(generation) = &mut self.generation else {
            return;
        };
        let (since, limit) = match generation.stage {
            Stage::Away { since, limit } => (since, limit),
            Stage::Leaving { since, .. } => (since, self.limits.rejoin),
            Stage::Forming | Stage::Training => return,
        };
        if now.saturating_sub(since) <= limit {
            return;
        }
        let names = generation.absent_names().join(", ");
        self.give_up(&format!(
            "{names} did not come back within {} s",
            limit.as_secs_f64()
        ));
        self.forget_absent();
    }

    /// Ends a generation whose members are not all back. Those that may still come have a moment to say what they hold.
    pub(super) fn give_up(&mut self, cause: &str) {
        if self.generation.as_ref().is_some_and(Generation::away) {
            let cause = format!("the coordinator was restarted, and {cause}");
            self.break_up(cause, Severity::Lost { counts: false }, None);
        }
    }

    /// Members that are not back are lost.
    pub(super) fn forget_absent(&mut self) {
        let members = self.generation.iter_mut().flat_map(|it| &mut it.members);
        let absent = members.filter(|member| member.absent());
        absent.for_each(|member| member.lost = true);
    }
}

impl Generation {
    /// Its members are waited for.
    pub fn away(&self) -> bool {
        matches!(self.stage, Stage::Away { .. })
    }

    /// Names of the members that are not back.
    pub fn absent_names(&self) -> Vec<&str> {
        let absent = self.members.iter().filter(|member| member.absent());
        absent.map(|member| member.name.as_str()).collect()
    }

    /// Since when members have been waited for that never came back; none when nobody was.
    pub fn waited_since(&self) -> Option<Duration> {
        let never = self.members.iter().any(|member| member.conn == NO_CONN);
        match self.stage {
            Stage::Leaving { since, .. } if never => Some(since),
            _ => None,
        }
    }
}

impl Member {
    /// It was a member when the coordinator died, and is not back yet.
    pub fn absent(&self) -> bool {
        self.conn == NO_CONN && !self.lost
    }
}
