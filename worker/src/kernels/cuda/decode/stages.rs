//! The matrix products of a token step, each in the way that is the fastest for a number of rows.

use std::collections::BTreeMap;

use tch::Tensor;

use super::{
    COLUMNS, Decoder,
    graph::{Graph, Tape},
    library::{Algorithm, Described, Shape},
    weights::Recurrence,
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
        "thin_narrow_1",
        "thin_narrow_2",
        "thin_wide_1",
        "thin_wide_2",
        "thin_gated_narrow_1",
        "thin_gated_narrow_2",
        "thin_gated_wide_1",
        "thin_gated_wide_2",
    ],
};

/// Threads of a block of other kernels.
const THREADS: u32 = 256;
/// Rows that the kernels for few rows take.
const MOST_ROWS: i64 = 16;
/// Blocks over which a way is measured, so that weights come from memory as they do in a step.
const MEASURED_LAYERS: usize = 4;
/// How often each way is measured; the fastest counts.
const REPEATS: usize = 3;
/// The library's ways of a stage that are measured in their place, too.
const FASTEST: usize = 4;

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
#[derive(Debug)]
pub enum Way {
    /// By a kernel for few rows.
    Thin(Thin),
    /// By cuBLASLt; a second product beside the first.
    Library(Vec<(Described, Algorithm)>),
}

/// The kernels for few rows: how much of a weight a block has in hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thin {
    /// 16 rows of the weight by 8 warps.
    Narrow,
    /// 32 rows by 16 warps.
    Wide,
}

impl Thin {
    const ALL: [Thin; 2] = [Thin::Narrow, Thin::Wide];

    /// Rows of a weight per block.
    fn height(self) -> i64 {
        match self {
            Thin::Narrow => 16,
            Thin::Wide => 32,
        }
    }

    fn threads(self) -> u32 {
        match self {
            Thin::Narrow => 256,
            Thin::Wide => 512,
        }
    }

    /// The kernel for n rows.
    fn kernel(self, gated: bool, n: i64) -> &'static str {
        match (gated, self, n) {
            (false, Thin::Narrow, ..=8) => "thin_narrow_1",
            (false, Thin::Narrow, _) => "thin_narrow_2",
            (false, Thin::Wide, ..=8) => "thin_wide_1",
            (false, Thin::Wide, _) => "thin_wide_2",
            (true, Thin::Narrow, ..=8) => "thin_gated_narrow_1",
            (true, Thin::Narrow, _) => "thin_gated_narrow_2",
            (true, Thin::Wide, ..=8) => "thin_gated_wide_1",
            (true, Thin::Wide, _) => "thin_gated_wide_2",
        }
    }
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
        tape: &Tape<'_>,
        n: i64,
        stage: Stage,
        layer: usize,
        way: &Way,
    ) -> Result<(), KernelError> {
        let products = self.products(stage, layer);
        match way {
            &Way::Thin(thin) => self.thin(tape.main(), n, stage, thin, &products),
            Way::Library(plans) => {
                let multiply = |at: usize, queue: &Queue| {
                    let (product, (described, algorithm)) = (&products[at], &plans[at]);
                    let tensors = [product.weight, product.x, product.y];
                    self.library
                        .multiply(queue, at, described, algorithm, tensors)
                };
                match plans.len() {
                    1 => multiply(0, tape.main())?,
                    _ => tape.both(|main| multiply(0, main), |beside| multiply(1, beside))?,
                }
                match stage {
                    Stage::Gate => self.gate(tape.main(), n),
                    _ => Ok(()),
                }
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
        match stage {
            Stage::Project => vec![product(layer.in_proj, &b.normed, &b.projected)],
            Stage::Features => match &layer.supra {
                Some(Recurrence {
                    features: [[query, _], [key, _]],
                    ..
                }) => vec![
                    product(*query, &columns(0, q), &b.features[0]),
                    product(*key, &columns(q, k), &b.features[1]),
                ],
                None => Vec::new(),
            },
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
        thin: Thin,
        products: &[Product],
    ) -> Result<(), KernelError> {
        let rows = length("x", n)?.into();
        let (first, last) = (&products[0], &products[products.len() - 1]);
        let gated = stage == Stage::Gate;
        let name = thin.kernel(gated, n);
        if gated {
            let f = self.config.ffn;
            let [weight, x, _, inner, x_stride, _] = first.arguments()?;
            let (y, f_32) = (
                Argument::pointer(&self.buffers.gated),
                length("y", f)?.into(),
            );
            let arguments = [weight, x, y, inner, x_stride, f_32, f_32, rows];
            return self.launch(
                queue,
                name,
                ((f / (thin.height() / 2), 1), thin.threads()),
                &arguments,
            );
        }
        let blocks = |product: &Product| product.outer / thin.height();
        let all = products.iter().map(blocks).sum();
        let split = length("y", blocks(first))?.into();
        let mut arguments = [first.arguments()?, last.arguments()?].concat();
        arguments.extend([split, rows]);
        self.launch(queue, name, ((all, 1), thin.threads()), &arguments)
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

    /// The fastest way of each stage for n rows, measured. The rows' slots have to be those of padding: no state may move.
    pub(super) fn measure(&self, n: i64) -> Result<Ways, KernelError> {
        let (mut ways, mut others) = (Ways::new(), Vec::new());
        for stage in STAGES {
            if !self.products(stage, 0).is_empty() {
                let mut library = self.by_library(n, stage)?.into_iter();
                let first = library
                    .next()
                    .ok_or_else(|| self.library.offers_nothing())?;
                ways.insert(stage, first);
                let thin = Thin::ALL.into_iter();
                let thin = thin.filter(|&thin| self.takes_thin(n, stage, thin));
                others.push((
                    stage,
                    library.chain(thin.map(Way::Thin)).collect::<Vec<_>>(),
                ));
            }
        }
        // One kernel's end and the next one's beginning share the GPU: what is fast alone need not be fast in its place.
        for (stage, others) in others {
            let in_place = |ways: &Ways| {
                self.time(|tape, at| match stage {
                    Stage::Head => self.stage(tape, n, stage, at, &ways[&stage]),
                    _ => self.block(tape, n, at, ways),
                })
            };
            let mut least = in_place(&ways)?;
            for other in others {
                let before = ways.insert(stage, other);
                let time = in_place(&ways)?;
                match before {
                    Some(before) if time >= least => drop(ways.insert(stage, before)),
                    _ => least = time,
                }
            }
        }
        tracing::debug!(rows = n, ?ways, "chose the ways of products");
        Ok(ways)
    }

    /// Whether the kernel for few rows can compute a stage.
    fn takes_thin(&self, n: i64, stage: Stage, thin: Thin) -> bool {
        let whole =
            |product: &Product| product.outer % thin.height() == 0 && product.inner % COLUMNS == 0;
        let products = self.products(stage, 0);
        n <= MOST_ROWS && products.iter().all(whole)
    }

    /// The [`FASTEST`] ways of a stage by the library, each of its products alone, the fastest first.
    fn by_library(&self, n: i64, stage: Stage) -> Result<Vec<Way>, KernelError> {
        let products = self.products(stage, 0);
        let mut ways: [Vec<_>; FASTEST] = Default::default();
        for (at, product) in products.iter().enumerate() {
            let described = self.library.describe(product.shape(n))?;
            let mut measured = Vec::new();
            for algorithm in self.library.algorithms(&described)? {
                let time = self.time(|tape, layer| {
                    let product = &self.products(stage, layer)[at];
                    let tensors = [product.weight, product.x, product.y];
                    self.library
                        .multiply(tape.main(), at, &described, &algorithm, tensors)
                });
                // What the library offers and then refuses is not used.
                if let Ok(time) = time {
                    measured.push((time, algorithm));
                }
            }
            measured.sort_by(|(a, _), (b, _)| a.total_cmp(b));
            for (plans, (_, algorithm)) in ways.iter_mut().zip(measured) {
                plans.push((self.library.describe(product.shape(n))?, algorithm));
            }
        }
        let whole = ways
            .into_iter()
            .filter(|plans| plans.len() == products.len());
        Ok(whole.map(Way::Library).collect())
    }

    /// Milliseconds of some work on several blocks, one after the other.
    fn time(
        &self,
        work: impl Fn(&Tape<'_>, usize) -> Result<(), KernelError>,
    ) -> Result<f64, KernelError> {
        let graph = Graph::record(&self.gpu, |tape| {
            (0..self.layers.len().min(MEASURED_LAYERS)).try_for_each(|at| work(tape, at))
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
