//! Linear attention and its gradients against the plain quadratic form in fp64.

use std::time::Instant;

use supra_worker::{
    kernels::{DecayTables, Kernels, Twin, cuda::CudaKernels},
    model::{Decay, Documents, attention::decay::slopes},
};
use tch::{Cuda, Kind, Tensor};

use super::{
    bench::{GPU, TOLERANCE, distance, poison, print_row, random, sanitized, too_large},
    gpu, gpu_without_warpgroups,
};

const BF16: Kind = Kind::BFloat16;

/// Calls that are timed, after some that are not.
const TIMED: u32 = 20;

/// One call's lengths, decays and document starts.
struct Case {
    /// B, T, H, K, d.
    shape: [i64; 5],
    decay: Decay,
    /// Where documents begin, for every row.
    starts: Option<Vec<Vec<u32>>>,
}

fn case(shape: [i64; 5], decay: Decay) -> Case {
    let starts = None;
    Case {
        shape,
        decay,
        starts,
    }
}

/// With documents that begin at these tokens of the first row, later by 7 in each further row.
fn with_documents(shape: [i64; 5], decay: Decay, starts: &[u32]) -> Case {
    let row = |b: i64| starts.iter().map(|start| start + 7 * b as u32).collect();
    Case {
        starts: Some((0..shape[0]).map(row).collect()),
        ..case(shape, decay)
    }
}

/// Lengths around those of chunks, groups of one head and of several, documents that begin at, before and behind the
/// boundaries of chunks, and what a 7B model does.
fn cases() -> Vec<Case> {
    use Decay::{Alibi, None, Retnet};
    let regular: Vec<u32> = (0..2048).step_by(300).collect();
    vec![
        case([3, 1, 4, 2, 64], Alibi),
        // libtorch's: there are no kernels for such heads.
        case([1, 70, 4, 2, 32], Alibi),
        case([2, 63, 2, 1, 64], None),
        case([2, 64, 2, 2, 128], Retnet),
        case([1, 65, 3, 1, 128], Alibi),
        case([1, 128, 4, 4, 64], Alibi),
        case([2, 129, 6, 3, 128], Retnet),
        case([1, 193, 8, 1, 128], None),
        case([3, 777, 8, 2, 128], Alibi),
        case([1, 1000, 5, 5, 64], Alibi),
        with_documents([2, 40, 4, 2, 128], None, &[0, 1, 2, 30]),
        with_documents([3, 300, 4, 1, 64], None, &[64, 128, 192, 256]),
        with_documents([2, 700, 4, 2, 128], Retnet, &[0, 127, 128, 129, 383, 513]),
        with_documents([2, 1100, 2, 1, 128], None, &[500]),
        case([4, 2048, 32, 8, 128], Alibi),
        with_documents([4, 2048, 32, 8, 128], Alibi, &regular),
        case([4, 2048, 32, 32, 128], Alibi),
        case([1, 8192, 32, 8, 128], Alibi),
    ]
}

impl Case {
    fn query_shape(&self) -> [i64; 4] {
        let [b, t, h, _, d] = self.shape;
        [b, h, t, d]
    }

    fn key_shape(&self) -> [i64; 4] {
        let [b, t, _, k, d] = self.shape;
        [b, k, t, d]
    }

    fn tables(&self) -> DecayTables {
        let [_, tokens, heads, ..] = self.shape;
        let segments_bt = self.starts.as_ref().map(|starts| {
            Documents::from_starts(starts, tokens as usize)
                .segments_bt
                .to_device(GPU)
        });
        DecayTables::new(
            slopes(self.decay, heads),
            128,
            tokens,
            segments_bt,
            (BF16, GPU),
        )
    }

    /// q, k (scaled), v and the gradient of o.
    fn inputs(&self) -> [Tensor; 4] {
        let scale = (self.shape[4] as f64).sqrt().recip();
        let (query, key) = (self.query_shape(), self.key_shape());
        let k_bktd = random(&key) * scale;
        [random(&query), k_bktd, random(&key), random(&query)]
    }

    fn name(&self, what: &str) -> String {
        let documents = if self.starts.is_some() { " docs" } else { "" };
        format!("{what} {:?} {:?}{documents}", self.shape, self.decay)
    }

    fn check_and_time(&self, kernels: &CudaKernels) {
        if too_large(self.query_shape().iter().product::<i64>() as usize) {
            return;
        }
        let (tables, inputs) = (self.tables(), self.inputs());
        let got = outputs(self, kernels, &tables, &inputs);
        let again = outputs(self, kernels, &tables, &inputs);
        let want = quadratic(self, &tables, &inputs);
        let mut errors = [0.0; 4];
        for (place, name) in ["o", "dq", "dk", "dv"].into_iter().enumerate() {
            errors[place] = distance(&got[place], &want[place]);
            let what = self.name(name);
            assert!(errors[place] <= TOLERANCE, "{what}: {}", errors[place]);
            assert!(got[place].equal(&again[place]), "{what} varies");
        }
        if sanitized() {
            return;
        }
        let [q, k, v, d_o] = &inputs;
        let [mut o, mut dq, mut dk, mut dv] = got;
        let bytes = |tensors: &[&Tensor]| -> i64 {
            tensors.iter().map(|tensor| tensor.numel() as i64 * 2).sum()
        };
        let forward = seconds(|| kernels.linear_attention(&tables, q, k, v, &mut o));
        let backward = seconds(|| {
            let gradients = [&mut dq, &mut dk, &mut dv];
            kernels.linear_attention_backward(&tables, [q, k, v], d_o, gradients);
        });
        kernels.check().unwrap_or_else(|error| panic!("{error}"));
        let read = bytes(&[q, k, v]);
        print_row(
            &self.name("attention"),
            errors[0],
            forward,
            read + bytes(&[&o]),
        );
        print_row(
            &self.name("attention_backward"),
            errors[1].max(errors[2]).max(errors[3]),
            backward,
            2 * read + bytes(&[d_o]),
        );
    }
}

/// o, dq, dk, dv of the kernels, where NaN was before.
fn outputs(
    case: &Case,
    kernels: &CudaKernels,
    tables: &DecayTables,
    [q, k, v, d_o]: &[Tensor; 4],
) -> [Tensor; 4] {
    let (query, key) = (case.query_shape(), case.key_shape());
    let [mut o, mut dq, mut dk, mut dv] =
        [query, query, key, key].map(|shape| poison(&shape, BF16));
    kernels.linear_attention(tables, q, k, v, &mut o);
    kernels.linear_attention_backward(tables, [q, k, v], d_o, [&mut dq, &mut dk, &mut dv]);
    kernels.check().unwrap_or_else(|error| panic!("{error}"));
    [o, dq, dk, dv]
}

/// The same by its definition, all pairs of tokens of one group of heads at a time.
fn quadratic(case: &Case, tables: &DecayTables, inputs: &[Tensor; 4]) -> [Tensor; 4] {
    let [batch, tokens, heads, kv_heads, _] = case.shape;
    let (double, group) = ((Kind::Double, GPU), heads / kv_heads);
    let (query, key) = (case.query_shape(), case.key_shape());
    let out = [query, query, key, key].map(|shape| Tensor::zeros(shape, double));
    let token_t = Tensor::arange(tokens, double);
    let age_tj = (token_t.unsqueeze(1) - token_t.unsqueeze(0)).clamp_min(0.0);
    for (b, kv_head) in (0..batch).flat_map(|b| (0..kv_heads).map(move |kv_head| (b, kv_head))) {
        let of = |tensor: &Tensor, heads: i64| {
            let row = tensor.select(0, b).narrow(0, kv_head * heads, heads);
            row.to_kind(Kind::Double)
        };
        let [q, d_o] = [&inputs[0], &inputs[3]].map(|tensor| of(tensor, group));
        let [k, v] = [&inputs[1], &inputs[2]].map(|tensor| of(tensor, 1));
        let first = (kv_head * group) as usize;
        let slopes_h = Tensor::from_slice(&tables.slopes_h[first..first + group as usize]);
        let mut mask_htj = (slopes_h.to_device(GPU).view([-1, 1, 1]) * &age_tj)
            .neg()
            .exp()
            .tril(0);
        if let Some(segments_bt) = &tables.segments_bt {
            let segments_t = segments_bt.select(0, b);
            let same_tj = segments_t.unsqueeze(1).eq_tensor(&segments_t.unsqueeze(0));
            mask_htj *= same_tj;
        }
        let scores_htj = q.matmul(&k.transpose(-2, -1)) * &mask_htj;
        let dscores_htj = d_o.matmul(&v.transpose(-2, -1)) * mask_htj;
        let summed = |x_hjt: &Tensor, y_htd: &Tensor| {
            x_hjt.transpose(-2, -1).matmul(y_htd).sum_dim_intlist(
                [0i64].as_slice(),
                true,
                None::<Kind>,
            )
        };
        let results = [
            (scores_htj.matmul(&v), group),
            (dscores_htj.matmul(&k), group),
            (summed(&dscores_htj, &q), 1),
            (summed(&scores_htj, &d_o), 1),
        ];
        for (out, (result, heads)) in out.iter().zip(results) {
            out.select(0, b)
                .narrow(0, kv_head * heads, heads)
                .copy_(&result);
        }
    }
    out
}

fn seconds(mut call: impl FnMut()) -> f64 {
    let mut launch = |times| {
        for _ in 0..times {
            call();
        }
        Cuda::synchronize(0);
    };
    launch(3);
    let start = Instant::now();
    launch(TIMED);
    start.elapsed().as_secs_f64() / f64::from(TIMED)
}

#[test]
fn gpu_linear_attention_and_its_gradients_are_the_quadratic_form() {
    let Some(kernels) = gpu("linear attention") else {
        return;
    };
    for case in cases() {
        case.check_and_time(&kernels);
    }
}

#[test]
fn gpu_linear_attention_by_single_warps_is_the_quadratic_form_too() {
    let Some(kernels) = gpu_without_warpgroups("linear attention by single warps") else {
        return;
    };
    for case in cases() {
        case.check_and_time(&kernels);
    }
}

/// Rows in three parts, each going on from the state that the one before left, beside the whole rows' quadratic form.
fn check_onward(case: &Case, kernels: &CudaKernels) {
    let [batch, tokens, heads, _, d] = case.shape;
    let numbers = case.query_shape().iter().product::<i64>() as usize;
    if case.starts.is_some() || tokens < 3 || too_large(numbers) {
        return;
    }
    let (tables, inputs) = (case.tables(), case.inputs());
    let [want, ..] = quadratic(case, &tables, &inputs);
    let shape = [batch, heads, d, d];
    let mut state = Tensor::zeros(shape, (Kind::Float, GPU));
    let mut exact = Tensor::zeros(shape, (Kind::Double, GPU));
    // In the kind of sums, as everything else that is not a weight.
    let tables_of =
        |tokens, kind| DecayTables::new(tables.slopes_h.clone(), 128, tokens, None, (kind, GPU));
    let mut parts = Vec::new();
    let cuts = [0, tokens / 5 + 1, tokens * 2 / 3 + 1, tokens];
    for cut in cuts.windows(2) {
        let length = cut[1] - cut[0];
        let part = |x: &Tensor| x.narrow(2, cut[0], length).contiguous();
        let [q, k, v] = [0, 1, 2].map(|at| part(&inputs[at]));
        let mut o = poison(&q.size(), BF16);
        let single = tables_of(length, Kind::Float);
        kernels.linear_attention_from(&single, [&q, &k, &v], &mut state, &mut o);
        kernels.check().unwrap_or_else(|error| panic!("{error}"));
        let wide = [&q, &k, &v].map(|x| x.to_kind(Kind::Double));
        let mut unused = wide[0].empty_like();
        let double = tables_of(length, Kind::Double);
        Twin.linear_attention_from(&double, wide.each_ref(), &mut exact, &mut unused);
        let error = distance(&state, &exact);
        let what = case.name("state");
        assert!(error <= TOLERANCE, "{what} after {}: {error}", cut[1]);
        parts.push(o);
    }
    let error = distance(&Tensor::cat(&parts, 2), &want);
    let what = case.name("o onward");
    assert!(error <= TOLERANCE, "{what}: {error}");
    if sanitized() {
        return;
    }
    let [q, k, v, _] = &inputs;
    let mut o = poison(&case.query_shape(), BF16);
    let single = tables_of(tokens, Kind::Float);
    let whole = seconds(|| kernels.linear_attention_from(&single, [q, k, v], &mut state, &mut o));
    kernels.check().unwrap_or_else(|error| panic!("{error}"));
    let moved: usize = [q, k, v, &o].iter().map(|x| x.numel() * 2).sum();
    print_row(&case.name("attention_from"), error, whole, moved as i64);
}

#[test]
fn gpu_linear_attention_goes_on_from_a_state() {
    let Some(kernels) = gpu("linear attention from a state") else {
        return;
    };
    for case in cases() {
        check_onward(&case, &kernels);
    }
}

#[test]
fn gpu_linear_attention_by_single_warps_goes_on_from_a_state_too() {
    let Some(kernels) = gpu_without_warpgroups("linear attention from a state by single warps")
    else {
        return;
    };
    for case in cases() {
        check_onward(&case, &kernels);
    }
}

#[test]
fn gpu_linear_attention_names_what_it_cannot_take() {
    let Some(kernels) = gpu("linear attention's refusals") else {
        return;
    };
    let attempts = [
        ([1, 10, 3, 2, 64], 3, "do not divide"),
        ([1, 10, 4, 2, 64], 2, "decays for 2"),
    ];
    for (shape, decays, words) in attempts {
        let case = case(shape, Decay::None);
        let [q, k, v, _] = case.inputs();
        let mut o = poison(&case.query_shape(), BF16);
        let tables = DecayTables::new(vec![0.0; decays], 128, 10, None, (BF16, GPU));
        kernels.linear_attention(&tables, &q, &k, &v, &mut o);
        let error = kernels.check().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}
