//! The training step by hand gives the gradients of autograd, whatever it keeps, and stops when told to.

use std::{cell::Cell, rc::Rc};

use supra_worker::{
    kernels::Twin,
    model::{AttentionKind, Decay, Documents, LossInput, ModelConfig, Params, Transformer},
    optim::Layout,
    step::{Meanwhile, Policy, Step, StepError},
};
use tch::{Device, Kind, Tensor};

use crate::network::{assert_close, by_hand, config, ids, leaves, map, supra, weights};

const POLICIES: [Policy; 3] = [Policy::Recompute, Policy::Lean, Policy::Save];

/// Rows in which some targets do not count.
fn input(rows: i64, tokens: i64, documents: Option<Documents>) -> LossInput {
    let ids = ids(rows, tokens + 1, 3);
    let targets_bt = ids.narrow(1, 1, tokens);
    LossInput {
        inputs_bt: ids.narrow(1, 0, tokens),
        mask_bt: targets_bt.remainder(5).ne(0),
        targets_bt,
        documents,
    }
}

/// Two rows of 22 tokens: one document after another, one of which begins before the row.
fn documents() -> Documents {
    Documents::from_starts(&[vec![0, 5, 8, 9], vec![13]], 22)
}

fn variants() -> Vec<(String, ModelConfig)> {
    let mut variants = Vec::new();
    for (heads, kv_heads) in [(4, 4), (4, 2), (6, 2), (3, 1)] {
        for decay in [Decay::Alibi, Decay::Retnet, Decay::None] {
            for qk_norm in [false, true] {
                variants.push(config(heads, kv_heads, supra(decay, qk_norm, 6)));
            }
        }
        variants.push(config(heads, kv_heads, supra(Decay::Alibi, false, 64)));
        variants.push(config(heads, kv_heads, AttentionKind::Softmax));
    }
    let named = variants.into_iter().zip(0..).map(|(config, number)| {
        let config = ModelConfig {
            tied: number % 3 == 0,
            ..config
        };
        let name = format!(
            "{}/{} heads, tied {}, {:?}",
            config.heads, config.kv_heads, config.tied, config.attention
        );
        (name, config)
    });
    named.collect()
}

#[test]
fn the_step_by_hand_has_autograds_loss_and_gradients() {
    tch::set_num_threads(1);
    for (name, config) in variants() {
        for (z_loss, documents) in [(0.0, None), (1e-2, Some(documents()))] {
            let (weights, input) = (weights(&config, 7), input(2, 22, documents));
            let leaves = leaves(&weights);
            let oracle = Transformer::new(config.clone()).loss_sum(&leaves, &input, z_loss);
            oracle.objective.backward();

            let (loss, gradients) = by_hand(&config, &weights, &input, z_loss, Policy::Lean);
            for (found, expected) in [
                (loss.objective, oracle.objective),
                (loss.cross_entropy, oracle.cross_entropy),
            ] {
                let error = (found / expected.double_value(&[]) - 1.0).abs();
                assert!(error < 1e-12, "{name}: loss differs by {error:e}");
            }
            for (parameter, gradient) in gradients.iter() {
                let expected = leaves.get(parameter).grad();
                assert_close(gradient, &expected, &format!("{name}: {parameter}"));
            }
        }
    }
}

#[test]
fn what_is_kept_changes_no_bit() {
    tch::set_num_threads(1);
    for (name, config) in variants() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let weights = weights(&config, 8).to(Device::Cpu, kind);
            let input = input(2, 22, Some(documents()));
            let results = POLICIES.map(|policy| by_hand(&config, &weights, &input, 1e-4, policy));
            let (loss, gradients) = &results[0];
            for (policy, (other_loss, others)) in POLICIES.iter().zip(&results) {
                assert_eq!(other_loss, loss, "{name}, {kind:?}, {policy:?}");
                for (parameter, gradient) in others.iter() {
                    let same = gradient == gradients.get(parameter);
                    assert!(same, "{name}, {kind:?}, {policy:?}: {parameter}");
                }
            }
        }
    }
}

#[test]
fn bf16_gradients_are_as_near_to_exact_ones_as_autograds() {
    tch::set_num_threads(1);
    for attention in [AttentionKind::Softmax, supra(Decay::Alibi, false, 6)] {
        let config = config(4, 2, attention);
        let rounded = weights(&config, 9).to(Device::Cpu, Kind::BFloat16);
        let exact = rounded.to(Device::Cpu, Kind::Double);
        let input = input(2, 22, None);
        let (_, expected) = by_hand(&config, &exact, &input, 0.0, Policy::Lean);
        let (_, gradients) = by_hand(&config, &rounded, &input, 0.0, Policy::Lean);
        let leaves = leaves(&rounded);
        let model = Transformer::new(config.clone());
        model.loss_sum(&leaves, &input, 0.0).objective.backward();
        for (name, expected) in expected.iter() {
            let error = |found: &Tensor| {
                let difference = found.to_kind(Kind::Double) - expected;
                difference.norm().double_value(&[]) / expected.norm().double_value(&[])
            };
            let (mine, autograds) = (error(gradients.get(name)), error(&leaves.get(name).grad()));
            assert!(
                mine < 2.0 * autograds,
                "{attention:?}: {name}: {mine:e} against {autograds:e}"
            );
        }
    }
}

#[test]
fn micro_batches_of_any_shapes_add_up() {
    tch::set_num_threads(1);
    let config = config(4, 2, supra(Decay::Alibi, false, 6));
    let weights = weights(&config, 4);
    let inputs = [
        input(2, 22, None),
        input(1, 9, None),
        input(2, 22, Some(documents())),
        input(2, 22, None),
    ];
    let together = map(&weights, Tensor::zeros_like);
    let mut step = Step::new(config.clone(), Rc::new(Twin), Policy::Lean, Device::Cpu);
    let mut sum = 0.0;
    let alone: Vec<Params> = inputs
        .iter()
        .map(|input| {
            step.accumulate(&weights, &together, input, 0.0, &mut || false)
                .unwrap();
            let (loss, gradients) = by_hand(&config, &weights, input, 0.0, Policy::Lean);
            sum += loss.objective;
            gradients
        })
        .collect();
    assert!((step.take_loss().objective / sum - 1.0).abs() < 1e-12);
    assert_eq!(step.take_loss().objective, 0.0, "a loss is taken once");
    for (name, gradient) in together.iter() {
        let parts: Vec<&Tensor> = alone.iter().map(|gradients| gradients.get(name)).collect();
        let expected = Tensor::stack(&parts, 0).sum_dim_intlist([0i64].as_slice(), false, None);
        assert_close(gradient, &expected, name);
    }
}

#[test]
fn the_step_asks_before_every_block_whether_to_stop() {
    for attention in [AttentionKind::Softmax, supra(Decay::Alibi, false, 6)] {
        let config = config(2, 2, attention);
        let (weights, input) = (weights(&config, 1), input(1, 5, None));
        let gradients = map(&weights, Tensor::zeros_like);
        let mut step = Step::new(config, Rc::new(Twin), Policy::Lean, Device::Cpu);
        // Two blocks there and back: the fifth question is never asked.
        for fatal in 1..=5 {
            let asked = Cell::new(0);
            let mut stop = || {
                asked.set(asked.get() + 1);
                asked.get() == fatal
            };
            let done = step.accumulate(&weights, &gradients, &input, 0.0, &mut stop);
            assert_eq!(done.is_ok(), fatal == 5);
            assert_eq!(asked.get(), fatal.min(4));
        }
    }
}

/// Notes what the step says, and what a bucket's gradients are when it says that they are complete.
struct Notes<'a> {
    layout: &'a Layout,
    gradient: &'a Tensor,
    needed: Vec<usize>,
    complete: Vec<(usize, Tensor)>,
}

impl Meanwhile for Notes<'_> {
    fn stop(&self) -> bool {
        false
    }

    fn needed(&mut self, bucket: usize) -> Result<(), StepError> {
        self.needed.push(bucket);
        Ok(())
    }

    fn complete(&mut self, bucket: usize) -> Result<(), StepError> {
        let numbers = self.layout.buckets()[bucket].view(self.gradient).copy();
        self.complete.push((bucket, numbers));
        Ok(())
    }
}

#[test]
fn the_step_says_when_weights_are_needed_and_when_gradients_are_complete() {
    for (name, tied) in [("tied", true), ("untied", false)] {
        let config = ModelConfig {
            tied,
            ..config(2, 2, supra(Decay::Alibi, true, 6))
        };
        let layout = Layout::new(&config.params(), false, 1);
        let options = (Kind::Double, Device::Cpu);
        let gradient = Tensor::zeros([layout.elements()], options);
        let weights = weights(&config, 1);
        let mut notes = Notes {
            layout: &layout,
            gradient: &gradient,
            needed: Vec::new(),
            complete: Vec::new(),
        };
        let mut step = Step::new(config, Rc::new(Twin), Policy::Recompute, Device::Cpu);
        let input = input(1, 5, None);
        let gradients = layout.views(&gradient);
        step.accumulate(&weights, &gradients, &input, 0.0, &mut notes)
            .unwrap();
        assert_eq!(notes.needed, [0, 1, 2, 3], "{name}");
        let order: Vec<usize> = notes.complete.iter().map(|(bucket, _)| *bucket).collect();
        assert_eq!(order, [3, 2, 1, 0], "{name}");
        for (bucket, then) in &notes.complete {
            let now = layout.buckets()[*bucket].view(&gradient);
            assert_eq!(&now, then, "{name}: bucket {bucket} was not final");
            assert!(
                now.norm().double_value(&[]) > 0.0,
                "{name}: bucket {bucket}"
            );
        }
    }
}
