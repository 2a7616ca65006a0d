//! A whole block at the shape of a 7B model, in bf16 by the GPU's kernels, against libtorch in fp64 on the same rounded
//! weights and inputs: its output, and its gradients of the input and of every weight.

use supra_worker::{
    kernels::{Kernels, Twin},
    model::{
        AttentionKind, Documents, ModelConfig, ParamSpec, Params, SupraConfig, accumulate_kind,
        block::LayerParams,
    },
    step::{Policy, block::Block, buffers::Buffers, tables::Tables},
};
use tch::{Kind, Tensor};

use super::bench::{GPU, distance, random, sanitized};
use super::gpu;

/// What the root of the mean square error may be, relative to that of the right values.
const OUTPUT: f64 = 1e-2;
const GRADIENT: f64 = 2e-2;
/// The same of gradients where sums lie around the kink of the feature maps' ReLU. Of a sum that rounding moves across it,
/// the gradient is lost or made up as a whole: if that happens to a share p of them, the error is the root of p.
const GRADIENT_AT_KINK: f64 = 1e-1;

/// B, T: whole chunks, and a ragged last one.
const ROWS: [(i64, i64); 2] = [(1, 2048), (2, 509)];

/// Of Mistral 7B, one block; nothing else of the model is used.
fn config(attention: AttentionKind) -> ModelConfig {
    ModelConfig {
        vocab: 8,
        dim: 4096,
        layers: 1,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        ffn: 14_336,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        tied: false,
        attention,
        max_positions: 2048,
        sliding_window: None,
        bos: None,
        eos: Vec::new(),
    }
}

/// Documents that begin at, before and behind the boundaries of chunks; the first one began before the row.
fn documents((batch, tokens): (i64, i64)) -> Documents {
    let row = |b: i64| -> Vec<u32> {
        let starts = [3, 127, 128, 300, 384, 500, 1100, 1151, 1990];
        starts.iter().map(|start| start + 7 * b as u32).collect()
    };
    let rows: Vec<Vec<u32>> = (0..batch).map(row).collect();
    Documents::from_starts(&rows, tokens as usize).to_device(GPU)
}

/// Weights that keep activations near 1, with gains and biases of their own. The feature maps' sums lie around 0, or, if not
/// `at_kink`, four standard deviations on either side of it.
fn weight(spec: &ParamSpec, at_kink: bool) -> (String, Tensor) {
    let normal = Tensor::randn(spec.shape.as_slice(), (Kind::Float, GPU));
    let map = !at_kink && spec.name.contains("_totrain_embed");
    let weight = match spec.shape[..] {
        [_, columns] if map => normal * (columns as f64).sqrt().recip() * 0.25,
        [_] if map => normal.sign(),
        [_, columns] => normal * (columns as f64).sqrt().recip(),
        _ if spec.name.ends_with("norm.weight") => normal * 0.1 + 1.0,
        _ => normal * 0.1,
    };
    (spec.name.clone(), weight.to_kind(Kind::BFloat16))
}

fn map(params: &Params, new: impl Fn(&Tensor) -> Tensor) -> Params {
    let named = params.iter();
    Params::new(named.map(|(name, x)| (name.to_owned(), new(x))).collect())
}

/// A block with what goes into it.
struct Case<'a> {
    config: &'a ModelConfig,
    rows: (i64, i64),
    documents: Option<&'a Documents>,
    weights: &'a Params,
    x_nd: Tensor,
    dy_nd: Tensor,
    /// Limit of the error of gradients.
    limit: f64,
}

impl Case<'_> {
    /// Output, gradient of the input, gradients of the weights, all computed in `kind`.
    fn run(&self, kernels: &dyn Kernels, kind: Kind) -> (Tensor, Tensor, Params) {
        let _guard = tch::no_grad_guard();
        let weights = map(self.weights, |weight| weight.to_kind(kind));
        let gradients = map(&weights, |weight| {
            weight.zeros_like().to_kind(accumulate_kind(kind))
        });
        let whole = Tables::new(self.config, self.rows.1, (kind, GPU));
        let within = self
            .documents
            .map(|documents| whole.within(self.config, documents));
        let block = Block {
            config: self.config,
            kernels,
            tables: within.as_ref().unwrap_or(&whole),
            rows: self.rows,
            weights: LayerParams::new(self.config, &weights, 0),
        };
        let Buffers {
            mut blocks,
            mut scratch,
            ..
        } = Buffers::new(self.config, self.rows, Policy::Lean, (kind, GPU));
        let at = &mut blocks[0];
        at.x_in_nd.copy_(&self.x_nd);
        block.forward(None, at, &scratch.work_nd, None);
        let y_nd = &at.x_mid_nd + &scratch.work_nd;
        scratch.dx_nd.copy_(&self.dy_nd);
        let dweights = LayerParams::new(self.config, &gradients, 0);
        block.backward(Policy::Lean, &dweights, at, &mut scratch);
        kernels.check().unwrap_or_else(|error| panic!("{error}"));
        (y_nd, scratch.dx_nd, gradients)
    }

    fn check(&self, kernels: &dyn Kernels, name: &str) {
        let (y_nd, dx_nd, gradients) = self.run(kernels, Kind::BFloat16);
        let (want_y_nd, want_dx_nd, wanted) = self.run(&Twin, Kind::Double);
        let output = distance(&y_nd, &want_y_nd);
        let mut worst = (distance(&dx_nd, &want_dx_nd), "the input");
        for (weight, gradient) in gradients
            .iter()
            .filter(|(name, _)| name.contains("layers.0"))
        {
            let error = distance(gradient, wanted.get(weight));
            if error > worst.0 || error.is_nan() {
                worst = (error, weight);
            }
        }
        println!(
            "accuracy {name:<40} output {output:.2e}  gradients {:.2e} at most, of {}",
            worst.0, worst.1
        );
        assert!(output <= OUTPUT, "{name}: output {output}");
        assert!(worst.0 <= self.limit, "{name}: gradient {worst:?}");
    }
}

#[test]
fn gpu_blocks_of_a_7b_model_are_near_exact_ones() {
    let Some(kernels) = gpu("blocks of a 7B model") else {
        return;
    };
    if sanitized() {
        return;
    }
    let supra = AttentionKind::Supra(SupraConfig::default());
    for (name, attention, at_kink) in [
        ("supra", supra, false),
        ("supra at the kink", supra, true),
        ("softmax", AttentionKind::Softmax, false),
    ] {
        let config = config(attention);
        let specs = config.params();
        let weights = Params::new(specs.iter().map(|spec| weight(spec, at_kink)).collect());
        for rows in ROWS {
            let documents = documents(rows);
            for documents in [None, Some(&documents)] {
                let normal = || random(&[rows.0 * rows.1, config.dim]);
                let case = Case {
                    config: &config,
                    rows,
                    documents,
                    weights: &weights,
                    x_nd: normal(),
                    dy_nd: normal(),
                    limit: if at_kink { GRADIENT_AT_KINK } else { GRADIENT },
                };
                let within = documents.map_or("", |_| " documents");
                case.check(&kernels, &format!("{name} {}x{}{within}", rows.0, rows.1));
            }
        }
    }
}
