//! Samples as tensors: a whole step's laid out on the host, on the thread that reads ahead, and micro-batches of it handed to
//! the device without waiting.

use supra_data::Sample;
use supra_recipes::Digest;
use tch::{Device, TchError, Tensor};

use crate::model::{Documents, LossInput};

/// How samples become tensors.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Every token has to be below it.
    pub vocabulary: i64,
    /// Whether documents do not see each other; then a target that begins one does not count: nothing is there to predict
    /// it from.
    pub reset_at_document: bool,
    /// Rows of a micro-batch. All have so many: rows that are missing in the last one repeat the last sample, and none of
    /// their targets counts, so that they add exactly nothing to loss and gradients.
    pub rows: usize,
    /// Where the micro-batches will go. For a GPU they are laid out in pinned memory.
    pub device: Device,
}

/// The samples of a rank in one step, on the host.
#[derive(Debug)]
pub struct HostBatch {
    /// All micro-batches, one below the other.
    all: LossInput,
    rows: i64,
    device: Device,
    /// Samples, repeated ones not counted.
    pub samples: u64,
    /// Number of targets that count.
    pub targets: u64,
    /// Sum of the digests of the samples: what was really fed.
    pub digest: Digest,
}

/// Why samples cannot be laid out.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A token that the model does not know.
    #[error(
        "sample {sample} holds token {token} at position {position}, but the model's vocabulary has {vocabulary} tokens. \
         Tokenize the data with the model's own tokenizer"
    )]
    Token {
        /// Number of the sample.
        sample: u64,
        /// The token.
        token: u32,
        /// Where it stands.
        position: usize,
        /// Tokens that the model knows.
        vocabulary: i64,
    },
    /// The system gives no pinned memory.
    #[error(
        "cannot get memory that the GPU can read: {0}. Free some of the host's memory, or lower batch.tokens"
    )]
    Memory(#[from] TchError),
}

impl Layout {
    /// Lays samples of equal length out.
    ///
    /// # Errors
    ///
    /// Names the sample and position of a token that is not below the vocabulary; when there is no pinned memory.
    pub fn lay_out(&self, samples: &[Sample]) -> Result<HostBatch, LayoutError> {
        let length = samples
            .first()
            .map_or(0, |sample| sample.tokens.len().saturating_sub(1));
        let padded = samples.len().next_multiple_of(self.rows.max(1));
        let (mut inputs, mut targets, mut mask) = (Vec::new(), Vec::new(), Vec::new());
        let tokens = padded * length;
        inputs.reserve_exact(tokens);
        targets.reserve_exact(tokens);
        mask.reserve_exact(tokens);
        let mut starts = Vec::with_capacity(padded);
        for row in 0..padded {
            let counts = row < samples.len();
            let sample = &samples[row.min(samples.len() - 1)];
            self.check(sample)?;
            let ids = sample.tokens.iter().map(|&token| i64::from(token));
            inputs.extend(ids.clone().take(length));
            targets.extend(ids.skip(1));
            if counts {
                mask.extend(target_mask(&sample.starts, length, self.reset_at_document));
            } else {
                mask.resize(mask.len() + length, false);
            }
            starts.push(sample.starts.as_slice());
        }
        let shape = [padded as i64, length as i64];
        let ids = |ids: &[i64]| self.pinned(Tensor::from_slice(ids).view(shape));
        let documents = || {
            let Documents {
                positions_bt,
                segments_bt,
            } = Documents::from_starts(&starts, length);
            Ok::<_, TchError>(Documents {
                positions_bt: self.pinned(positions_bt)?,
                segments_bt: self.pinned(segments_bt)?,
            })
        };
        Ok(HostBatch {
            all: LossInput {
                inputs_bt: ids(&inputs)?,
                targets_bt: ids(&targets)?,
                mask_bt: self.pinned(Tensor::from_slice(&mask).view(shape))?,
                documents: self.reset_at_document.then(documents).transpose()?,
            },
            rows: self.rows.max(1) as i64,
            device: self.device,
            samples: samples.len() as u64,
            targets: mask.iter().filter(|&&counts| counts).count() as u64,
            digest: samples
                .iter()
                .map(|sample| Digest::of_sample(sample.id, &sample.tokens))
                .sum(),
        })
    }

    fn check(&self, sample: &Sample) -> Result<(), LayoutError> {
        let outside = |&token: &u32| i64::from(token) >= self.vocabulary;
        match sample.tokens.iter().position(outside) {
            None => Ok(()),
            Some(position) => Err(LayoutError::Token {
                sample: sample.id,
                token: sample.tokens[position],
                position,
                vocabulary: self.vocabulary,
            }),
        }
    }

    /// The tensor in memory from which the device copies by itself. libtorch keeps such memory and fills it again once the
    /// copies out of it are done, so after the first steps none is asked of the system.
    fn pinned(&self, host: Tensor) -> Result<Tensor, TchError> {
        if self.device.is_cuda() {
            host.f_internal_pin_memory(self.device)
        } else {
            Ok(host)
        }
    }
}

impl HostBatch {
    /// The micro-batches in order, each on its way to the device when it is asked for.
    ///
    /// Nothing waits: a copy out of pinned memory is queued behind the work of the micro-batch before, and the memory that it
    /// goes to comes back from that one's.
    pub fn micro_batches(&self) -> impl Iterator<Item = LossInput> {
        let padded = self.all.inputs_bt.size()[0];
        let step = self.rows as usize;
        (0..padded).step_by(step).map(move |first| {
            let part = |x: &Tensor| {
                let rows = x.narrow(0, first, self.rows);
                if self.device.is_cuda() {
                    rows.internal_to_copy((x.kind(), self.device), true)
                } else {
                    rows
                }
            };
            LossInput {
                inputs_bt: part(&self.all.inputs_bt),
                targets_bt: part(&self.all.targets_bt),
                mask_bt: part(&self.all.mask_bt),
                documents: self.all.documents.as_ref().map(|documents| Documents {
                    positions_bt: part(&documents.positions_bt),
                    segments_bt: part(&documents.segments_bt),
                }),
            }
        })
    }
}

/// Which of the targets at positions `1..=length` count.
fn target_mask(starts: &[u32], length: usize, reset: bool) -> Vec<bool> {
    let mut mask = vec![true; length];
    if reset {
        for start in starts
            .iter()
            .map(|&start| start as usize)
            .filter(|start| (1..=length).contains(start))
        {
            mask[start - 1] = false;
        }
    }
    mask
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn layout(rows: usize) -> Layout {
        Layout {
            vocabulary: 9,
            reset_at_document: true,
            rows,
            device: Device::Cpu,
        }
    }

    fn sample(id: u64, tokens: &[u32], starts: &[u32]) -> Sample {
        Sample {
            id,
            tokens: tokens.to_vec(),
            starts: starts.to_vec(),
        }
    }

    fn ids(tensor: &Tensor) -> Vec<Vec<i64>> {
        Vec::try_from(tensor.to_kind(Kind::Int64)).unwrap()
    }

    #[test]
    fn a_target_that_begins_a_document_leaves_the_loss() {
        assert_eq!(target_mask(&[0, 2, 4], 4, true), [true, false, true, false]);
        assert_eq!(target_mask(&[0, 2, 4], 4, false), [true; 4]);
    }

    #[test]
    fn inputs_and_targets_are_one_apart() {
        let batch = layout(1).lay_out(&[sample(7, &[1, 2, 3], &[1])]).unwrap();
        let inputs: Vec<LossInput> = batch.micro_batches().collect();
        assert_eq!(inputs.len(), 1);
        assert_eq!(ids(&inputs[0].inputs_bt), [[1, 2]]);
        assert_eq!(ids(&inputs[0].targets_bt), [[2, 3]]);
        assert_eq!(ids(&inputs[0].mask_bt), [[0, 1]]);
        assert_eq!((batch.samples, batch.targets), (1, 1));
        assert_eq!(batch.digest, Digest::of_sample(7, &[1, 2, 3]));
    }

    #[test]
    fn the_last_micro_batch_is_filled_with_rows_that_do_not_count() {
        let samples = [
            sample(3, &[1, 2, 3], &[0]),
            sample(4, &[2, 3, 4], &[]),
            sample(5, &[3, 4, 5], &[1]),
        ];
        let batch = layout(2).lay_out(&samples).unwrap();
        let inputs: Vec<LossInput> = batch.micro_batches().collect();
        assert_eq!(inputs.len(), 2);
        assert_eq!(ids(&inputs[0].inputs_bt), [[1, 2], [2, 3]]);
        assert_eq!(ids(&inputs[1].inputs_bt), [[3, 4], [3, 4]]);
        assert_eq!(ids(&inputs[1].mask_bt), [[0, 1], [0, 0]]);
        let documents = inputs[1].documents.as_ref().unwrap();
        assert_eq!(ids(&documents.segments_bt), [[0, 1], [0, 1]]);
        assert_eq!((batch.samples, batch.targets), (3, 5));
        let digests = samples.map(|sample| Digest::of_sample(sample.id, &sample.tokens));
        assert_eq!(batch.digest, digests.into_iter().sum());
    }

    #[test]
    fn a_rank_without_samples_has_no_micro_batches() {
        let batch = layout(2).lay_out(&[]).unwrap();
        assert_eq!(batch.micro_batches().count(), 0);
        assert_eq!((batch.samples, batch.targets), (0, 0));
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_named() {
        let error = layout(1).lay_out(&[sample(7, &[1, 2, 9], &[])]);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("sample 7") && error.contains("token 9 at position 2"),
            "{error}"
        );
    }
}
