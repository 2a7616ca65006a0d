//! Workers that no generation takes: drained by a user, or put aside because they broke too many generations.
//!
//! Each is attached and idle until its supervisor is started anew, which shows as another instance in its hello. People act
//! on that, so the journal keeps it; what led to it begins anew with the coordinator.

use std::collections::VecDeque;
use std::time::Duration;

use supra_proto::v1::Hello;

use super::Machine;
use super::clients::Refused;
use super::fact::Fact;
use super::generation::{Generation, Stage};
use super::worker::{Conn, Worker};

/// Generations that are remembered.
const REMEMBERED: usize = 10;

/// So many of them broken by the same worker are too many. It is as many as end a run that fails at the same step, so
/// that rule decides first: a step that fails everywhere is not the fault of the worker that says so.
const TOO_MANY: usize = 3;

/// So many of them in which its device computed wrong are too many: that seldom passes.
const TOO_MANY_OF_HARDWARE: usize = 2;

/// How long after the end of a generation a lost worker still counts as its cause: the others often notice that its
/// sockets are gone before the coordinator does, and report that as a fault of their own.
const ECHO: Duration = Duration::from_secs(2);

/// What a worker did to its generation, the more telling first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Blame {
    /// Its device computes wrong.
    Hardware,
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

/// The worker that broke a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Culprit {
    name: String,
    blame: Blame,
}

const DRAINED: &str = "drained by a user";

/// What is remembered of the workers' conduct.
#[derive(Debug, Default)]
pub(crate) struct Conduct {
    /// In the generation in hand.
    accused: Vec<Accusation>,
    /// The last generations, newest last: the worker that broke it while others survived, if one did.
    ended: VecDeque<Option<Culprit>>,
}

impl Conduct {
    /// A generation is over. How many of those remembered `culprit` has broken, when that is too many.
    fn end(&mut self, culprit: Option<Culprit>) -> Option<usize> {
        self.ended.push_back(culprit.clone());
        if self.ended.len() > REMEMBERED {
            self.ended.pop_front();
        }
        let name = culprit?.name;
        let its = || self.ended.iter().flatten().filter(|it| it.name == name);
        let (broken, of_hardware) = (
            its().count(),
            its().filter(|it| it.blame == Blame::Hardware).count(),
        );
        (broken >= TOO_MANY || of_hardware >= TOO_MANY_OF_HARDWARE).then_some(broken)
    }

    /// Of the last generations, those that a worker is to blame for.
    #[cfg(test)]
    pub(super) fn blamed(&self) -> usize {
        self.ended.iter().flatten().count()
    }
}

impl Machine {
    /// Notes that a member of the generation in hand has broken it.
    pub(super) fn accuse(&mut self, rank: usize, blame: Blame, cause: &str) {
        let Some(generation) = &self.generation else {
            return;
        };
        // Whoever does as it was ordered is not to blame.
        if self.ordered_here().is_some() {
            return;
        }
        let blame = match generation.stage {
            Stage::Leaving { .. }
                if self.state.run(generation.run).is_none_or(|run| run.ended()) =>
            {
                return;
            }
            Stage::Leaving { since, .. }
                if blame != Blame::Hardware && self.moment.now.saturating_sub(since) > ECHO =>
            {
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
        let ended = culprit.as_ref().map(|culprit| Culprit {
            name: culprit.name.clone(),
            blame: culprit.blame,
        });
        let (Some(broken), Some(culprit)) = (self.conduct.end(ended), culprit) else {
            return;
        };
        let Accusation {
            name,
            instance,
            cause,
            ..
        } = culprit;
        let last = self.conduct.ended.len();
        // It begins with a clean record when it is back.
        self.conduct.ended.iter_mut().for_each(|ended| {
            ended.take_if(|ended| ended.name == name);
        });
        let known = |worker: &&Worker| worker.hello.name == name;
        let attached = self.workers.values().find(known);
        if attached.is_some_and(|worker| worker.hello.instance != instance) {
            // Its supervisor was started anew before this was known.
            return;
        }
        let reason =
            format!("broke {broken} of the last {last} generations; the last time {cause}");
        self.log(
            Some(run),
            "WARN",
            format!("worker {name} is put aside until it is restarted: it {reason}"),
        );
        self.put_aside(name, instance, reason);
    }

    fn put_aside(&mut self, worker: String, instance: String, reason: String) {
        let at = self.moment.unix_ms;
        self.decide(Fact::PutAside {
            worker,
            instance,
            reason,
            at,
        });
    }

    /// Why no generation takes this worker.
    fn why(&self, hello: &Hello) -> Option<&str> {
        let aside = self.state.aside.get(&hello.name)?;
        (aside.instance == hello.instance).then_some(aside.reason.as_str())
    }

    /// A worker attaches: a new supervisor of one that is aside makes it as good as any other.
    pub(super) fn take_back(&mut self, hello: &Hello) {
        let aside = self.state.aside.get(&hello.name);
        if aside.is_some_and(|aside| aside.instance != hello.instance) {
            let (worker, at) = (hello.name.clone(), self.moment.unix_ms);
            self.decide(Fact::TakenBack { worker, at });
            let run = self.state.queue.front().copied();
            let text = format!("worker {} was restarted and is aside no more", hello.name);
            self.log(run, "INFO", text);
        }
    }

    /// Why no generation takes this worker; empty when one may.
    pub(super) fn why_aside(&self, worker: &Worker) -> &str {
        self.why(&worker.hello).unwrap_or_default()
    }

    /// Attached workers that a generation may take.
    pub(super) fn able(&self) -> impl Iterator<Item = (&Conn, &Worker)> {
        let able = |worker: &Worker| self.why(&worker.hello).is_none();
        self.workers.iter().filter(move |(_, worker)| able(worker))
    }

    /// Attached workers that none may take, with the reason: `b (drained by a user)`.
    pub(super) fn unable(&self) -> Vec<String> {
        let why = |worker: &Worker| Some((worker.hello.name.clone(), self.why(&worker.hello)?));
        let known = self.workers.values().filter_map(why);
        known.map(|(name, why)| format!("{name} ({why})")).collect()
    }

    /// A member of the last generation that nobody has to wait for.
    pub(super) fn is_aside(&self, name: &str) -> bool {
        self.state.aside.contains_key(name)
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
        if self.why(&worker.hello) != Some(DRAINED) {
            self.put_aside_attached(name, DRAINED);
        }
        Ok(())
    }

    /// Has no generation take the attached worker of this name any more.
    pub(super) fn put_aside_attached(&mut self, name: &str, reason: &str) {
        let mut workers = self.workers.values();
        let Some(worker) = workers.find(|worker| worker.hello.name == name) else {
            return;
        };
        let instance = worker.hello.instance.clone();
        self.put_aside(name.to_owned(), instance, reason.to_owned());
        let run = self.state.queue.front().copied();
        self.log(run, "INFO", format!("worker {name} is {reason}"));
    }

    /// Lets generations have the workers again that are aside for this reason, but one.
    pub(super) fn take_back_aside(&mut self, reason: &str, kept: Option<&str>) {
        let aside = self.state.aside.iter();
        let back: Vec<String> = aside
            .filter(|(name, aside)| aside.reason == reason && kept != Some(name.as_str()))
            .map(|(name, _)| name.clone())
            .collect();
        let at = self.moment.unix_ms;
        for worker in back {
            self.decide(Fact::TakenBack { worker, at });
        }
    }

    /// A member of a generation that no generation may take any more.
    pub(super) fn drained<'a>(&self, generation: &'a Generation) -> Option<&'a str> {
        if self.state.aside.is_empty() {
            return None;
        }
        let aside = |conn| {
            let worker = self.workers.get(conn);
            worker.is_some_and(|worker| self.why(&worker.hello).is_some())
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
    use super::*;

    #[test]
    fn three_of_the_last_ten_are_too_many() {
        let mut conduct = Conduct::default();
        let by = |name: &str, blame| {
            let name = name.to_owned();
            Some(Culprit { name, blame })
        };
        let b = || by("b", Blame::Failed);
        assert_eq!((conduct.end(b()), conduct.end(b())), (None, None));
        for _ in 0..7 {
            assert_eq!(conduct.end(None), None);
        }
        assert_eq!(conduct.end(b()), Some(3));
        assert_eq!(conduct.end(by("a", Blame::Hardware)), None);
        assert_eq!(conduct.end(b()), None, "the first two are forgotten");
        assert_eq!(conduct.end(b()), Some(3));
        assert_eq!(conduct.end(by("a", Blame::Hardware)), Some(2));
    }
}
