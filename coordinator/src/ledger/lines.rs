//! `ledger.jsonl` of capsules and checkpoints: the ledger as text, a record a line, hashes as hexadecimal digits.

use serde::{Deserialize, Serialize};

use super::{Body, Evaluation, Hash, Open, Record, Step, hex32};

#[derive(Serialize, Deserialize)]
struct Line(#[serde(with = "Linked")] Record);

#[derive(Serialize, Deserialize)]
#[serde(remote = "Record")]
struct Linked {
    index: u64,
    #[serde(with = "hex32")]
    previous: Hash,
    #[serde(with = "hex32")]
    hash: Hash,
    #[serde(with = "Said")]
    body: Body,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Body", rename_all = "lowercase")]
enum Said {
    Open(#[serde(with = "Opened")] Open),
    Step(#[serde(with = "Stepped")] Step),
    Void {
        generation: u64,
        after_step: u64,
        reason: String,
    },
    Durable {
        generation: u64,
        step: u64,
        #[serde(with = "hex32")]
        manifest_hash: Hash,
    },
    Lost {
        generation: u64,
        step: u64,
        #[serde(with = "hex32")]
        manifest_hash: Hash,
        durable: u64,
        reason: String,
    },
    Evaluated(#[serde(with = "Measured")] Evaluation),
    Close {
        step: u64,
        samples: u64,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Open")]
struct Opened {
    run: String,
    #[serde(with = "hex32")]
    recipe_hash: Hash,
    #[serde(with = "hex32")]
    manifest_hash: Hash,
    windows: u64,
    sequence_length: u64,
    batch_samples: u64,
    samples: u64,
    steps: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Step")]
struct Stepped {
    generation: u64,
    step: u64,
    first_sample: u64,
    samples: u64,
    #[serde(with = "hex32")]
    digest: Hash,
    skipped: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Evaluation")]
struct Measured {
    generation: u64,
    step: u64,
    windows: u64,
    #[serde(rename = "loss_sum", with = "exact")]
    loss_bits: u64,
    targets: u64,
}

/// The bits of a number as its shortest decimal digits that lead back to it, in a string: JSON has no NaN, and what reads
/// numbers of JSON may round them.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::ledger::loss_bits;

    pub fn serialize<S: Serializer>(bits: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&f64::from_bits(*bits))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let number: f64 = String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)?;
        Ok(loss_bits(number))
    }
}

/// Appends the line of a record.
pub(crate) fn append(bytes: &mut Vec<u8>, record: Record) {
    serde_json::to_writer(&mut *bytes, &Line(record))
        .expect("invariant: a record has only text and numbers, and memory can be written");
    bytes.push(b'\n');
}

/// The records of such a file, in order.
///
/// # Errors
/// A line that is no record: which, and why, in one line.
pub(crate) fn parse(bytes: &[u8]) -> Result<Vec<Record>, String> {
    let lines = bytes.split(|byte| *byte == b'\n').enumerate();
    let records = lines.filter(|(_, line)| !line.is_empty());
    let record = |(number, line)| {
        let line: Line = serde_json::from_slice(line)
            .map_err(|error| format!("line {} is no record: {error}", number + 1))?;
        Ok(line.0)
    };
    records.map(record).collect()
}
