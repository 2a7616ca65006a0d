//! The recurrent form: U = S + k v^T, o = U^T q, S <- gamma U.
//!
//! The state S [B, H, d, e] is kept already decayed, in fp32 (fp64 for an fp64 model): with gamma or S in bf16 a layer is
//! some 7 % off.

use tch::{Device, Kind, Tensor};

/// The decay of each head, ready for single steps.
#[derive(Debug)]
pub struct Recurrent {
    gamma_h11: Tensor,
}

impl Recurrent {
    /// Computes in `kind`.
    pub fn new(slopes_h: &[f64], options: (Kind, Device)) -> Recurrent {
        let gammas: Vec<f64> = slopes_h.iter().map(|slope| (-slope).exp()).collect();
        let gamma_h11 = Tensor::from_slice(&gammas)
            .view([-1, 1, 1])
            .to_device(options.1)
            .to_kind(options.0);
        Recurrent { gamma_h11 }
    }

    /// One token: q, k [B, H, 1, d], v [B, H, 1, e] and the state before it to o [B, H, 1, e] and the state after it.
    pub fn step(
        &self,
        q_bh1d: &Tensor,
        k_bh1d: &Tensor,
        v_bh1e: &Tensor,
        state_bhde: &Tensor,
    ) -> (Tensor, Tensor) {
        let kind = self.gamma_h11.kind();
        let update = k_bh1d.to_kind(kind).transpose(-2, -1) * v_bh1e.to_kind(kind);
        let seen_bhde = state_bhde + update;
        (
            q_bh1d.to_kind(kind).matmul(&seen_bhde),
            seen_bhde * &self.gamma_h11,
        )
    }
}
