//! Every function against the plainest form of it, and its gradient against autograd, in fp64.

use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use super::Twin;
use crate::{
    kernels::{DecayTables, Delta, HeadShape, HeadsGrad, HeadsIn, Kernels, NormOut},
    model::{
        Documents,
        attention::{features::repeat_heads, parallel::Parallel},
        loss, norm,
    },
};

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, DOUBLE)
}

/// What must not be read before it is written.
fn poison(shape: &[i64]) -> Tensor {
    Tensor::full(shape, f64::NAN, DOUBLE)
}

fn leaf(tensor: &Tensor) -> Tensor {
    tensor.copy().set_requires_grad(true)
}

/// Gradients of the leaves from that of `out`.
fn autograd<const N: usize>(out: &Tensor, dout: &Tensor, leaves: [&Tensor; N]) -> [Tensor; N] {
    let sum = (out * dout).sum(None::<Kind>);
    Tensor::run_backward(&[sum], &leaves, false, false)
        .try_into()
        .unwrap()
}

#[track_caller]
fn assert_close(found: &Tensor, expected: &Tensor) {
    assert_eq!(found.size(), expected.size());
    let error = (found - expected).norm().double_value(&[]);
    let scale = expected.norm().double_value(&[]).max(1e-3);
    assert!(error <= 1e-10 * scale, "off by {error:e} of {scale:e}");
}

fn shapes() -> impl Strategy<Value = HeadShape> {
    let heads = prop_oneof![Just((4, 4)), Just((4, 1)), Just((6, 2)), Just((3, 3))];
    (1..4i64, 1..24i64, heads, 1..5i64).prop_map(|(batch, tokens, (heads, kv_heads), pairs)| {
        HeadShape {
            batch,
            tokens,
            heads,
            kv_heads,
            head_dim: 2 * pairs,
        }
    })
}

/// Where documents begin, a list for each of up to three rows.
fn starts() -> impl Strategy<Value = Option<Vec<Vec<u32>>>> {
    let row = prop::collection::btree_set(0..24u32, 0..5).prop_map(Vec::from_iter);
    prop::option::of(prop::collection::vec(row, 3))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn residual_and_rms_norm(n in 1..40i64, d in 1..20i64, seed in any::<u32>()) {
        tch::manual_seed(i64::from(seed));
        let [x, delta, dnormed, dx] = [(); 4].map(|()| random(&[n, d]));
        let (gain, dgain, eps) = (random(&[d]), random(&[d]), 1e-2);
        let stream = leaf(&(&x + &delta));
        let leaf_gain = leaf(&gain);
        let expected = norm::rms_norm(&stream, &leaf_gain, eps);
        let [dstream, dexpected_gain] = autograd(&expected, &dnormed, [&stream, &leaf_gain]);

        let (mut sum, mut rstd, mut normed) = (poison(&[n, d]), poison(&[n]), poison(&[n, d]));
        let added = Delta { delta_nd: &delta, sum_nd: &mut sum };
        let out = NormOut { rstd_n: &mut rstd, normed_nd: &mut normed };
        Twin.add_rms_norm(&x, Some(added), &gain, eps, out);
        assert_close(&sum, &stream.detach());
        assert_close(&normed, &expected.detach());
        let (mut rstd_alone, mut alone) = (poison(&[n]), poison(&[n, d]));
        let out = NormOut { rstd_n: &mut rstd_alone, normed_nd: &mut alone };
        Twin.add_rms_norm(&sum, None, &gain, eps, out);
        prop_assert!(alone == normed && rstd_alone == rstd);
        let mut again = poison(&[n, d]);
        Twin.rms_norm_again(&sum, &rstd, &gain, &mut again);
        prop_assert!(again == normed);

        let (mut dx_sum, mut dgain_sum) = (dx.copy(), dgain.copy());
        Twin.rms_norm_backward(&dnormed, &sum, &rstd, &gain, &mut dx_sum, &mut dgain_sum);
        assert_close(&dx_sum, &(dx + dstream));
        assert_close(&dgain_sum, &(dgain + dexpected_gain));
    }

    #[test]
    fn projections_to_heads(shape in shapes(), own_positions: bool, maps: bool, seed in any::<u32>()) {
        tch::manual_seed(i64::from(seed));
        let HeadShape { batch, tokens, heads, kv_heads, head_dim } = shape;
        let (n, queries, keys) = (batch * tokens, heads * head_dim, kv_heads * head_dim);
        let rows = leaf(&random(&[n, queries + 2 * keys]));
        let parts = rows.split_with_sizes([queries, keys, keys].as_slice(), 1);
        let bias_q = leaf(&random(&[queries]));
        let shared = heads == kv_heads;
        let bias_k = if shared { bias_q.shallow_clone() } else { leaf(&random(&[keys])) };
        let rows_of_tables = if own_positions { batch } else { 1 };
        let angles = random(&[rows_of_tables, tokens, head_dim / 2]);
        let (cos, sin, key_scale) = (angles.cos(), angles.sin(), 0.3);

        let plain = |x: &Tensor, bias: &Tensor, heads: i64, scale: f64| {
            let x = if maps { (x + bias).relu() } else { x.shallow_clone() };
            let halves = x.view([batch, tokens, heads, head_dim]).transpose(1, 2).chunk(2, -1);
            let (cos, sin) = (cos.unsqueeze(1), sin.unsqueeze(1));
            let turned = [&halves[0] * &cos - &halves[1] * &sin, &halves[1] * &cos + &halves[0] * &sin];
            Tensor::cat(&turned, -1) * scale
        };
        let q = plain(&parts[0], &bias_q, heads, 1.0);
        let k = plain(&parts[1], &bias_k, kv_heads, key_scale);
        let v = parts[2].view([batch, tokens, kv_heads, head_dim]).transpose(1, 2);

        let [pre_q, pre_k, in_v] = [0, 1, 2].map(|part: usize| parts[part].detach());
        let biases = [bias_q.detach(), bias_k.detach()];
        let input = HeadsIn {
            shape, pre_q_nx: &pre_q, pre_k_nx: &pre_k, v_nx: &in_v,
            biases: maps.then(|| biases.each_ref()), cos_xtp: &cos, sin_xtp: &sin, key_scale,
        };
        let [mut found_q, mut found_k, mut found_v] = [&q, &k, &v].map(|x| poison(&x.size()));
        Twin.heads(&input, &mut found_q, &mut found_k, &mut found_v);
        for (found, expected) in [(&found_q, &q), (&found_k, &k), (&found_v, &v)] {
            assert_close(found, &expected.detach());
        }

        let [dq, dk, dv] = [&q, &k, &v].map(|x| random(&x.size()));
        let objective = [(&q, &dq), (&k, &dk), (&v, &dv)].map(|(x, dx)| (x * dx).sum(None::<Kind>));
        let inputs: &[&Tensor] = match (maps, shared) {
            (false, _) => &[&rows],
            (true, true) => &[&rows, &bias_q],
            (true, false) => &[&rows, &bias_q, &bias_k],
        };
        let expected = Tensor::run_backward(&objective, inputs, false, false);
        let found_rows = poison(&rows.size());
        let mut cut = found_rows.split_with_sizes([queries, keys, keys].as_slice(), 1);
        let mut dbias_q = Tensor::ones([queries], DOUBLE);
        let mut dbias_k = if shared { dbias_q.shallow_clone() } else { Tensor::ones([keys], DOUBLE) };
        let [dpre_q_nx, dpre_k_nx, dv_nx] = cut.as_mut_slice() else { unreachable!() };
        let dbiases_sum = maps.then_some([&mut dbias_q, &mut dbias_k]);
        let out = HeadsGrad { dpre_q_nx, dpre_k_nx, dv_nx, dbiases_sum };
        Twin.heads_backward(&input, &dq, &dk, &dv, out);
        let dbiases = [&found_rows, &(&dbias_q - 1.0), &(&dbias_k - 1.0)];
        for (found, expected) in dbiases.into_iter().zip(&expected) {
            assert_close(found, expected);
        }
    }

    #[test]
    fn attention_within_documents(shape in shapes(), chunk in 1..30i64, starts in starts(), seed in any::<u32>()) {
        tch::manual_seed(i64::from(seed));
        let HeadShape { batch, tokens, heads, kv_heads, head_dim } = shape;
        let slopes: Vec<f64> = (0..heads).map(|head| 0.9 / (head + 1) as f64).collect();
        let documents = starts.map(|rows| Documents::from_starts(&rows[..batch as usize], tokens as usize));
        let segments = documents.as_ref().map(|documents| documents.segments_bt.shallow_clone());
        let tables = DecayTables::new(slopes.clone(), chunk, tokens, segments, DOUBLE);
        let [q, k, v] = [heads, kv_heads, kv_heads]
            .map(|heads| leaf(&random(&[batch, heads, tokens, head_dim])));
        let plain = Parallel::new(&slopes, tokens, documents.as_ref(), DOUBLE);
        let o = plain.mix(&q, &repeat_heads(&k, heads), &repeat_heads(&v, heads));
        let d_o = random(&o.size());
        let expected = autograd(&o, &d_o, [&q, &k, &v]);

        let qkv = [&q, &k, &v].map(Tensor::detach);
        let mut found = poison(&o.size());
        Twin.linear_attention(&tables, &qkv[0], &qkv[1], &qkv[2], &mut found);
        assert_close(&found, &o.detach());
        let mut gradients = qkv.each_ref().map(|x| poison(&x.size()));
        Twin.linear_attention_backward(&tables, qkv.each_ref(), &d_o, gradients.each_mut());
        for (found, expected) in gradients.iter().zip(&expected) {
            assert_close(found, expected);
        }
    }

    #[test]
    fn norm_of_heads(shape in shapes(), seed in any::<u32>()) {
        tch::manual_seed(i64::from(seed));
        let HeadShape { batch, tokens, heads, head_dim, .. } = shape;
        let o = leaf(&random(&[batch, heads, tokens, head_dim]));
        let rows = [batch * tokens, heads * head_dim];
        let expected = norm::head_norm(&o).transpose(1, 2).reshape(rows);
        let dout = random(&rows);
        let [do_expected] = autograd(&expected, &dout, [&o]);
        let (mut out, mut d_o) = (poison(&rows), poison(&o.size()));
        Twin.head_norm(&o.detach(), &mut out);
        assert_close(&out, &expected.detach());
        Twin.head_norm_backward(&dout, &o.detach(), &mut d_o);
        assert_close(&d_o, &do_expected);
    }

    #[test]
    fn gated_feed_forward(n in 1..40i64, f in 1..20i64, seed in any::<u32>()) {
        tch::manual_seed(i64::from(seed));
        let gate_up = leaf(&random(&[n, 2 * f]));
        let halves = gate_up.chunk(2, 1);
        let expected = halves[0].silu() * &halves[1];
        let dout = random(&[n, f]);
        let [dexpected] = autograd(&expected, &dout, [&gate_up]);
        let (mut out, mut buffer) = (poison(&[n, f]), gate_up.detach().copy());
        Twin.swiglu(&buffer, &mut out);
        assert_close(&out, &expected.detach());
        Twin.swiglu_backward(&mut buffer, &dout);
        assert_close(&buffer, &dexpected);
    }

    #[test]
    fn loss_and_its_gradient(c in 1..30i64, vocab in 2..40i64, z_loss in 0.0..0.1, seed in any::<u32>()) {
        tch::manual_seed(i64::from(seed));
        let logits = leaf(&(random(&[c, vocab]) * 5.0));
        let targets = Tensor::randint(vocab, [c], (Kind::Int64, Device::Cpu));
        let mask = random(&[c]).gt(-0.5);
        let expected = loss::loss_sum(&logits, &targets, &mask, z_loss);
        let [dexpected] = autograd(&expected.objective, &Tensor::ones([], DOUBLE), [&logits]);
        let mut buffer = logits.detach().copy();
        let mut sums = Tensor::from_slice(&[1.0, 2.0]);
        Twin.cross_entropy(&mut buffer, &targets, &mask, z_loss, &mut sums);
        assert_close(&buffer, &dexpected);
        assert_close(&sums, &Tensor::stack(&[expected.cross_entropy + 1.0, expected.objective.detach() + 2.0], 0));
    }

    #[test]
    fn embedding(n in 1..40i64, d in 1..9i64, vocab in 1..12i64, seed in any::<u32>()) {
        tch::manual_seed(i64::from(seed));
        let table = leaf(&random(&[vocab, d]));
        let ids = Tensor::randint(vocab, [n], (Kind::Int64, Device::Cpu));
        let dx = random(&[n, d]);
        let rows = Tensor::embedding(&table, &ids, -1, false, false);
        let [expected] = autograd(&rows, &dx, [&table]);
        let mut found = Tensor::ones([vocab, d], DOUBLE);
        Twin.embedding_backward(&dx, &ids, &mut found);
        assert_close(&found, &(expected + 1.0));
    }
}
