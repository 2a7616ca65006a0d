//! One rank's copy of everything that training changes.
//!
//! fp32 masters, both moments and the gradient are flat buffers of one [`Layout`]. The model computes
//! on views of the masters (fp32), or of a bf16 copy of them that each update refreshes, and adds its
//! gradients to views of the gradient.

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
    params: Params,
    gradients: Params,
}

impl Replica {
    /// A replica that has seen no update. `masters` is flat, in the layout's order; `precision` is what the model
    /// computes in.
    pub fn new(layout: Layout, masters: Tensor, precision: Kind, device: Device) -> Replica {
        let masters = masters.to_device(device).to_kind(Kind::Float).contiguous();
        let zeros = || Tensor::zeros([layout.elements()], (Kind::Float, device));
        let compute = (precision != Kind::Float).then(|| masters.to_kind(precision));
        let gradient = zeros();
        Replica {
            params: layout.views(compute.as_ref().unwrap_or(&masters)),
            gradients: layout.views(&gradient),
            exp_avg: zeros(),
            exp_avg_sq: zeros(),
            gradient,
            updates: 0,
            layout,
            masters,
            compute,
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

    /// Where the model adds the gradient of each parameter: views of [`gradient`](Replica::gradient).
    pub fn gradients(&self) -> &Params {
        &self.gradients
    }

    /// Forgets the gradient: a new step begins.
    pub fn zero_gradient(&mut self) {
        let _ = self.gradient.zero_();
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
            compute.copy_(&self.masters);
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
    fn gradients_of_parameters_are_parts_of_the_flat_one() {
        let mut replica = replica();
        let _ = replica.gradients().get("a").shallow_clone().fill_(2.0);
        let gradient = Vec::<f32>::try_from(&replica.gradient).unwrap();
        assert_eq!(gradient, [2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0]);
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
