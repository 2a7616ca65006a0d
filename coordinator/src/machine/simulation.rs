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
    /// A worker reports a fault of its environment; it keeps its state or has lost it.
    Fault(usize, bool),
    /// A worker's stream breaks, and it keeps its state; perhaps after a step that it could not report any more.
    Cut(usize, bool),
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
        1 => (0..4usize, any::<bool>()).prop_map(|(who, keeps)| Move::Fault(who, keeps)),
        2 => (0..4usize, any::<bool>()).prop_map(|(who, ahead)| Move::Cut(who, ahead)),
        1 => Just(Move::CancelOrResume),
        1 => (0..4usize).prop_map(Move::Crash),
        10 => (0..30u8).prop_map(Move::Wait),
    ]
}

/// Which generation trained each step that a state is behind: two states are the same when this is.
type Lineage = Vec<u64>;

fn hash(lineage: &Lineage) -> Vec<u8> {
    let bytes = lineage
        .iter()
        .flat_map(|generation| generation.to_le_bytes());
    blake3::hash(&bytes.collect::<Vec<_>>()).as_bytes().to_vec()
}

/// A state in a worker's memory, as it speaks of it, and in truth.
#[derive(Clone, Debug)]
struct Memory {
    held: v1::Held,
    lineage: Lineage,
}

/// An honest worker: what it knows, and what it would say next.
#[derive(Default)]
struct Actor {
    place: Option<v1::Assignment>,
    generation: u64,
    /// What its state is behind, while it has a place.
    lineage: Lineage,
    /// Step that its generation starts from.
    start: u64,
    formed: bool,
    /// What it held before it got its place.
    memory: Option<Memory>,
    /// Step after which it stops or regroups, once asked: the ranks agree on the newest that any of them has begun.
    stop_at: Option<u64>,
    regroup_at: Option<u64>,
    void: bool,
    publish: Option<v1::PublishCheckpoint>,
    awaiting: bool,
    last_checkpoint: Option<u64>,
}

impl Actor {
    fn step(&self) -> u64 {
        self.lineage.len() as u64
    }

    /// What it keeps when its generation ends now.
    fn keeps(&self) -> Option<Memory> {
        if self.place.is_none() || !self.formed {
            return self.memory.clone();
        }
        Some(Memory {
            held: v1::Held {
                run: "rig-1".into(),
                generation: self.generation,
                step: self.step(),
                replica_hash: hash(&self.lineage),
            },
            lineage: self.lineage.clone(),
        })
    }

    /// It leaves its generation with what it keeps.
    fn leave(&mut self, memory: Option<Memory>) -> Option<v1::Held> {
        *self = Actor {
            generation: self.generation,
            memory,
            ..Actor::default()
        };
        self.memory.clone().map(|memory| memory.held)
    }
}

struct World {
    rig: Rig,
    conns: BTreeMap<usize, Conn>,
    actors: BTreeMap<Conn, Actor>,
    /// What workers without a stream hold.
    away: BTreeMap<usize, Memory>,
    /// What is behind each checkpoint, by path, and each state that was ever held, by hash.
    checkpoints: BTreeMap<String, Lineage>,
    states: BTreeMap<Vec<u8>, Lineage>,
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
            away: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            states: BTreeMap::new(),
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
                    let memory = self.away.remove(&who);
                    let held = memory.as_ref().map(|memory| memory.held.clone());
                    let actor = Actor {
                        memory,
                        ..Actor::default()
                    };
                    self.actors.insert(conn, actor);
                    self.rig.attach_holding(conn, NAMES[who], held);
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
                } else {
                    self.away.remove(&who);
                }
            }
            Move::Fault(who, keeps) => {
                let conn = self.conns.get(&who).copied();
                let actor = conn
                    .and_then(|conn| self.actors.get_mut(&conn))
                    .filter(|actor| actor.place.is_some());
                if let (Some(conn), Some(actor)) = (conn, actor) {
                    let generation = actor.generation;
                    let memory = actor.keeps().filter(|_| keeps);
                    let held = actor.leave(memory);
                    self.rig
                        .fault(conn, generation, v1::FaultKind::Transient, "disk full");
                    self.rig
                        .left_holding(conn, generation, LeftReason::Fault, held);
                }
            }
            Move::Cut(who, ahead) => {
                if let Some(conn) = self.conns.remove(&who) {
                    if ahead {
                        self.train(conn);
                    }
                    self.go_away(who, conn);
                    self.rig.lose(conn);
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
                self.restart(kept);
            }
            Move::Wait(tenths) => self.rig.wait(f64::from(tenths) / 10.0),
        }
        self.hear();
    }

    /// The coordinator dies after `kept` facts and starts again; the workers keep what they have.
    fn restart(&mut self, kept: usize) {
        for (who, conn) in std::mem::take(&mut self.conns) {
            self.go_away(who, conn);
        }
        self.actors.clear();
        self.rig.restart(kept);
    }

    /// A worker has lost its stream, and with it its place.
    fn go_away(&mut self, who: usize, conn: Conn) {
        if let Some(memory) = self.actors.remove(&conn).and_then(|actor| actor.keeps()) {
            self.away.insert(who, memory);
        }
    }

    /// Delivers what the coordinator said.
    fn hear(&mut self) {
        for conn in std::mem::take(&mut self.rig.closed) {
            let known = self.conns.iter().find(|(_, known)| **known == conn);
            if let Some(who) = known.map(|(who, _)| *who) {
                self.conns.remove(&who);
                self.go_away(who, conn);
            }
        }
        for (conn, generation, body) in self.rig.told() {
            let newest = self
                .actors
                .values()
                .filter(|actor| actor.generation == generation && actor.place.is_some())
                .map(Actor::step)
                .max();
            let Some(actor) = self.actors.get_mut(&conn) else {
                continue;
            };
            match body {
                Down::Assignment(place) => {
                    let memory = actor.memory.take();
                    let lineage = match (&place.held, &place.restore) {
                        (Some(held), _) => {
                            let state = held.state.clone().unwrap();
                            if held.holders.contains(&place.rank) {
                                let own = memory.clone().expect("a holder holds it");
                                assert_eq!(own.held, state);
                                own.lineage
                            } else {
                                self.states[&state.replica_hash].clone()
                            }
                        }
                        (None, Some(restore)) => self.checkpoints[&restore.path].clone(),
                        (None, None) => Lineage::new(),
                    };
                    *actor = Actor {
                        place: Some(place),
                        generation,
                        start: lineage.len() as u64,
                        lineage,
                        memory,
                        ..Actor::default()
                    };
                }
                Down::Void(_) if actor.generation == generation => actor.void = true,
                Down::Stop(_) if actor.regroup_at.is_none() => actor.stop_at = newest,
                Down::Regroup(_) if actor.stop_at.is_none() => actor.regroup_at = newest,
                Down::Publish(publish) => actor.publish = Some(publish),
                _ => {}
            }
        }
    }

    /// The next thing that an honest worker says. A step takes part of all, so a rank is never ahead of another by more
    /// than one step.
    fn work(&mut self, conn: Conn) {
        let plan = rig::plan();
        let Some(actor) = self.actors.get_mut(&conn) else {
            return;
        };
        let Some(place) = actor.place.clone() else {
            return;
        };
        let generation = actor.generation;
        let step = actor.step();
        if actor.void {
            let memory = actor.keeps();
            let held = actor.leave(memory);
            return self
                .rig
                .left_holding(conn, generation, LeftReason::Void, held);
        }
        if !actor.formed {
            actor.formed = true;
            let hash = hash(&actor.lineage);
            self.states.insert(hash.clone(), actor.lineage.clone());
            return self.rig.formed_with(conn, generation, step, hash);
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
        let due = step > 0
            && (actor.stop_at == Some(step) || plan.checkpoint_due(step) && step > actor.start);
        if place.rank == 0 && due && actor.last_checkpoint != Some(step) {
            actor.last_checkpoint = Some(step);
            actor.awaiting = true;
            let path = rig::checkpoint(generation, step).path;
            self.checkpoints.insert(path, actor.lineage.clone());
            return self.rig.written(conn, generation, step);
        }
        if step == plan.steps || actor.stop_at == Some(step) {
            let reason = if step == plan.steps {
                LeftReason::Finished
            } else {
                LeftReason::Stopped
            };
            actor.leave(None);
            return self.rig.left(conn, generation, reason);
        }
        if actor.regroup_at == Some(step) {
            let memory = actor.keeps();
            let held = actor.leave(memory);
            return self
                .rig
                .left_holding(conn, generation, LeftReason::Regrouped, held);
        }
        if self.train(conn) {
            let report = rig::report(&plan, step + 1, place.rank, place.world);
            self.rig.say(conn, generation, Up::Step(report));
        }
    }

    /// Does a step, if the other ranks are not behind.
    fn train(&mut self, conn: Conn) -> bool {
        let (slowest, steps) = (self.slowest(conn), rig::plan().steps);
        let Some(actor) = self
            .actors
            .get_mut(&conn)
            .filter(|actor| actor.formed && !actor.void)
        else {
            return false;
        };
        if slowest.is_none_or(|slowest| actor.step() > slowest) || actor.step() == steps {
            return false;
        }
        actor.lineage.push(actor.generation);
        let lineage = actor.lineage.clone();
        self.states.insert(hash(&lineage), lineage);
        true
    }

    /// The step of the slowest worker in the generation of this one; none while one is not there yet.
    fn slowest(&self, conn: Conn) -> Option<u64> {
        let generation = self.actors.get(&conn).map_or(0, |actor| actor.generation);
        let peers = self
            .actors
            .values()
            .filter(|actor| actor.generation == generation && actor.place.is_some());
        peers
            .map(|actor| {
                if actor.formed {
                    Some(actor.step())
                } else {
                    None
                }
            })
            .min()
            .flatten()
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
        let mut lineage = Lineage::new();
        for record in self.rig.ledger() {
            match record.body {
                Body::Step(step) => {
                    assert!(
                        applied.insert((step.generation, step.step)),
                        "once per generation and step"
                    );
                    lineage.push(step.generation);
                }
                Body::Void { after_step, .. } => lineage.truncate(after_step as usize),
                _ => {}
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
            let placed = |actor: &&Actor| {
                actor.place.is_some() && !actor.formed && actor.generation == generation.number
            };
            for actor in self.actors.values().filter(placed) {
                assert_eq!(
                    actor.lineage, lineage,
                    "the state that it starts from is the one that the ledger accounts for"
                );
            }
        }
        for wrong in ["hold different", "disagree", "cannot train"] {
            assert!(!run.reason.contains(wrong), "{}", run.reason);
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
        // Its workers of later facts never were.
        world.conns.clear();
        world.actors.clear();
        world.away.clear();
        world.rig.restart(kept);
        world.check();
        world.calm_down();
        world.check();
    }
}
