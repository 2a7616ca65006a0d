//! The training step by hand: forward and backward of the whole network, without autograd, into buffers that are there.
//!
//! It computes what [`Transformer::loss_sum`](crate::model::Transformer::loss_sum) and autograd compute, and is the only
//! way to train. The work itself is behind [`Kernels`]. Gradients are added, in fp32 (beside fp64 weights in fp64), to
//! tensors of the caller's. What the forward pass keeps is a [`Policy`]; whatever it does not keep is computed again by the
//! same code, so gradients do not depend on it.

pub mod block;
pub mod buffers;
mod qk_norm;
mod softmax;
pub mod tables;

use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use block::Block;
use buffers::Buffers;
// The memory plan chooses among these, so the plan's type is the step's.
pub use supra_recipes::plan::Policy;
use tables::Tables;

use crate::{
    collective::DeviceCollectiveError,
    kernels::{Delta, KernelError, Kernels, NormOut},
    model::{LossInput, ModelConfig, Params, block::LayerParams},
};

const EMBEDDING: &str = "tok_embeddings.weight";

/// Forward and backward passes over micro-batches.
pub struct Step {
    config: ModelConfig,
    kernels: Rc<dyn Kernels>,
    policy: Policy,
    /// Cross-entropy and objective since they were last taken: fp64 [2].
    loss_2: Tensor,
    room: Option<Room>,
}

/// What micro-batches of one shape share: kept from one to the next as long as their shape stays.
struct Room {
    rows: (i64, i64),
    tables: Tables,
    buffers: Buffers,
}

impl Room {
    fn new(config: &ModelConfig, rows: (i64, i64), policy: Policy, weights: &Params) -> Room {
        let options = (weights.kind(), weights.device());
        Room {
            rows,
            tables: Tables::new(config, rows.1, options),
            buffers: Buffers::new(config, rows, policy, options),
        }
    }
}

/// Sums over targets that count, over some micro-batches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// Cross-entropy, in nats: what to report.
    pub cross_entropy: f64,
    /// Cross-entropy plus z-loss: what the gradients are of.
    pub objective: f64,
}

/// What happens beside a micro-batch. Buckets are those of [`Layout`](crate::optim::Layout): the embedding, each block, and
/// the last norm with the output layer.
pub trait Meanwhile {
    /// Whether to stop; asked before every block in both directions.
    fn stop(&self) -> bool;

    /// The weights of a bucket are about to be used for the first time.
    fn needed(&mut self, bucket: usize) -> Result<(), StepError>;

    /// The gradients of a bucket have got all that this micro-batch adds to them. The last bucket comes first.
    fn complete(&mut self, bucket: usize) -> Result<(), StepError>;
}

/// Whether to stop is all there is to ask.
impl<F: Fn() -> bool> Meanwhile for F {
    fn stop(&self) -> bool {
        self()
    }

    fn needed(&mut self, _: usize) -> Result<(), StepError> {
        Ok(())
    }

    fn complete(&mut self, _: usize) -> Result<(), StepError> {
        Ok(())
    }
}

/// Why a micro-batch was not finished.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// [`Meanwhile::stop`] said so.
    #[error("stopped in the middle of a micro-batch")]
    Stopped,
    /// What was to happen meanwhile did not.
    #[error(transparent)]
    Exchange(#[from] DeviceCollectiveError),
    /// A kernel did not run.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl Step {
    /// For models of this shape, on `device`.
    pub fn new(
        config: ModelConfig,
        kernels: Rc<dyn Kernels>,
        policy: Policy,
        device: Device,
    ) -> Step {
        Step {
            config,
            kernels,
            policy,
            loss_2: Tensor::zeros([2], (Kind::Double, device)),
            room: None,
        }
    }

    /// Adds the gradient of a micro-batch's summed loss, with `z_loss` times the sum of squared log-normalizers, to
    /// `gradients`, which have the names and shapes of `weights`, and its loss to what
    /// [`take_loss`](Step::take_loss) returns. After an error gradients and loss are of no use.
    pub fn accumulate(
        &mut self,
        weights: &Params,
        gradients: &Params,
        input: &LossInput,
        z_loss: f64,
        meanwhile: &mut dyn Meanwhile,
    ) -> Result<(), StepError> {
        self.pass(weights, Some(gradients), input, z_loss, meanwhile)
    }

    /// Adds the loss of a micro-batch to what [`take_loss`](Step::take_loss) returns, by the forward pass of
    /// [`accumulate`](Step::accumulate) and in its buffers: no other memory is taken.
    pub fn evaluate(
        &mut self,
        weights: &Params,
        input: &LossInput,
        meanwhile: &mut dyn Meanwhile,
    ) -> Result<(), StepError> {
        self.pass(weights, None, input, 0.0, meanwhile)
    }

    /// Forward, and backward where there are gradients to add to.
    fn pass(
        &mut self,
        weights: &Params,
        gradients: Option<&Params>,
        input: &LossInput,
        z_loss: f64,
        meanwhile: &mut dyn Meanwhile,
    ) -> Result<(), StepError> {
        let _guard = tch::no_grad_guard();
        let size = input.inputs_bt.size();
        let rows = (size[0], size[1]);
        // What does not fit is gone before its successor takes memory.
        let room = self
            .room
            .take()
            .filter(|room| room.rows == rows)
            .unwrap_or_else(|| Room::new(&self.config, rows, self.policy, weights));
        let room = self.room.insert(room);
        let within = input
            .documents
            .as_ref()
            .map(|documents| room.tables.within(&self.config, documents));
        let pass = Pass {
            config: &self.config,
            kernels: self.kernels.as_ref(),
            policy: self.policy,
            tables: within.as_ref().unwrap_or(&room.tables),
            rows,
            weights,
        };
        let ids_n = input.inputs_bt.flatten(0, 1);
        let buffers = &mut room.buffers;
        pass.forward(buffers, &ids_n, meanwhile)?;
        meanwhile.needed(pass.end())?;
        pass.head(buffers, gradients, input, z_loss, &mut self.loss_2);
        if let Some(gradients) = gradients {
            meanwhile.complete(pass.end())?;
            pass.backward(buffers, gradients, &ids_n, meanwhile)?;
        }
        Ok(self.kernels.check()?)
    }

    /// The cross-entropy of the micro-batches since the last [`take_loss`](Step::take_loss). Waits for the device.
    pub fn cross_entropy_so_far(&self) -> f64 {
        self.loss_2.double_value(&[0])
    }

    /// The loss of the micro-batches since the last call.
    pub fn take_loss(&mut self) -> Loss {
        let loss = Loss {
            cross_entropy: self.loss_2.double_value(&[0]),
            objective: self.loss_2.double_value(&[1]),
        };
        let _ = self.loss_2.zero_();
        loss
    }
}

/// One micro-batch on its way.
struct Pass<'a> {
    config: &'a ModelConfig,
    kernels: &'a dyn Kernels,
    policy: Policy,
    tables: &'a Tables,
    rows: (i64, i64),
    weights: &'a Params,
}

/// The embedding's bucket; that of block `l` is `l + 1`.
const START: usize = 0;

impl<'a> Pass<'a> {
    fn block(&self, layer: usize) -> Block<'a> {
        Block {
            config: self.config,
            kernels: self.kernels,
            tables: self.tables,
            rows: self.rows,
            weights: LayerParams::new(self.config, self.weights, layer as i64),
        }
    }

    /// The last bucket.
    fn end(&self) -> usize {
        self.config.layers as usize + 1
    }

    /// Embedding and blocks.
    fn forward(
        &self,
        buffers: &mut Buffers,
        ids_n: &Tensor,
        meanwhile: &mut dyn Meanwhile,
    ) -> Result<(), StepError> {
        let mut before = None;
        meanwhile.needed(START)?;
        for (layer, at) in buffers.blocks.iter_mut().enumerate() {
            if meanwhile.stop() {
                return Err(StepError::Stopped);
            }
            meanwhile.needed(layer + 1)?;
            if layer == 0 {
                let embedding_vd = self.weights.get(EMBEDDING);
                let _ = embedding_vd.index_select_out(&at.x_in_nd, 0, ids_n);
            }
            self.block(layer)
                .forward(before.as_ref(), at, &buffers.scratch.work_nd, None);
            before = Some(at.x_mid_nd.shallow_clone());
        }
        Ok(())
    }

    /// Last norm, output layer and loss, forward and, where there are gradients to add to, backward, some tokens at a time.
    fn head(
        &self,
        buffers: &mut Buffers,
        gradients: Option<&Params>,
        input: &LossInput,
        z_loss: f64,
        loss_2: &mut Tensor,
    ) {
        let (head, scratch) = (&mut buffers.head, &mut buffers.scratch);
        let last = buffers
            .blocks
            .last()
            .expect("invariant: a model has at least one block");
        let gain_d = self.weights.get("norm.weight");
        let delta = Delta {
            delta_nd: &scratch.work_nd,
            sum_nd: &mut head.x_nd,
        };
        let out = NormOut {
            rstd_n: &mut head.rstd_n,
            normed_nd: &mut head.normed_nd,
        };
        let eps = self.config.norm_eps;
        self.kernels
            .add_rms_norm(&last.x_mid_nd, Some(delta), gain_d, eps, out);

        let output = if self.config.tied {
            EMBEDDING
        } else {
            "output.weight"
        };
        let output_vd = self.weights.get(output);
        let targets_n = input.targets_bt.flatten(0, 1);
        let mask_n = input.mask_bt.flatten(0, 1);
        let (n, most) = (targets_n.size()[0], head.logits_cv.size()[0]);
        for start in (0..n).step_by(most as usize) {
            let c = most.min(n - start);
            let some = |x: &Tensor| x.narrow(0, start, c);
            let mut logits_cv = head.logits_cv.narrow(0, 0, c);
            let normed_cd = some(&head.normed_nd);
            self.kernels.linear(&normed_cd, output_vd, &logits_cv);
            self.kernels.cross_entropy(
                &mut logits_cv,
                &some(&targets_n),
                &some(&mask_n),
                z_loss,
                loss_2,
            );
            if let Some(gradients) = gradients {
                let doutput_vd = gradients.get(output);
                self.kernels
                    .linear_weight_gradient(&logits_cv, &normed_cd, doutput_vd);
                self.kernels
                    .linear_input_gradient(&logits_cv, output_vd, &some(&scratch.work_nd));
            }
        }
        let Some(gradients) = gradients else {
            return;
        };

        let _ = scratch.dx_nd.zero_();
        self.kernels.rms_norm_backward(
            &scratch.work_nd,
            &head.x_nd,
            &head.rstd_n,
            gain_d,
            &mut scratch.dx_nd,
            &mut gradients.get("norm.weight").shallow_clone(),
        );
    }

    /// Blocks and embedding.
    fn backward(
        &self,
        buffers: &mut Buffers,
        gradients: &Params,
        ids_n: &Tensor,
        meanwhile: &mut dyn Meanwhile,
    ) -> Result<(), StepError> {
        for (layer, at) in buffers.blocks.iter_mut().enumerate().rev() {
            if meanwhile.stop() {
                return Err(StepError::Stopped);
            }
            let dweights = LayerParams::new(self.config, gradients, layer as i64);
            self.block(layer)
                .backward(self.policy, &dweights, at, &mut buffers.scratch);
            meanwhile.complete(layer + 1)?;
        }
        self.kernels.embedding_backward(
            &buffers.scratch.dx_nd,
            ids_n,
            &mut gradients.get(EMBEDDING).shallow_clone(),
        );
        meanwhile.complete(START)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kernels::Twin,
        model::{AttentionKind, SupraConfig, config::tests::small, init_all},
    };

    #[test]
    fn logits_may_be_made_a_few_tokens_at_a_time() {
        let config = small(AttentionKind::Supra(SupraConfig::default()));
        let weights = init_all(&config, 3).to(Device::Cpu, Kind::Double);
        let ids_bt = Tensor::arange(22, (Kind::Int64, Device::Cpu)).view([2, 11]);
        let input = LossInput {
            inputs_bt: ids_bt.shallow_clone(),
            targets_bt: &ids_bt + 1,
            mask_bt: ids_bt.ne(7),
            documents: None,
        };
        let mut step = Step::new(config, Rc::new(Twin), Policy::Lean, Device::Cpu);
        let mut run = |rows: Option<i64>| {
            let zeros = |(name, weight): (&str, &Tensor)| (name.to_owned(), weight.zeros_like());
            let gradients = Params::new(weights.iter().map(zeros).collect());
            if let (Some(rows), Some(room)) = (rows, &mut step.room) {
                let logits_cv = &mut room.buffers.head.logits_cv;
                *logits_cv = logits_cv.narrow(0, 0, rows);
            }
            step.accumulate(&weights, &gradients, &input, 1e-3, &mut || false)
                .unwrap();
            let flat: Vec<Tensor> = gradients.iter().map(|(_, x)| x.flatten(0, -1)).collect();
            (step.take_loss(), Tensor::cat(&flat, 0))
        };
        let (loss, gradient) = run(None);
        for rows in [5, 1] {
            let (parts_loss, parts_gradient) = run(Some(rows));
            assert!((parts_loss.objective / loss.objective - 1.0).abs() < 1e-14);
            assert!(parts_gradient.allclose(&gradient, 1e-10, 1e-12, false));
        }
    }
}
