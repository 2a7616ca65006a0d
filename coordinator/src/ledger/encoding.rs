//! The canonical bytes of a ledger body: what is hashed and stored.

use super::{Body, Evaluation, Hash, Open, Step, loss_bits};

const OPEN: u8 = 1;
const STEP: u8 = 2;
const VOID: u8 = 3;
const DURABLE: u8 = 4;
const CLOSE: u8 = 5;
const LOST: u8 = 6;
const EVALUATED: u8 = 7;

impl Body {
    /// The canonical bytes of a body.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::with_capacity(80));
        match self {
            Body::Open(open) => {
                out.tag(OPEN)
                    .text(&open.run)
                    .raw(&open.recipe_hash)
                    .raw(&open.manifest_hash);
                out.numbers(&[open.windows, open.sequence_length, open.batch_samples]);
                out.numbers(&[open.samples, open.steps]);
            }
            Body::Step(step) => {
                out.tag(STEP)
                    .numbers(&[step.generation, step.step, step.first_sample]);
                out.numbers(&[step.samples])
                    .raw(&step.digest)
                    .tag(u8::from(step.skipped));
            }
            Body::Void {
                generation,
                after_step,
                reason,
            } => {
                out.tag(VOID)
                    .numbers(&[*generation, *after_step])
                    .text(reason);
            }
            Body::Durable {
                generation,
                step,
                manifest_hash,
            } => {
                out.tag(DURABLE)
                    .numbers(&[*generation, *step])
                    .raw(manifest_hash);
            }
            Body::Lost {
                generation,
                step,
                manifest_hash,
                durable,
                reason,
            } => {
                out.tag(LOST)
                    .numbers(&[*generation, *step])
                    .raw(manifest_hash)
                    .numbers(&[*durable])
                    .text(reason);
            }
            Body::Evaluated(evaluation) => {
                out.tag(EVALUATED)
                    .numbers(&[evaluation.generation, evaluation.step])
                    .numbers(&[evaluation.windows, evaluation.loss_bits])
                    .numbers(&[evaluation.targets]);
            }
            Body::Close { step, samples } => {
                out.tag(CLOSE).numbers(&[*step, *samples]);
            }
        }
        out.0
    }

    /// Reads what [`Body::encode`] wrote; `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<Body> {
        let mut input = Reader(bytes);
        let body = match input.tag()? {
            OPEN => Body::Open(Open {
                run: input.text()?,
                recipe_hash: input.raw()?,
                manifest_hash: input.raw()?,
                windows: input.number()?,
                sequence_length: input.number()?,
                batch_samples: input.number()?,
                samples: input.number()?,
                steps: input.number()?,
            }),
            STEP => Body::Step(Step {
                generation: input.number()?,
                step: input.number()?,
                first_sample: input.number()?,
                samples: input.number()?,
                digest: input.raw()?,
                skipped: match input.tag()? {
                    0 => false,
                    1 => true,
                    _ => return None,
                },
            }),
            VOID => Body::Void {
                generation: input.number()?,
                after_step: input.number()?,
                reason: input.text()?,
            },
            DURABLE => Body::Durable {
                generation: input.number()?,
                step: input.number()?,
                manifest_hash: input.raw()?,
            },
            LOST => Body::Lost {
                generation: input.number()?,
                step: input.number()?,
                manifest_hash: input.raw()?,
                durable: input.number()?,
                reason: input.text()?,
            },
            EVALUATED => Body::Evaluated(Evaluation {
                generation: input.number()?,
                step: input.number()?,
                windows: input.number()?,
                loss_bits: input.loss()?,
                targets: input.number()?,
            }),
            CLOSE => Body::Close {
                step: input.number()?,
                samples: input.number()?,
            },
            _ => return None,
        };
        input.0.is_empty().then_some(body)
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn tag(&mut self, tag: u8) -> &mut Self {
        self.0.push(tag);
        self
    }

    fn numbers(&mut self, numbers: &[u64]) -> &mut Self {
        for number in numbers {
            self.0.extend_from_slice(&number.to_le_bytes());
        }
        self
    }

    fn raw(&mut self, bytes: &Hash) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.numbers(&[text.len() as u64]);
        self.0.extend_from_slice(text.as_bytes());
        self
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn tag(&mut self) -> Option<u8> {
        self.take::<1>().map(|[tag]| tag)
    }

    fn number(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// The bits of a loss in the one form that [`loss_bits`] gives them.
    fn loss(&mut self) -> Option<u64> {
        self.number()
            .filter(|bits| loss_bits(f64::from_bits(*bits)) == *bits)
    }

    fn raw(&mut self) -> Option<Hash> {
        self.take()
    }

    fn text(&mut self) -> Option<String> {
        let length = usize::try_from(self.number()?).ok()?;
        let (text, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).ok()
    }
}
