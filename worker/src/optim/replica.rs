//! One rank's copy of everything that training changes.
//!
//! Parameters, both moments and the gradient are flat buffers of one [`Layout`]. The model computes on views of the
//! parameters and adds its gradients to views of the gradient. In fp32 the parameters are the masters; in bf16 they are
//! the masters' upper halves, and a remainder of 16 bits each is the rest.

use tch::{Device, Kind, Tensor};

use super::{Layout, chunks};
use crate::{
    collective::{DeviceCollective, DeviceCollectiveError},
    kernels::{Kernels, Shard, Twin},
    model::Params,
};

/// Kinds of the numbers that a replica keeps, each fp32 or bf16. Masters and gradient are fp32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kinds {
    /// What the model computes in.
    pub parameters: Kind,
    /// Both moments'.
    pub moments: Kind,
}

/// Parameters, optimizer state and gradient of one rank.
pub struct Replica {
    layout: Layout,
    /// What the model computes on, flat.
    pub parameters: Tensor,
    /// What masters have beyond bf16 parameters: i16, flat.
    pub remainder: Option<Tensor>,
    /// First moment of the gradient, flat.
    pub exp_avg: Tensor,
    /// Second moment of the gradient, flat.
    pub exp_avg_sq: Tensor,
    /// Sum of the gradients of the step in hand, fp32, flat.
    pub gradient: Tensor,
    /// Updates applied so far: AdamW's step counter. A skipped step does not count.
    pub updates: u64,
    params: Params,
    gradients: Params,
}

impl Replica {
    /// A replica that has seen no update. `masters` is flat, in the layout's order.
    pub fn new(layout: Layout, masters: Tensor, kinds: Kinds, device: Device) -> Replica {
        let masters = masters.to_device(device).to_kind(Kind::Float).contiguous();
        let zeros = |kind| Tensor::zeros([layout.elements()], (kind, device));
        let (parameters, remainder) = if kinds.parameters == Kind::Float {
            (masters, None)
        } else {
            let (mut parameters, mut remainder) = (zeros(kinds.parameters), zeros(Kind::Int16));
            Twin.split(&masters, &mut parameters, &mut remainder);
            (parameters, Some(remainder))
        };
        let gradient = zeros(Kind::Float);
        Replica {
            params: layout.views(&parameters),
            gradients: layout.views(&gradient),
            exp_avg: zeros(kinds.moments),
            exp_avg_sq: zeros(kinds.moments),
            gradient,
            updates: 0,
            layout,
            parameters,
            remainder,
        }
    }

    /// fp32 masters of all parameters, flat: the parameters themselves, or joined from their halves.
    pub fn masters(&self) -> Tensor {
        match &self.remainder {
            None => self.parameters.shallow_clone(),
            Some(remainder) => {
                let mut masters = Tensor::zeros_like(&self.gradient);
                Twin.join(&self.parameters, remainder, &mut masters);
                masters
            }
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

    /// What an update reads and changes.
    pub fn shard(&mut self) -> Shard<'_> {
        Shard {
            decayed: self.layout.decayed(),
            first: 0,
            param_m: &mut self.parameters,
            remainder_m: self.remainder.as_mut(),
            gradient_m: &self.gradient,
            exp_avg_m: &mut self.exp_avg,
            exp_avg_sq_m: &mut self.exp_avg_sq,
        }
    }

    /// BLAKE3 over the bytes of parameters, remainder, first and second moments (little-endian, flat order) and the
    /// number of updates: equal on two ranks exactly when they will go on alike.
    pub fn hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let mut host = Vec::new();
        let flats = [Some(&self.parameters), self.remainder.as_ref()];
        let moments = [Some(&self.exp_avg), Some(&self.exp_avg_sq)];
        for flat in flats.into_iter().chain(moments).flatten() {
            for (start, length) in chunks(self.layout.elements()) {
                let halves = flat.narrow(0, start, length).view_dtype(Kind::Int16);
                let count = halves.numel();
                host.resize(count, 0i16);
                halves.copy_data(&mut host, count);
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
            Tensor::arange(7, (Kind::Float, Device::Cpu)) + 1e-3,
            Kinds {
                parameters: Kind::BFloat16,
                moments: Kind::Float,
            },
            Device::Cpu,
        )
    }

    #[test]
    fn bf16_parameters_and_the_remainder_are_the_masters() {
        let replica = replica();
        let masters = Tensor::arange(7, (Kind::Float, Device::Cpu)) + 1e-3;
        assert!(replica.masters() == masters);
        assert!(
            replica.parameters == masters.to_kind(Kind::BFloat16),
            "no ties here"
        );
    }

    #[test]
    fn gradients_of_parameters_are_parts_of_the_flat_one() {
        let mut replica = replica();
        let _ = replica.gradients().get("a").shallow_clone().fill_(2.0);
        let gradient = Vec::<f32>::try_from(&replica.gradient).unwrap();
        assert_eq!(gradient, [2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0]);
        replica.zero_gradient();
        assert_eq!(
            replica.gradient.count_nonzero(None::<i64>).int64_value(&[]),
            0
        );
    }

    #[test]
    fn the_hash_sees_every_part_of_the_state() {
        let mut replica = replica();
        let mut seen = vec![replica.hash()];
        let _ = replica.parameters.narrow(0, 6, 1).fill_(9.0);
        seen.push(replica.hash());
        let _ = replica.remainder.as_ref().unwrap().narrow(0, 2, 1).fill_(9);
        seen.push(replica.hash());
        let _ = replica.exp_avg.narrow(0, 0, 1).fill_(1e-30);
        seen.push(replica.hash());
        let _ = replica.exp_avg_sq.narrow(0, 3, 1).fill_(1e-30);
        seen.push(replica.hash());
        replica.updates += 1;
        seen.push(replica.hash());
        let _ = replica.gradient.fill_(1.0);
        assert_eq!(replica.hash(), seen[5], "the gradient is not state");
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 6);
    }
}
