//! Kernels that also take the time: where a training step spends it, component by component.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    ops::Div,
    rc::Rc,
    time::Instant,
};

use serde::Serialize;
use tch::{Device, Tensor};

use super::{
    DecayTables, Delta, HeadsGrad, HeadsIn, KernelError, Kernels, NormOut, Shard, Update,
    cuda::{Event, Gpu},
};

/// What a step is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Component {
    /// Matrix products of linear layers.
    Gemm,
    /// Linear attention, without its projections.
    Attention,
    /// Norms, head layout, rotary embedding, gates, embedding gradient: one pass over memory each.
    Elementwise,
    /// Cross-entropy and its gradient.
    Loss,
    /// Norm of the gradient and AdamW.
    Optimizer,
}

/// What a component did while its time was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Time on the device.
    pub milliseconds: f64,
    /// Multiplications and additions of matrix products.
    pub flops: f64,
    /// What has to pass between memory and processors, each operand of each call once.
    pub bytes: f64,
}

impl Div<f64> for Cost {
    type Output = Cost;

    fn div(self, parts: f64) -> Cost {
        Cost {
            milliseconds: self.milliseconds / parts,
            flops: self.flops / parts,
            bytes: self.bytes / parts,
        }
    }
}

/// Lets other kernels work and, while asked to, takes their time. Then each call costs two marks on the stream, a
/// microsecond or two.
pub struct Timed {
    inner: Rc<dyn Kernels>,
    asked: Cell<bool>,
    gpu: Option<Gpu>,
    spans: RefCell<Vec<Span>>,
    failure: RefCell<Option<KernelError>>,
}

/// A call.
struct Span {
    component: Component,
    flops: f64,
    bytes: f64,
    from: Mark,
    to: Mark,
}

/// When something was done.
enum Mark {
    Host(Instant),
    Device(Event),
}

impl Timed {
    /// Takes the time of what `inner` does on `device`.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(inner: Rc<dyn Kernels>, device: Device) -> Result<Timed, KernelError> {
        let gpu = match device {
            Device::Cuda(index) => Some(Gpu::open(index)?),
            _ => None,
        };
        Ok(Timed {
            inner,
            asked: Cell::new(false),
            gpu,
            spans: RefCell::default(),
            failure: RefCell::default(),
        })
    }

    /// Bytes per second between a GPU's memory and its processors, at most.
    pub fn bandwidth(&self) -> Option<f64> {
        self.gpu.as_ref()?.bandwidth().ok()
    }

    /// Begins to take times.
    pub fn start(&self) {
        self.asked.set(true);
    }

    /// The costs since [`start`](Timed::start), and no more times from here on. Waits for the device.
    ///
    /// # Errors
    /// The driver's, also of an earlier call: then times are missing.
    pub fn take(&self) -> Result<BTreeMap<Component, Cost>, KernelError> {
        self.asked.set(false);
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        let mut costs = BTreeMap::<_, Cost>::new();
        for span in self.spans.take() {
            let cost = costs.entry(span.component).or_default();
            cost.milliseconds += self.between(&span.from, &span.to)?;
            cost.flops += span.flops;
            cost.bytes += span.bytes;
        }
        Ok(costs)
    }

    fn mark(&self) -> Option<Mark> {
        let Some(gpu) = &self.gpu else {
            return Some(Mark::Host(Instant::now()));
        };
        match Event::now(gpu) {
            Ok(event) => Some(Mark::Device(event)),
            Err(error) => {
                self.failure.borrow_mut().get_or_insert(error);
                None
            }
        }
    }

    /// Milliseconds from one mark to a later one.
    fn between(&self, from: &Mark, to: &Mark) -> Result<f64, KernelError> {
        match (from, to, &self.gpu) {
            (Mark::Device(from), Mark::Device(to), Some(gpu)) => to.since(from, gpu),
            (Mark::Host(from), Mark::Host(to), _) => {
                Ok(to.duration_since(*from).as_secs_f64() * 1e3)
            }
            _ => unreachable!("all marks of one `Timed` are of its device"),
        }
    }

    fn time<T>(
        &self,
        component: Component,
        flops: f64,
        bytes: f64,
        work: impl FnOnce(&dyn Kernels) -> T,
    ) -> T {
        if !self.asked.get() {
            return work(self.inner.as_ref());
        }
        let from = self.mark();
        let result = work(self.inner.as_ref());
        if let (Some(from), Some(to)) = (from, self.mark()) {
            self.spans.borrow_mut().push(Span {
                component,
                flops,
                bytes,
                from,
                to,
            });
        }
        result
    }

    fn product(&self, x: &Tensor, y: &Tensor, z: &Tensor, work: impl FnOnce(&dyn Kernels)) {
        // Each of the three axes of a product is an axis of two of its three matrices.
        let [x_elements, y_elements, z_elements] = [x, y, z].map(|matrix| matrix.numel() as f64);
        let flops = 2.0 * (x_elements * y_elements * z_elements).sqrt();
        self.time(Component::Gemm, flops, bytes(&[x, y, z]), work);
    }

    fn elementwise(&self, bytes: f64, work: impl FnOnce(&dyn Kernels)) {
        self.time(Component::Elementwise, 0.0, bytes, work);
    }
}

/// Bytes of the tensors, each once.
fn bytes(tensors: &[&Tensor]) -> f64 {
    let of = |tensor: &&Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
    tensors.iter().map(of).sum::<usize>() as f64
}

/// Products inside the chunks and with the state, per token and query head, of one pass over a causal chunk: multiplied by the
/// number of such passes.
fn attention_flops(decay: &DecayTables, q_bhtd: &Tensor, passes: f64) -> f64 {
    let size = q_bhtd.size();
    let (tokens_heads, d) = ((size[0] * size[1] * size[2]) as f64, size[3] as f64);
    passes * tokens_heads * d * (4.0 * d + 2.0 * decay.chunk as f64)
}

impl Kernels for Timed {
    fn linear(&self, x_ni: &Tensor, weight_oi: &Tensor, y_no: &Tensor) {
        self.product(x_ni, weight_oi, y_no, |inner| {
            inner.linear(x_ni, weight_oi, y_no)
        });
    }

    fn linear_input_gradient(&self, dy_no: &Tensor, weight_oi: &Tensor, dx_ni: &Tensor) {
        self.product(dy_no, weight_oi, dx_ni, |inner| {
            inner.linear_input_gradient(dy_no, weight_oi, dx_ni);
        });
    }

    fn linear_weight_gradient(&self, dy_no: &Tensor, x_ni: &Tensor, dweight_oi_sum: &Tensor) {
        self.product(dy_no, x_ni, dweight_oi_sum, |inner| {
            inner.linear_weight_gradient(dy_no, x_ni, dweight_oi_sum);
        });
    }

    fn add_rms_norm(
        &self,
        x_nd: &Tensor,
        delta: Option<Delta<'_>>,
        gain_d: &Tensor,
        eps: f64,
        out: NormOut<'_>,
    ) {
        let passes = if delta.is_some() { 4.0 } else { 2.0 };
        self.elementwise(passes * bytes(&[x_nd]), |inner| {
            inner.add_rms_norm(x_nd, delta, gain_d, eps, out);
        });
    }

    fn rms_norm_again(
        &self,
        x_nd: &Tensor,
        rstd_n: &Tensor,
        gain_d: &Tensor,
        normed_nd: &mut Tensor,
    ) {
        self.elementwise(bytes(&[x_nd, normed_nd]), |inner| {
            inner.rms_norm_again(x_nd, rstd_n, gain_d, normed_nd);
        });
    }

    fn rms_norm_backward(
        &self,
        dnormed_nd: &Tensor,
        x_nd: &Tensor,
        rstd_n: &Tensor,
        gain_d: &Tensor,
        dx_nd_sum: &mut Tensor,
        dgain_d_sum: &mut Tensor,
    ) {
        let moved = bytes(&[dnormed_nd, x_nd, dx_nd_sum, dx_nd_sum]);
        self.elementwise(moved, |inner| {
            inner.rms_norm_backward(dnormed_nd, x_nd, rstd_n, gain_d, dx_nd_sum, dgain_d_sum);
        });
    }

    fn heads(
        &self,
        input: &HeadsIn<'_>,
        q_bhtd: &mut Tensor,
        k_bktd: &mut Tensor,
        v_bktd: &mut Tensor,
    ) {
        let moved = 2.0 * bytes(&[q_bhtd, k_bktd, v_bktd]);
        self.elementwise(moved, |inner| inner.heads(input, q_bhtd, k_bktd, v_bktd));
    }

    fn heads_backward(
        &self,
        input: &HeadsIn<'_>,
        dq_bhtd: &Tensor,
        dk_bktd: &Tensor,
        dv_bktd: &Tensor,
        out: HeadsGrad<'_>,
    ) {
        let read_again = input.biases.map_or(0.0, |_| bytes(&[dq_bhtd, dk_bktd]));
        let moved = 2.0 * bytes(&[dq_bhtd, dk_bktd, dv_bktd]) + read_again;
        self.elementwise(moved, |inner| {
            inner.heads_backward(input, dq_bhtd, dk_bktd, dv_bktd, out);
        });
    }

    fn linear_attention(
        &self,
        decay: &DecayTables,
        q_bhtd: &Tensor,
        k_bktd: &Tensor,
        v_bktd: &Tensor,
        o_bhtd: &mut Tensor,
    ) {
        let flops = attention_flops(decay, q_bhtd, 1.0);
        let moved = bytes(&[q_bhtd, k_bktd, v_bktd, o_bhtd]);
        self.time(Component::Attention, flops, moved, |inner| {
            inner.linear_attention(decay, q_bhtd, k_bktd, v_bktd, o_bhtd);
        });
    }

    fn linear_attention_from(
        &self,
        decay: &DecayTables,
        qkv: [&Tensor; 3],
        state_bhde: &mut Tensor,
        o_bhtd: &mut Tensor,
    ) {
        let flops = attention_flops(decay, o_bhtd, 1.0);
        let moved = bytes(&qkv) + bytes(&[o_bhtd]) + 2.0 * bytes(&[state_bhde]);
        self.time(Component::Attention, flops, moved, |inner| {
            inner.linear_attention_from(decay, qkv, state_bhde, o_bhtd);
        });
    }

    fn linear_attention_backward(
        &self,
        decay: &DecayTables,
        qkv: [&Tensor; 3],
        do_bhtd: &Tensor,
        dqkv: [&mut Tensor; 3],
    ) {
        let flops = attention_flops(decay, do_bhtd, 2.0);
        let moved = 2.0 * bytes(&qkv) + bytes(&[do_bhtd]);
        self.time(Component::Attention, flops, moved, |inner| {
            inner.linear_attention_backward(decay, qkv, do_bhtd, dqkv);
        });
    }

    fn head_norm(&self, o_bhtd: &Tensor, out_nx: &mut Tensor) {
        self.elementwise(bytes(&[o_bhtd, out_nx]), |inner| {
            inner.head_norm(o_bhtd, out_nx);
        });
    }

    fn head_norm_backward(&self, dout_nx: &Tensor, o_bhtd: &Tensor, do_bhtd: &mut Tensor) {
        self.elementwise(bytes(&[dout_nx, o_bhtd, do_bhtd]), |inner| {
            inner.head_norm_backward(dout_nx, o_bhtd, do_bhtd);
        });
    }

    fn swiglu(&self, gate_up_nx: &Tensor, out_nf: &mut Tensor) {
        self.elementwise(bytes(&[gate_up_nx, out_nf]), |inner| {
            inner.swiglu(gate_up_nx, out_nf);
        });
    }

    fn swiglu_backward(
        &self,
        gate_up_nx: &mut Tensor,
        dout_nf: &Tensor,
        out_nf: Option<&mut Tensor>,
    ) {
        let again = out_nf.as_ref().map_or(0.0, |out_nf| bytes(&[out_nf]));
        let moved = bytes(&[gate_up_nx, gate_up_nx, dout_nf]) + again;
        self.elementwise(moved, |inner| {
            inner.swiglu_backward(gate_up_nx, dout_nf, out_nf);
        });
    }

    fn cross_entropy(
        &self,
        logits_cv: &mut Tensor,
        targets_c: &Tensor,
        mask_c: &Tensor,
        z_loss: f64,
        loss_2_sum: &mut Tensor,
    ) {
        let moved = bytes(&[logits_cv, logits_cv]);
        self.time(Component::Loss, 0.0, moved, |inner| {
            inner.cross_entropy(logits_cv, targets_c, mask_c, z_loss, loss_2_sum);
        });
    }

    fn embedding_backward(&self, dx_nd: &Tensor, ids_n: &Tensor, dembedding_vd_sum: &mut Tensor) {
        // At most one row of the sum per token, read and written in fp32.
        let moved = bytes(&[dx_nd]) + 8.0 * dx_nd.numel() as f64;
        self.elementwise(moved, |inner| {
            inner.embedding_backward(dx_nd, ids_n, dembedding_vd_sum);
        });
    }

    fn squared_norm(&self, flats_m: &[Tensor]) -> f64 {
        let flats: Vec<&Tensor> = flats_m.iter().collect();
        self.time(Component::Optimizer, 0.0, bytes(&flats), |inner| {
            inner.squared_norm(flats_m)
        })
    }

    fn adamw(&self, shard: Shard<'_>, update: &Update) {
        let state = [&*shard.param_m, &*shard.exp_avg_m, &*shard.exp_avg_sq_m];
        let remainder = shard
            .remainder_m
            .as_ref()
            .map_or(0.0, |remainder| bytes(&[remainder]));
        let moved = 2.0 * (bytes(&state) + remainder) + bytes(&[shard.gradient_m]);
        self.time(Component::Optimizer, 0.0, moved, |inner| {
            inner.adamw(shard, update);
        });
    }

    fn fingerprint(&self, flat_m: &Tensor, first: i64, key: u64) -> Result<[u64; 4], KernelError> {
        self.inner.fingerprint(flat_m, first, key)
    }

    fn check(&self) -> Result<(), KernelError> {
        self.inner.check()
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::kernels::Twin;

    #[test]
    fn only_what_is_done_while_asked_is_counted() {
        let timed = Timed::new(Rc::new(Twin), Device::Cpu).unwrap();
        let ones = |rows, columns| Tensor::ones([rows, columns], (Kind::Float, Device::Cpu));
        let (x, weight, y) = (ones(6, 4), ones(3, 4), ones(6, 3));
        timed.linear(&x, &weight, &y);
        assert!(timed.take().unwrap().is_empty());
        assert_eq!(
            y.double_value(&[5, 2]),
            4.0,
            "the work is done all the same"
        );

        timed.start();
        timed.linear(&x, &weight, &y);
        timed.linear_input_gradient(&y, &weight, &x);
        timed.linear_weight_gradient(&y, &x, &weight);
        timed.swiglu(&x, &mut ones(6, 2));
        let costs = timed.take().unwrap();
        let gemm = costs[&Component::Gemm];
        assert!(
            (gemm.flops - 3.0 * 2.0 * 6.0 * 4.0 * 3.0).abs() < 1e-9,
            "{gemm:?}"
        );
        assert_eq!(gemm.bytes, 3.0 * 4.0 * (24.0 + 12.0 + 18.0));
        assert_eq!(costs[&Component::Elementwise].bytes, 4.0 * (24.0 + 12.0));
        assert!(costs.values().all(|cost| cost.milliseconds >= 0.0));
        assert!(timed.take().unwrap().is_empty());
    }
}
