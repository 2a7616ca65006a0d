//! Whether a ledger and the manifest that remembers its head tell of the same run.

use supra_checkpoint::Manifest;

use crate::audit::{self, Options, Outcome, Verdict};
use crate::ledger::{Body, Hash, Open, Record, hex};

/// Proves that a ledger is whole up to the head that the manifest remembers, that it accounts for every sample behind the
/// manifest's step exactly once, and that it was opened for the manifest's run, recipe and data.
///
/// # Errors
/// What is not so, in one line.
pub(super) fn prove(ledger: &[Record], manifest: &Manifest) -> Result<(), String> {
    let head = blake3::Hash::from_hex(&manifest.ledger_head)
        .map_err(|_| "the manifest remembers no head of a ledger".to_owned())?;
    let recipe = blake3::hash(manifest.recipe.as_bytes());
    let options = Options {
        head: Some(*head.as_bytes()),
        recipe_hash: Some(*recipe.as_bytes()),
        ..Options::default()
    };
    let verdict = audit::audit(ledger.iter().cloned(), options);
    match (verdict.verdict, verdict.breaks.first()) {
        (Outcome::Ok, _) => {}
        (Outcome::Broken, Some(found)) => {
            return Err(format!("record {}: {}", found.record, found.what));
        }
        (Outcome::Broken, None) => return Err("it is broken".to_owned()),
    }
    let Some(Body::Open(open)) = ledger.first().map(|record| &record.body) else {
        return Err("it holds nothing".to_owned());
    };
    fits(&verdict, open, manifest)
}

fn fits(verdict: &Verdict, open: &Open, manifest: &Manifest) -> Result<(), String> {
    let (step, run) = (manifest.step, &manifest.run);
    if open.run != *run {
        return Err(format!("it is that of run {}, not of {run}", open.run));
    }
    let data = hex(&open.manifest_hash);
    if data != manifest.dataset {
        let other = &manifest.dataset;
        return Err(format!(
            "it was opened for the data {data}, and the manifest says {other}"
        ));
    }
    if verdict.steps < step {
        let steps = verdict.steps;
        return Err(format!(
            "it accounts for {steps} steps, and the manifest is behind step {step}"
        ));
    }
    if verdict.durable_step > step || verdict.finished {
        return Err(format!(
            "it goes on after step {step}, which the manifest is behind, and says that later steps are durable"
        ));
    }
    let samples = step.saturating_mul(open.batch_samples).min(open.samples);
    if manifest.next_sample != samples {
        let next = manifest.next_sample;
        return Err(format!(
            "{samples} samples are behind step {step}, and the manifest goes on with sample {next}"
        ));
    }
    Ok(())
}

/// Whether a ledger calls the checkpoint with this manifest durable, and not damaged since.
pub(super) fn vouches(ledger: &[Record], hash: &Hash) -> bool {
    let said = ledger.iter().rev().find_map(|record| match &record.body {
        Body::Durable { manifest_hash, .. } if manifest_hash == hash => Some(true),
        Body::Lost { manifest_hash, .. } if manifest_hash == hash => Some(false),
        _ => None,
    });
    said.unwrap_or(false)
}
