//! Every elementwise kernel against its twin in fp64, at odd shapes and at those of a 7B model.

use supra_worker::kernels::{Delta, HeadShape, HeadsGrad, HeadsIn, Kernels, NormOut};
use tch::{Kind, Tensor};

use super::bench::{Call, Case, GPU, poison, random};
use super::gpu;

const BF16: Kind = Kind::BFloat16;

/// Tokens of a micro-batch, width, feed-forward width and vocabulary of a 7B model.
const N: i64 = 8192;
const D: i64 = 4096;
const F: i64 = 14336;
const V: i64 = 32000;

/// [n, D]: fewer than a warp's vectors, more than a block's threads, not a whole number of anything, the widest.
const NORM_SHAPES: [[i64; 2]; 6] = [[7, 64], [40, 8], [300, 2056], [5, 8200], [3, 16384], [N, D]];

fn add_rms_norm(n: i64, d: i64, delta: bool) -> (Case<'static>, i64) {
    let call: &Call<'_> = if delta {
        &|kernels, inputs, outputs| {
            let [sum_nd, rstd_n, normed_nd] = outputs else {
                unreachable!()
            };
            let delta_nd = &inputs[2];
            let delta = Some(Delta { delta_nd, sum_nd });
            let out = NormOut { rstd_n, normed_nd };
            kernels.add_rms_norm(&inputs[0], delta, &inputs[1], 1e-5, out);
        }
    } else {
        &|kernels, inputs, outputs| {
            let [rstd_n, normed_nd] = outputs else {
                unreachable!()
            };
            let out = NormOut { rstd_n, normed_nd };
            kernels.add_rms_norm(&inputs[0], None, &inputs[1], 1e-5, out);
        }
    };
    let mut inputs = vec![random(&[n, d]), random(&[d])];
    let mut outputs = vec![poison(&[n], Kind::Float), poison(&[n, d], BF16)];
    if delta {
        inputs.push(random(&[n, d]));
        outputs.insert(0, poison(&[n, d], BF16));
    }
    let name = format!("add_rms_norm {n}x{d} delta={delta}");
    let bytes = n * d * 2 * if delta { 4 } else { 2 };
    let case = Case {
        name,
        inputs,
        outputs,
        call,
    };
    (case, bytes)
}

#[test]
fn gpu_add_rms_norm_is_its_twin() {
    let Some(kernels) = gpu("add_rms_norm") else {
        return;
    };
    for [n, d] in NORM_SHAPES {
        for delta in [true, false] {
            let (case, bytes) = add_rms_norm(n, d, delta);
            case.measure(&kernels, bytes);
        }
    }
}

#[test]
fn gpu_rms_norm_again_has_the_same_bits() {
    let Some(kernels) = gpu("rms_norm_again") else {
        return;
    };
    for [n, d] in NORM_SHAPES {
        let (x_nd, gain_d) = (random(&[n, d]), random(&[d]));
        let (mut rstd_n, mut normed_nd) = (poison(&[n], Kind::Float), poison(&[n, d], BF16));
        let out = NormOut {
            rstd_n: &mut rstd_n,
            normed_nd: &mut normed_nd,
        };
        kernels.add_rms_norm(&x_nd, None, &gain_d, 1e-5, out);
        let mut again_nd = poison(&[n, d], BF16);
        kernels.rms_norm_again(&x_nd, &rstd_n, &gain_d, &mut again_nd);
        kernels.check().unwrap();
        assert!(again_nd.equal(&normed_nd), "{n}x{d}");
        let case = Case {
            name: format!("rms_norm_again {n}x{d}"),
            inputs: vec![x_nd, rstd_n, gain_d],
            outputs: vec![again_nd],
            call: &|kernels, inputs, outputs| {
                kernels.rms_norm_again(&inputs[0], &inputs[1], &inputs[2], &mut outputs[0]);
            },
        };
        case.measure(&kernels, n * d * 4);
    }
}

#[test]
fn gpu_rms_norm_backward_is_its_twin() {
    let Some(kernels) = gpu("rms_norm_backward") else {
        return;
    };
    for [n, d] in NORM_SHAPES {
        let x_nd = random(&[n, d]);
        let mean_square =
            x_nd.to_kind(Kind::Float)
                .square()
                .mean_dim([-1i64].as_slice(), false, None::<Kind>);
        let case = Case {
            name: format!("rms_norm_backward {n}x{d}"),
            inputs: vec![
                random(&[n, d]),
                x_nd,
                (mean_square + 1e-5).rsqrt(),
                random(&[d]),
            ],
            outputs: vec![random(&[n, d]), Tensor::randn([d], (Kind::Float, GPU))],
            call: &|kernels, inputs, outputs| {
                let [dx_nd, dgain_d] = outputs else {
                    unreachable!()
                };
                let [dnormed_nd, x_nd, rstd_n, gain_d] = inputs else {
                    unreachable!()
                };
                kernels.rms_norm_backward(dnormed_nd, x_nd, rstd_n, gain_d, dx_nd, dgain_d);
            },
        };
        case.measure(&kernels, n * d * 8);
    }
}

/// Shapes of heads, whether there are biases, and whether positions differ between rows.
const HEADS: [(HeadShape, bool, bool); 6] = [
    (shape([1, 5, 3, 1, 64]), true, false),
    (shape([2, 77, 4, 2, 32]), true, true),
    (shape([3, 33, 2, 2, 96]), true, true),
    (shape([2, 9, 5, 5, 128]), false, false),
    (shape([4, 2048, 32, 8, 128]), false, true),
    (shape([4, 2048, 32, 8, 128]), true, false),
];

const fn shape([batch, tokens, heads, kv_heads, head_dim]: [i64; 5]) -> HeadShape {
    HeadShape {
        batch,
        tokens,
        heads,
        kv_heads,
        head_dim,
    }
}

/// One wide matrix of projections, two biases, cosines and sines.
fn heads_inputs(shape: HeadShape, documents: bool) -> Vec<Tensor> {
    let HeadShape {
        batch,
        tokens,
        heads,
        kv_heads,
        head_dim,
    } = shape;
    let rows = if documents { batch } else { 1 };
    let angles_xtp = Tensor::rand([rows, tokens, head_dim / 2], (Kind::Float, GPU)) * 6.3;
    vec![
        random(&[batch * tokens, (heads + 2 * kv_heads) * head_dim]),
        random(&[heads * head_dim]),
        random(&[kv_heads * head_dim]),
        angles_xtp.cos(),
        angles_xtp.sin(),
    ]
}

/// Slices for queries, keys and values of a matrix that holds all three.
fn cut(wide_nx: &Tensor, shape: HeadShape) -> [Tensor; 3] {
    let (q, k) = (
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    );
    [(0, q), (q, k), (q + k, k)].map(|(start, length)| wide_nx.narrow(1, start, length))
}

fn with_heads<R>(
    shape: HeadShape,
    biases: bool,
    inputs: &[Tensor],
    use_it: impl FnOnce(&HeadsIn<'_>) -> R,
) -> R {
    let [pre_q_nx, pre_k_nx, v_nx] = &cut(&inputs[0], shape);
    use_it(&HeadsIn {
        shape,
        pre_q_nx,
        pre_k_nx,
        v_nx,
        biases: biases.then_some([&inputs[1], &inputs[2]]),
        cos_xtp: &inputs[3],
        sin_xtp: &inputs[4],
        key_scale: (shape.head_dim as f64).sqrt().recip(),
    })
}

#[test]
fn gpu_heads_are_their_twin() {
    let Some(kernels) = gpu("heads") else { return };
    for (shape, biases, documents) in HEADS {
        let q_bhtd = [shape.batch, shape.heads, shape.tokens, shape.head_dim];
        let k_bktd = [shape.batch, shape.kv_heads, shape.tokens, shape.head_dim];
        let case = Case {
            name: format!("heads {q_bhtd:?} K={} biases={biases}", shape.kv_heads),
            inputs: heads_inputs(shape, documents),
            outputs: [q_bhtd, k_bktd, k_bktd]
                .map(|shape| poison(&shape, BF16))
                .into(),
            call: &|kernels, inputs, outputs| {
                let [q_bhtd, k_bktd, v_bktd] = outputs else {
                    unreachable!()
                };
                with_heads(shape, biases, inputs, |input| {
                    kernels.heads(input, q_bhtd, k_bktd, v_bktd);
                });
            },
        };
        case.measure(&kernels, 2 * bytes(&case.outputs));
    }
}

#[test]
fn gpu_heads_backward_is_its_twin() {
    let Some(kernels) = gpu("heads_backward") else {
        return;
    };
    for (shape, biases, documents) in HEADS {
        let (q, k) = (
            shape.heads * shape.head_dim,
            shape.kv_heads * shape.head_dim,
        );
        let n = shape.batch * shape.tokens;
        let mut inputs = heads_inputs(shape, documents);
        for heads in [shape.heads, shape.kv_heads, shape.kv_heads] {
            inputs.push(random(&[shape.batch, heads, shape.tokens, shape.head_dim]));
        }
        let outputs = vec![
            poison(&[n, q + 2 * k], BF16),
            Tensor::randn([q], (Kind::Float, GPU)),
            Tensor::randn([k], (Kind::Float, GPU)),
        ];
        let case = Case {
            name: format!(
                "heads_backward {:?} biases={biases}",
                [
                    shape.batch,
                    shape.heads,
                    shape.kv_heads,
                    shape.tokens,
                    shape.head_dim
                ]
            ),
            inputs,
            outputs,
            call: &|kernels, inputs, outputs| {
                let [dpre_nx, dbias_q, dbias_k] = outputs else {
                    unreachable!()
                };
                let [dpre_q_nx, dpre_k_nx, dv_nx] = &mut cut(dpre_nx, shape);
                let out = HeadsGrad {
                    dpre_q_nx,
                    dpre_k_nx,
                    dv_nx,
                    dbiases_sum: biases.then_some([dbias_q, dbias_k]),
                };
                with_heads(shape, biases, inputs, |input| {
                    kernels.heads_backward(input, &inputs[5], &inputs[6], &inputs[7], out);
                });
            },
        };
        let read = if biases { 3 } else { 2 };
        case.measure(&kernels, n * (q * read + k * (read + 2)) * 2);
    }
}

#[test]
fn gpu_one_feature_map_gets_the_gradients_of_queries_and_keys() {
    let Some(kernels) = gpu("heads_backward of one map") else {
        return;
    };
    let shape = shape([2, 50, 4, 4, 64]);
    let x = shape.heads * shape.head_dim;
    let mut inputs = heads_inputs(shape, false);
    inputs.extend((0..3).map(|_| random(&[2, 4, 50, 64])));
    let case = Case {
        name: "heads_backward of one map".to_owned(),
        inputs,
        outputs: vec![
            poison(&[100, 3 * x], BF16),
            Tensor::randn([x], (Kind::Float, GPU)),
        ],
        call: &|kernels, inputs, outputs| {
            let [dpre_nx, dbias] = outputs else {
                unreachable!()
            };
            let [dpre_q_nx, dpre_k_nx, dv_nx] = &mut cut(dpre_nx, shape);
            let mut same = dbias.shallow_clone();
            let out = HeadsGrad {
                dpre_q_nx,
                dpre_k_nx,
                dv_nx,
                dbiases_sum: Some([dbias, &mut same]),
            };
            with_heads(shape, true, inputs, |input| {
                kernels.heads_backward(input, &inputs[5], &inputs[6], &inputs[7], out);
            });
        },
    };
    case.check(&kernels);
}

/// [B, H, T, d].
const HEAD_NORM_SHAPES: [[i64; 4]; 5] = [
    [1, 1, 1, 8],
    [2, 3, 77, 32],
    [3, 5, 7, 96],
    [1, 2, 33, 256],
    [4, 32, 2048, 128],
];

#[test]
fn gpu_head_norm_is_its_twin() {
    let Some(kernels) = gpu("head_norm") else {
        return;
    };
    for shape in HEAD_NORM_SHAPES {
        let [b, h, t, d] = shape;
        let forward = Case {
            name: format!("head_norm {shape:?}"),
            // A mean that is large beside the spread: what is to be taken off.
            inputs: vec![random(&shape) + 4.0],
            outputs: vec![poison(&[b * t, h * d], BF16)],
            call: &|kernels, inputs, outputs| kernels.head_norm(&inputs[0], &mut outputs[0]),
        };
        forward.measure(&kernels, 2 * bytes(&forward.outputs));
        let backward = Case {
            name: format!("head_norm_backward {shape:?}"),
            inputs: vec![random(&[b * t, h * d]), random(&shape)],
            outputs: vec![poison(&shape, BF16)],
            call: &|kernels, inputs, outputs| {
                kernels.head_norm_backward(&inputs[0], &inputs[1], &mut outputs[0]);
            },
        };
        backward.measure(&kernels, 3 * bytes(&backward.outputs));
    }
}

#[test]
fn gpu_swiglu_is_its_twin() {
    let Some(kernels) = gpu("swiglu") else { return };
    for [n, f] in [[1, 8], [7, 2056], [70_000, 16], [N, F]] {
        let forward = Case {
            name: format!("swiglu {n}x{f}"),
            inputs: vec![random(&[n, 2 * f]) * 3.0],
            outputs: vec![poison(&[n, f], BF16)],
            call: &|kernels, inputs, outputs| kernels.swiglu(&inputs[0], &mut outputs[0]),
        };
        forward.measure(&kernels, 3 * bytes(&forward.outputs));
        let backward = Case {
            name: format!("swiglu_backward {n}x{f}"),
            inputs: vec![random(&[n, f])],
            outputs: vec![random(&[n, 2 * f])],
            call: &|kernels, inputs, outputs| {
                kernels.swiglu_backward(&mut outputs[0], &inputs[0]);
            },
        };
        backward.measure(&kernels, 5 * bytes(&backward.inputs));
    }
}

#[test]
fn gpu_cross_entropy_is_its_twin() {
    let Some(kernels) = gpu("cross_entropy") else {
        return;
    };
    let shapes = [
        [3, 5],
        [9, 13],
        [50, 257],
        [6, 32_003],
        [2, 128_256],
        [N, V],
    ];
    for ([c, v], z_loss) in shapes.into_iter().zip([0.0, 1e-2, 0.0, 1e-4, 1e-4, 1e-4]) {
        let mask_c = Tensor::rand([c], (Kind::Float, GPU)).gt(0.1);
        let _ = mask_c.narrow(0, 0, 1).fill_(1);
        let case = Case {
            name: format!("cross_entropy {c}x{v}"),
            inputs: vec![Tensor::randint(v, [c], (Kind::Int64, GPU)), mask_c],
            outputs: vec![
                random(&[c, v]) * 2.0,
                Tensor::full([2], 1.0, (Kind::Double, GPU)),
            ],
            call: &|kernels, inputs, outputs| {
                let [logits_cv, loss_2] = outputs else {
                    unreachable!()
                };
                kernels.cross_entropy(logits_cv, &inputs[0], &inputs[1], z_loss, loss_2);
            },
        };
        case.measure(&kernels, c * v * 4);
    }
}

#[test]
fn gpu_embedding_backward_is_its_twin() {
    let Some(kernels) = gpu("embedding_backward") else {
        return;
    };
    for [n, d, v] in [[1, 8, 3], [700, 2056, 50], [2000, 64, 7], [N, D, V]] {
        let case = Case {
            name: format!("embedding_backward {n}x{d} V={v}"),
            inputs: vec![random(&[n, d]), Tensor::randint(v, [n], (Kind::Int64, GPU))],
            outputs: vec![Tensor::randn([v, d], (Kind::Float, GPU))],
            call: &|kernels, inputs, outputs| {
                kernels.embedding_backward(&inputs[0], &inputs[1], &mut outputs[0]);
            },
        };
        case.measure(&kernels, n * d * 10);
    }
}

#[test]
fn gpu_tensors_that_kernels_cannot_take_are_named() {
    let Some(kernels) = gpu("refusals") else {
        return;
    };
    let mut out_nf = poison(&[4, 16], BF16);
    let bad = [
        (random(&[4, 32]).to_kind(Kind::Float), "Float"),
        (random(&[4, 32]).to_device(tch::Device::Cpu), "Cpu"),
        (random(&[4, 30]), "[4, 30]"),
        (random(&[32, 4]).transpose(0, 1), "contiguous"),
        (random(&[129]).narrow(0, 1, 128).view([4, 32]), "address"),
    ];
    for (gate_up_nx, word) in bad {
        kernels.swiglu(&gate_up_nx, &mut out_nf);
        let error = kernels.check().unwrap_err().to_string();
        assert!(
            error.contains("gate_up_nx") && error.contains(word),
            "{error}"
        );
        assert!(kernels.check().is_ok(), "an error is told once");
    }
}

fn bytes(tensors: &[Tensor]) -> i64 {
    tensors.iter().map(|tensor| tensor.numel() as i64 * 2).sum()
}
