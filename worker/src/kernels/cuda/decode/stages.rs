//! The matrix products of a token step, each in the way that is the fastest for a number of rows.

use std::collections::BTreeMap;

use tch::Tensor;

use super::{
    COLUMNS, Decoder,
    graph::Graph,
    library::{Algorithm, Described, Shape},
};
use crate::kernels::cuda::{
    Source,
    error::KernelError,
    event::Event,
    launch::{Argument, Queue},
    tensors::{VECTOR, length},
};

/// The source of the kernels for few rows.
pub const SOURCE: Source = Source {
    name: "thin.cu",
    text: include_str!("thin.cu"),
    kernels: &[
        "thin_1_1",
        "thin_2_1",
        "thin_1_2",
        "thin_2_2",
        "thin_1_4",
        "thin_2_4",
        "thin_gated_1_1",
        "thin_gated_2_1",
        "thin_gated_1_2",
        "thin_gated_2_2",
        "thin_gated_1_4",
        "thin_gated_2_4",
    ],
};

/// Threads of a block.
const THREADS: u32 = 256;
/// Rows that the kernels for few rows take.
const MOST_ROWS: i64 = 32;
/// Blocks over which a way is measured, so that weights come from memory as they do in a step.
const MEASURED_LAYERS: usize = 8;
/// How often each way is measured; the fastest counts.
const REPEATS: usize = 3;

/// The stages of a step that are matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// To queries, keys and values.
    Project,
    /// The feature maps, before bias and ReLU.
    Features,
    /// From the heads to the residual stream.
    Out,
    /// Gate and up, and what SwiGLU makes of them.
    Gate,
    /// From there to the residual stream.
    Down,
    /// To logits.
    Head,
}

/// All of them.
const STAGES: [Stage; 6] = [
    Stage::Project,
    Stage::Features,
    Stage::Out,
    Stage::Gate,
    Stage::Down,
    Stage::Head,
];

/// How a stage is computed.
pub enum Way {
    /// By the kernel for few rows, so many times 16 rows of a weight per block.
    Thin(i64),
    /// By cuBLASLt, one product after the other.
    Library(Vec<(Described, Algorithm)>),
}

/// The way of each stage for a number of rows.
pub type Ways = BTreeMap<Stage, Way>;

/// One product: y [n, outer] = x [n, inner] W^T. Rows of x are `x_stride` apart.
struct Product {
    weight: Argument,
    x: Argument,
    x_stride: i64,
    y: Argument,
    inner: i64,
    outer: i64,
}

impl Product {
    fn shape(&self, rows: i64) -> Shape {
        Shape {
            rows,
            inner: self.inner,
            outer: self.outer,
            x_stride: self.x_stride,
            y_stride: self.outer,
        }
    }

    /// As the kernel for few rows takes it.
    fn arguments(&self) -> Result<[Argument; 6], KernelError> {
        Ok([
            self.weight,
            self.x,
            self.y,
            length("x", self.inner)?.into(),
            length("x", self.x_stride)?.into(),
            length("y", self.outer)?.into(),
        ])
    }
}

impl Decoder {
    /// Puts a stage of block `layer` on a stream, for n rows.
    pub(super) fn stage(
        &self,
        queue: &Queue,
        n: i64,
        stage: Stage,
        layer: usize,
        way: &Way,
    ) -> Result<(), KernelError> {
        let products = self.products(stage, layer);
        match way {
            &Way::Thin(tiles) => self.thin(queue, n, stage, tiles, &products),
            Way::Library(plans) => {
                for (product, (described, algorithm)) in products.iter().zip(plans) {
                    let tensors = [product.weight, product.x, product.y];
                    self.library
                        .multiply(queue, described, algorithm, tensors)?;
                }
                if stage == Stage::Gate {
                    self.gate(queue, n)?;
                }
                Ok(())
            }
        }
    }

    fn products(&self, stage: Stage, layer: usize) -> Vec<Product> {
        let (b, config, layer) = (&self.buffers, &self.config, &self.layers[layer]);
        let (q, k) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let product = |weight, x: &Tensor, y: &Tensor| Product {
            weight,
            x: Argument::pointer(x),
            x_stride: x.stride()[0],
            y: Argument::pointer(y),
            inner: x.size()[1],
            outer: y.size()[1],
        };
        let columns = |from, width| b.projected.narrow(1, from, width);
        let [[query, _], [key, _]] = layer.features;
        match stage {
            Stage::Project => vec![product(layer.in_proj, &b.normed, &b.projected)],
            Stage::Features => vec![
                product(query, &columns(0, q), &b.features[0]),
                product(key, &columns(q, k), &b.features[1]),
            ],
            Stage::Out => vec![product(layer.out_proj, &b.mixed, &b.delta)],
            Stage::Gate => vec![product(layer.w12, &b.normed, &b.gate_up)],
            Stage::Down => vec![product(layer.w3, &b.gated, &b.delta)],
            Stage::Head => vec![product(self.output, &b.normed, &b.logits)],
        }
    }

    fn thin(
        &self,
        queue: &Queue,
        n: i64,
        stage: Stage,
        tiles: i64,
        products: &[Product],
    ) -> Result<(), KernelError> {
        let rows = length("x", n)?.into();
        let (first, last) = (&products[0], &products[products.len() - 1]);
        let gated = stage == Stage::Gate;
        let name = kernel(gated, tiles, n);
        if gated {
            let f = self.config.ffn;
            let [weight, x, _, inner, x_stride, _] = first.arguments()?;
            let (y, f_32) = (
                Argument::pointer(&self.buffers.gated),
                length("y", f)?.into(),
            );
            let arguments = [weight, x, y, inner, x_stride, f_32, f_32, rows];
            return self.launch(queue, name, ((f / (8 * tiles), 1), THREADS), &arguments);
        }
        let blocks = |product: &Product| product.outer / (16 * tiles);
        let all = products.iter().map(blocks).sum();
        let split = length("y", blocks(first))?.into();
        let mut arguments = [first.arguments()?, last.arguments()?].concat();
        arguments.extend([split, rows]);
        self.launch(queue, name, ((all, 1), THREADS), &arguments)
    }

    fn gate(&self, queue: &Queue, n: i64) -> Result<(), KernelError> {
        let (b, f) = (&self.buffers, self.config.ffn);
        let arguments = [
            Argument::pointer(&b.gate_up),
            Argument::pointer(&b.gated),
            length("y", f)?.into(),
        ];
        let blocks = f
            .cast_unsigned()
            .div_ceil(u64::from(THREADS) * VECTOR as u64);
        let grid = ((blocks.cast_signed(), n), THREADS);
        self.launch(queue, "gate_rows", grid, &arguments)
    }

    /// The fastest way of each stage for n rows, measured.
    pub(super) fn measure(&self, n: i64) -> Result<Ways, KernelError> {
        let fastest = |&stage: &Stage| {
            let mut best = self.by_library(n, stage)?;
            for tiles in [1, 2] {
                if self.takes_thin(n, stage, tiles) {
                    let way = Way::Thin(tiles);
                    let time = self.time(|queue, at| self.stage(queue, n, stage, at, &way))?;
                    if time < best.0 {
                        best = (time, way);
                    }
                }
            }
            let (milliseconds, way) = best;
            let how = match &way {
                Way::Thin(tiles) => format!("thin, {tiles} tiles"),
                Way::Library(_) => "cuBLASLt".to_owned(),
            };
            tracing::debug!(
                rows = n,
                ?stage,
                how,
                milliseconds,
                "chose the products' way"
            );
            Ok((stage, way))
        };
        STAGES.iter().map(fastest).collect()
    }

    /// Whether the kernel for few rows can compute a stage.
    fn takes_thin(&self, n: i64, stage: Stage, tiles: i64) -> bool {
        let whole =
            |product: &Product| product.outer % (16 * tiles) == 0 && product.inner % COLUMNS == 0;
        n <= MOST_ROWS && self.products(stage, 0).iter().all(whole)
    }

    /// The time of a stage with the best algorithm for each of its products.
    fn by_library(&self, n: i64, stage: Stage) -> Result<(f64, Way), KernelError> {
        let mut plans = Vec::new();
        for (at, product) in self.products(stage, 0).iter().enumerate() {
            let described = self.library.describe(product.shape(n))?;
            let mut best = None;
            for algorithm in self.library.algorithms(&described)? {
                let time = self.time(|queue, layer| {
                    let product = &self.products(stage, layer)[at];
                    let tensors = [product.weight, product.x, product.y];
                    self.library
                        .multiply(queue, &described, &algorithm, tensors)
                });
                // What the library offers and then refuses is not used.
                if let Ok(time) = time
                    && best.as_ref().is_none_or(|(least, _)| time < *least)
                {
                    best = Some((time, algorithm));
                }
            }
            let (_, algorithm) = best.ok_or_else(|| self.library.offers_nothing())?;
            plans.push((described, algorithm));
        }
        let way = Way::Library(plans);
        let time = self.time(|queue, layer| self.stage(queue, n, stage, layer, &way))?;
        Ok((time, way))
    }

    /// Milliseconds of some work on several blocks, one after the other.
    fn time(
        &self,
        work: impl Fn(&Queue, usize) -> Result<(), KernelError>,
    ) -> Result<f64, KernelError> {
        let graph = Graph::record(&self.gpu, |queue| {
            (0..self.layers.len().min(MEASURED_LAYERS)).try_for_each(|at| work(queue, at))
        })?;
        let mut least = f64::INFINITY;
        for _ in 0..=REPEATS {
            let before = Event::now(&self.gpu)?;
            graph.launch(&self.gpu)?;
            least = least.min(Event::now(&self.gpu)?.since(&before, &self.gpu)?);
        }
        Ok(least)
    }
}

/// The kernel for few rows, for n of them.
fn kernel(gated: bool, tiles: i64, n: i64) -> &'static str {
    match (gated, tiles, n) {
        (false, 1, ..=8) => "thin_1_1",
        (false, _, ..=8) => "thin_2_1",
        (false, 1, ..=16) => "thin_1_2",
        (false, _, ..=16) => "thin_2_2",
        (false, 1, _) => "thin_1_4",
        (false, _, _) => "thin_2_4",
        (true, 1, ..=8) => "thin_gated_1_1",
        (true, _, ..=8) => "thin_gated_2_1",
        (true, 1, ..=16) => "thin_gated_1_2",
        (true, _, ..=16) => "thin_gated_2_2",
        (true, 1, _) => "thin_gated_1_4",
        (true, _, _) => "thin_gated_2_4",
    }
}
