//! A seeded simulation: random workers, faults, restarts and message orders against one machine, with the promises
//! checked after every event.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use supra_proto::v1::{
    self, LeftReason, coordinator_message::Body as Down, worker_message::Body as Up,
};

use super::rig::{self, Rig};
use super::*;
use crate::audit::{Options, Outcome as Verdict, audit};
use crate::ledger::Body;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// One thing that happens. Numbers pick among what is possible at that moment.
#[derive(Clone, Debug)]
enum Move {
    /// A worker that is away attaches.
    Attach(usize),
    /// A worker does the next thing that is on its mind.
    Work(usize),
    /// A worker is killed.
    Kill(usize),
    /// A worker reports a fault of its environment.
    Fault(usize),
    /// A client cancels, or resumes what is stopped.
    CancelOrResume,
    /// The coordinator dies and has lost the last few unsynced facts.
    Crash(usize),
    /// Time passes.
    Wait(u8),
}

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        8 => (0..4usize).prop_map(Move::Attach),
        60 => (0..4usize).prop_map(Move::Work),
        2 => (0..4usize).prop_map(Move::Kill),
        1 => (0..4usize).prop_map(Move::Fault),
        1 => Just(Move::CancelOrResume),
        1 => (0..4usize).prop_map(Move::Crash),
        10 => (0..30u8).prop_map(Move::Wait),
    ]
}

/// An honest worker: what it knows, and what it would say next.
#[derive(Default)]
struct Actor {
    place: Option<v1::Assignment>,
    generation: u64,
    step: u64,
    formed: bool,
    /// Step after which it stops, once asked: the ranks agree on the newest that any of them has begun.
    stop_at: Option<u64>,
    void: bool,
    publish: Option<v1::PublishCheckpoint>,
    awaiting: bool,
    last_checkpoint: Option<u64>,
}

struct World {
    rig: Rig,
    conns: BTreeMap<usize, Conn>,
    actors: BTreeMap<Conn, Actor>,
    next: Conn,
}

impl World {
    fn new() -> World {
        let mut rig = Rig::new();
        rig.submit("rig-1");
        World {
            rig,
            conns: BTreeMap::new(),
            actors: BTreeMap::new(),
            next: 1,
        }
    }

    fn make(&mut self, step: &Move) {
        match *step {
            Move::Attach(who) => {
                if !self.conns.contains_key(&who) {
                    let conn = self.next;
                    self.next += 1;
                    self.conns.insert(who, conn);
                    self.actors.insert(conn, Actor::default());
                    self.rig.attach(conn, NAMES[who]);
                }
            }
            Move::Work(who) => {
                if let Some(conn) = self.conns.get(&who).copied() {
                    self.work(conn);
                }
            }
            Move::Kill(who) => {
                if let Some(conn) = self.conns.remove(&who) {
                    self.actors.remove(&conn);
                    self.rig.lose(conn);
                }
            }
            Move::Fault(who) => {
                let conn = self.conns.get(&who).copied();
                let actor = conn
                    .and_then(|conn| self.actors.get_mut(&conn))
                    .filter(|actor| actor.place.is_some());
                if let (Some(conn), Some(actor)) = (conn, actor) {
                    let generation = actor.generation;
                    *actor = Actor {
                        generation,
                        ..Actor::default()
                    };
                    self.rig
                        .fault(conn, generation, v1::FaultKind::Transient, "disk full");
                    self.rig.left(conn, generation, LeftReason::Fault);
                }
            }
            Move::CancelOrResume => {
                let event = if self.rig.run().ended() {
                    Event::Resume(1)
                } else {
                    Event::Cancel(1)
                };
                let _ = self.rig.event(event);
            }
            Move::Crash(lost) => {
                let unsynced = self
                    .rig
                    .facts
                    .iter()
                    .rev()
                    .take_while(|fact| !fact.urgent())
                    .count();
                let kept = self.rig.facts.len() - lost.min(unsynced);
                self.conns.clear();
                self.actors.clear();
                self.rig.restart(kept);
            }
            Move::Wait(tenths) => self.rig.wait(f64::from(tenths) / 10.0),
        }
        self.hear();
    }

    /// Delivers what the coordinator said.
    fn hear(&mut self) {
        for conn in std::mem::take(&mut self.rig.closed) {
            self.actors.remove(&conn);
            self.conns.retain(|_, known| *known != conn);
        }
        for (conn, generation, body) in self.rig.told() {
            let newest = self
                .actors
                .values()
                .filter(|actor| actor.generation == generation)
                .map(|actor| actor.step)
                .max();
            let Some(actor) = self.actors.get_mut(&conn) else {
                continue;
            };
            match body {
                Down::Assignment(place) => {
                    let step = place.restore.as_ref().map_or(0, |restore| restore.step);
                    *actor = Actor {
                        place: Some(place),
                        generation,
                        step,
                        ..Actor::default()
                    };
                }
                Down::Void(_) if actor.generation == generation => actor.void = true,
                Down::Stop(_) => actor.stop_at = newest,
                Down::Publish(publish) => actor.publish = Some(publish),
                _ => {}
            }
        }
    }

    /// The next thing that an honest worker says. A step takes part of all, so a rank is never ahead of another by more
    /// than one step.
    fn work(&mut self, conn: Conn) {
        let plan = rig::plan();
        let slowest = self.slowest(conn);
        let Some(actor) = self.actors.get_mut(&conn) else {
            return;
        };
        let Some(place) = actor.place.clone() else {
            return;
        };
        let generation = actor.generation;
        if actor.void {
            *actor = Actor {
                generation,
                ..Actor::default()
            };
            return self.rig.left(conn, generation, LeftReason::Void);
        }
        if !actor.formed {
            actor.formed = true;
            let step = actor.step;
            return self.rig.formed(conn, generation, step);
        }
        if actor.awaiting {
            let Some(publish) = actor.publish.take() else {
                return;
            };
            actor.awaiting = false;
            let published = v1::CheckpointPublished {
                step: publish.step,
                manifest_hash: publish.manifest_hash,
            };
            return self
                .rig
                .say(conn, generation, Up::CheckpointPublished(published));
        }
        let due = actor.step > 0
            && (actor.stop_at == Some(actor.step) || plan.checkpoint_due(actor.step));
        if place.rank == 0 && due && actor.last_checkpoint != Some(actor.step) {
            actor.last_checkpoint = Some(actor.step);
            actor.awaiting = true;
            let step = actor.step;
            return self.rig.written(conn, generation, step);
        }
        if actor.step == plan.steps || actor.stop_at == Some(actor.step) {
            let reason = if actor.step == plan.steps {
                LeftReason::Finished
            } else {
                LeftReason::Stopped
            };
            *actor = Actor {
                generation,
                ..Actor::default()
            };
            return self.rig.left(conn, generation, reason);
        }
        if actor.step <= slowest {
            actor.step += 1;
            let report = rig::report(&plan, actor.step, place.rank, place.world);
            self.rig.say(conn, generation, Up::Step(report));
        }
    }

    /// The step of the slowest worker in the generation of this one.
    fn slowest(&self, conn: Conn) -> u64 {
        let generation = self.actors.get(&conn).map_or(0, |actor| actor.generation);
        let peers = self
            .actors
            .values()
            .filter(|actor| actor.generation == generation && actor.place.is_some());
        peers
            .map(|actor| if actor.formed { actor.step } else { 0 })
            .min()
            .unwrap_or(0)
    }

    fn check(&self) {
        assert_eq!(
            &self.rig.replayed(),
            self.rig.machine.state(),
            "replay is the live state"
        );
        let verdict = audit(self.rig.ledger(), Options::default());
        assert_eq!(verdict.verdict, Verdict::Ok, "{:?}", verdict.breaks);
        let mut applied = BTreeSet::new();
        for record in self.rig.ledger() {
            if let Body::Step(step) = record.body {
                assert!(
                    applied.insert((step.generation, step.step)),
                    "once per generation and step"
                );
            }
        }
        let run = self.rig.run();
        assert_eq!(verdict.steps, run.step);
        assert!(
            run.recovery_step() <= run.step,
            "a checkpoint holds only applied steps"
        );
        let live = self
            .rig
            .machine
            .generation
            .as_ref()
            .filter(|generation| !generation.leaving());
        if let Some(generation) = live.filter(|generation| generation.plan.is_none()) {
            assert_eq!(
                run.step, generation.from_step,
                "a generation starts where the ledger ends"
            );
        }
        for actor in self.actors.values().filter(|actor| actor.place.is_some()) {
            let on = live.is_some_and(|generation| generation.number == actor.generation);
            assert!(
                on || actor.void || run.phase == RunPhase::Finished,
                "a worker in a void generation is told"
            );
        }
        if run.phase == RunPhase::Finished {
            assert!(verdict.finished);
            assert_eq!(verdict.tokens, verdict.budget_tokens);
        }
    }

    /// Lets everything go right until the run has ended.
    fn calm_down(&mut self) {
        for round in 0..2_000 {
            if self.rig.run().phase == RunPhase::Finished {
                return;
            }
            if self.rig.run().ended() {
                let _ = self.rig.event(Event::Resume(1));
            }
            self.make(&Move::Attach(round % 4));
            for who in 0..4 {
                self.make(&Move::Work(who));
                if let Some(conn) = self.conns.get(&who).copied() {
                    self.rig
                        .say(conn, 0, Up::Heartbeat(v1::Heartbeat::default()));
                }
            }
            self.make(&Move::Wait(5));
        }
        panic!("the run does not end: {:?}", self.rig.status());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn every_sample_is_trained_exactly_once_whatever_happens(moves in prop::collection::vec(moves(), 0..250)) {
        let mut world = World::new();
        for step in &moves {
            world.make(step);
            world.check();
        }
        world.calm_down();
        world.check();
        prop_assert!(audit(world.rig.ledger(), Options::default()).finished);
    }

    #[test]
    fn a_coordinator_killed_after_any_fact_goes_on_to_the_end(
        moves in prop::collection::vec(moves(), 50..200),
        cut in 0.0..1.0f64,
    ) {
        let mut world = World::new();
        moves.iter().for_each(|step| world.make(step));
        let kept = 1 + ((world.rig.facts.len() - 1) as f64 * cut) as usize;
        world.conns.clear();
        world.actors.clear();
        world.rig.restart(kept);
        world.check();
        world.calm_down();
        world.check();
    }
}
