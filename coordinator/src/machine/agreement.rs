//! What ranks must agree on: with each other, with the plan and with the ledger. Pure comparisons that name the
//! ranks and the field when they do not.

use std::fmt::Display;

use supra_proto::v1::{Formed, Held, StepReport};
use supra_recipes::plan::{Digest, Plan};

use super::replicas;
use crate::ledger::{self, Hash, Open};

/// What a rank said, with the name of its worker; several are in rank order.
pub(crate) type Said<'a, T> = (usize, &'a str, &'a T);

/// Learning rates are computed by the same code everywhere; only libm may differ in the last bits.
const LEARNING_RATE_TOLERANCE: f64 = 1e-12;

/// What all ranks saw when they had formed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ground {
    pub windows: u64,
    pub manifest_hash: Hash,
}

/// Holds what the ranks of a forming generation said against each other and against the run's ledger.
pub(crate) fn formed(
    said: &[Said<Formed>],
    from_step: u64,
    from_held: Option<&Held>,
    open: Option<&Open>,
) -> Result<Ground, String> {
    let step = same(said, "the step of their state", |formed| formed.step)?;
    if step != from_step {
        return Err(format!(
            "the ranks hold the state of step {step}, they were to restore step {from_step}"
        ));
    }
    let hash = same(said, "the hash of their parameters", |formed| {
        ledger::hex(&formed.replica_hash)
    })?;
    // Of a state in parts, the parts have hashes.
    let whole = from_held.filter(|held| !held.replica_hash.is_empty());
    if let Some(held) = whole.map(|held| ledger::hex(&held.replica_hash))
        && held != hash
    {
        return Err(format!(
            "the ranks hold parameters with hash {hash}, those that they were to start from have {held}"
        ));
    }
    let windows = same(said, "the windows of the training data", |formed| {
        formed.windows
    })?;
    same(said, "the hash of the training data's manifest", |formed| {
        ledger::hex(&formed.manifest_hash)
    })?;
    let manifest_hash = said
        .first()
        .and_then(|(_, _, formed)| Hash::try_from(formed.manifest_hash.as_slice()).ok())
        .ok_or("the hash of the training data's manifest is not 32 bytes")?;
    if let Some(open) = open
        && (open.windows != windows || open.manifest_hash != manifest_hash)
    {
        return Err(format!(
            "the training data changed since the run began: {} windows and manifest {}, was {} and {}; \
             put the old data back, or submit a new run",
            windows,
            ledger::hex(&manifest_hash),
            open.windows,
            ledger::hex(&open.manifest_hash),
        ));
    }
    Ok(Ground {
        windows,
        manifest_hash,
    })
}

/// Holds the reports on one step of a generation of `world` ranks against each other and against the plan; answers with
/// the sum of the digests of what all ranks fed. Where reports are missing that is what the ranks told each other; none
/// when they did not.
pub(crate) fn step(
    said: &[Said<StepReport>],
    world: usize,
    step: u64,
    plan: &Plan,
) -> Result<Option<Digest>, String> {
    global(said, step, plan)?;
    let fed = fed(said, world, step, plan)?;
    let told = told(said)?;
    if said.len() < world {
        return Ok(told);
    }
    match told.filter(|told| *told != fed) {
        None => Ok(Some(fed)),
        Some(told) => Err(format!(
            "the ranks fed samples with digest {fed}, they told each other {told}"
        )),
    }
}

/// What has to be the same on all ranks, and in the plan.
fn global(said: &[Said<StepReport>], step: u64, plan: &Plan) -> Result<(), String> {
    let planned = plan.step_samples(step);
    let first = same(said, "the first sample", |report| report.first_sample)?;
    let samples = same(said, "the number of samples", |report| report.samples)?;
    if step > plan.steps || first != planned.start || samples != planned.end - planned.start {
        return Err(format!(
            "the ranks fed samples {first}..{}, the plan says {planned:?}",
            first.saturating_add(samples)
        ));
    }
    same(said, "the sum of the loss", |report| Bits(report.loss_sum))?;
    same(said, "the number of targets", |report| report.targets)?;
    same(said, "the gradient norm", |report| Bits(report.grad_norm))?;
    let skipped = same(said, "whether the update was skipped", |report| {
        report.skipped
    })?;
    let rate = same(said, "the learning rate", |report| {
        Bits(report.learning_rate)
    })?
    .0;
    let expected = plan.learning_rate(step);
    let close = (rate - expected).abs() <= LEARNING_RATE_TOLERANCE * expected.abs();
    if !skipped && !close {
        return Err(format!(
            "the ranks applied learning rate {rate}, the plan says {expected}"
        ));
    }
    let hash = replicas::same(said)?;
    if plan.replica_check_due(step) && hash.is_empty() {
        return Err("a hash of the parameters is due and no rank sent one".into());
    }
    Ok(())
}

/// Each rank fed its own share, so all together they fed the step.
fn fed(said: &[Said<StepReport>], world: usize, step: u64, plan: &Plan) -> Result<Digest, String> {
    let mut sum = Digest::ZERO;
    for (rank, name, report) in said {
        let share = plan.rank_samples(step, *rank as u32, world as u32);
        if report.fed_samples != share.end - share.start {
            return Err(format!(
                "rank {rank} ({name}) fed {} samples, its share is {}",
                report.fed_samples,
                share.end - share.start,
            ));
        }
        sum += digest(*rank, name, &report.fed_digest)?;
    }
    Ok(sum)
}

/// The sum of what all ranks fed, by those that say what they told each other.
fn told(said: &[Said<StepReport>]) -> Result<Option<Digest>, String> {
    let telling: Vec<Said<StepReport>> = said
        .iter()
        .filter(|(_, _, report)| !report.step_digest.is_empty())
        .copied()
        .collect();
    let Some((rank, name, report)) = telling.first() else {
        return Ok(None);
    };
    same(&telling, "the digest of the step", |report| {
        ledger::hex(&report.step_digest)
    })?;
    digest(*rank, name, &report.step_digest).map(Some)
}

fn digest(rank: usize, name: &str, bytes: &[u8]) -> Result<Digest, String> {
    Hash::try_from(bytes).map(Digest::from_bytes).map_err(|_| {
        format!(
            "rank {rank} ({name}) sent a digest of {} bytes",
            bytes.len()
        )
    })
}

/// The value that all ranks gave; an error names the first two ranks that differ.
fn same<T, V: PartialEq + Display>(
    said: &[Said<T>],
    what: &str,
    value: impl Fn(&T) -> V,
) -> Result<V, String> {
    let mut ranks = said
        .iter()
        .map(|(rank, name, report)| (rank, *name, value(report)));
    let Some((first_rank, first_name, first)) = ranks.next() else {
        return Err("no rank reported".into());
    };
    match ranks.find(|(_, _, other)| *other != first) {
        None => Ok(first),
        Some((rank, name, other)) => Err(format!(
            "the ranks disagree about {what}: {first} on rank {first_rank} ({first_name}), {other} on rank {rank} ({name})"
        )),
    }
}

/// A float that equals only its own bits, so that NaN equals NaN and a last-bit difference is one.
struct Bits(f64);

impl PartialEq for Bits {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}

impl Display for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::rig;

    fn reports(plan: &Plan, step: u64, world: u32) -> Vec<StepReport> {
        (0..world)
            .map(|rank| rig::report(plan, step, rank, world))
            .collect()
    }

    fn check(reports: &[StepReport], number: u64, plan: &Plan) -> Result<Digest, String> {
        Ok(partly(reports, reports.len(), number, plan)?.unwrap())
    }

    /// The same where the generation has more ranks than those that report.
    fn partly(
        reports: &[StepReport],
        world: usize,
        number: u64,
        plan: &Plan,
    ) -> Result<Option<Digest>, String> {
        let ranks = reports.iter().enumerate();
        let said: Vec<_> = ranks.map(|(rank, r)| (rank, "worker", r)).collect();
        step(&said, world, number, plan)
    }

    #[test]
    fn one_rank_accounts_for_all_when_they_told_each_other_what_they_fed() {
        let plan = rig::plan();
        let all = reports(&plan, 2, 3);
        let whole = check(&all, 2, &plan).unwrap();
        assert_eq!(partly(&all[..1], 3, 2, &plan), Ok(Some(whole)));
        let mut silent = all.clone();
        silent.iter_mut().for_each(|r| r.step_digest.clear());
        assert_eq!(partly(&silent[..1], 3, 2, &plan), Ok(None));
        assert_eq!(partly(&silent, 3, 2, &plan), Ok(Some(whole)));
    }

    #[test]
    fn what_was_told_must_be_what_was_fed_and_the_same_to_all() {
        let plan = rig::plan();
        let mut lying = reports(&plan, 2, 3);
        lying.iter_mut().for_each(|r| r.step_digest = vec![7; 32]);
        let error = check(&lying, 2, &plan).unwrap_err();
        assert!(error.contains("they told each other 0707"), "{error}");
        let mut split = reports(&plan, 2, 3);
        split[1].step_digest = vec![7; 32];
        let error = partly(&split[..2], 3, 2, &plan).unwrap_err();
        assert!(error.contains("digest of the step"), "{error}");
        split[0].step_digest = vec![7; 31];
        let error = partly(&split[..1], 3, 2, &plan).unwrap_err();
        assert!(error.contains("a digest of 31 bytes"), "{error}");
    }

    #[test]
    fn honest_reports_add_up_to_the_same_digest_whatever_the_world() {
        let plan = rig::plan();
        let alone = check(&reports(&plan, 2, 1), 2, &plan).unwrap();
        for world in 2..6 {
            assert_eq!(check(&reports(&plan, 2, world), 2, &plan).unwrap(), alone);
        }
    }

    #[test]
    fn each_disagreement_is_named_with_its_rank() {
        let plan = rig::plan();
        let has = |change: &dyn Fn(&mut StepReport), text: &str| {
            let mut reports = reports(&plan, 2, 3);
            change(&mut reports[1]);
            let error = check(&reports, 2, &plan).unwrap_err();
            assert!(error.contains(text) && error.contains("rank 1"), "{error}");
        };
        has(&|report| report.loss_sum = f64::NAN, "loss");
        has(&|report| report.targets += 1, "targets");
        has(
            &|report| report.grad_norm = -report.grad_norm,
            "gradient norm",
        );
        has(&|report| report.learning_rate *= 2.0, "learning rate");
        has(&|report| report.skipped = true, "skipped");
        has(&|report| report.samples += 1, "number of samples");
        has(&|report| report.replica_hash = vec![9; 32], "parameters");
        has(&|report| report.fed_samples += 1, "its share");
        has(&|report| report.fed_digest.clear(), "digest of 0 bytes");
    }

    #[test]
    fn ranks_that_agree_on_something_else_than_the_plan_are_wrong() {
        let plan = rig::plan();
        let mut shifted = reports(&plan, 2, 2);
        shifted
            .iter_mut()
            .for_each(|report| report.first_sample += 1);
        assert!(
            check(&shifted, 2, &plan)
                .unwrap_err()
                .contains("the plan says")
        );
        let mut faster = reports(&plan, 2, 2);
        faster
            .iter_mut()
            .for_each(|report| report.learning_rate += 1e-9);
        assert!(
            check(&faster, 2, &plan)
                .unwrap_err()
                .contains("learning rate")
        );
    }

    #[test]
    fn both_infinite_and_nan_losses_agree_with_themselves() {
        let plan = rig::plan();
        let mut skipped = reports(&plan, 2, 2);
        skipped
            .iter_mut()
            .for_each(|report| (report.loss_sum, report.skipped) = (f64::NAN, true));
        assert!(check(&skipped, 2, &plan).is_ok());
    }

    #[test]
    fn changed_data_and_a_wrong_state_are_refused() {
        let fine = Formed {
            step: 4,
            replica_hash: vec![1; 32],
            windows: 10,
            manifest_hash: vec![2; 32],
        };
        let said = [(0, "a", &fine), (1, "b", &fine)];
        assert_eq!(
            formed(&said, 4, None, None),
            Ok(Ground {
                windows: 10,
                manifest_hash: [2; 32]
            })
        );
        assert!(
            formed(&said, 3, None, None)
                .unwrap_err()
                .contains("were to restore step 3")
        );
        let mut open = rig::open();
        open.windows = 11;
        assert!(
            formed(&said, 4, None, Some(&open))
                .unwrap_err()
                .contains("training data changed")
        );
        let other = Formed {
            replica_hash: vec![3; 32],
            ..fine.clone()
        };
        let held = rig::held(1, 4);
        assert!(formed(&said, 4, Some(&held), None).is_ok());
        let error = formed(&[(0, "a", &other)], 4, Some(&held), None).unwrap_err();
        assert!(error.contains("they were to start from"), "{error}");
        let error = formed(&[(0, "a", &fine), (1, "b", &other)], 4, None, None).unwrap_err();
        assert!(
            error.contains("rank 1 (b)") && error.contains("parameters"),
            "{error}"
        );
    }
}
