//! Generations that are alive and make no progress.
//!
//! Workers whose heartbeats come while nothing is done are not lost, and the others would wait for them for ever. So
//! whatever a generation is in the middle of has a limit. That of a step is learned: a step may take
//! [`Limits::stuck_factor`] times the median of the generation's last steps, and [`Limits::stuck_slack`] more. The rest
//! happens too seldom to be learned and has a fixed limit. The time of a step begins anew when a step is applied, and
//! when a checkpoint has been written: rank 0 writes while the others wait, and that is no slow step.

use std::collections::VecDeque;
use std::time::Duration;

use supra_proto::v1::Phase;

use super::aside::Blame;
use super::ending::Severity;
use super::generation::{Generation, Stage};
use super::state::RunNumber;
use super::worker::Worker;
use super::{Limits, Machine};

/// Steps whose times are remembered: the median forgets a change of pace within half of them.
const REMEMBERED: usize = 32;

/// What a generation is in the middle of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stretch {
    /// Connecting, loading, comparing.
    #[default]
    Load,
    /// The first step, which compiles and warms up.
    FirstStep,
    /// Any other step.
    Step,
    /// At least one rank writes a checkpoint, or hands its part over.
    Checkpoint,
}

/// The clock of the generation in hand.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    generation: (RunNumber, u64),
    stretch: Stretch,
    since: Duration,
    /// Seconds of the last applied steps, as the slowest rank measured them.
    times: VecDeque<f64>,
}

/// Something that takes too long.
#[derive(Debug, PartialEq)]
struct Overdue {
    waited: Duration,
    /// What it should have taken, in words.
    expected: String,
}

impl Watch {
    /// Begins anew when the generation is another one.
    fn turn_to(&mut self, generation: (RunNumber, u64), now: Duration) {
        if self.generation != generation {
            *self = Watch {
                generation,
                since: now,
                ..Watch::default()
            };
        }
    }

    /// Sees what the generation is in the middle of.
    fn see(&mut self, stretch: Stretch, now: Duration) {
        if self.stretch != stretch {
            (self.stretch, self.since) = (stretch, now);
        }
    }

    /// A step is applied that took so many seconds.
    fn applied(&mut self, seconds: f64, now: Duration) {
        (self.stretch, self.since) = (Stretch::Step, now);
        if seconds.is_finite() && seconds >= 0.0 {
            self.times.push_back(seconds);
            if self.times.len() > REMEMBERED {
                self.times.pop_front();
            }
        }
    }

    /// The coordinator itself was asleep: what it did not see may have been progress.
    pub fn excuse(&mut self, now: Duration) {
        self.since = now;
    }

    /// Seconds that a step usually takes: the median, which a few slow steps do not move.
    fn usual(&self) -> Option<f64> {
        let mut times: Vec<f64> = self.times.iter().copied().collect();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied()
    }

    /// Whether what is in hand takes too long.
    fn overdue(&self, limits: &Limits, now: Duration) -> Option<Overdue> {
        let waited = now.saturating_sub(self.since);
        let fixed = |limit: Duration| (limit, format!("at most {} s", limit.as_secs_f64()));
        let (limit, expected) = match (self.stretch, self.usual()) {
            (Stretch::Load, _) => fixed(limits.load),
            (Stretch::Checkpoint, _) => fixed(limits.checkpoint),
            (Stretch::FirstStep, _) | (Stretch::Step, None) => fixed(limits.first_step),
            (Stretch::Step, Some(usual)) => {
                let learned = Duration::try_from_secs_f64(usual * f64::from(limits.stuck_factor))
                    .unwrap_or(Duration::MAX);
                let limit = learned.saturating_add(limits.stuck_slack);
                (limit, format!("usually {}", seconds(usual)))
            }
        };
        (waited > limit).then_some(Overdue { waited, expected })
    }
}

/// `3.1 s`, `64 s`, `12 ms`.
fn seconds(seconds: f64) -> String {
    match seconds {
        _ if seconds < 0.1 => format!("{:.0} ms", seconds * 1e3),
        _ if seconds < 10.0 => format!("{seconds:.1} s"),
        _ => format!("{seconds:.0} s"),
    }
}

/// One rank, as far as its reports and heartbeats show.
struct Rank {
    /// Grows with progress, and is comparable between ranks.
    progress: u64,
    /// `rank 2 (node7/cuda:0)`.
    who: String,
    /// `training step 118`.
    doing: String,
}

/// Which ranks are behind the others; none when all are equally far. A lone rank is always behind.
fn behind(ranks: &[Rank]) -> Vec<usize> {
    let least = ranks.iter().map(|rank| rank.progress).min();
    let slow: Vec<usize> = (0..ranks.len())
        .filter(|rank| Some(ranks[*rank].progress) == least)
        .collect();
    if slow.len() < ranks.len() || ranks.len() == 1 {
        slow
    } else {
        Vec::new()
    }
}

/// One line that names who is stuck in what, for how long, and how long that should take.
fn reason(ranks: &[Rank], slow: &[usize], overdue: &Overdue) -> String {
    let waited = seconds(overdue.waited.as_secs_f64());
    let who: Vec<&str> = slow.iter().map(|rank| ranks[*rank].who.as_str()).collect();
    let doing = |rank: Option<&Rank>| rank.map_or(String::new(), |rank| rank.doing.clone());
    let (subject, doing) = match who.as_slice() {
        [] => (
            format!("none of {} ranks is behind, but all are stuck", ranks.len()),
            doing(ranks.first()),
        ),
        [one] => (format!("{one} is stuck"), doing(ranks.get(slow[0]))),
        many => (
            format!("{} are stuck", many.join(", ")),
            doing(ranks.get(slow[0])),
        ),
    };
    format!("{subject}: {doing} for {waited}, {}", overdue.expected)
}

/// What the generation is in the middle of, by its stage and its workers' heartbeats; nothing once it is over.
fn stretch<'a>(
    generation: &Generation,
    mut workers: impl Iterator<Item = &'a Worker>,
    stepped: bool,
) -> Option<Stretch> {
    match generation.stage {
        Stage::Leaving { .. } => None,
        Stage::Forming => Some(Stretch::Load),
        Stage::Training if workers.any(|worker| worker.phase == Phase::Checkpointing) => {
            Some(Stretch::Checkpoint)
        }
        Stage::Training if stepped => Some(Stretch::Step),
        Stage::Training => Some(Stretch::FirstStep),
    }
}

/// How far a rank is. While the generation forms: connecting, loading, formed. Then by steps, each of which is first
/// trained, then reported or behind its checkpoint.
fn progress(generation: &Generation, rank: usize, worker: &Worker) -> u64 {
    if generation.members[rank].left.is_some() {
        return u64::MAX;
    }
    if generation.stage == Stage::Forming {
        let formed = generation.members[rank].formed.is_some();
        return match worker.phase {
            _ if formed => 2,
            Phase::Loading => 1,
            _ => 0,
        };
    }
    let reported = generation
        .reports
        .iter()
        .rev()
        .find(|(_, reports)| reports.contains_key(&rank))
        .map_or(0, |(step, _)| 2 * step);
    let said = match worker.phase {
        Phase::Training => (2 * worker.step).saturating_sub(1),
        Phase::Checkpointing => 2 * worker.step,
        _ => 0,
    };
    reported.max(said)
}

impl Machine {
    /// A step of the generation in hand is applied; `seconds` as the slowest rank measured it.
    pub(super) fn step_took(&mut self, seconds: f64) {
        let Some(generation) = &self.generation else {
            return;
        };
        let key = (generation.run, generation.number);
        self.watch.turn_to(key, self.moment.now);
        self.watch.applied(seconds, self.moment.now);
    }

    /// Ends the generation in hand if it is stuck.
    pub(super) fn watch_over(&mut self) {
        let now = self.moment.now;
        let Some(generation) = &self.generation else {
            return;
        };
        self.watch.turn_to((generation.run, generation.number), now);
        let places = || {
            let members = generation.members.iter().enumerate();
            members.filter_map(|(rank, member)| Some((rank, self.workers.get(&member.conn)?)))
        };
        let stepped = !self.watch.times.is_empty();
        let Some(stretch) = stretch(generation, places().map(|(_, worker)| worker), stepped) else {
            return;
        };
        self.watch.see(stretch, now);
        let Some(overdue) = self.watch.overdue(&self.limits, now) else {
            return;
        };
        let ranks: Vec<Rank> = places()
            .map(|(rank, worker)| Rank {
                progress: progress(generation, rank, worker),
                who: format!("rank {rank} ({})", generation.members[rank].name),
                doing: worker.doing(),
            })
            .collect();
        let slow = behind(&ranks);
        let cause = reason(&ranks, &slow, &overdue);
        let culprit = match slow.as_slice() {
            [one] => places().nth(*one).map(|(rank, _)| rank),
            _ => None,
        };
        if let Some(rank) = culprit {
            self.accuse(rank, Blame::Failed, &cause);
        }
        self.break_up(cause, Severity::Transient, None);
    }
}

#[cfg(test)]
mod tests {
    use supra_proto::v1::{
        self, LeftReason, coordinator_message::Body as Down, worker_message::Body as Up,
    };

    use super::super::rig::Rig;
    use super::*;

    const STEP: Duration = Duration::from_millis(3100);

    /// A watch that has seen steps of 3.1 s, the last one at 100 s.
    fn paced() -> Watch {
        let mut watch = Watch::default();
        watch.turn_to((1, 1), Duration::ZERO);
        watch.see(Stretch::Step, Duration::ZERO);
        for _ in 0..REMEMBERED {
            watch.applied(STEP.as_secs_f64(), Duration::from_secs(100));
        }
        watch
    }

    fn after(watch: &Watch, waited: f64) -> Option<String> {
        let now = watch.since + Duration::from_secs_f64(waited);
        let overdue = watch.overdue(&Limits::default(), now);
        overdue.map(|overdue| overdue.expected)
    }

    #[test]
    fn a_step_may_take_ten_times_the_usual_and_half_a_minute() {
        let watch = paced();
        assert_eq!(after(&watch, 61.0), None);
        assert_eq!(after(&watch, 61.1).as_deref(), Some("usually 3.1 s"));
    }

    #[test]
    fn a_few_slow_steps_and_nonsense_do_not_move_what_is_usual() {
        let mut watch = paced();
        for seconds in [900.0, 900.0, f64::NAN, f64::INFINITY, -1.0] {
            watch.applied(seconds, Duration::from_secs(200));
        }
        assert_eq!(watch.usual(), Some(3.1));
        assert_eq!(watch.times.len(), REMEMBERED);
    }

    #[test]
    fn a_lasting_change_of_pace_is_learned() {
        let mut watch = paced();
        for _ in 0..REMEMBERED {
            watch.applied(60.0, Duration::from_secs(200));
        }
        assert_eq!(after(&watch, 600.0), None);
    }

    #[test]
    fn load_first_step_and_checkpoint_have_limits_of_their_own() {
        let limits = Limits::default();
        for (stretch, limit) in [
            (Stretch::Load, limits.load),
            (Stretch::FirstStep, limits.first_step),
            (Stretch::Checkpoint, limits.checkpoint),
        ] {
            let mut watch = paced();
            watch.see(stretch, Duration::from_secs(500));
            assert_eq!(after(&watch, limit.as_secs_f64()), None);
            assert!(after(&watch, limit.as_secs_f64() + 0.1).is_some());
        }
    }

    #[test]
    fn another_generation_learns_anew() {
        let mut watch = paced();
        watch.turn_to((1, 2), Duration::from_secs(900));
        assert_eq!(
            (watch.usual(), watch.since),
            (None, Duration::from_secs(900))
        );
        assert_eq!(seconds(0.0123), "12 ms");
    }

    /// Workers a, b and c (streams 1 to 3) train; step 1 is applied.
    fn training() -> Rig {
        let mut rig = Rig::new();
        rig.submit("rig-1");
        for (conn, name) in [(1, "a"), (2, "b"), (3, "c")] {
            rig.attach(conn, name);
        }
        for conn in 1..=3 {
            rig.formed(conn, 1, 0);
        }
        rig.step(&[1, 2, 3], 1, 1);
        rig.told();
        rig
    }

    fn beat(rig: &mut Rig, conn: u64, phase: Phase, step: u64) {
        let heartbeat = v1::Heartbeat {
            phase: phase.into(),
            step,
            in_phase_ms: 0,
        };
        rig.say(conn, 1, Up::Heartbeat(heartbeat));
    }

    /// Lets time pass while every worker says what it does; the reasons of the voids told.
    fn pass(rig: &mut Rig, seconds: u64, doing: [(Phase, u64); 3]) -> Vec<String> {
        for _ in 0..seconds {
            for (conn, (phase, step)) in (1..).zip(doing) {
                beat(rig, conn, phase, step);
            }
            rig.wait(1.0);
        }
        let told = rig.told().into_iter();
        told.filter_map(|(_, _, body)| match body {
            Down::Void(void) => Some(void.reason),
            _ => None,
        })
        .collect()
    }

    const ON: (Phase, u64) = (Phase::Training, 2);

    #[test]
    fn a_rank_that_does_not_report_what_others_have_is_stuck() {
        let mut rig = training();
        rig.report(1, 1, 2, 0, 3);
        rig.report(3, 1, 2, 2, 3);
        let ahead = (Phase::Training, 3);
        assert!(pass(&mut rig, 31, [ahead, ON, ahead]).is_empty());
        let told = pass(&mut rig, 1, [ahead, ON, ahead]);
        assert_eq!(
            told,
            vec!["rank 1 (b) is stuck: training step 2 for 32 s, usually 0.1 s"; 3],
            "the stuck one is told too"
        );
        assert!(rig.closed.is_empty(), "it may still leave");
    }

    #[test]
    fn when_nobody_is_behind_the_reason_says_so() {
        let mut rig = training();
        let told = pass(&mut rig, 32, [ON; 3]);
        assert!(
            told[0].starts_with("none of 3 ranks is behind, but all are stuck: training step 2"),
            "{told:?}"
        );
    }

    #[test]
    fn a_long_checkpoint_is_no_stuck_step() {
        let mut rig = training();
        rig.step(&[1, 2, 3], 1, 2);
        let writing = (Phase::Checkpointing, 2);
        let ahead = (Phase::Training, 3);
        assert!(pass(&mut rig, 300, [writing, ahead, ahead]).is_empty());
        assert!(
            pass(&mut rig, 31, [ahead; 3]).is_empty(),
            "time begins anew"
        );
        assert_eq!(pass(&mut rig, 2, [ahead; 3]).len(), 3);
    }

    #[test]
    fn a_checkpoint_that_never_ends_is_stuck_in_rank_0() {
        let mut rig = training();
        let (writing, ahead) = ((Phase::Checkpointing, 2), (Phase::Training, 3));
        let told = pass(&mut rig, 1802, [writing, ahead, ahead]);
        assert_eq!(
            told[0],
            "rank 0 (a) is stuck: writing the checkpoint of step 2 for 1801 s, at most 1800 s"
        );
    }

    #[test]
    fn the_coordinators_own_sleep_is_no_stuck_step() {
        let mut rig = training();
        pass(&mut rig, 20, [ON; 3]);
        rig.wait(500.0);
        assert!(pass(&mut rig, 25, [ON; 3]).is_empty());
    }

    #[test]
    fn a_rank_that_never_forms_is_stuck_loading() {
        let mut rig = Rig::new();
        rig.submit("rig-1");
        for (conn, name) in [(1, "a"), (2, "b"), (3, "c")] {
            rig.attach(conn, name);
        }
        rig.formed(1, 1, 0);
        rig.formed(3, 1, 0);
        rig.told();
        let idle = (Phase::Training, 0);
        let told = pass(&mut rig, 1802, [idle, (Phase::Loading, 0), idle]);
        assert_eq!(
            told[0],
            "rank 1 (b) is stuck: loading for 1801 s, at most 1800 s"
        );
    }

    #[test]
    fn a_stuck_worker_that_does_not_leave_is_dropped_and_the_others_go_on() {
        let mut rig = training();
        rig.report(1, 1, 2, 0, 3);
        rig.report(3, 1, 2, 2, 3);
        pass(&mut rig, 32, [ON; 3]);
        rig.left(1, 1, LeftReason::Void);
        rig.left(3, 1, LeftReason::Void);
        let idle = (Phase::Idle, 0);
        pass(&mut rig, 16, [idle, ON, idle]);
        assert_eq!(rig.closed, [2]);
        assert_eq!((rig.status().generation, rig.status().world), (2, 2));
    }
}
