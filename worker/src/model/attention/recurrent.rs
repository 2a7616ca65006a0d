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

    /// One token of each sequence: o [B, H, 1, e] of q, k [B, H, 1, d] and v [B, H, 1, e], of the kind computed in. Those rows
    /// of `state_shde` that `slots_b` names, at least one, move on in place.
    pub fn advance(
        &self,
        [q_bh1d, k_bh1d, v_bh1e]: [&Tensor; 3],
        state_shde: &mut Tensor,
        slots_b: &[i64],
    ) -> Tensor {
        let (first, count) = (slots_b[0], slots_b.len() as i64);
        if slots_b.iter().copied().eq(first..first + count) {
            let mut rows = state_shde.narrow(0, first, count);
            return self.update([q_bh1d, k_bh1d, v_bh1e], &mut rows);
        }
        let index_b = Tensor::from_slice(slots_b).to_device(state_shde.device());
        let mut rows = state_shde.index_select(0, &index_b);
        let o_bh1e = self.update([q_bh1d, k_bh1d, v_bh1e], &mut rows);
        let _ = state_shde.index_copy_(0, &index_b, &rows);
        o_bh1e
    }

    fn update(&self, [q_bh1d, k_bh1d, v_bh1e]: [&Tensor; 3], state_bhde: &mut Tensor) -> Tensor {
        let size = state_bhde.size();
        let (b, h, d, e) = (size[0], size[1], size[2], size[3]);
        let mut state_xde = state_bhde.view([b * h, d, e]);
        let _ = state_xde.baddbmm_(
            &k_bh1d.reshape([b * h, d, 1]),
            &v_bh1e.reshape([b * h, 1, e]),
        );
        let o_x1e = q_bh1d.reshape([b * h, 1, d]).bmm(&state_xde);
        let _ = state_bhde.g_mul_(&self.gamma_h11);
        o_x1e.view([b, h, 1, e])
    }
}
