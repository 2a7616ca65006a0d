//! Samples as tensors.

use supra_data::Sample;
use supra_recipes::Digest;
use tch::{Device, Kind, Tensor};

use crate::model::{Documents, LossInput};

/// A few samples on the device.
pub struct MicroBatch {
    /// What the model's loss takes.
    pub input: LossInput,
    /// Number of targets that count.
    pub targets: u64,
    /// Sum of the digests of the samples: what was really fed.
    pub digest: Digest,
}

impl MicroBatch {
    /// Lays samples of equal length out on the device. With `reset`, documents do not see each other, and a target
    /// that begins a document does not count: nothing is there to predict it from.
    ///
    /// # Errors
    ///
    /// Names the sample and position of a token that is not below `vocabulary`.
    pub fn new(
        samples: &[Sample],
        vocabulary: i64,
        reset: bool,
        device: Device,
    ) -> Result<MicroBatch, String> {
        let length = samples
            .first()
            .map_or(0, |sample| sample.tokens.len().saturating_sub(1));
        let (mut tokens, mut mask, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        for sample in samples {
            check_tokens(sample, vocabulary)?;
            tokens.extend(sample.tokens.iter().map(|&token| i64::from(token)));
            mask.extend(target_mask(&sample.starts, length, reset));
            starts.push(sample.starts.clone());
        }
        let (rows, length) = (samples.len() as i64, length as i64);
        let tokens_bt = Tensor::from_slice(&tokens).view([rows, length + 1]);
        let part = |from: i64| {
            tokens_bt
                .narrow(1, from, length)
                .contiguous()
                .to_device(device)
        };
        let input = LossInput {
            inputs_bt: part(0),
            targets_bt: part(1),
            mask_bt: Tensor::from_slice(&mask)
                .to_kind(Kind::Bool)
                .view([rows, length])
                .to_device(device),
            documents: reset
                .then(|| Documents::from_starts(&starts, length as usize).to_device(device)),
        };
        Ok(MicroBatch {
            input,
            targets: mask.iter().filter(|&&counts| counts).count() as u64,
            digest: samples
                .iter()
                .map(|sample| Digest::of_sample(sample.id, &sample.tokens))
                .sum(),
        })
    }
}

fn check_tokens(sample: &Sample, vocabulary: i64) -> Result<(), String> {
    match sample
        .tokens
        .iter()
        .position(|&token| i64::from(token) >= vocabulary)
    {
        None => Ok(()),
        Some(at) => Err(format!(
            "sample {} holds token {} at position {at}, but the model's vocabulary has {vocabulary} tokens. Tokenize \
             the data with the model's own tokenizer",
            sample.id, sample.tokens[at]
        )),
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
    use super::*;

    #[test]
    fn a_target_that_begins_a_document_leaves_the_loss() {
        assert_eq!(target_mask(&[0, 2, 4], 4, true), [true, false, true, false]);
        assert_eq!(target_mask(&[0, 2, 4], 4, false), [true; 4]);
    }

    #[test]
    fn inputs_and_targets_are_one_apart() {
        let sample = Sample {
            id: 7,
            tokens: vec![1, 2, 3],
            starts: vec![1],
        };
        let micro = MicroBatch::new(std::slice::from_ref(&sample), 4, true, Device::Cpu).unwrap();
        assert_eq!(
            Vec::<i64>::try_from(micro.input.inputs_bt.reshape([-1])).unwrap(),
            [1, 2]
        );
        assert_eq!(
            Vec::<i64>::try_from(micro.input.targets_bt.reshape([-1])).unwrap(),
            [2, 3]
        );
        assert_eq!(micro.targets, 1);
        assert_eq!(micro.digest, Digest::of_sample(7, &[1, 2, 3]));
        let error = MicroBatch::new(&[sample], 3, true, Device::Cpu)
            .err()
            .unwrap();
        assert!(
            error.contains("sample 7") && error.contains("token 3 at position 2"),
            "{error}"
        );
    }
}
