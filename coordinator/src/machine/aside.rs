//! Workers that no generation takes: drained by a user, or put aside because they broke too many generations.
//!
//! Each is attached and idle until its supervisor is started anew, which shows as another instance in its hello. A
//! coordinator that restarts remembers none of it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use supra_proto::v1::Hello;

use super::Machine;
use super::clients::Refused;
use super::generation::{Generation, Stage};
use super::worker::{Conn, Worker};

/// Generations that are remembered.
const REMEMBERED: usize = 10;

/// So many of them broken by the same worker are too many. It is as many as end a run that fails at the same step, so
/// that rule decides first: a step that fails everywhere is not the fault of the worker that says so.
const TOO_MANY: usize = 3;

/// How long after the end of a generation a lost worker still counts as its cause: the others often notice that its
/// sockets are gone before the coordinator does, and report that as a fault of their own.
const ECHO: Duration = Duration::from_secs(2);

/// What a worker did to its generation, the more telling first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Blame {
    /// It died or fell silent.
    Lost,
    /// It reported a fault, or stood still.
    Failed,
    /// It was lost while it should have left.
    Late,
}

#[derive(Clone, Debug)]
struct Accusation {
    name: String,
    instance: String,
    blame: Blame,
    cause: String,
}

/// A worker that no generation takes.
#[derive(Debug)]
struct Aside {
    /// Of its supervisor: another one is a new chance.
    instance: String,
    reason: String,
}

const DRAINED: &str = "drained by a user";

/// What is remembered of the workers' conduct.
#[derive(Debug, Default)]
pub(crate) struct Conduct {
    /// In the generation in hand.
    accused: Vec<Accusation>,
    /// The last generations, newest last: the worker that broke it while others survived, if one did.
    ended: VecDeque<Option<String>>,
    /// By name.
    aside: BTreeMap<String, Aside>,
}

impl Conduct {
    /// A generation is over. How many of those remembered `culprit` has broken, when that is too many.
    fn end(&mut self, culprit: Option<String>) -> Option<usize> {
        self.ended.push_back(culprit.clone());
        if self.ended.len() > REMEMBERED {
            self.ended.pop_front();
        }
        let broken = self.ended.iter().filter(|ended| **ended == culprit).count();
        (culprit.is_some() && broken >= TOO_MANY).then_some(broken)
    }

    /// Why no generation takes this worker.
    fn why(&self, hello: &Hello) -> Option<&str> {
        let aside = self.aside.get(&hello.name)?;
        (aside.instance == hello.instance).then_some(aside.reason.as_str())
    }
}

impl Machine {
    /// Notes that a member of the generation in hand has broken it.
    pub(super) fn accuse(&mut self, rank: usize, blame: Blame, cause: &str) {
        let Some(generation) = &self.generation else {
            return;
        };
        let blame = match generation.stage {
            Stage::Leaving { .. }
                if self.state.run(generation.run).is_none_or(|run| run.ended()) =>
            {
                return;
            }
            Stage::Leaving { since, .. } if self.moment.now.saturating_sub(since) > ECHO => {
                Blame::Late
            }
            _ => blame,
        };
        let name = generation.members[rank].name.clone();
        let conn = generation.members[rank].conn;
        let worker = self.workers.get(&conn).or(self.departed.back());
        let instance = worker.map(|worker| worker.hello.instance.clone());
        self.conduct.accused.push(Accusation {
            name,
            instance: instance.unwrap_or_default(),
            blame,
            cause: cause.to_owned(),
        });
    }

    /// The generation in hand is over: draws the consequence for the worker that broke it.
    pub(super) fn judge(&mut self) {
        let accused = std::mem::take(&mut self.conduct.accused);
        let Some(generation) = &self.generation else {
            return;
        };
        let run = generation.run;
        let culprit = accused
            .into_iter()
            .min_by_key(|accusation| accusation.blame)
            .filter(|culprit| {
                let mut others = generation.members.iter();
                others.any(|member| member.name != culprit.name && !member.lost)
            });
        let name = culprit.as_ref().map(|culprit| culprit.name.clone());
        let (Some(broken), Some(culprit)) = (self.conduct.end(name), culprit) else {
            return;
        };
        let Accusation {
            name,
            instance,
            cause,
            ..
        } = culprit;
        let last = self.conduct.ended.len();
        let reason =
            format!("broke {broken} of the last {last} generations; the last time {cause}");
        self.log(
            Some(run),
            "WARN",
            format!("worker {name} is put aside until it is restarted: it {reason}"),
        );
        // It begins with a clean record when it is back.
        self.conduct.ended.iter_mut().for_each(|ended| {
            ended.take_if(|ended| *ended == name);
        });
        self.conduct.aside.insert(name, Aside { instance, reason });
    }

    /// A worker attaches: a new supervisor of one that is aside makes it as good as any other.
    pub(super) fn take_back(&mut self, hello: &Hello) {
        let renewed = self
            .conduct
            .aside
            .get(&hello.name)
            .is_some_and(|aside| aside.instance != hello.instance);
        if renewed {
            self.conduct.aside.remove(&hello.name);
            let run = self.state.queue.front().copied();
            let text = format!("worker {} was restarted and is aside no more", hello.name);
            self.log(run, "INFO", text);
        }
    }

    /// Why no generation takes this worker; empty when one may.
    pub(super) fn why_aside(&self, worker: &Worker) -> &str {
        self.conduct.why(&worker.hello).unwrap_or_default()
    }

    /// Attached workers that a generation may take.
    pub(super) fn able(&self) -> impl Iterator<Item = (&Conn, &Worker)> {
        let able = |worker: &Worker| self.conduct.why(&worker.hello).is_none();
        self.workers.iter().filter(move |(_, worker)| able(worker))
    }

    /// Attached workers that none may take, with the reason: `b (drained by a user)`.
    pub(super) fn unable(&self) -> Vec<String> {
        let why =
            |worker: &Worker| Some((worker.hello.name.clone(), self.conduct.why(&worker.hello)?));
        let known = self.workers.values().filter_map(why);
        known.map(|(name, why)| format!("{name} ({why})")).collect()
    }

    /// A member of the last generation that nobody has to wait for.
    pub(super) fn is_aside(&self, name: &str) -> bool {
        self.conduct.aside.contains_key(name)
    }

    /// Has no generation take this worker any more, and the one in hand go on without it.
    pub(super) fn drain(&mut self, name: &str) -> Result<(), Refused> {
        let known = self
            .workers
            .iter()
            .find(|(_, worker)| worker.hello.name == name);
        let Some((_, worker)) = known else {
            return Err(self.no_worker(name));
        };
        if self.conduct.why(&worker.hello) == Some(DRAINED) {
            return Ok(());
        }
        let drained = Aside {
            instance: worker.hello.instance.clone(),
            reason: DRAINED.to_owned(),
        };
        self.conduct.aside.insert(name.to_owned(), drained);
        let run = self.state.queue.front().copied();
        self.log(run, "INFO", format!("worker {name} is drained"));
        Ok(())
    }

    /// A member of a generation that no generation may take any more.
    pub(super) fn drained<'a>(&self, generation: &'a Generation) -> Option<&'a str> {
        if self.conduct.aside.is_empty() {
            return None;
        }
        let aside = |conn| {
            let worker = self.workers.get(conn);
            worker.is_some_and(|worker| self.conduct.why(&worker.hello).is_some())
        };
        let member = generation.members.iter().find(|it| aside(&it.conn))?;
        Some(&member.name)
    }

    fn no_worker(&self, name: &str) -> Refused {
        let known = self.workers.values().map(|worker| &worker.hello.name);
        let mut near: Vec<(f64, &String)> = known
            .map(|known| (strsim::jaro_winkler(name, known), known))
            .filter(|(likeness, _)| *likeness > 0.7)
            .collect();
        near.sort_by(|left, right| right.0.total_cmp(&left.0));
        let near = near.into_iter().take(3);
        Refused::NoWorker {
            name: name.to_owned(),
            near: near.map(|(_, known)| known.clone()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use supra_proto::v1::{FaultKind, LeftReason, RunState, coordinator_message::Body as Down};

    use super::super::rig::{Rig, hello};
    use super::super::{Event, State};
    use super::*;

    #[test]
    fn three_of_the_last_ten_are_too_many() {
        let mut conduct = Conduct::default();
        let b = || Some("b".to_owned());
        assert_eq!((conduct.end(b()), conduct.end(b())), (None, None));
        for _ in 0..7 {
            assert_eq!(conduct.end(None), None);
        }
        assert_eq!(conduct.end(b()), Some(3));
        assert_eq!(conduct.end(Some("a".into())), None);
        assert_eq!(conduct.end(b()), None, "the first two are forgotten");
        assert_eq!(conduct.end(b()), Some(3));
    }

    /// Workers a (stream 1) and b (stream 2) train in generation 1.
    fn training() -> Rig {
        let mut rig = Rig::new();
        rig.submit("rig-1");
        rig.attach(1, "a");
        rig.attach(2, "b");
        rig.wait(1.1);
        rig.told();
        rig
    }

    /// b reports a fault of its environment, and both leave.
    fn break_by_b(rig: &mut Rig, generation: u64) {
        rig.fault(2, generation, FaultKind::Transient, "xid 79");
        rig.left(2, generation, LeftReason::Fault);
        rig.left(1, generation, LeftReason::Void);
        rig.wait(1.1);
    }

    /// b has broken three generations, the last one a step further than the others, which keeps the run alive.
    fn broken() -> Rig {
        let mut rig = training();
        break_by_b(&mut rig, 1);
        break_by_b(&mut rig, 2);
        rig.formed(1, 3, 0);
        rig.formed(2, 3, 0);
        rig.step(&[1, 2], 3, 1);
        break_by_b(&mut rig, 3);
        rig
    }

    fn aside(rig: &Rig, name: &str) -> String {
        let workers = rig.machine.worker_list();
        let worker = workers.iter().find(|worker| worker.name == name);
        worker.expect("is listed").aside.clone()
    }

    #[test]
    fn a_worker_that_breaks_three_generations_is_put_aside_and_the_others_go_on() {
        let rig = broken();
        assert_eq!((rig.status().generation, rig.status().world), (4, 1));
        assert_eq!(aside(&rig, "a"), "");
        let why = aside(&rig, "b");
        assert!(
            why.starts_with("broke 3 of the last 3 generations; the last time rank 1 (b) failed")
                && why.contains("xid 79"),
            "{why}"
        );
    }

    #[test]
    fn only_a_new_supervisor_brings_it_back() {
        let mut rig = broken();
        rig.lose(2);
        let again = |conn, instance| Event::Hello {
            conn,
            peer: "b:9".into(),
            hello: hello("b", instance),
        };
        rig.event(again(3, 2)).unwrap();
        assert!(!aside(&rig, "b").is_empty(), "the same supervisor");
        rig.lose(3);
        rig.event(again(4, 4)).unwrap();
        assert_eq!(aside(&rig, "b"), "");
    }

    #[test]
    fn three_failures_at_the_same_step_still_stop_the_run() {
        let mut rig = training();
        for generation in 1..=3 {
            break_by_b(&mut rig, generation);
        }
        assert_eq!(rig.status().state(), RunState::Failed);
    }

    #[test]
    fn the_one_that_died_is_to_blame_and_not_those_that_noticed_first() {
        let mut rig = training();
        for (generation, b) in [(1, 2), (2, 12), (3, 22)] {
            if generation == 3 {
                rig.formed(1, 3, 0);
                rig.formed(b, 3, 0);
                rig.step(&[1, b], 3, 1);
            }
            let noticed = "rank 1 closed the connection";
            rig.fault(1, generation, FaultKind::Transient, noticed);
            rig.left(1, generation, LeftReason::Fault);
            rig.lose(b);
            rig.event(Event::Hello {
                conn: b + 10,
                peer: "b:9".into(),
                hello: hello("b", 2),
            })
            .unwrap();
            rig.wait(1.1);
        }
        assert_eq!(aside(&rig, "a"), "");
        assert!(aside(&rig, "b").contains("rank 1 (b) was lost"));
    }

    #[test]
    fn a_run_that_lacks_workers_names_those_that_are_aside() {
        let mut rig = training();
        rig.event(Event::Drain("a".into())).unwrap();
        rig.event(Event::Drain("b".into())).unwrap();
        rig.left(1, 1, LeftReason::Regrouped);
        rig.left(2, 1, LeftReason::Regrouped);
        let reason = rig.status().reason;
        assert!(
            reason.starts_with(
                "waiting for 1 worker: 0 attached, without a (drained by a user), b (drained by a user)"
            ),
            "{reason}"
        );
    }

    #[test]
    fn a_drained_member_is_left_out_of_the_next_generation() {
        let mut rig = training();
        rig.event(Event::Drain("b".into())).unwrap();
        rig.event(Event::Drain("b".into())).unwrap();
        assert!(rig.told().is_empty(), "it has no step to finish yet");
        rig.formed(1, 1, 0);
        rig.formed(2, 1, 0);
        let told = rig.told();
        assert_eq!(told.len(), 2, "a repeat is harmless: {told:?}");
        for (_, _, body) in told {
            assert!(
                matches!(&body, Down::Regroup(regroup) if regroup.reason == "worker b is drained"),
                "{body:?}"
            );
        }
        rig.left(1, 1, LeftReason::Regrouped);
        rig.left(2, 1, LeftReason::Regrouped);
        rig.wait(1.1);
        assert_eq!((rig.status().generation, rig.status().world), (2, 1));
        assert_eq!(aside(&rig, "b"), "drained by a user");
    }

    #[test]
    fn a_worker_that_is_back_before_its_predecessor_is_put_aside_stays_in() {
        let mut rig = training();
        let before = Aside {
            instance: "before".into(),
            reason: "broke too many".into(),
        };
        rig.machine.conduct.aside.insert("b".into(), before);
        rig.formed(1, 1, 0);
        rig.formed(2, 1, 0);
        let regrouped = |(_, _, body): &(_, _, Down)| matches!(body, Down::Regroup(_));
        assert!(!rig.told().iter().any(regrouped));
    }

    #[test]
    fn a_worker_without_a_place_is_drained_at_once() {
        let mut rig = Rig::new();
        rig.attach(1, "a");
        rig.event(Event::Drain("a".into())).unwrap();
        assert!(
            rig.told()
                .iter()
                .all(|(_, _, body)| !matches!(body, Down::Regroup(_)))
        );
        rig.submit("rig-1");
        rig.wait(5.0);
        assert_eq!(rig.status().world, 0);
        assert_eq!(rig.machine.state(), &rig.replayed());
        assert_ne!(rig.machine.state(), &State::default());
    }

    #[test]
    fn a_drained_worker_that_goes_is_not_waited_for() {
        let mut rig = training();
        rig.event(Event::Drain("b".into())).unwrap();
        rig.left(1, 1, LeftReason::Regrouped);
        rig.left(2, 1, LeftReason::Regrouped);
        rig.lose(2);
        rig.wait(1.1);
        assert_eq!((rig.status().generation, rig.status().world), (2, 1));
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_nearest() {
        let mut rig = Rig::new();
        rig.attach(1, "node7/cuda:0");
        rig.attach(2, "desk/cpu");
        let refused = rig.event(Event::Drain("node7".into())).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "no attached worker is called node7; did you mean node7/cuda:0? `supra workers` lists them"
        );
    }
}
