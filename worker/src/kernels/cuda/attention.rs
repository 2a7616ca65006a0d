//! Launches of linear attention with decay and of its gradients.

use std::f64::consts::LOG2_E;

use tch::{Kind, Tensor};

use super::{
    CudaKernels,
    compile::Source,
    error::KernelError,
    launch::{Argument, Grid},
    tensors::{heads_first, length, wrong},
};
use crate::kernels::DecayTables;

/// Its source.
pub const SOURCE: Source = Source {
    name: "attention.cu",
    text: include_str!("attention.cu"),
    kernels: &[
        "attention_states_64",
        "attention_states_from_64",
        "attention_state_gradients_64",
        "attention_outputs_64",
        "attention_outputs_from_64",
        "attention_query_gradients_64",
        "attention_key_value_gradients_64",
        "attention_states_128",
        "attention_states_from_128",
        "attention_state_gradients_128",
        "attention_outputs_128",
        "attention_outputs_from_128",
        "attention_query_gradients_128",
        "attention_key_value_gradients_128",
    ],
};

/// The kernels for heads of one size.
struct Names {
    states: &'static str,
    states_from: &'static str,
    state_gradients: &'static str,
    outputs: &'static str,
    outputs_from: &'static str,
    query_gradients: &'static str,
    key_value_gradients: &'static str,
}

const NAMES_64: Names = Names {
    states: "attention_states_64",
    states_from: "attention_states_from_64",
    state_gradients: "attention_state_gradients_64",
    outputs: "attention_outputs_64",
    outputs_from: "attention_outputs_from_64",
    query_gradients: "attention_query_gradients_64",
    key_value_gradients: "attention_key_value_gradients_64",
};

const NAMES_128: Names = Names {
    states: "attention_states_128",
    states_from: "attention_states_from_128",
    state_gradients: "attention_state_gradients_128",
    outputs: "attention_outputs_128",
    outputs_from: "attention_outputs_from_128",
    query_gradients: "attention_query_gradients_128",
    key_value_gradients: "attention_key_value_gradients_128",
};

/// Tokens of a chunk, tokens of a piece of one, pieces in flight, and columns of the state in a block: as in the source.
const CHUNK: i64 = 128;
const PIECE: i64 = 64;
const STAGES: i64 = 3;
const COLUMNS: i64 = 64;

/// The architecture for which attention is compiled with products of warpgroups; others get products of warps.
pub const WARPGROUPS: &str = "sm_90a";

/// Bytes of a bf16.
const BF16: i64 = 2;

/// How many blocks a grid may have along y.
const MAX_BLOCKS_Y: i64 = 65_535;

/// The kernels for heads of `d` channels; none: libtorch computes such heads.
fn names(d: i64) -> Option<&'static Names> {
    match d {
        64 => Some(&NAMES_64),
        128 => Some(&NAMES_128),
        _ => None,
    }
}

/// Whether there are kernels for heads of `d` channels.
pub fn takes_heads_of(d: i64) -> bool {
    names(d).is_some()
}

/// Whether there are kernels for heads [B, H, T, d] of this size. Others are left to libtorch.
pub fn takes(heads_bhtd: &Tensor) -> bool {
    heads_bhtd
        .size()
        .last()
        .copied()
        .is_some_and(takes_heads_of)
}

/// The lengths of a call, checked.
struct Lengths {
    /// [B, H, T, d].
    q_bhtd: [i64; 4],
    /// [B, K, T, d].
    k_bktd: [i64; 4],
    /// T, H, K, as the kernels take them.
    counts: [Argument; 3],
    /// N.
    chunks: i64,
    names: &'static Names,
}

impl Lengths {
    fn new(decay: &DecayTables, q_bhtd: &Tensor, k_bktd: &Tensor) -> Result<Lengths, KernelError> {
        let query @ [batch, heads, tokens, d] = heads_first("q_bhtd", q_bhtd)?;
        let [_, kv_heads, ..] = heads_first("k_bktd", k_bktd)?;
        let names = names(d).expect("invariant: `takes` was asked");
        if kv_heads == 0 || heads % kv_heads != 0 {
            let problem = format!("its {kv_heads} heads do not divide the {heads} of q_bhtd");
            return Err(wrong("k_bktd", problem));
        }
        if decay.slopes_h.len() as i64 != heads {
            let problem = format!(
                "it has {heads} heads, and there are decays for {}",
                decay.slopes_h.len()
            );
            return Err(wrong("q_bhtd", problem));
        }
        let chunks = (tokens + CHUNK - 1) / CHUNK;
        if batch * heads == 0 || tokens == 0 || chunks > MAX_BLOCKS_Y {
            let most = MAX_BLOCKS_Y * CHUNK;
            let problem = format!(
                "its shape is {query:?}: rows of 1 to {most} tokens, and at least one, were expected"
            );
            return Err(wrong("q_bhtd", problem));
        }
        length("q_bhtd", batch * heads)?;
        Ok(Lengths {
            q_bhtd: query,
            k_bktd: [batch, kv_heads, tokens, d],
            counts: [
                length("q_bhtd", tokens)?.into(),
                length("q_bhtd", heads)?.into(),
                length("k_bktd", kv_heads)?.into(),
            ],
            chunks,
            names,
        })
    }

    /// Bytes of the states at so many boundaries of each row: bf16 [B, H, boundaries, d, d].
    fn states_bytes(&self, boundaries: i64) -> i64 {
        let [batch, heads, _, d] = self.q_bhtd;
        batch * heads * boundaries * d * d * BF16
    }

    /// For either direction of the walk along a row.
    fn states_grid(&self) -> Grid {
        let [batch, heads, _, d] = self.q_bhtd;
        let shared = STAGES * PIECE * (d + COLUMNS) * BF16;
        grid((batch * heads, d / COLUMNS), 128, shared)
    }

    fn outputs_grid(&self, warpgroups: bool) -> Grid {
        // Warpgroups read two heads' rows and states from shared memory: one that is computed, one that is fetched.
        let (tiles, states) = if warpgroups { (4, 2) } else { (3, 1) };
        self.chunks_grid(2 * CHUNK, tiles, states)
    }

    fn key_value_gradients_grid(&self) -> Grid {
        self.chunks_grid(4 * CHUNK, 4, 1)
    }

    /// A block for each chunk of each key and value head, with room for so many tiles of a chunk's rows, and states.
    fn chunks_grid(&self, threads: i64, tiles: i64, states: i64) -> Grid {
        let [batch, kv_heads, _, d] = self.k_bktd;
        let shared = (tiles * CHUNK * d + states * d * d) * BF16;
        grid((batch * kv_heads, self.chunks), threads, shared)
    }
}

fn grid(blocks: (i64, i64), threads: i64, shared_bytes: i64) -> Grid {
    let number = |x: i64| u32::try_from(x).expect("invariant: lengths were checked");
    Grid {
        blocks: (number(blocks.0), number(blocks.1)),
        threads: (number(threads), 1),
        shared_bytes: number(shared_bytes),
    }
}

/// The decays of the last call on the device. They are those of a model, so one upload serves it for good.
pub struct Decays {
    slopes_h: Vec<f64>,
    /// log2(gamma): fp32 [H].
    log2_gamma_h: Tensor,
}

/// What all kernels of a call take.
struct Context {
    /// Decays and segments.
    weights: [Argument; 2],
    states: Argument,
}

impl CudaKernels {
    pub(super) fn try_linear_attention(
        &self,
        decay: &DecayTables,
        q_bhtd: &Tensor,
        k_bktd: &Tensor,
        v_bktd: &Tensor,
        o_bhtd: &mut Tensor,
    ) -> Result<(), KernelError> {
        let (l, [q, k, v]) = self.qkv(decay, [q_bhtd, k_bktd, v_bktd])?;
        let o = self.heads_first("o_bhtd", o_bhtd, l.q_bhtd)?;
        let context = self.attention_context(decay, &l)?;
        self.keep_states(&l, &context, k, v)?;
        let arguments = [
            &[q, k, v, context.states],
            context.weights.as_slice(),
            &[o],
            &l.counts,
        ]
        .concat();
        self.gpu
            .launch(l.names.outputs, l.outputs_grid(self.warpgroups), &arguments)
    }

    pub(super) fn try_linear_attention_from(
        &self,
        decay: &DecayTables,
        qkv: [&Tensor; 3],
        state_bhde: &mut Tensor,
        o_bhtd: &mut Tensor,
    ) -> Result<(), KernelError> {
        let (l, [q, k, v]) = self.qkv(decay, qkv)?;
        if decay.segments_bt.is_some() {
            let problem = "rows of several documents do not go on from a state";
            return Err(wrong("segments_bt", problem.to_owned()));
        }
        let o = self.heads_first("o_bhtd", o_bhtd, l.q_bhtd)?;
        let [batch, query_heads, _, d] = l.q_bhtd;
        let state = self.tensors.vectors(
            "state_bhde",
            state_bhde,
            Kind::Float,
            &[batch, query_heads, d, d],
        )?;
        // At the inner boundaries, and those on entry.
        let kept = self.scratch(l.states_bytes(l.chunks));
        let log2_gamma = self.log2_gamma(&decay.slopes_h);

        let arguments = [&[k, v, log2_gamma, kept, state], l.counts.as_slice()].concat();
        self.gpu
            .launch(l.names.states_from, l.states_grid(), &arguments)?;
        let arguments = [&[q, k, v, kept, log2_gamma, o], l.counts.as_slice()].concat();
        let grid = l.outputs_grid(self.warpgroups);
        self.gpu.launch(l.names.outputs_from, grid, &arguments)
    }

    pub(super) fn try_linear_attention_backward(
        &self,
        decay: &DecayTables,
        qkv: [&Tensor; 3],
        do_bhtd: &Tensor,
        [dq_bhtd, dk_bktd, dv_bktd]: [&mut Tensor; 3],
    ) -> Result<(), KernelError> {
        let (l, [q, k, v]) = self.qkv(decay, qkv)?;
        let d_o = self.heads_first("do_bhtd", do_bhtd, l.q_bhtd)?;
        let dq = self.heads_first("dq_bhtd", dq_bhtd, l.q_bhtd)?;
        let dk = self.heads_first("dk_bktd", dk_bktd, l.k_bktd)?;
        let dv = self.heads_first("dv_bktd", dv_bktd, l.k_bktd)?;
        let context = self.attention_context(decay, &l)?;
        let (states, weights) = (context.states, context.weights.as_slice());

        self.keep_states(&l, &context, k, v)?;
        let arguments = [&[d_o, v, k, states], weights, &[dq], &l.counts].concat();
        let grid = l.outputs_grid(self.warpgroups);
        self.gpu.launch(l.names.query_gradients, grid, &arguments)?;
        // The states have been read: their gradients take their place.
        if l.chunks > 1 {
            let arguments = [&[q, d_o], weights, &[states], &l.counts[..2]].concat();
            self.gpu
                .launch(l.names.state_gradients, l.states_grid(), &arguments)?;
        }
        let arguments = [&[q, k, v, d_o, states], weights, &[dk, dv], &l.counts].concat();
        self.gpu.launch(
            l.names.key_value_gradients,
            l.key_value_gradients_grid(),
            &arguments,
        )
    }

    /// The lengths of a call, and its queries, keys and values, checked.
    fn qkv(
        &self,
        decay: &DecayTables,
        [q_bhtd, k_bktd, v_bktd]: [&Tensor; 3],
    ) -> Result<(Lengths, [Argument; 3]), KernelError> {
        let l = Lengths::new(decay, q_bhtd, k_bktd)?;
        let qkv = [
            self.heads_first("q_bhtd", q_bhtd, l.q_bhtd)?,
            self.heads_first("k_bktd", k_bktd, l.k_bktd)?,
            self.heads_first("v_bktd", v_bktd, l.k_bktd)?,
        ];
        Ok((l, qkv))
    }

    /// The states at the inner boundaries, where there are any.
    fn keep_states(
        &self,
        l: &Lengths,
        context: &Context,
        k: Argument,
        v: Argument,
    ) -> Result<(), KernelError> {
        if l.chunks == 1 {
            return Ok(());
        }
        let arguments = [
            &[k, v],
            context.weights.as_slice(),
            &[context.states],
            &l.counts,
        ]
        .concat();
        self.gpu.launch(l.names.states, l.states_grid(), &arguments)
    }

    fn attention_context(&self, decay: &DecayTables, l: &Lengths) -> Result<Context, KernelError> {
        let [batch, _, tokens, _] = l.q_bhtd;
        let segments = match &decay.segments_bt {
            Some(segments_bt) => {
                self.tensors
                    .numbers("segments_bt", segments_bt, Kind::Int64, &[batch, tokens])?
            }
            None => Argument::NULL,
        };
        Ok(Context {
            weights: [self.log2_gamma(&decay.slopes_h), segments],
            states: self.scratch(l.states_bytes(l.chunks - 1)),
        })
    }

    /// log2(gamma) of each head, on the device.
    fn log2_gamma(&self, slopes_h: &[f64]) -> Argument {
        let mut decays = self.decays.borrow_mut();
        if decays
            .as_ref()
            .is_none_or(|decays| decays.slopes_h != slopes_h)
        {
            let log2_gamma_h: Vec<f32> = slopes_h
                .iter()
                .map(|slope| (-slope * LOG2_E) as f32)
                .collect();
            *decays = Some(Decays {
                slopes_h: slopes_h.to_vec(),
                log2_gamma_h: Tensor::from_slice(&log2_gamma_h).to_device(self.tensors.device),
            });
        }
        let decays = decays.as_ref().expect("invariant: just filled");
        Argument::pointer(&decays.log2_gamma_h)
    }
}

#[cfg(test)]
mod tests {
    use supra_recipes::{
        Recipe,
        plan::{Memory, ModelShape, Policy},
    };
    use tch::Device;

    use super::*;

    #[test]
    fn the_plan_counts_the_states() {
        let (heads, kv_heads) = (4, 2);
        for (tokens, d) in [(300, 64), (384, 128), (128, 64)] {
            let options = (Kind::BFloat16, Device::Cpu);
            let decay = DecayTables::new(vec![0.5; 4], 64, tokens, None, options);
            let [q_bhtd, k_bktd] =
                [heads, kv_heads].map(|heads| Tensor::empty([3, heads, tokens, d], options));
            let lengths = Lengths::new(&decay, &q_bhtd, &k_bktd).unwrap();

            let text = format!(
                "name: t\nbase: {{ path: b }}\ndata: {{ train: d }}\nbudget: {{ tokens: 100M }}\n\
                 batch: {{ tokens: {}, micro_batch: 3, sequence_length: {tokens} }}\n",
                3 * tokens
            );
            let recipe = Recipe::parse(&text, "t.yaml").unwrap();
            let shape = ModelShape {
                vocab: 50,
                dim: (heads * d).cast_unsigned(),
                layers: 2,
                heads: heads.cast_unsigned(),
                kv_heads: kv_heads.cast_unsigned(),
                ffn: 96,
                tied: false,
            };
            let plan = Memory::new(&recipe, &shape, 1, Policy::Lean);
            let mut parts = plan.components.iter();
            let states = parts.find(|part| part.name == "states of attention");
            assert_eq!(
                states.unwrap().bytes,
                lengths.states_bytes(lengths.chunks - 1).cast_unsigned(),
                "{tokens} tokens, {d} channels"
            );
        }
    }

    #[test]
    fn launches_and_source_agree_on_what_a_block_does() {
        for (name, value) in [
            ("CHUNK", CHUNK),
            ("PIECE", PIECE),
            ("STAGES", STAGES),
            ("COLUMNS", COLUMNS),
        ] {
            let line = format!("constexpr unsigned {name} = {value};");
            assert!(SOURCE.text.contains(&line), "{line}");
        }
    }
}
