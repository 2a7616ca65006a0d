//! The gate of the feed-forward layer.

use tch::Tensor;

use super::{rounded, wide};

pub fn swiglu(gate_up_nx: &Tensor, out_nf: &mut Tensor) {
    let [gate_nf, up_nf] = halves(gate_up_nx);
    rounded(out_nf, |out_nf| {
        let _ = wide(&gate_nf).silu_out(out_nf);
        let _ = out_nf.g_mul_(&up_nf);
    });
}

pub fn swiglu_backward(gate_up_nx: &mut Tensor, dout_nf: &Tensor) {
    let [mut gate_nf, up_nf] = halves(gate_up_nx);
    let (wide_gate_nf, dout_nf) = (wide(&gate_nf), wide(dout_nf));
    let silu_nf = wide_gate_nf.silu();
    let dsilu_nf = &dout_nf * &up_nf;
    rounded(&mut gate_nf, |dgate_nf| {
        let _ = wide_gate_nf.silu_backward_grad_input(dgate_nf, &dsilu_nf);
    });
    let _ = silu_nf.mul_out(&up_nf, &dout_nf);
}

/// Views of the two halves of the rows.
fn halves(gate_up_nx: &Tensor) -> [Tensor; 2] {
    let f = gate_up_nx.size()[1] / 2;
    [0, f].map(|start| gate_up_nx.narrow(1, start, f))
}
