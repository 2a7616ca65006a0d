//! One rank's copy of everything that training changes.
//!
//! fp32 masters, both moments and the gradient are flat buffers of one [`Layout`]. The model computes
//! on *leaves*: views of the masters (fp32), or of a bf16 copy of them that each update refreshes.

use tch::{Device, Kind, Tensor};

use super::{Layout, chunks, clip};
use crate::{
    collective::{DeviceCollective, DeviceCollectiveError},
    model::Params,
};

/// Parameters, optimizer state and gradient of one rank.
pub struct Replica {
    layout: Layout,
    /// fp32 master of every parameter, flat.
    pub masters: Tensor,
    /// First moment of the gradient, fp32, flat.
    pub exp_avg: Tensor,
    /// Second moment of the gradient, fp32, flat.
    pub exp_avg_sq: Tensor,
    /// Sum of the gradients of the step in hand, fp32, flat.
    pub gradient: Tensor,
    /// Updates applied so far: AdamW's step counter. A skipped step does not count.
    pub updates: u64,
    /// The rounded masters, where the model does not compute in fp32.
    compute: Option<Tensor>,
    leaves: Vec<Tensor>,
    params: Params,
}

impl Replica {
    /// A replica that has seen no update. `masters` is flat, in the layout's order; `precision` is what the model
    /// computes in.
    pub fn new(layout: Layout, masters: Tensor, precision: Kind, device: Device) -> Replica {
        let masters = masters.to_device(device).to_kind(Kind::Float).contiguous();
        let zeros = || Tensor::zeros([layout.elements()], (Kind::Float, device));
        let compute = (precision != Kind::Float).then(|| masters.to_kind(precision));
        let flat = compute.as_ref().unwrap_or(&masters);
        let leaves: Vec<Tensor> = layout
            .slots()
            .iter()
            .map(|slot| slot.view(flat).detach().set_requires_grad(true))
            .collect();
        let named = layout
            .slots()
            .iter()
            .zip(&leaves)
            .map(|(slot, leaf)| (slot.name.clone(), leaf.shallow_clone()));
        Replica {
            params: Params::new(named.collect()),
            exp_avg: zeros(),
            exp_avg_sq: zeros(),
            gradient: zeros(),
            updates: 0,
            layout,
            masters,
            compute,
            leaves,
        }
    }

    /// Where each parameter lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What the model computes with.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Forgets the gradient: a new step begins.
    pub fn zero_gradient(&mut self) {
        let _ = self.gradient.zero_();
    }

    /// Runs the backward pass of a summed loss and adds its gradient in fp32.
    pub fn accumulate(&mut self, loss_sum: &Tensor) {
        let gradients = Tensor::run_backward(&[loss_sum], &self.leaves, false, false);
        tch::no_grad(|| {
            for (slot, gradient) in self.layout.slots().iter().zip(gradients) {
                // A parameter that the loss does not reach has no gradient at all.
                if gradient.defined() {
                    let _ = slot
                        .view(&self.gradient)
                        .g_add_(&gradient.to_kind(Kind::Float));
                }
            }
        });
    }

    /// Replaces the gradient by its sum over all ranks. The result has the same bits on all.
    pub fn reduce_gradient(
        &mut self,
        collective: &mut dyn DeviceCollective,
    ) -> Result<(), DeviceCollectiveError> {
        collective.all_reduce(&mut self.gradient)
    }

    /// L2 norm of the gradient sum.
    pub fn gradient_norm(&self) -> f64 {
        clip::norm(&self.gradient)
    }

    /// Rounds the masters again for the model, after they changed.
    pub fn refresh(&mut self) {
        if let Some(compute) = &mut self.compute {
            tch::no_grad(|| compute.copy_(&self.masters));
        }
    }

    /// BLAKE3 over the bytes of masters, first and second moments (fp32 little-endian, flat order) and the number of
    /// updates: equal on two ranks exactly when they will go on alike.
    pub fn hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let mut host = Vec::new();
        for flat in [&self.masters, &self.exp_avg, &self.exp_avg_sq] {
            for (start, length) in chunks(self.layout.elements()) {
                host.resize(length as usize, 0f32);
                flat.narrow(0, start, length)
                    .copy_data(&mut host, length as usize);
                hasher.update(bytemuck::cast_slice(&host));
            }
        }
        hasher.update(&self.updates.to_le_bytes());
        *hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ParamSpec;

    fn replica() -> Replica {
        let spec = |name: &str, shape: &[i64]| ParamSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            decayed: true,
            new: false,
        };
        let layout = Layout::new(&[spec("a", &[2, 2]), spec("unused", &[3])], false);
        Replica::new(
            layout,
            Tensor::arange(7, (Kind::Float, Device::Cpu)),
            Kind::Float,
            Device::Cpu,
        )
    }

    #[test]
    fn gradients_add_up_and_unused_parameters_have_none() {
        let mut replica = replica();
        for _ in 0..2 {
            let loss = replica.params().get("a").square().sum(Kind::Float);
            replica.accumulate(&loss);
        }
        let gradient = Vec::<f32>::try_from(&replica.gradient).unwrap();
        assert_eq!(gradient, [0.0, 4.0, 8.0, 12.0, 0.0, 0.0, 0.0]);
        replica.zero_gradient();
        assert_eq!(replica.gradient_norm(), 0.0);
    }

    #[test]
    fn the_hash_sees_every_part_of_the_state() {
        let mut replica = replica();
        let mut seen = vec![replica.hash()];
        let _ = replica.masters.narrow(0, 6, 1).fill_(9.0);
        seen.push(replica.hash());
        let _ = replica.exp_avg.narrow(0, 0, 1).fill_(1e-30);
        seen.push(replica.hash());
        let _ = replica.exp_avg_sq.narrow(0, 3, 1).fill_(1e-30);
        seen.push(replica.hash());
        replica.updates += 1;
        seen.push(replica.hash());
        let _ = replica.gradient.fill_(1.0);
        assert_eq!(replica.hash(), seen[4], "the gradient is not state");
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 5);
    }
}
