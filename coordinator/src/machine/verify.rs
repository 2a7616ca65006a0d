//! Steps that are trained a second time, because what they led to was lost: what they come to now against what they came to
//! then, before they count.
//!
//! The first `resume.verify_steps` steps after a checkpoint are logged in the journal as they are applied, and stay there until
//! a newer checkpoint makes them durable. A step that is logged and not applied is therefore void, and trained again.

use serde::{Deserialize, Serialize};

use super::fact::Fact;
use super::state::{Run, RunNumber};
use super::steps::Accounted;
use super::worker::Worker;
use super::{Identity, Machine};
use crate::ledger::{self, Hash, hex32};

/// How far mean loss and gradient norm may be from those of the first training, relative to these, where other workers give
/// other roundings: the loss is a mean over all tokens of a step, the norm a root of squares that bf16 rounds one by one.
const LOSS_TOLERANCE: f64 = 0.01;
const NORM_TOLERANCE: f64 = 0.1;

/// What an applied step came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logged {
    /// The step.
    pub step: u64,
    /// Generation that trained it.
    pub generation: u64,
    /// Sum of the digests of what all ranks fed, as in the ledger.
    #[serde(with = "hex32")]
    pub digest: Hash,
    /// The update was skipped.
    pub skipped: bool,
    /// Mean loss in nats, its bits: JSON has no NaN.
    pub loss: u64,
    /// Norm of its gradient, its bits.
    pub grad_norm: u64,
    /// [`Run::circumstances`] of all steps from the checkpoint before to this one; none when they differ.
    pub circumstances: Option<String>,
}

impl Logged {
    /// What a step of the last generation of a run came to.
    fn new(run: &Run, (entry, metrics): &Accounted) -> Logged {
        Logged {
            step: entry.step,
            generation: entry.generation,
            digest: entry.digest,
            skipped: entry.skipped,
            loss: metrics.loss.to_bits(),
            grad_norm: metrics.grad_norm.to_bits(),
            circumstances: run.uniform.then(|| ledger::hex(&run.circumstances)),
        }
    }

    fn loss(&self) -> f64 {
        f64::from_bits(self.loss)
    }

    fn grad_norm(&self) -> f64 {
        f64::from_bits(self.grad_norm)
    }

    /// Another training of the same step has to come to the same bits.
    fn binds(&self, again: &Logged) -> bool {
        self.circumstances.is_some() && self.circumstances == again.circumstances
    }

    /// Why the second training of the same step does not come to the same; none when it does.
    fn contradicts(&self, again: &Logged) -> Option<String> {
        if self.digest != again.digest {
            return Some("the samples that were fed hold other tokens than then".into());
        }
        let exact = self.binds(again);
        let same = match (self.skipped, again.skipped) {
            (true, true) => true,
            (false, false) if exact => (self.loss, self.grad_norm) == (again.loss, again.grad_norm),
            (false, false) => {
                near(self.loss(), again.loss(), LOSS_TOLERANCE)
                    && near(self.grad_norm(), again.grad_norm(), NORM_TOLERANCE)
            }
            _ => false,
        };
        (!same).then(|| {
            let expected = if exact {
                "the same workers, devices and build give the same bits".to_owned()
            } else {
                tolerance()
            };
            format!(
                "it has loss {} and gradient norm {}{}, and had {} and {}{} in generation {}; {expected}",
                again.loss(),
                again.grad_norm(),
                skip(again),
                self.loss(),
                self.grad_norm(),
                skip(self),
                self.generation,
            )
        })
    }
}

fn skip(logged: &Logged) -> &'static str {
    if logged.skipped { " (skipped)" } else { "" }
}

fn tolerance() -> String {
    format!(
        "other workers may differ by {} % and {} %",
        100.0 * LOSS_TOLERANCE,
        100.0 * NORM_TOLERANCE
    )
}

fn near(left: f64, right: f64, tolerance: f64) -> bool {
    (left - right).abs() <= tolerance * left.abs()
}

/// What has to be the same for two generations to give the same bits from the same state: the build, and the names and devices
/// of the workers in rank order. Who has the same name is taken to be the same machine.
pub(super) fn circumstances<'a>(
    identity: &Identity,
    workers: impl Iterator<Item = &'a Worker>,
) -> Hash {
    let mut hasher = blake3::Hasher::new();
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    add(&identity.build);
    for worker in workers {
        add(&worker.hello.name);
        add(&worker.hello.device);
    }
    *hasher.finalize().as_bytes()
}

/// Steps behind the state of the run that were applied before, ascending.
fn logged_ahead(run: &Run) -> impl Iterator<Item = &Logged> {
    run.logged.iter().filter(|logged| logged.step > run.step)
}

impl Machine {
    /// An applied step: logs what it came to if it is one of the first `count` after the newest checkpoint, and not logged.
    pub(super) fn log_result(&mut self, number: RunNumber, accounted: &Accounted, count: u64) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        let step = accounted.0.step;
        let first = step <= run.recovery_step().saturating_add(count);
        if !first || run.logged.iter().any(|known| known.step == step) {
            return;
        }
        let result = Logged::new(run, accounted);
        self.decide(Fact::Logged {
            run: number,
            result,
        });
    }

    /// Holds a step that is about to be applied against what it came to when it was trained before, if that is logged.
    ///
    /// # Errors
    /// Both values, when they differ. What it came to now takes the place of what it came to then: after `supra resume` two
    /// trainings that agree go on.
    pub(super) fn verify(
        &mut self,
        number: RunNumber,
        accounted: &Accounted,
    ) -> Result<(), String> {
        let Some(run) = self.state.run(number) else {
            return Ok(());
        };
        let step = accounted.0.step;
        let Some(logged) = logged_ahead(run).find(|logged| logged.step == step) else {
            return Ok(());
        };
        let again = Logged::new(run, accounted);
        let Some(why) = logged.contradicts(&again) else {
            let how = if logged.binds(&again) {
                "to the bit"
            } else {
                "within rounding"
            };
            let text = format!(
                "step {step} was trained again and is what it was in generation {}, {how}",
                logged.generation
            );
            self.log(Some(number), "INFO", text);
            return Ok(());
        };
        let restored = match run.recovery_step() {
            0 => "the base".to_owned(),
            step => format!("the checkpoint of step {step}"),
        };
        let (run, result) = (number, again);
        self.decide(Fact::Logged { run, result });
        Err(format!(
            "step {step} was trained again from {restored} and is not what it was: {why}. Either training was wrong, or what \
             decides bits has changed: processor, threads, libraries. `supra resume` trains it once more, and goes on if that \
             agrees with this time"
        ))
    }

    /// Says what of the steps that a generation trains again can be compared.
    pub(super) fn announce_verification(&mut self, number: RunNumber, from_memory: bool) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        let (step, first) = (run.step, run.generation == 1);
        let count = logged_ahead(run).count();
        let text = match count {
            0 if from_memory || first => return,
            0 => format!(
                "no step after step {step} is logged: nothing can be compared with an earlier training"
            ),
            _ => format!(
                "{count} steps after step {step} are logged, and compared when they are trained again before they count"
            ),
        };
        self.log(Some(number), "INFO", text);
    }
}

#[cfg(test)]
mod tests {
    use supra_proto::v1::{RunState, StepReport, worker_message::Body as Up};

    use super::super::rig::{Rig, plan, report};
    use super::super::{Conn, Event, Fact, State};

    /// Workers attach and form a generation that starts from `step`.
    fn form(rig: &mut Rig, workers: &[(Conn, &str)], generation: u64, step: u64) {
        for (conn, name) in workers {
            rig.attach(*conn, name);
        }
        rig.wait(3.1);
        for (conn, _) in workers {
            rig.formed(*conn, generation, step);
        }
    }

    /// The ranks of `conns` report `step`, changed alike.
    fn report_all(
        rig: &mut Rig,
        conns: &[Conn],
        generation: u64,
        step: u64,
        change: impl Fn(&mut StepReport),
    ) {
        for (rank, conn) in (0..).zip(conns) {
            let mut report = report(&plan(), step, rank, conns.len() as u32);
            change(&mut report);
            rig.say(*conn, generation, Up::Step(report));
        }
    }

    /// a and b have trained step 1, and are gone with what they had in memory.
    fn lost_with(more: &str) -> Rig {
        let mut rig = Rig::new();
        rig.submit_with("rig-1", more);
        form(&mut rig, &[(1, "a"), (2, "b")], 1, 0);
        rig.step(&[1, 2], 1, 1);
        rig.lose(1);
        rig.lose(2);
        rig
    }

    fn lost() -> Rig {
        lost_with("")
    }

    fn says(rig: &Rig, what: &str) -> bool {
        rig.logs.iter().any(|line| line.contains(what))
    }

    #[test]
    fn a_step_that_comes_to_the_same_again_counts_again() {
        let mut rig = lost();
        form(&mut rig, &[(3, "a"), (4, "b")], 2, 0);
        assert!(
            says(&rig, "1 steps after step 0 are logged"),
            "{:?}",
            rig.logs
        );
        rig.step(&[3, 4], 2, 1);
        assert_eq!(rig.run().step, 1);
        assert!(
            says(
                &rig,
                "step 1 was trained again and is what it was in generation 1, to the bit"
            ),
            "{:?}",
            rig.logs
        );
        assert_eq!(&rig.replayed(), rig.machine.state());
    }

    #[test]
    fn a_last_bit_that_differs_stops_the_run_before_the_step_counts() {
        let mut rig = lost();
        form(&mut rig, &[(3, "a"), (4, "b")], 2, 0);
        report_all(&mut rig, &[3, 4], 2, 1, |report| {
            report.grad_norm = 1.0f64.next_up();
        });
        assert_eq!(
            (rig.status().state(), rig.run().step),
            (RunState::Failed, 0)
        );
        let reason = rig.status().reason;
        for part in [
            "step 1 was trained again from the base and is not what it was",
            "gradient norm 1.0000000000000002, and had 0.0875 and 1 in generation 1",
            "give the same bits",
        ] {
            assert!(reason.contains(part), "{reason}");
        }
    }

    #[test]
    fn after_a_resume_two_trainings_that_agree_go_on() {
        let other = |report: &mut StepReport| report.loss_sum = 4.0;
        for agrees in [true, false] {
            let mut rig = lost();
            form(&mut rig, &[(3, "a"), (4, "b")], 2, 0);
            report_all(&mut rig, &[3, 4], 2, 1, other);
            for conn in [3, 4] {
                rig.left(conn, 2, supra_proto::v1::LeftReason::Void);
            }
            rig.event(Event::Resume {
                run: 1,
                strict: false,
            })
            .unwrap();
            form(&mut rig, &[], 3, 0);
            rig.formed(3, 3, 0);
            rig.formed(4, 3, 0);
            report_all(&mut rig, &[3, 4], 3, 1, |report| {
                if agrees {
                    other(report);
                }
            });
            let expected = if agrees {
                (RunState::Training, 1)
            } else {
                (RunState::Failed, 0)
            };
            assert_eq!((rig.status().state(), rig.run().step), expected);
        }
    }

    #[test]
    fn other_workers_may_differ_by_rounding_and_by_no_more() {
        for (factor, stands) in [(1.009, true), (1.011, false), (0.989, false)] {
            let mut rig = lost();
            form(&mut rig, &[(3, "a")], 2, 0);
            report_all(&mut rig, &[3], 2, 1, |report| report.loss_sum *= factor);
            assert_eq!(rig.run().step, u64::from(stands), "{:?}", rig.logs);
            assert_eq!(says(&rig, "within rounding"), stands);
        }
    }

    /// Whether all steps after the checkpoint were trained in the same circumstances, after each fact.
    fn uniform(facts: &[Fact]) -> Vec<bool> {
        let mut state = State::default();
        let mut rig = Rig::new();
        rig.submit("rig-1");
        rig.facts.iter().for_each(|fact| state.apply(fact));
        let seen = facts.iter().map(|fact| {
            state.apply(fact);
            state.run(1).unwrap().uniform
        });
        seen.collect()
    }

    #[test]
    fn only_what_one_kind_of_circumstances_made_since_the_checkpoint_binds_to_the_bit() {
        let formed = |generation, from_step, workers: u8| Fact::Formed {
            run: 1,
            generation,
            members: Vec::new(),
            from_step,
            circumstances: [workers; 32],
        };
        assert_eq!(
            uniform(&[
                formed(1, 0, 7),
                // It goes on from what survivors hold.
                formed(2, 3, 7),
                formed(3, 3, 8),
                formed(4, 5, 8),
                formed(5, 5, 7),
                // It starts from the base once more.
                formed(6, 0, 7),
            ]),
            [true, true, false, false, false, true]
        );
        let written = Fact::Written {
            run: 1,
            checkpoint: crate::machine::Checkpoint {
                step: 6,
                tokens: 0,
                generation: 3,
                path: "step-6".into(),
                bytes: 0,
                manifest_hash: [0; 32],
                published: false,
                world: 1,
                at: 0,
                verified: false,
                name: String::new(),
            },
        };
        let facts = [
            formed(1, 0, 7),
            formed(2, 3, 8),
            written,
            formed(3, 9, 8),
            formed(4, 9, 7),
        ];
        assert_eq!(uniform(&facts), [true, false, true, true, false]);
    }

    #[test]
    fn other_tokens_are_told_from_another_result() {
        let mut rig = lost();
        form(&mut rig, &[(3, "a")], 2, 0);
        report_all(&mut rig, &[3], 2, 1, |report| {
            report.fed_digest = vec![7; 32];
            report.step_digest = vec![7; 32];
        });
        assert_eq!(rig.status().state(), RunState::Failed);
        assert!(
            rig.status().reason.contains("hold other tokens than then"),
            "{}",
            rig.status().reason
        );
    }

    #[test]
    fn what_is_logged_survives_the_coordinator() {
        let mut rig = lost();
        rig.restart(usize::MAX);
        form(&mut rig, &[(3, "a"), (4, "b")], 2, 0);
        report_all(&mut rig, &[3, 4], 2, 1, |report| report.loss_sum *= 2.0);
        assert_eq!(rig.status().state(), RunState::Failed);
    }

    #[test]
    fn what_only_a_survivor_reported_is_compared_too() {
        let mut rig = lost();
        form(&mut rig, &[(3, "a"), (4, "b")], 2, 0);
        rig.lose(4);
        report_all(&mut rig, &[3], 2, 1, |report| {
            *report = supra_proto::v1::StepReport {
                loss_sum: 99.0,
                ..self::report(&plan(), 1, 0, 2)
            };
        });
        rig.left(3, 2, supra_proto::v1::LeftReason::Void);
        assert_eq!(rig.status().state(), RunState::Failed);
        assert!(
            rig.status().reason.contains("is not what it was"),
            "{}",
            rig.status().reason
        );
    }

    #[test]
    fn a_checkpoint_ends_the_comparing_of_what_it_holds() {
        let mut rig = Rig::new();
        rig.submit("rig-1");
        form(&mut rig, &[(1, "a")], 1, 0);
        rig.step(&[1], 1, 1);
        rig.step(&[1], 1, 2);
        let steps = |rig: &Rig| -> Vec<u64> { rig.run().logged.iter().map(|it| it.step).collect() };
        assert_eq!(steps(&rig), [1, 2]);
        rig.written(1, 1, 2);
        rig.published(1, 1, 2);
        assert!(steps(&rig).is_empty());
        rig.lose(1);
        form(&mut rig, &[(2, "a")], 2, 2);
        assert!(
            says(&rig, "no step after step 2 is logged"),
            "{:?}",
            rig.logs
        );
        rig.step(&[2], 2, 3);
        assert_eq!(steps(&rig), [3]);
    }

    #[test]
    fn nothing_is_logged_where_nothing_is_to_be_compared() {
        let mut rig = lost_with("resume: { verify_steps: 0 }\n");
        let logged = rig
            .facts
            .iter()
            .any(|fact| matches!(fact, Fact::Logged { .. }));
        assert!(!logged);
        form(&mut rig, &[(3, "a")], 2, 0);
        report_all(&mut rig, &[3], 2, 1, |report| report.loss_sum *= 2.0);
        assert_eq!(rig.run().step, 1);
        assert!(!says(&rig, "logged"), "{:?}", rig.logs);
    }
}
