//! Ledger records on the wire.

use supra_proto::v1;

use super::{Body, Evaluation, Hash, Open, Record, RecordError, Step, loss_bits};

impl From<&Record> for v1::LedgerRecord {
    fn from(record: &Record) -> Self {
        use v1::ledger_record::Body as Wire;
        let body = match &record.body {
            Body::Open(open) => Wire::Open(v1::LedgerOpen {
                run: open.run.clone(),
                recipe_hash: open.recipe_hash.to_vec(),
                manifest_hash: open.manifest_hash.to_vec(),
                windows: open.windows,
                sequence_length: open.sequence_length,
                batch_samples: open.batch_samples,
                samples: open.samples,
                steps: open.steps,
            }),
            Body::Step(step) => Wire::Step(v1::LedgerStep {
                generation: step.generation,
                step: step.step,
                first_sample: step.first_sample,
                samples: step.samples,
                digest: step.digest.to_vec(),
                skipped: step.skipped,
            }),
            Body::Void {
                generation,
                after_step,
                reason,
            } => Wire::Void(v1::LedgerVoid {
                generation: *generation,
                after_step: *after_step,
                reason: reason.clone(),
            }),
            Body::Durable {
                generation,
                step,
                manifest_hash,
            } => Wire::Durable(v1::LedgerDurable {
                generation: *generation,
                step: *step,
                manifest_hash: manifest_hash.to_vec(),
            }),
            Body::Lost {
                generation,
                step,
                manifest_hash,
                durable,
                reason,
            } => Wire::Lost(v1::LedgerLost {
                generation: *generation,
                step: *step,
                manifest_hash: manifest_hash.to_vec(),
                durable: *durable,
                reason: reason.clone(),
            }),
            Body::Evaluated(evaluation) => Wire::Evaluated(v1::LedgerEvaluated {
                generation: evaluation.generation,
                step: evaluation.step,
                windows: evaluation.windows,
                loss_sum: evaluation.loss_sum(),
                targets: evaluation.targets,
            }),
            Body::Close { step, samples } => Wire::Close(v1::LedgerClose {
                step: *step,
                samples: *samples,
            }),
        };
        v1::LedgerRecord {
            index: record.index,
            previous: record.previous.to_vec(),
            hash: record.hash.to_vec(),
            body: Some(body),
        }
    }
}

impl TryFrom<v1::LedgerRecord> for Record {
    type Error = RecordError;

    fn try_from(wire: v1::LedgerRecord) -> Result<Self, RecordError> {
        use v1::ledger_record::Body as Wire;
        let index = wire.index;
        let fixed = |field: &'static str, bytes: &[u8]| {
            Hash::try_from(bytes).map_err(|_| RecordError::Length {
                index,
                field,
                found: bytes.len(),
            })
        };
        let body = match wire.body.ok_or(RecordError::Unknown { index })? {
            Wire::Open(open) => Body::Open(Open {
                recipe_hash: fixed("recipe_hash", &open.recipe_hash)?,
                manifest_hash: fixed("manifest_hash", &open.manifest_hash)?,
                run: open.run,
                windows: open.windows,
                sequence_length: open.sequence_length,
                batch_samples: open.batch_samples,
                samples: open.samples,
                steps: open.steps,
            }),
            Wire::Step(step) => Body::Step(Step {
                generation: step.generation,
                step: step.step,
                first_sample: step.first_sample,
                samples: step.samples,
                digest: fixed("digest", &step.digest)?,
                skipped: step.skipped,
            }),
            Wire::Void(void) => Body::Void {
                generation: void.generation,
                after_step: void.after_step,
                reason: void.reason,
            },
            Wire::Durable(durable) => Body::Durable {
                generation: durable.generation,
                step: durable.step,
                manifest_hash: fixed("manifest_hash", &durable.manifest_hash)?,
            },
            Wire::Lost(lost) => Body::Lost {
                generation: lost.generation,
                step: lost.step,
                manifest_hash: fixed("manifest_hash", &lost.manifest_hash)?,
                durable: lost.durable,
                reason: lost.reason,
            },
            Wire::Evaluated(evaluated) => Body::Evaluated(Evaluation {
                generation: evaluated.generation,
                step: evaluated.step,
                windows: evaluated.windows,
                loss_bits: loss_bits(evaluated.loss_sum),
                targets: evaluated.targets,
            }),
            Wire::Close(close) => Body::Close {
                step: close.step,
                samples: close.samples,
            },
        };
        Ok(Record {
            index,
            previous: fixed("previous", &wire.previous)?,
            hash: fixed("hash", &wire.hash)?,
            body,
        })
    }
}
