//! What happens while a checkpoint is written: a pure function of random numbers.

use std::fmt;
use std::time::Duration;

use nix::errno::Errno;
use rand::{Rng, RngExt};

use super::storage::Mood;
use crate::campaigns::victim::Victim;

/// Shortest and longest time for which storage fails or a process stands still, seconds. The coordinator gives up a silent
/// worker after 10.
const LASTS: (f64, f64) = (0.1, 14.0);

/// The kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// The computing process of the rank that publishes.
    WriterKilled,
    /// That of another one.
    RankKilled,
    SupervisorKilled,
    CoordinatorKilled,
    EverythingKilled,
    /// The computing process of the rank that publishes stands still, and goes on when others may have gone on without it.
    WriterStopped,
    StoreRefuses,
    StoreFull,
    StoreHangs,
}

impl Kind {
    pub const ALL: [Kind; 9] = [
        Kind::WriterKilled,
        Kind::RankKilled,
        Kind::SupervisorKilled,
        Kind::CoordinatorKilled,
        Kind::EverythingKilled,
        Kind::WriterStopped,
        Kind::StoreRefuses,
        Kind::StoreFull,
        Kind::StoreHangs,
    ];

    /// How often it happens beside the others.
    fn weight(self) -> u32 {
        match self {
            Kind::WriterKilled | Kind::CoordinatorKilled | Kind::EverythingKilled => 4,
            Kind::RankKilled | Kind::SupervisorKilled => 3,
            Kind::WriterStopped | Kind::StoreRefuses | Kind::StoreFull | Kind::StoreHangs => 1,
        }
    }

    /// It is a SIGKILL and nothing else.
    pub fn kills(self) -> bool {
        self < Kind::WriterStopped
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Kind::WriterKilled => "rank 0 killed",
            Kind::RankKilled => "another rank killed",
            Kind::SupervisorKilled => "supervisor killed",
            Kind::CoordinatorKilled => "coordinator killed",
            Kind::EverythingKilled => "everything killed",
            Kind::WriterStopped => "rank 0 stopped",
            Kind::StoreRefuses => "store refuses",
            Kind::StoreFull => "store full",
            Kind::StoreHangs => "store hangs",
        }
    }
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Blow {
    pub kind: Kind,
    /// Which of those that it may happen to, counted on from the first as often as need be.
    pub whom: usize,
    /// For how long, where it lasts.
    pub lasts: Duration,
    /// Where it lasts: something dies in the end, and only then is it over.
    pub deadly: bool,
    /// With what a store refuses.
    pub error: Errno,
}

impl Blow {
    pub fn draw(random: &mut impl Rng) -> Self {
        let total = Kind::ALL.iter().map(|kind| kind.weight()).sum();
        let mut place = random.random_range(0..total);
        let kind = Kind::ALL.into_iter().find(|kind| {
            let here = place < kind.weight();
            place = place.wrapping_sub(kind.weight());
            here
        });
        // Short ones are as frequent as long ones ten times as long.
        let (shortest, longest) = LASTS;
        let lasts = shortest * (longest / shortest).powf(random.random());
        Self {
            kind: kind.expect("invariant: the place is below the sum of the weights"),
            whom: random.random_range(0..12),
            lasts: Duration::from_secs_f64(lasts),
            deadly: random.random(),
            error: if random.random() {
                Errno::EROFS
            } else {
                Errno::EACCES
            },
        }
    }

    /// Who is killed, now or when it has lasted. `ranks` are the numbers of the workers that train, by rank.
    pub fn victim(&self, ranks: &[u32]) -> Option<Victim> {
        let (writer, others) = ranks.split_first()?;
        let other = others.get(self.whom % others.len().max(1));
        let any = ranks[self.whom % ranks.len()];
        match self.kind {
            Kind::WriterKilled => Some(Victim::Compute(*writer)),
            Kind::RankKilled => other.copied().map(Victim::Compute),
            Kind::SupervisorKilled => Some(Victim::Supervisor(any)),
            Kind::CoordinatorKilled => Some(Victim::Coordinator),
            Kind::EverythingKilled => Some(Victim::Everything),
            _ if !self.deadly => None,
            Kind::WriterStopped => other.copied().map(Victim::Compute),
            Kind::StoreRefuses | Kind::StoreFull | Kind::StoreHangs => match self.whom % 3 {
                0 => Some(Victim::Compute(*writer)),
                1 => Some(Victim::Coordinator),
                _ => Some(Victim::Everything),
            },
        }
    }

    /// What the store does meanwhile, unless it is slow as ever.
    pub fn mood(&self) -> Option<Mood> {
        match self.kind {
            Kind::StoreRefuses => Some(Mood::Refuses(self.error)),
            Kind::StoreFull => Some(Mood::Full),
            Kind::StoreHangs => Some(Mood::Hangs),
            _ => None,
        }
    }
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        if self.kind == Kind::StoreRefuses {
            write!(f, " ({})", self.error)?;
        }
        if !self.kind.kills() {
            write!(f, " for {:.1} s", self.lasts.as_secs_f64())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn every_kind_is_drawn_as_often_as_it_weighs() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut drawn = BTreeMap::new();
        for _ in 0..2200 {
            *drawn.entry(Blow::draw(&mut random).kind).or_insert(0) += 1;
        }
        for kind in Kind::ALL {
            let (times, usual) = (drawn[&kind], 100 * kind.weight());
            assert!(times > usual / 2 && times < usual * 2, "{kind:?}: {times}");
        }
    }

    #[test]
    fn a_fault_of_a_rank_is_of_the_right_one() {
        let mut random = ChaCha8Rng::seed_from_u64(2);
        for _ in 0..500 {
            let blow = Blow::draw(&mut random);
            let victim = blow.victim(&[7, 3, 5]);
            match blow.kind {
                Kind::WriterKilled => assert_eq!(victim, Some(Victim::Compute(7))),
                Kind::RankKilled => assert!(matches!(victim, Some(Victim::Compute(3 | 5)))),
                kind => assert_eq!(victim.is_some(), kind.kills() || blow.deadly),
            }
        }
    }
}
