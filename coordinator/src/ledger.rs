//! The ledger: a hash-chained account of the samples that were really trained.
//!
//! Record i is `(index, body, hash)` with `hash_i = BLAKE3(hash_{i-1} || i as u64 LE || body bytes)`
//! and 32 zero bytes before the first. The body bytes are the fixed encoding of [`Body::encode`],
//! which no serialisation library can change under us: one tag byte, then the fields in order,
//! integers as u64 little-endian, texts as length and UTF-8.

mod encoding;
pub(crate) mod lines;
mod wire;

/// Length of every hash and digest in the ledger, bytes.
pub const HASH_BYTES: usize = 32;

/// A BLAKE3 hash, or a digest sum.
pub type Hash = [u8; HASH_BYTES];

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Opens the ledger of a run: what it promises to train. Always record 0, and only there.
    Open(Open),
    /// A step that all ranks applied.
    Step(Step),
    /// Steps after `after_step` of generations up to `generation` are void.
    Void {
        /// Last generation whose steps are void.
        generation: u64,
        /// Recovery point: the last step that stays.
        after_step: u64,
        /// Why, in one line.
        reason: String,
    },
    /// A published checkpoint makes the steps up to `step` durable.
    Durable {
        /// Generation that wrote the checkpoint.
        generation: u64,
        /// Step of the checkpoint.
        step: u64,
        /// BLAKE3 of its manifest.
        manifest_hash: Hash,
    },
    /// The checkpoint that made steps up to `step` durable is damaged: those after `durable` are durable no more.
    Lost {
        /// Generation that wrote the checkpoint.
        generation: u64,
        /// Step of the checkpoint.
        step: u64,
        /// BLAKE3 of its manifest.
        manifest_hash: Hash,
        /// Step of the newest published checkpoint that is left; 0 = there is none.
        durable: u64,
        /// What is wrong with it, in one line.
        reason: String,
    },
    /// The held-out loss of the state behind a step was measured.
    Evaluated(Evaluation),
    /// The budget is spent. Always the last record.
    Close {
        /// Last step.
        step: u64,
        /// Samples of the whole budget.
        samples: u64,
    },
}

/// The promise of a run.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Open {
    /// Id of the run.
    pub run: String,
    /// BLAKE3 of the resolved recipe's YAML.
    pub recipe_hash: Hash,
    /// BLAKE3 of the training data's manifest.
    pub manifest_hash: Hash,
    /// Windows of one pass of the data.
    pub windows: u64,
    /// Tokens of a sample.
    pub sequence_length: u64,
    /// Samples of a full step.
    pub batch_samples: u64,
    /// Samples of the whole budget.
    pub samples: u64,
    /// Steps of the whole budget.
    pub steps: u64,
}

impl Open {
    /// Tokens trained when step `step` is done.
    pub fn tokens_after(&self, step: u64) -> u64 {
        step.saturating_mul(self.batch_samples)
            .min(self.samples)
            .saturating_mul(self.sequence_length)
    }
}

/// One applied step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Generation that trained it.
    pub generation: u64,
    /// 1-based number of the step.
    pub step: u64,
    /// First sample of the step.
    pub first_sample: u64,
    /// Samples of the step.
    pub samples: u64,
    /// Sum modulo 2^256 of the digests of what all ranks fed, little-endian.
    pub digest: Hash,
    /// The update was skipped because loss or gradient was not finite.
    pub skipped: bool,
}

/// The held-out loss of the state behind a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Evaluation {
    /// Generation that measured it.
    pub generation: u64,
    /// Step that the state is behind; 0 = before the first.
    pub step: u64,
    /// Windows that were read.
    pub windows: u64,
    /// Sum of the cross-entropy over targets, nats: the bits of a 64-bit number, since they are what is hashed.
    pub loss_bits: u64,
    /// Target tokens.
    pub targets: u64,
}

impl Evaluation {
    /// Sum of the cross-entropy over targets, nats.
    pub fn loss_sum(&self) -> f64 {
        f64::from_bits(self.loss_bits)
    }

    /// Mean cross-entropy per target, nats; not a number without targets.
    pub fn loss(&self) -> f64 {
        self.loss_sum() / self.targets as f64
    }
}

/// The bits that stand for a loss: what is not a number has only one form in a ledger.
pub fn loss_bits(loss: f64) -> u64 {
    if loss.is_nan() { f64::NAN } else { loss }.to_bits()
}

/// One link of the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// 0-based place in the chain.
    pub index: u64,
    /// Hash of the record before.
    pub previous: Hash,
    /// Hash of this record.
    pub hash: Hash,
    /// What it says.
    pub body: Body,
}

/// A record that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A hash of the wrong length.
    #[error("ledger record {index}: {field} has {found} bytes instead of {HASH_BYTES}")]
    Length {
        /// Record.
        index: u64,
        /// Field.
        field: &'static str,
        /// Bytes found.
        found: usize,
    },
    /// No body, or one of a later version.
    #[error("ledger record {index}: no body that this version knows")]
    Unknown {
        /// Record.
        index: u64,
    },
    /// Stored bytes that are no body.
    #[error("ledger record {index}: the stored body is damaged")]
    Damaged {
        /// Record.
        index: u64,
    },
}

/// The end of a chain: all that is needed to append to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tail {
    /// Records so far.
    pub length: u64,
    /// Hash of the last one; zero when there is none.
    #[serde(with = "hex32")]
    pub head: Hash,
}

impl Tail {
    /// The record that puts `body` at the end of this chain. The tail itself does not move.
    pub fn next(&self, body: Body) -> Record {
        let hash = hash(&self.head, self.length, &body);
        Record {
            index: self.length,
            previous: self.head,
            hash,
            body,
        }
    }

    /// Moves the tail behind `record`.
    pub fn advance(&mut self, record: &Record) {
        self.length = record.index.saturating_add(1);
        self.head = record.hash;
    }
}

/// The hash of a record: BLAKE3 of the previous hash, the index and the body.
pub fn hash(previous: &Hash, index: u64, body: &Body) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(previous);
    hasher.update(&index.to_le_bytes());
    hasher.update(&body.encode());
    *hasher.finalize().as_bytes()
}

/// Lower-case hexadecimal, as hashes are shown to people.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// Serde form of a [`Hash`] for people: 64 hexadecimal digits.
pub(crate) mod hex32 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::{HASH_BYTES, Hash, hex};

    pub fn serialize<S: Serializer>(hash: &Hash, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex(hash))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Hash, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bad = || D::Error::custom("not a hash of 64 hexadecimal digits");
        if text.len() != 2 * HASH_BYTES || !text.is_ascii() {
            return Err(bad());
        }
        let mut hash = [0; HASH_BYTES];
        for (place, byte) in hash.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * place..2 * place + 2], 16).map_err(|_| bad())?;
        }
        Ok(hash)
    }
}

#[cfg(test)]
mod tests {
    use supra_proto::v1;

    use super::*;

    fn bodies() -> Vec<Body> {
        vec![
            Body::Open(Open {
                run: "quick-1".into(),
                recipe_hash: [1; 32],
                manifest_hash: [2; 32],
                windows: 100,
                sequence_length: 8,
                batch_samples: 4,
                samples: 10,
                steps: 3,
            }),
            Body::Step(Step {
                generation: 1,
                step: 1,
                first_sample: 0,
                samples: 4,
                digest: [3; 32],
                skipped: true,
            }),
            Body::Void {
                generation: 1,
                after_step: 0,
                reason: "rank 1 vanished".into(),
            },
            Body::Durable {
                generation: 2,
                step: 3,
                manifest_hash: [4; 32],
            },
            Body::Close {
                step: 3,
                samples: 10,
            },
        ]
    }

    /// Bodies that came later: the hash of the others stays what it was.
    fn later_bodies() -> Vec<Body> {
        let lost = Body::Lost {
            generation: 2,
            step: 3,
            manifest_hash: [4; 32],
            durable: 1,
            reason: "model.safetensors: the file is missing".into(),
        };
        let evaluated = |loss: f64| {
            Body::Evaluated(Evaluation {
                generation: 2,
                step: 0,
                windows: 64,
                loss_bits: loss_bits(loss),
                targets: 131_072,
            })
        };
        vec![lost, evaluated(0.1 + 0.2), evaluated(f64::NAN)]
    }

    #[test]
    fn bodies_and_records_survive_both_encodings() {
        let mut tail = Tail::default();
        for body in bodies().into_iter().chain(later_bodies()) {
            assert_eq!(Body::decode(&body.encode()), Some(body.clone()));
            let record = tail.next(body);
            tail.advance(&record);
            let wire = v1::LedgerRecord::from(&record);
            assert_eq!(Record::try_from(wire).unwrap(), record);
            let mut line = Vec::new();
            lines::append(&mut line, record.clone());
            assert_eq!(lines::parse(&line), Ok(vec![record]));
        }
        assert_eq!(tail.length, 8);
    }

    #[test]
    fn a_cut_or_lengthened_body_is_no_body() {
        for body in bodies().into_iter().chain(later_bodies()) {
            let mut bytes = body.encode();
            bytes.push(0);
            assert_eq!(Body::decode(&bytes), None);
            for length in 0..bytes.len() - 1 {
                assert_eq!(Body::decode(&bytes[..length]), None);
            }
        }
    }

    #[test]
    fn the_hash_of_a_fixed_record_never_changes() {
        let mut tail = Tail::default();
        for body in bodies() {
            let record = tail.next(body);
            tail.advance(&record);
        }
        assert_eq!(hex(&tail.head), PINNED_HEAD);
    }

    /// Ledgers outlive programs: this value may only change with a new ledger format.
    const PINNED_HEAD: &str = "67ada1d1e02924ee874d96d75ade614e0e8ad03b49fc9e763a53f9508ace64c0";
}
