//! The feature maps' bias and relu, rotary embedding, and the way from tokens first to heads first.

use tch::{Kind, Tensor};

use super::{heads_first, rounded, wide};
use crate::kernels::{HeadsGrad, HeadsIn};

pub fn heads(input: &HeadsIn<'_>, q_bhtd: &mut Tensor, k_bktd: &mut Tensor, v_bktd: &mut Tensor) {
    let shape = &input.shape;
    let bias = |which: usize| input.biases.map(|biases| biases[which]);
    let features = |pre_nx: &Tensor, bias: Option<&Tensor>| match bias {
        Some(bias) => biased(pre_nx, bias).relu_(),
        None => wide(pre_nx),
    };
    let q_nx = features(input.pre_q_nx, bias(0));
    let k_nx = features(input.pre_k_nx, bias(1));
    let rotation = Rotation::new(input, 1.0);
    rounded(q_bhtd, |q_bhtd| {
        rotation.turn(&heads_first(&q_nx, shape.batch, shape.heads), q_bhtd)
    });
    let rotation = Rotation::new(input, input.key_scale);
    rounded(k_bktd, |k_bktd| {
        rotation.turn(&heads_first(&k_nx, shape.batch, shape.kv_heads), k_bktd)
    });
    v_bktd.copy_(&heads_first(input.v_nx, shape.batch, shape.kv_heads));
}

pub fn heads_backward(
    input: &HeadsIn<'_>,
    dq_bhtd: &Tensor,
    dk_bktd: &Tensor,
    dv_bktd: &Tensor,
    out: HeadsGrad<'_>,
) {
    let shape = &input.shape;
    let [dbias_q, dbias_k] = match out.dbiases_sum {
        Some(dbiases) => dbiases.map(Some),
        None => [None, None],
    };
    let bias = |which: usize| input.biases.map(|biases| biases[which]);
    back(
        &Rotation::new(input, 1.0).reversed(),
        &wide(dq_bhtd),
        (input.pre_q_nx, bias(0)),
        (out.dpre_q_nx, dbias_q),
    );
    back(
        &Rotation::new(input, input.key_scale).reversed(),
        &wide(dk_bktd),
        (input.pre_k_nx, bias(1)),
        (out.dpre_k_nx, dbias_k),
    );
    heads_first(out.dv_nx, shape.batch, shape.kv_heads).copy_(dv_bktd);
}

/// Back through rotation, relu and bias of queries or keys.
fn back(
    rotation: &Rotation,
    dx_bhtd: &Tensor,
    (pre_nx, bias): (&Tensor, Option<&Tensor>),
    (dpre_nx, dbias_sum): (&mut Tensor, Option<&mut Tensor>),
) {
    let (batch, heads) = (dx_bhtd.size()[0], dx_bhtd.size()[1]);
    rounded(dpre_nx, |dpre_nx| {
        rotation.turn(dx_bhtd, &mut heads_first(dpre_nx, batch, heads));
        if let (Some(bias), Some(dbias_sum)) = (bias, dbias_sum) {
            let _ = biased(pre_nx, bias).threshold_backward_grad_input(dpre_nx, dpre_nx, 0.0);
            let _ =
                dbias_sum.g_add_(&dpre_nx.sum_dim_intlist([0i64].as_slice(), false, None::<Kind>));
        }
    });
}

/// What relu is applied to: wide.
fn biased(pre_nx: &Tensor, bias: &Tensor) -> Tensor {
    wide(pre_nx) + wide(bias)
}

/// Rotation of the half-split pairs of channels, and a scale.
struct Rotation {
    cos_x1tp: Tensor,
    sin_x1tp: Tensor,
}

impl Rotation {
    fn new(input: &HeadsIn<'_>, scale: f64) -> Rotation {
        Rotation {
            cos_x1tp: (input.cos_xtp * scale).unsqueeze(1),
            sin_x1tp: (input.sin_xtp * scale).unsqueeze(1),
        }
    }

    /// The transpose: the other way round, with the same scale.
    fn reversed(self) -> Rotation {
        Rotation {
            sin_x1tp: self.sin_x1tp.neg(),
            ..self
        }
    }

    /// Writes x turned into `out`, both [B, heads, T, d] with any strides.
    fn turn(&self, x_bhtd: &Tensor, out_bhtd: &mut Tensor) {
        let p = x_bhtd.size()[3] / 2;
        let half = |x: &Tensor, which: i64| x.narrow(3, which * p, p);
        let (first, second) = (half(x_bhtd, 0), half(x_bhtd, 1));
        let (mut turned_first, mut turned_second) = (half(out_bhtd, 0), half(out_bhtd, 1));
        let _ = first.mul_out(&turned_first, &self.cos_x1tp);
        let _ = turned_first.addcmul_(&second, &self.sin_x1tp.neg());
        let _ = second.mul_out(&turned_second, &self.cos_x1tp);
        let _ = turned_second.addcmul_(&first, &self.sin_x1tp);
    }
}
