//! AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101) on flat buffers.

use supra_recipes::schema::Optimizer;

use super::Replica;
use crate::kernels::{Kernels, Update, mix};

/// The constants of AdamW; the learning rate comes with each update.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    seed: u64,
}

impl AdamW {
    /// The optimizer that a recipe asks for. Of `seed`, the run's, is the random rounding of bf16 moments.
    pub fn new(optimizer: &Optimizer, seed: u64) -> AdamW {
        AdamW {
            betas: optimizer.betas,
            eps: optimizer.eps,
            weight_decay: optimizer.weight_decay,
            seed,
        }
    }

    /// Applies one update to the replica's part of masters and moments, and to its update counter. Calls `updated` with the
    /// number of each bucket behind its update, and stops when that fails.
    ///
    /// The gradient in the replica is a sum; `gradient_scale` makes it the clipped gradient of the mean loss.
    /// Deterministic: every operation is elementwise, in a fixed order, and rounding is random only by seed, update and
    /// place.
    pub fn update<E>(
        &self,
        kernels: &dyn Kernels,
        replica: &mut Replica,
        learning_rate: f64,
        gradient_scale: f64,
        mut updated: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<(), E> {
        replica.updates += 1;
        let power = replica.updates.min(i32::MAX as u64) as i32;
        let (beta1, beta2) = self.betas;
        let update = Update {
            gradient_scale,
            betas: self.betas,
            eps: self.eps,
            step_size: learning_rate / (1.0 - beta1.powi(power)),
            root_correction: (1.0 - beta2.powi(power)).sqrt(),
            decay: 1.0 - learning_rate * self.weight_decay,
            rounding: mix::number(self.seed, replica.updates),
        };
        let _guard = tch::no_grad_guard();
        for bucket in 0..replica.layout().buckets().len() {
            replica.update(bucket, |shard| kernels.adamw(shard, &update));
            updated(bucket)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use supra_agent::collective::Solo;
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::{
        kernels::Twin,
        model::ParamSpec,
        optim::{Kinds, Layout, Part, Run, Section},
    };

    const BETAS: (f64, f64) = (0.9, 0.95);

    fn replica(parameters: Kind, moments: Kind) -> Replica {
        let spec = |name: &str, shape: &[i64], decayed| ParamSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            decayed,
            new: false,
        };
        let layout = Layout::new(
            &[spec("norm", &[2], false), spec("w", &[2, 2], true)],
            false,
            1,
        );
        let masters = Tensor::from_slice(&[0.5f32, -1.0, 2.0, 0.25, 1.0, 1.0]);
        let kinds = Kinds {
            parameters,
            moments,
        };
        let mut replica = Replica::new(layout, Part::WHOLE, kinds, Device::Cpu);
        replica.load(Section::Masters, 0, &masters);
        replica
    }

    fn set_gradient(replica: &mut Replica, numbers: &Tensor) {
        replica.gradient.narrow(0, 0, 6).copy_(numbers);
    }

    fn update(adamw: AdamW, replica: &mut Replica, learning_rate: f64, scale: f64) {
        let Ok(()) = adamw.update(&Twin, replica, learning_rate, scale, |_| {
            Ok::<_, Infallible>(())
        });
    }

    /// The textbook formulas in fp64, one number at a time.
    fn reference(steps: &[[f64; 6]], lr: f64, eps: f64, weight_decay: f64) -> [f64; 6] {
        let mut params = [0.5, -1.0, 2.0, 0.25, 1.0, 1.0];
        let (mut m, mut v) = ([0.0; 6], [0.0; 6]);
        for (t, gradient) in steps.iter().enumerate() {
            let t = t as i32 + 1;
            for i in 0..6 {
                m[i] = BETAS.0 * m[i] + (1.0 - BETAS.0) * gradient[i];
                v[i] = BETAS.1 * v[i] + (1.0 - BETAS.1) * gradient[i] * gradient[i];
                let (m_hat, v_hat) = (
                    m[i] / (1.0 - BETAS.0.powi(t)),
                    v[i] / (1.0 - BETAS.1.powi(t)),
                );
                let decay: f64 = if i < 4 { weight_decay } else { 0.0 };
                params[i] -= lr * decay * params[i] + lr * m_hat / (v_hat.sqrt() + eps);
            }
        }
        params
    }

    fn adamw(weight_decay: f64) -> AdamW {
        AdamW {
            betas: BETAS,
            eps: 1e-8,
            weight_decay,
            seed: 17,
        }
    }

    const STEPS: [[f64; 6]; 3] = [
        [0.1, -0.2, 0.3, 0.0, 0.5, -0.6],
        [0.3, 0.1, -0.1, 0.2, 0.0, 1.0],
        [-0.2; 6],
    ];

    fn train(replica: &mut Replica) {
        for gradient in &STEPS {
            // Twice the gradient and half the scale: the scale is applied once.
            set_gradient(replica, &(Tensor::from_slice(gradient) * 2.0));
            update(adamw(0.1), replica, 0.01, 0.5);
        }
    }

    #[test]
    fn updates_follow_the_formulas_to_the_precision_of_masters_and_moments() {
        for (parameters, moments, tolerance) in [
            (Kind::Float, Kind::Float, 1e-6),
            (Kind::BFloat16, Kind::Float, 1e-6),
            (Kind::BFloat16, Kind::BFloat16, 3e-4),
        ] {
            let mut replica = replica(parameters, moments);
            train(&mut replica);
            let (run, mut bytes) = (
                Run {
                    all: 0,
                    own: 0,
                    length: 6,
                },
                Vec::new(),
            );
            let numbers = replica.numbers(Part::WHOLE);
            numbers.read(Section::Masters, run, &mut bytes);
            let masters = Tensor::from_data_size(&bytes, &[6], Kind::Float).to_kind(Kind::Double);
            let got = Vec::<f64>::try_from(masters).unwrap();
            for (got, want) in got.iter().zip(reference(&STEPS, 0.01, 1e-8, 0.1)) {
                let error = (got - want).abs();
                assert!(
                    error < tolerance,
                    "{parameters:?} {moments:?}: {got} for {want}"
                );
            }
            assert_eq!(replica.updates, 3);
        }
    }

    #[test]
    fn rounding_depends_on_the_seed_and_on_nothing_that_passes() {
        let trained = |seed| {
            let mut replica = replica(Kind::BFloat16, Kind::BFloat16);
            for _ in 0..20 {
                set_gradient(&mut replica, &Tensor::from_slice(&STEPS[0]));
                update(AdamW { seed, ..adamw(0.1) }, &mut replica, 0.01, 1.0);
            }
            replica.hash(&Twin, &mut Solo).unwrap()
        };
        assert_eq!(trained(1), trained(1));
        assert_ne!(trained(1), trained(2));
    }

    #[test]
    fn leaves_see_the_update_in_both_precisions() {
        for precision in [Kind::Float, Kind::BFloat16] {
            let mut replica = replica(precision, Kind::Float);
            let _ = replica.gradient.fill_(1.0);
            update(adamw(0.0), &mut replica, 0.125, 1.0);
            let leaf = replica.params().get("norm").to_kind(Kind::Double);
            assert!(
                (leaf.double_value(&[0]) - 0.875).abs() < 1e-6,
                "{precision:?}"
            );
        }
    }
}
