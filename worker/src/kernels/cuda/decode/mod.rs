//! A token step as one recorded graph: one more token for each of some rows, in bf16 with fp32 states, or with the caches of a
//! softmax model.
//!
//! Between two matrix products stands one kernel ([`rows`](self) in `rows.cu`); the products themselves take, for few rows, a
//! kernel that streams the weights (`thin.cu`) and else cuBLASLt ([`library`]), whichever is measured to be faster for that
//! number of rows ([`stages`]). What a step computes is what [`Transformer::advance`](crate::model::Transformer::advance)
//! computes for spans of single tokens; sums are rounded at other places.

mod buffers;
mod caches;
mod graph;
mod library;
mod pinned;
mod stages;
mod weights;

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use self::{
    buffers::Buffers,
    caches::Caches,
    graph::{Graph, Tape},
    library::Library,
    pinned::Pinned,
    stages::{Stage, Ways},
    weights::{Alive, Layer, Recurrence},
};
use super::{
    error::KernelError,
    launch::{Argument, Gpu, Grid, Queue},
    load,
    tensors::{Tensors, VECTOR, length},
};
use crate::model::{ModelConfig, Params, Slots, block::LayerParams};

/// Columns that a warp reads at once: what widths are multiples of.
const COLUMNS: i64 = 32;
/// The widest row that a block norms.
const MAX_WIDTH: i64 = 16384;

const ROWS: super::Source = super::Source {
    name: "rows.cu",
    text: include_str!("rows.cu"),
    kernels: &[
        "begin_rows",
        "norm_rows",
        "gate_rows",
        "recur_64",
        "recur_128",
        "choose_rows",
    ],
};

const ATTEND: super::Source = super::Source {
    name: "attend.cu",
    text: include_str!("attend.cu"),
    kernels: &[
        "attend_64_1",
        "attend_64_2",
        "attend_64_4",
        "attend_64_8",
        "attend_128_1",
        "attend_128_2",
        "attend_128_4",
        "attend_128_8",
        "unite_64",
        "unite_128",
    ],
};

/// Threads of a block of `attend`.
const ATTENDING: u32 = 128;

/// The kernel in which the query heads of a key/value head attend together, if there is one.
fn attend_kernel(config: &ModelConfig) -> Option<&'static str> {
    Some(match (config.head_dim, config.group()) {
        (64, 1) => "attend_64_1",
        (64, 2) => "attend_64_2",
        (64, 4) => "attend_64_4",
        (64, 8) => "attend_64_8",
        (128, 1) => "attend_128_1",
        (128, 2) => "attend_128_2",
        (128, 4) => "attend_128_4",
        (128, 8) => "attend_128_8",
        _ => return None,
    })
}

/// Why a model's token steps are left to libtorch. None: they can be recorded.
pub fn misfit(config: &ModelConfig, kind: Kind) -> Option<String> {
    let multiple = |what: &str, width: i64| {
        (width % COLUMNS != 0).then(|| format!("its {what} is {width}, no multiple of {COLUMNS}"))
    };
    if kind != Kind::BFloat16 {
        Some("it does not compute in bf16".to_owned())
    } else if config.supra().is_some_and(|supra| supra.qk_norm) {
        Some("it norms queries and keys".to_owned())
    } else if !matches!(config.head_dim, 64 | 128) {
        let d = config.head_dim;
        Some(format!("its heads have {d} channels, not 64 or 128"))
    } else if config.supra().is_none() && attend_kernel(config).is_none() {
        let group = config.group();
        Some(format!(
            "{group} query heads share a key/value head, not 1, 2, 4 or 8"
        ))
    } else if config.dim > MAX_WIDTH {
        let width = config.dim;
        Some(format!("its width is {width}, more than {MAX_WIDTH}"))
    } else if config.vocab % VECTOR != 0 {
        let vocab = config.vocab;
        Some(format!(
            "its vocabulary of {vocab} is no multiple of {VECTOR}"
        ))
    } else {
        multiple("width", config.dim).or_else(|| multiple("feed-forward width", config.ffn))
    }
}

/// The recorded steps of one model, whose sequences lie in the slots that it was made with.
pub struct Decoder {
    gpu: Gpu,
    config: ModelConfig,
    layers: Vec<Layer>,
    embedding: Argument,
    last_norm: Argument,
    output: Argument,
    buffers: Buffers,
    /// What the host says of the rows, and what it hears of them.
    inputs: Pinned,
    chosen: Pinned,
    /// Of a softmax model.
    caches: Option<Caches>,
    library: Library,
    steps: BTreeMap<i64, Step>,
    /// What the pointers point to.
    _alive: Vec<Tensor>,
}

impl Decoder {
    /// For a model that is no [`misfit`], and all of its slots. Weights and states may change, but not move.
    pub fn new(
        index: usize,
        config: &ModelConfig,
        params: &Params,
        slots: &Slots,
    ) -> Result<Decoder, KernelError> {
        let mut gpu = Gpu::open(index)?;
        let architecture = gpu.architecture()?;
        load(&mut gpu, &architecture, &[ROWS, ATTEND, stages::SOURCE])?;
        let device = Device::Cuda(index);
        let rows = bucket(slots.positions_s.len() as i64);
        let mut alive = Alive {
            tensors: Tensors { device },
            kept: Vec::new(),
        };
        let layers = (0..config.layers)
            .zip(&slots.layers)
            .map(|(layer, memory)| {
                alive.layer(config, &LayerParams::new(config, params, layer), memory)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let (d, v) = (config.dim, config.vocab);
        let output = match config.tied {
            true => "tok_embeddings.weight",
            false => "output.weight",
        };
        let embedding = alive.weight("embedding", params.get("tok_embeddings.weight"), &[v, d])?;
        let last_norm = alive.weight("norm", params.get("norm.weight"), &[d])?;
        let output = alive.weight("output", params.get(output), &[v, d])?;
        let buffers = Buffers::new(config, rows, device);
        Ok(Decoder {
            caches: config
                .supra()
                .is_none()
                .then(|| Caches::new(config, slots.positions_s.len(), rows, device)),
            inputs: Pinned::new(&gpu, 3 * rows as usize)?,
            chosen: Pinned::new(&gpu, rows as usize)?,
            library: Library::open(index)?,
            gpu,
            config: config.clone(),
            layers,
            embedding,
            last_norm,
            output,
            buffers,
            steps: BTreeMap::new(),
            _alive: alive.kept,
        })
    }

    /// Reads one more token of some sequences, no slot twice: `memory`, that of the slots it was made with, moves on. Gives
    /// the likeliest next token of each row, -1 where logits are not numbers; [`logits`](Decoder::logits) are then those of
    /// these rows. Waits for the GPU.
    pub fn step(&mut self, rows: &[Row], memory: &mut Slots) -> Result<Vec<i32>, KernelError> {
        let n = bucket(rows.len() as i64);
        if let Some(caches) = &mut self.caches {
            caches.reserve(rows, memory)?;
        }
        if !self.steps.contains_key(&n) {
            let step = self.record(n)?;
            self.steps.insert(n, step);
        }
        let size = self.buffers.chosen.numel();
        let inputs = self.inputs.numbers();
        for (at, row) in rows.iter().enumerate() {
            inputs[at] = row.token;
            inputs[size + at] = row.slot;
            inputs[2 * size + at] = memory.positions_s[row.slot as usize] as i32;
        }
        // Padding: any token, in no slot.
        inputs[rows.len()..size].fill(0);
        inputs[size + rows.len()..2 * size].fill(-1);
        self.steps[&n].graph.launch(&self.gpu)?;
        self.gpu.wait()?;
        for row in rows {
            memory.positions_s[row.slot as usize] += 1;
        }
        Caches::count(rows, memory);
        Ok(self.chosen.numbers()[..rows.len()].to_vec())
    }

    /// Logits [n, V] of the rows of the last step.
    pub fn logits(&self, rows: usize) -> Tensor {
        self.buffers.logits.narrow(0, 0, rows as i64)
    }

    /// Measures how products of n rows are computed best, and records a step.
    fn record(&mut self, n: i64) -> Result<Step, KernelError> {
        let _ = self.buffers.inputs.get(1).fill_(-1);
        let ways = self.measure(n)?;
        let graph = Graph::record(&self.gpu, |tape| self.enqueue(tape, n, &ways))?;
        Ok(Step { graph, _ways: ways })
    }

    fn enqueue(&self, tape: &Tape<'_>, n: i64, ways: &Ways) -> Result<(), KernelError> {
        let queue = tape.main();
        self.inputs.send(queue, &self.buffers.inputs)?;
        self.begin(queue, n)?;
        (0..self.layers.len()).try_for_each(|at| self.block(tape, n, at, ways))?;
        self.norm(queue, n, Some(&self.buffers.delta), self.last_norm)?;
        self.stage(tape, n, Stage::Head, 0, &ways[&Stage::Head])?;
        self.choose(queue, n)?;
        self.chosen.fetch(queue, &self.buffers.chosen)
    }

    fn block(&self, tape: &Tape<'_>, n: i64, at: usize, ways: &Ways) -> Result<(), KernelError> {
        let (queue, layer) = (tape.main(), &self.layers[at]);
        let stage = |stage| self.stage(tape, n, stage, at, &ways[&stage]);
        let delta = (at > 0).then_some(&self.buffers.delta);
        self.norm(queue, n, delta, layer.attention_norm)?;
        stage(Stage::Project)?;
        match (&layer.supra, &self.caches) {
            (Some(supra), _) => {
                stage(Stage::Features)?;
                self.recur(queue, n, supra)?;
            }
            (None, Some(caches)) => self.attend(queue, n, at, caches)?,
            (None, None) => panic!("invariant: a softmax model has caches"),
        }
        stage(Stage::Out)?;
        self.norm(queue, n, Some(&self.buffers.delta), layer.ffn_norm)?;
        stage(Stage::Gate)?;
        stage(Stage::Down)
    }

    fn begin(&self, queue: &Queue, n: i64) -> Result<(), KernelError> {
        let b = &self.buffers;
        let [cosines, sines] = b.angles.each_ref().map(Argument::pointer);
        let arguments = [
            self.embedding,
            Argument::pointer(&b.inputs.get(0)),
            Argument::pointer(&b.inputs.get(2)),
            Argument::pointer(&b.frequencies),
            Argument::pointer(&b.x),
            cosines,
            sines,
            length("x", self.config.dim)?.into(),
            length("x", self.config.head_dim / 2)?.into(),
        ];
        self.launch(queue, "begin_rows", ((n, 1), 256), &arguments)
    }

    fn norm(
        &self,
        queue: &Queue,
        n: i64,
        delta: Option<&Tensor>,
        gain: Argument,
    ) -> Result<(), KernelError> {
        let b = &self.buffers;
        let arguments = [
            Argument::pointer(&b.x),
            delta.map_or(Argument::NULL, Argument::pointer),
            gain,
            Argument::pointer(&b.normed),
            length("x", self.config.dim)?.into(),
            (self.config.norm_eps as f32).into(),
        ];
        let threads = (self.config.dim / VECTOR).clamp(32, 512).cast_unsigned();
        let threads = (threads as u32).next_multiple_of(32);
        self.launch(queue, "norm_rows", ((n, 1), threads), &arguments)
    }

    fn recur(&self, queue: &Queue, n: i64, supra: &Recurrence) -> Result<(), KernelError> {
        let (b, config) = (&self.buffers, &self.config);
        let [[_, bias_q], [_, bias_k]] = supra.features;
        let [cosines, sines] = b.angles.each_ref().map(Argument::pointer);
        let [features_q, features_k] = b.features.each_ref().map(Argument::pointer);
        let arguments = [
            Argument::pointer(&b.projected),
            features_q,
            features_k,
            bias_q,
            bias_k,
            cosines,
            sines,
            Argument::pointer(&b.gammas),
            supra.states,
            Argument::pointer(&b.inputs.get(1)),
            Argument::pointer(&b.mixed),
            length("q", config.group())?.into(),
            ((config.head_dim as f64).sqrt().recip() as f32).into(),
        ];
        let name = match config.head_dim {
            64 => "recur_64",
            _ => "recur_128",
        };
        self.launch(queue, name, ((config.heads, n), 512), &arguments)
    }

    fn attend(
        &self,
        queue: &Queue,
        n: i64,
        layer: usize,
        caches: &Caches,
    ) -> Result<(), KernelError> {
        let (b, config) = (&self.buffers, &self.config);
        let splits = caches::splits(n);
        let [cosines, sines] = b.angles.each_ref().map(Argument::pointer);
        let [keys, values, rooms] = caches.arguments(layer);
        let slots = Argument::pointer(&b.inputs.get(1));
        let arguments = [
            Argument::pointer(&b.projected),
            cosines,
            sines,
            keys,
            values,
            rooms,
            slots,
            Argument::pointer(&b.inputs.get(2)),
            caches.parts(),
            length("k", config.kv_heads)?.into(),
            ((config.head_dim as f64).sqrt().recip() as f32).into(),
        ];
        let name = attend_kernel(config).expect("invariant: other groups are misfits");
        let grid = ((config.kv_heads * splits, n), ATTENDING);
        self.launch(queue, name, grid, &arguments)?;
        let (name, threads) = match config.head_dim {
            64 => ("unite_64", 64),
            _ => ("unite_128", 128),
        };
        let mixed = Argument::pointer(&b.mixed);
        let arguments = [
            caches.parts(),
            slots,
            mixed,
            length("parts", splits)?.into(),
        ];
        self.launch(queue, name, ((config.heads, n), threads), &arguments)
    }

    fn choose(&self, queue: &Queue, n: i64) -> Result<(), KernelError> {
        let arguments = [
            Argument::pointer(&self.buffers.logits),
            Argument::pointer(&self.buffers.chosen),
            length("logits", self.config.vocab)?.into(),
        ];
        self.launch(queue, "choose_rows", ((n, 1), 1024), &arguments)
    }

    fn launch(
        &self,
        queue: &Queue,
        name: &'static str,
        (blocks, threads): ((i64, i64), u32),
        arguments: &[Argument],
    ) -> Result<(), KernelError> {
        let blocks = [blocks.0, blocks.1].map(|count| length("rows", count));
        let [x, y] = blocks;
        let grid = Grid {
            blocks: (x?.cast_unsigned(), y?.cast_unsigned()),
            threads: (threads, 1),
            shared_bytes: 0,
        };
        self.gpu.launch_early(queue, name, grid, arguments)
    }
}

/// A recorded step, and what the library needs to know as long as it is repeated.
struct Step {
    graph: Graph,
    _ways: Ways,
}

/// One more token of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The token.
    pub token: i32,
    /// Where the sequence's state is.
    pub slot: i32,
}

/// Rows that are computed for `rows`: some numbers of rows have no graph of their own, and take that of a larger one, with
/// padding that only the products see.
fn bucket(rows: i64) -> i64 {
    let power = rows.cast_unsigned().next_power_of_two().cast_signed();
    match power / 4 * 3 {
        fewer if power > 16 && rows <= fewer => fewer,
        _ => power,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_waste_at_most_half() {
        let all: Vec<i64> = (1..=70).map(bucket).collect();
        for (rows, &bucket) in (1..).zip(&all) {
            assert!(rows <= bucket && bucket < 2 * rows, "{rows} -> {bucket}");
        }
        let mut distinct = all;
        distinct.dedup();
        assert_eq!(distinct, [1, 2, 4, 8, 16, 24, 32, 48, 64, 96]);
    }
}
