//! Generations that are alive and make no progress.
//!
//! Workers whose heartbeats come while nothing is done are not lost, and the others would wait for them for ever. So
//! whatever a generation is in the middle of has a limit. That of a step is learned: a step may take
//! [`Limits::stuck_factor`] times the median of the generation's last steps, and [`Limits::stuck_slack`] more. The rest
//! happens too seldom to be learned and has a fixed limit. The time of a step begins anew when a step is applied, and
//! when a checkpoint has been written or a state evaluated: rank 0 writes while the others wait, and that is no slow step.
//!
//! The others stand still with the one that hangs, mostly in the same step. But they wait for it in an exchange, and their
//! heartbeats say so; so those are to blame that do not wait.

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
    /// At least one rank measures the state behind a step.
    Evaluation,
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
            (Stretch::Evaluation, _) => fixed(limits.evaluation),
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

/// A wait in an exchange counts when it has lasted this part of the time that is too long: shorter ones are turns in an
/// exchange that goes on.
const WAITED: u32 = 4;

/// One rank, as far as its reports and heartbeats show.
struct Rank {
    /// Grows with progress, and is comparable between ranks.
    progress: u64,
    /// It waits for other ranks.
    waits: bool,
    /// `rank 2 (node7/cuda:0)`.
    who: String,
    /// `training step 118`.
    doing: String,
}

/// Why the ranks stand still.
#[derive(Debug, PartialEq)]
enum Standstill {
    /// These are behind, or keep the others waiting.
    Ranks(Vec<usize>),
    /// Something between ranks that all wait: on the way from the first of a pair to the second, where that shows.
    Network(Option<[usize; 2]>),
    /// All are equally far and nobody waits.
    Unknown,
}

/// Why the ranks stand still. Of those that do not wait, the ones that are behind are to blame; a lone rank always is.
fn standstill(ranks: &[Rank]) -> Standstill {
    let least = |ranks: &[usize], all: &[Rank]| {
        let least = ranks.iter().map(|rank| all[*rank].progress).min();
        let behind = |rank: &usize| Some(all[*rank].progress) == least;
        ranks.iter().copied().filter(behind).collect::<Vec<_>>()
    };
    let all: Vec<usize> = (0..ranks.len()).collect();
    let here = |rank: &usize| !ranks[*rank].waits && ranks[*rank].progress < GONE;
    let free: Vec<usize> = all.iter().copied().filter(here).collect();
    if free.is_empty() {
        // Ranks receive from the one before them, and the one that gets least far has got nothing.
        let pair = match least(&all, ranks).as_slice() {
            [one] => Some([(one + ranks.len() - 1) % ranks.len(), *one]),
            [first, second] if ranks.len() == 2 => Some([*first, *second]),
            _ => None,
        };
        return Standstill::Network(pair);
    }
    let slow = least(&free, ranks);
    if slow.len() < ranks.len() || ranks.len() == 1 {
        Standstill::Ranks(slow)
    } else {
        Standstill::Unknown
    }
}

/// One line that names who is stuck in what, for how long, and how long that should take.
fn reason(ranks: &[Rank], standstill: &Standstill, overdue: &Overdue) -> String {
    let first = |slow: &[usize]| slow.first().copied().unwrap_or_default();
    let (subject, at) = match standstill {
        Standstill::Unknown => {
            let count = ranks.len();
            (
                format!("none of {count} ranks is behind, but all are stuck"),
                0,
            )
        }
        Standstill::Network(pair) => {
            let at = pair.map_or(0, |[_, last]| last);
            (format!("all {} ranks wait for each other", ranks.len()), at)
        }
        Standstill::Ranks(slow) => {
            let names: Vec<&str> = slow.iter().map(|rank| ranks[*rank].who.as_str()).collect();
            let are = if names.len() == 1 { "is" } else { "are" };
            (format!("{} {are} stuck", names.join(", ")), first(slow))
        }
    };
    let doing = ranks.get(at).map_or("", |rank| rank.doing.as_str());
    let waited = seconds(overdue.waited.as_secs_f64());
    let detail = match standstill {
        Standstill::Unknown => String::new(),
        Standstill::Network(Some([from, to])) => format!(
            "; the network between {} and {} does not carry",
            ranks[*from].who, ranks[*to].who
        ),
        Standstill::Network(None) => "; the network between them does not carry".to_owned(),
        Standstill::Ranks(slow) => match ranks.iter().filter(|rank| rank.waits).count() {
            0 => String::new(),
            1 => format!("; another rank waits for {}", them(slow)),
            count => format!("; {count} ranks wait for {}", them(slow)),
        },
    };
    format!(
        "{subject}: {doing} for {waited}, {}{detail}",
        overdue.expected
    )
}

fn them(ranks: &[usize]) -> &'static str {
    if ranks.len() == 1 { "it" } else { "them" }
}

/// What the generation is in the middle of, by its stage and its workers' heartbeats; nothing once it is over.
fn stretch<'a>(
    generation: &Generation,
    workers: impl Iterator<Item = &'a Worker>,
    stepped: bool,
) -> Option<Stretch> {
    let phases: Vec<Phase> = workers.map(|worker| worker.phase).collect();
    match generation.stage {
        Stage::Leaving { .. } | Stage::Away { .. } => None,
        Stage::Forming => Some(Stretch::Load),
        Stage::Training if phases.contains(&Phase::Checkpointing) => Some(Stretch::Checkpoint),
        Stage::Training if phases.contains(&Phase::Evaluating) => Some(Stretch::Evaluation),
        Stage::Training if stepped => Some(Stretch::Step),
        Stage::Training => Some(Stretch::FirstStep),
    }
}

/// The progress of a rank that has left.
const GONE: u64 = u64::MAX;

/// How far a rank is. While the generation forms: connecting, loading, formed. Then by steps, each of which is first
/// trained, then reported or behind its checkpoint.
fn progress(generation: &Generation, rank: usize, worker: &Worker) -> u64 {
    if generation.members[rank].left.is_some() {
        return GONE;
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
        Phase::Evaluating | Phase::Checkpointing => 2 * worker.step,
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
                waits: worker.waited.saturating_mul(WAITED) >= overdue.waited,
                who: format!("rank {rank} ({})", generation.members[rank].name),
                doing: worker.doing(),
            })
            .collect();
        let standstill = standstill(&ranks);
        let cause = reason(&ranks, &standstill, &overdue);
        let culprit = match &standstill {
            Standstill::Ranks(slow) if slow.len() == 1 => {
                places().nth(slow[0]).map(|(rank, _)| rank)
            }
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
            (Stretch::Evaluation, limits.evaluation),
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

    /// Ranks that are so far, and wait or do not.
    fn ranks(known: &[(u64, bool)]) -> Vec<Rank> {
        let rank = |(number, (progress, waits)): (usize, &(u64, bool))| Rank {
            progress: *progress,
            waits: *waits,
            who: format!("rank {number}"),
            doing: "training step 2".into(),
        };
        known.iter().enumerate().map(rank).collect()
    }

    fn told(known: &[(u64, bool)]) -> String {
        let overdue = Overdue {
            waited: Duration::from_secs(40),
            expected: "usually 1.0 s".into(),
        };
        let ranks = ranks(known);
        reason(&ranks, &standstill(&ranks), &overdue)
    }

    const STUCK: &str = "training step 2 for 40 s, usually 1.0 s";

    #[test]
    fn of_ranks_in_the_same_step_those_that_do_not_wait_are_to_blame() {
        let (waits, hangs) = ((3, true), (3, false));
        assert_eq!(
            told(&[waits, hangs, waits]),
            format!("rank 1 is stuck: {STUCK}; 2 ranks wait for it")
        );
        assert_eq!(
            told(&[hangs, waits, hangs]),
            format!("rank 0, rank 2 are stuck: {STUCK}; another rank waits for them")
        );
        assert_eq!(
            told(&[hangs; 3]),
            format!("none of 3 ranks is behind, but all are stuck: {STUCK}")
        );
        assert_eq!(told(&[hangs]), format!("rank 0 is stuck: {STUCK}"));
    }

    #[test]
    fn a_rank_that_is_behind_because_it_waits_is_not_to_blame() {
        assert_eq!(
            standstill(&ranks(&[(3, true), (5, false), (5, true)])),
            Standstill::Ranks(vec![1])
        );
        assert_eq!(
            standstill(&ranks(&[(5, false), (3, false), (5, true)])),
            Standstill::Ranks(vec![1]),
            "of those that do not wait the slowest"
        );
    }

    #[test]
    fn when_all_wait_it_is_the_network_and_nobody_is_to_blame() {
        let waits = (3, true);
        assert_eq!(
            told(&[waits; 3]),
            format!(
                "all 3 ranks wait for each other: {STUCK}; the network between them does not carry"
            )
        );
        for (known, pair) in [
            (vec![waits; 2], [0, 1]),
            (vec![(5, true), waits, (5, true)], [0, 1]),
            (vec![waits, (5, true), (5, true)], [2, 0]),
        ] {
            let known = ranks(&known);
            assert_eq!(standstill(&known), Standstill::Network(Some(pair)));
        }
        assert_eq!(
            standstill(&ranks(&[(GONE, false), waits])),
            Standstill::Network(Some([0, 1])),
            "who has left is not to blame"
        );
    }
}
