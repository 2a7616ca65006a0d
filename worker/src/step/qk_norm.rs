//! The variant with query and key norms: one norm over all H d channels of a token, after the feature map, with keys
//! already repeated to H heads. It is a detour between the products of the feature maps and heads.

use tch::{Device, Kind, Tensor};

use super::buffers::Projected;
use crate::{
    kernels::{Kernels, NormOut},
    model::{ModelConfig, accumulate_kind, attention::features::Features},
};

/// What the detour computes, or the gradients of it. All [n, H d] but for the statistics.
pub struct QkNorm {
    /// relu(pre_q + bias).
    pub q_nx: Tensor,
    /// relu(pre_k + bias), repeated.
    pub k_nx: Tensor,
    /// Values, repeated.
    pub v_nx: Tensor,
    /// Of the norm of `q_nx`: [n].
    pub rstd_q_n: Tensor,
    /// Of the norm of `k_nx`: [n].
    pub rstd_k_n: Tensor,
    /// `q_nx` normed.
    pub normed_q_nx: Tensor,
    /// `k_nx` normed.
    pub normed_k_nx: Tensor,
}

impl QkNorm {
    /// Buffers for n tokens.
    pub fn new(config: &ModelConfig, n: i64, (kind, device): (Kind, Device)) -> QkNorm {
        let channels = || Tensor::empty([n, config.heads * config.head_dim], (kind, device));
        let per_token = || Tensor::empty([n], (accumulate_kind(kind), device));
        QkNorm {
            q_nx: channels(),
            k_nx: channels(),
            v_nx: channels(),
            rstd_q_n: per_token(),
            rstd_k_n: per_token(),
            normed_q_nx: channels(),
            normed_k_nx: channels(),
        }
    }

    /// The same buffers, each made by `new` from this one.
    pub fn map(&self, new: impl Fn(&Tensor) -> Tensor) -> QkNorm {
        QkNorm {
            q_nx: new(&self.q_nx),
            k_nx: new(&self.k_nx),
            v_nx: new(&self.v_nx),
            rstd_q_n: new(&self.rstd_q_n),
            rstd_k_n: new(&self.rstd_k_n),
            normed_q_nx: new(&self.normed_q_nx),
            normed_k_nx: new(&self.normed_k_nx),
        }
    }

    /// From the products of the feature maps to what becomes heads.
    ///
    /// # Panics
    /// If the weights have no norms.
    pub fn forward(
        &mut self,
        kernels: &dyn Kernels,
        config: &ModelConfig,
        weights: &Features<'_>,
        projected: &Projected,
    ) {
        let (gain_q, gain_k) = gains(weights);
        let _ = projected
            .pre_q_nx
            .add_out(&self.q_nx, weights.query.bias)
            .relu_();
        let k_nx = (&projected.pre_k_nx + weights.key.bias).relu_();
        grouped(&self.k_nx, config).copy_(&single(&k_nx, config).unsqueeze(2));
        grouped(&self.v_nx, config).copy_(&single(&projected.v_nx, config).unsqueeze(2));
        let eps = config.norm_eps;
        let out = NormOut {
            rstd_n: &mut self.rstd_q_n,
            normed_nd: &mut self.normed_q_nx,
        };
        kernels.add_rms_norm(&self.q_nx, None, gain_q, eps, out);
        let out = NormOut {
            rstd_n: &mut self.rstd_k_n,
            normed_nd: &mut self.normed_k_nx,
        };
        kernels.add_rms_norm(&self.k_nx, None, gain_k, eps, out);
    }

    /// Back to the products of the feature maps. `gradient` holds the gradients of `normed_q_nx`, `normed_k_nx` and
    /// `v_nx`; those of `q_nx` and `k_nx` are made in it on the way.
    ///
    /// # Panics
    /// If the weights have no norms.
    pub fn backward(
        &self,
        kernels: &dyn Kernels,
        config: &ModelConfig,
        weights: &Features<'_>,
        dweights: &Features<'_>,
        gradient: &mut QkNorm,
        dprojected: &mut Projected,
    ) {
        let ((gain_q, gain_k), (dgain_q, dgain_k)) = (gains(weights), gains(dweights));
        let through = |dnormed, x, rstd, gain, dx: &mut Tensor, dgain: &Tensor| {
            let _ = dx.zero_();
            kernels.rms_norm_backward(dnormed, x, rstd, gain, dx, &mut dgain.shallow_clone());
        };
        let d = gradient;
        through(
            &d.normed_q_nx,
            &self.q_nx,
            &self.rstd_q_n,
            gain_q,
            &mut d.q_nx,
            dgain_q,
        );
        through(
            &d.normed_k_nx,
            &self.k_nx,
            &self.rstd_k_n,
            gain_k,
            &mut d.k_nx,
            dgain_k,
        );
        // Where relu let something through, its result is positive.
        let _ = self
            .q_nx
            .threshold_backward_grad_input(&dprojected.pre_q_nx, &d.q_nx, 0.0);
        let dk_nkd = sum_groups(&d.k_nx, config);
        let _ = grouped(&self.k_nx, config)
            .select(2, 0)
            .threshold_backward_grad_input(&single(&dprojected.pre_k_nx, config), &dk_nkd, 0.0);
        single(&dprojected.v_nx, config).copy_(&sum_groups(&d.v_nx, config));
        for (dpre_nx, dbias) in [
            (&dprojected.pre_q_nx, dweights.query.bias),
            (&dprojected.pre_k_nx, dweights.key.bias),
        ] {
            let sum = dpre_nx.sum_dim_intlist([0i64].as_slice(), false, dbias.kind());
            let _ = dbias.shallow_clone().g_add_(&sum);
        }
    }
}

fn gains<'a>(weights: &Features<'a>) -> (&'a Tensor, &'a Tensor) {
    weights
        .norms
        .expect("invariant: the detour is taken only with query and key norms")
}

/// View of [n, K d] as [n, K, d].
fn single(x_nx: &Tensor, config: &ModelConfig) -> Tensor {
    x_nx.view([-1, config.kv_heads, config.head_dim])
}

/// View of [n, H d] as [n, K, H / K, d].
fn grouped(x_nx: &Tensor, config: &ModelConfig) -> Tensor {
    x_nx.view([-1, config.kv_heads, config.group(), config.head_dim])
}

/// [n, H d] summed into [n, K, d].
fn sum_groups(x_nx: &Tensor, config: &ModelConfig) -> Tensor {
    grouped(x_nx, config).sum_dim_intlist([2i64].as_slice(), false, None::<Kind>)
}
