//! Whether a generation may form now: a plain decision with its reason.

use std::time::Duration;

/// What the decision is made from.
#[derive(Clone, Debug)]
pub(crate) struct Muster<'a> {
    /// Workers that a generation of the run needs, and may have.
    pub min: u32,
    pub max: u32,
    /// Attached workers without a place.
    pub idle: usize,
    /// Attached workers that no generation may take, each with the reason.
    pub aside: &'a [String],
    /// Members of the run's last generation that are not attached.
    pub missing: &'a [String],
    /// Time since a worker last attached.
    pub quiet: Duration,
    /// Time since the last generation ended, or since the coordinator started.
    pub free: Duration,
    /// How long the quiet has to last while more workers could join.
    pub grace: Duration,
    /// How long missing members are waited for.
    pub rejoin: Duration,
}

impl Muster<'_> {
    /// The world size of the generation that forms now, or why none does.
    ///
    /// A full house goes at once. Otherwise members that were lost get `rejoin` to come back, since their
    /// supervisors restart them; and stragglers get `grace` after the last arrival.
    pub fn decide(&self) -> Result<u32, String> {
        let idle = u32::try_from(self.idle).unwrap_or(u32::MAX);
        if idle < self.min {
            let workers = if self.min == 1 { "worker" } else { "workers" };
            let without = if self.aside.is_empty() {
                String::new()
            } else {
                format!(", without {}", self.aside.join(", "))
            };
            return Err(format!(
                "waiting for {} {workers}: {idle} attached{without}",
                self.min
            ));
        }
        if idle >= self.max {
            return Ok(self.max);
        }
        if !self.missing.is_empty() && self.free < self.rejoin {
            return Err(format!(
                "waiting for {} to come back",
                self.missing.join(", ")
            ));
        }
        if self.quiet < self.grace {
            return Err(format!(
                "{idle} workers attached, waiting a moment for more"
            ));
        }
        Ok(idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn muster(idle: usize) -> Muster<'static> {
        Muster {
            min: 2,
            max: 4,
            idle,
            aside: &[],
            missing: &[],
            quiet: Duration::from_secs(9),
            free: Duration::from_secs(1),
            grace: Duration::from_secs(1),
            rejoin: Duration::from_secs(5),
        }
    }

    #[test]
    fn too_few_wait_and_a_full_house_goes_at_once() {
        assert_eq!(
            muster(1).decide(),
            Err("waiting for 2 workers: 1 attached".into())
        );
        assert_eq!(muster(2).decide(), Ok(2));
        assert_eq!(
            Muster {
                quiet: Duration::ZERO,
                ..muster(6)
            }
            .decide(),
            Ok(4)
        );
    }

    #[test]
    fn stragglers_and_lost_members_get_their_time() {
        assert!(
            Muster {
                quiet: Duration::ZERO,
                ..muster(2)
            }
            .decide()
            .is_err()
        );
        let missing = ["b".to_owned()];
        let short = Muster {
            missing: &missing,
            ..muster(2)
        };
        assert_eq!(short.decide(), Err("waiting for b to come back".into()));
        assert_eq!(
            Muster {
                free: Duration::from_secs(5),
                ..short
            }
            .decide(),
            Ok(2)
        );
    }
}
