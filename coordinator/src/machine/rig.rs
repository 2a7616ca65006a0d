//! What the machine's tests share: a small recipe, its plan, and honest workers.

use std::ops::Range;
use std::time::Duration;

use supra_proto::v1::{self, coordinator_message::Body as Down, worker_message::Body as Up};
use supra_recipes::plan::{Digest, Plan};
use supra_recipes::schema::Recipe;

use super::*;
use crate::ledger::{self, Open};

/// 10 tokens per sample, 4 samples per step, 10 samples: steps of 4, 4 and 2; a checkpoint every 2 steps.
pub(crate) const RECIPE: &str = "\
name: rig
base: { path: /base }
data: { train: /data }
budget: { tokens: 105 }
batch: { tokens: 40, micro_batch: 1, sequence_length: 10 }
optimizer: { warmup: 1 steps }
checkpoint: { every_tokens: 80, keep: 1 }
workers: { min: 1, max: 3 }
replica_check: { every_steps: 2 }
";

pub(crate) const WINDOWS: u64 = 50;
pub(crate) const MANIFEST: [u8; 32] = [2; 32];

pub(crate) fn plan() -> Plan {
    Plan::new(&Recipe::parse(RECIPE, "rig").unwrap(), WINDOWS, MANIFEST).unwrap()
}

pub(crate) fn open() -> Open {
    let plan = plan();
    Open {
        run: "rig-1".into(),
        recipe_hash: [0; 32],
        manifest_hash: MANIFEST,
        windows: WINDOWS,
        sequence_length: plan.sequence_length,
        batch_samples: plan.batch_samples,
        samples: plan.samples,
        steps: plan.steps,
    }
}

/// What an honest rank reports.
pub(crate) fn report(plan: &Plan, step: u64, rank: u32, world: u32) -> v1::StepReport {
    let all = plan.step_samples(step);
    let mine = plan.rank_samples(step, rank, world);
    let digest = |samples: Range<u64>| -> Digest {
        samples
            .map(|sample| Digest::of_sample(sample, &[sample as u32]))
            .sum()
    };
    v1::StepReport {
        step,
        first_sample: all.start,
        samples: all.end - all.start,
        fed_samples: mine.end - mine.start,
        fed_digest: digest(mine).as_bytes().to_vec(),
        loss_sum: 3.5,
        targets: 40,
        grad_norm: 1.0,
        learning_rate: plan.learning_rate(step),
        skipped: false,
        replica_hash: if plan.replica_check_due(step) {
            vec![step as u8; 32]
        } else {
            Vec::new()
        },
        seconds: 0.1,
        data_seconds: 0.01,
        exposed_comm_ms: 20.0,
        step_digest: digest(all).as_bytes().to_vec(),
        bucket_hashes: Vec::new(),
    }
}

pub(crate) fn identity() -> Identity {
    Identity {
        build: "test".into(),
        plan_version: 1,
        plan_probe: vec![5; 32],
    }
}

pub(crate) fn hello(name: &str, instance: u64) -> v1::Hello {
    v1::Hello {
        instance: format!("{name}-{instance}"),
        name: name.to_owned(),
        build: "test".into(),
        plan_version: 1,
        plan_probe: vec![5; 32],
        device: "cpu".into(),
        data_address: format!("{name}:1"),
        pid: 1,
        previous_exit: String::new(),
        held: None,
        place: None,
    }
}

pub(crate) fn submission(id: &str) -> Submission {
    Submission {
        id: id.to_owned(),
        name: "rig".into(),
        recipe: RECIPE.into(),
        checkpoint_root: "/checkpoints".into(),
        keep: 1,
        keep_every: 0,
        strict: false,
        budget_tokens: 100,
        workers: Workers {
            min: 1,
            max: 3,
            grace: Duration::from_secs(1),
        },
    }
}

/// A machine with its clock, and everything that it decided.
pub(crate) struct Rig {
    pub machine: Machine,
    pub now: Duration,
    pub facts: Vec<Fact>,
    /// What they rebuild.
    remembered: State,
    pub sent: Vec<(Conn, u64, Down)>,
    pub closed: Vec<Conn>,
    pub deleted: Vec<String>,
    /// Checkpoints that are to be read again: the number of the attempt, and the directory.
    pub verify: Vec<(u64, PathBuf)>,
    pub logs: Vec<String>,
    pub exited: bool,
}

impl Rig {
    pub fn new() -> Rig {
        let (machine, actions) = Machine::new(
            State::default(),
            Limits::default(),
            identity(),
            &Moment::default(),
        );
        assert!(actions.is_empty());
        Rig {
            machine,
            now: Duration::ZERO,
            facts: Vec::new(),
            remembered: State::default(),
            sent: Vec::new(),
            closed: Vec::new(),
            deleted: Vec::new(),
            verify: Vec::new(),
            logs: Vec::new(),
            exited: false,
        }
    }

    fn moment(&self) -> Moment {
        Moment {
            now: self.now,
            unix_ms: 1,
            key: [7; 32],
        }
    }

    pub fn event(&mut self, event: Event) -> Result<(), Refused> {
        let actions = self.machine.handle(event, &self.moment())?;
        self.carry_out(actions);
        assert_eq!(
            &self.remembered,
            self.machine.state(),
            "replay is the live state"
        );
        Ok(())
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Journal(fact) => {
                    self.remembered.apply(&fact);
                    self.facts.push(fact);
                }
                Action::Send {
                    conn,
                    generation,
                    body,
                    ..
                } => self.sent.push((conn, generation, body)),
                Action::Close(conn) => self.closed.push(conn),
                Action::Delete { path, .. } => self.deleted.push(path),
                Action::Verify {
                    attempt, directory, ..
                } => self.verify.push((attempt, directory)),
                Action::Exit => self.exited = true,
                Action::Log { entry, .. } => self.logs.push(entry.text),
                Action::Measured { .. } | Action::StoodStill { .. } | Action::Sync => {}
            }
        }
    }

    /// The coordinator dies after `kept` facts and starts again.
    pub fn restart(&mut self, kept: usize) {
        self.facts.truncate(kept);
        self.remembered = self.replayed();
        let (machine, actions) = Machine::new(
            self.remembered.clone(),
            Limits::default(),
            identity(),
            &self.moment(),
        );
        self.machine = machine;
        self.sent.clear();
        self.verify.clear();
        self.carry_out(actions);
    }

    /// The state that the facts so far rebuild.
    pub fn replayed(&self) -> State {
        let mut state = State::default();
        self.facts.iter().for_each(|fact| state.apply(fact));
        state
    }

    pub fn submit(&mut self, id: &str) {
        self.submit_with(id, "");
    }

    /// Submits the rig's recipe with more YAML at its end.
    pub fn submit_with(&mut self, id: &str, more: &str) {
        let submission = Submission {
            recipe: format!("{RECIPE}{more}"),
            ..submission(id)
        };
        self.event(Event::Submit(submission)).unwrap();
    }

    pub fn attach(&mut self, conn: Conn, name: &str) {
        self.attach_holding(conn, name, None);
    }

    /// A worker attaches that still has a state in memory.
    pub fn attach_holding(&mut self, conn: Conn, name: &str, held: Option<v1::Held>) {
        let hello = v1::Hello {
            held,
            ..hello(name, conn)
        };
        let peer = format!("{name}:9");
        self.event(Event::Hello { conn, peer, hello }).unwrap();
    }

    /// Says something of the newest run.
    pub fn say(&mut self, conn: Conn, generation: u64, body: Up) {
        let run = self
            .machine
            .state()
            .runs()
            .last()
            .map(|run| run.id.clone())
            .unwrap_or_default();
        self.say_of(run, conn, generation, body);
    }

    pub fn say_of(&mut self, run: String, conn: Conn, generation: u64, body: Up) {
        let message = v1::WorkerMessage {
            run,
            generation,
            sequence: 1,
            body: Some(body),
        };
        self.event(Event::Message { conn, message }).unwrap();
    }

    pub fn wait(&mut self, seconds: f64) {
        self.now += Duration::from_secs_f64(seconds);
        self.event(Event::Tick).unwrap();
    }

    pub fn lose(&mut self, conn: Conn) {
        self.event(Event::Lost {
            conn,
            cause: "the stream closed".into(),
        })
        .unwrap();
    }

    /// Takes the messages sent since the last call.
    pub fn told(&mut self) -> Vec<(Conn, u64, Down)> {
        std::mem::take(&mut self.sent)
    }

    pub fn formed(&mut self, conn: Conn, generation: u64, step: u64) {
        self.formed_with(conn, generation, step, vec![1; 32]);
    }

    pub fn formed_with(&mut self, conn: Conn, generation: u64, step: u64, replica_hash: Vec<u8>) {
        let formed = v1::Formed {
            step,
            replica_hash,
            windows: WINDOWS,
            manifest_hash: MANIFEST.to_vec(),
        };
        self.say(conn, generation, Up::Formed(formed));
    }

    /// Every worker of `conns`, in rank order, reports `step`.
    pub fn step(&mut self, conns: &[Conn], generation: u64, step: u64) {
        for (rank, conn) in conns.iter().enumerate() {
            self.report(*conn, generation, step, rank as u32, conns.len() as u32);
        }
    }

    /// One honest report.
    pub fn report(&mut self, conn: Conn, generation: u64, step: u64, rank: u32, world: u32) {
        self.say(
            conn,
            generation,
            Up::Step(report(&plan(), step, rank, world)),
        );
    }

    pub fn heartbeat(&mut self, conn: Conn) {
        self.say(conn, 0, Up::Heartbeat(v1::Heartbeat::default()));
    }

    pub fn written(&mut self, conn: Conn, generation: u64, step: u64) {
        self.say(
            conn,
            generation,
            Up::CheckpointWritten(checkpoint(generation, step)),
        );
    }

    pub fn published(&mut self, conn: Conn, generation: u64, step: u64) {
        let manifest_hash = checkpoint(generation, step).manifest_hash;
        self.say(
            conn,
            generation,
            Up::CheckpointPublished(v1::CheckpointPublished {
                step,
                manifest_hash,
            }),
        );
    }

    /// The checkpoint that was to be read again last has been; the name of its directory.
    pub fn verified(&mut self, found: Found) -> String {
        let (attempt, directory) = self.verify.pop().expect("one is to be read again");
        let run = self.run().number;
        self.event(Event::Verified {
            run,
            attempt,
            found,
        })
        .unwrap();
        let name = directory.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    pub fn left(&mut self, conn: Conn, generation: u64, reason: v1::LeftReason) {
        self.left_holding(conn, generation, reason, None);
    }

    pub fn left_holding(
        &mut self,
        conn: Conn,
        generation: u64,
        reason: v1::LeftReason,
        held: Option<v1::Held>,
    ) {
        let reason = reason.into();
        self.say(conn, generation, Up::Left(v1::Left { reason, held }));
    }

    pub fn fault(&mut self, conn: Conn, generation: u64, kind: v1::FaultKind, message: &str) {
        let phase = v1::Phase::Training.into();
        let fault = v1::Fault {
            kind: kind.into(),
            message: message.into(),
            phase,
            step: 1,
            culprit: None,
        };
        self.say(conn, generation, Up::Fault(fault));
    }

    pub fn run(&self) -> &Run {
        self.machine.state().runs().last().unwrap()
    }

    pub fn status(&self) -> v1::RunStatus {
        self.machine.status(self.run().number).unwrap()
    }

    /// The ledger of the newest run.
    pub fn ledger(&self) -> Vec<ledger::Record> {
        let number = self.run().number;
        let records = self.facts.iter().filter_map(|fact| match fact {
            Fact::Recorded { run, record } if *run == number => Some(record.clone()),
            _ => None,
        });
        records.collect()
    }
}

/// The state of the rig's first run behind a step, as [`Rig::formed`] hashes it.
pub(crate) fn held(generation: u64, step: u64) -> v1::Held {
    v1::Held {
        run: "rig-1".into(),
        generation,
        step,
        replica_hash: vec![1; 32],
        ..v1::Held::default()
    }
}

pub(crate) fn checkpoint(generation: u64, step: u64) -> v1::CheckpointWritten {
    v1::CheckpointWritten {
        step,
        path: format!("step-{step}-gen-{generation}"),
        bytes: 100,
        manifest_hash: vec![(16 * generation + step) as u8; 32],
        seconds: 0.1,
    }
}
