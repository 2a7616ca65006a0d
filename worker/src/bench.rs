//! How fast the training step is: forward and backward over random tokens, or a whole optimizer step, with random weights of
//! a model's shape; or with given ones, to compare what comes out with another program's.
//!
//! Random weights are drawn on the device: matrices from N(0, 0.02), norms' gains 1, biases 0. Tokens are fresh in every pass,
//! since a GPU computes faster on numbers that it has seen, and much faster on zeros.

pub mod checkpoint;
pub mod decode;

use std::{collections::BTreeMap, convert::Infallible, rc::Rc, time::Instant};

use rand::{SeedableRng, seq::index};
use rand_chacha::ChaCha8Rng;
use supra_recipes::schema::Optimizer;
use tch::{Device, Kind, Tensor};

use crate::{
    device::Place,
    kernels::{
        Kernels, Timed,
        timed::{Component, Cost},
    },
    model::{Documents, LossInput, ModelConfig, Params},
    optim::{AdamW, Layout, Part, Replica, Slot, clip, replica::Kinds},
    step::{Policy, Step, StepError},
};

/// Standard deviation of the entries of matrices.
const SPREAD: f64 = 0.02;
/// Of the steps; it changes no time.
const LEARNING_RATE: f64 = 1e-5;
/// Passes whose components are timed, after the others: marks on the stream cost a little.
const WATCHED: u32 = 2;

/// What is measured.
#[derive(Debug)]
pub struct StepBench {
    /// Shape of the model.
    pub config: ModelConfig,
    /// Sequences of a micro-batch.
    pub batch: i64,
    /// Tokens of a sequence.
    pub tokens: i64,
    /// Documents in each sequence, beginning at random places; whole sequences if 1.
    pub documents: i64,
    /// What the forward pass keeps.
    pub policy: Policy,
    /// Number format of weights and activations.
    pub precision: Kind,
    /// Micro-batches of an optimizer step, with clipping and AdamW, which then is a pass; 0: forward and backward of one
    /// micro-batch are a pass.
    pub micro_batches: u32,
    /// Passes before the clock runs.
    pub warmup: u32,
    /// Passes that are timed.
    pub passes: u32,
    /// Seed of weights, tokens and documents.
    pub seed: i64,
    /// In place of random weights and tokens.
    pub given: Option<Given>,
}

/// Weights and tokens of a real model.
#[derive(Debug)]
pub struct Given {
    /// Weights, by published name.
    pub weights: Params,
    /// Input tokens, i64 [B, T].
    pub inputs_bt: Tensor,
    /// Targets, i64 [B, T]. All count.
    pub targets_bt: Tensor,
}

/// What came out.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Parameters of the model.
    pub parameters: i64,
    /// Seconds of each timed pass.
    pub seconds: Vec<f64>,
    /// Mean loss of the last pass, in nats per token.
    pub loss: f64,
    /// L2 norm of the gradient of the mean loss of the last pass.
    pub gradient_norm: f64,
    /// Where the time of one more pass goes.
    pub components: BTreeMap<Component, Cost>,
    /// Seconds of that pass.
    pub watched: f64,
    /// Bytes per second between a GPU's memory and its processors, at most.
    pub bandwidth: Option<f64>,
}

impl Measured {
    /// The median of the timed passes, in seconds.
    pub fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }
}

impl StepBench {
    /// Draws weights and tokens and runs all passes, whose gradients add up in fp32 as in training.
    pub fn run(&self, place: &Place, kernels: Rc<dyn Kernels>) -> Result<Measured, StepError> {
        let device = place.device;
        tch::manual_seed(self.seed);
        let layout = Layout::new(&self.config.params(), false, 1);
        let mut state = self.state(&layout, device);
        for slot in layout.slots() {
            let mut weight = state.weights().get(&slot.name).shallow_clone();
            match &self.given {
                Some(given) => weight.copy_(given.weights.get(&slot.name)),
                None => draw(&mut weight, slot),
            }
        }
        let documents = self.documents(device);
        let timed = Rc::new(Timed::new(kernels, device)?);
        let mut step = Step::new(self.config.clone(), timed.clone(), self.policy, device);
        let targets = (self.batch * self.tokens) as f64 * f64::from(self.micro_batches.max(1));
        let (mut loss, mut passes) = (f64::NAN, 0.0);
        let mut pass = || -> Result<f64, StepError> {
            synchronize(device);
            let clock = Instant::now();
            state.begin();
            for _ in 0..self.micro_batches.max(1) {
                let input = self.input(device, documents.as_ref());
                step.accumulate(state.weights(), state.gradients(), &input, 0.0, &mut || {
                    false
                })?;
            }
            state.update(timed.as_ref(), targets);
            synchronize(device);
            let seconds = clock.elapsed().as_secs_f64();
            loss = step.take_loss().cross_entropy / targets;
            passes += 1.0;
            Ok(seconds)
        };
        for _ in 0..self.warmup {
            pass()?;
        }
        let seconds: Result<Vec<f64>, StepError> = (0..self.passes).map(|_| pass()).collect();
        timed.start();
        let mut watched = 0.0;
        for _ in 0..WATCHED {
            watched += pass()? / f64::from(WATCHED);
        }
        let costs = timed.take()?.into_iter();
        let components = costs.map(|(component, cost)| (component, cost / f64::from(WATCHED)));
        let components = components.collect();
        let gradient_norm = state.gradient_norm(timed.as_ref()) / targets;
        timed.check()?;
        Ok(Measured {
            parameters: layout.numbers(),
            seconds: seconds?,
            loss,
            gradient_norm: gradient_norm / if self.micro_batches == 0 { passes } else { 1.0 },
            components,
            watched,
            bandwidth: timed.bandwidth(),
        })
    }

    fn state(&self, layout: &Layout, device: Device) -> State {
        if self.micro_batches == 0 {
            let weights = Tensor::zeros([layout.elements()], (self.precision, device));
            let gradient = Tensor::zeros([layout.elements()], (Kind::Float, device));
            return State::Passes {
                weights: layout.views(&weights),
                gradients: layout.views(&gradient),
                gradient,
            };
        }
        let kinds = Kinds {
            parameters: self.precision,
            moments: Kind::Float,
        };
        let optimizer = Optimizer::default();
        State::Steps {
            replica: Replica::new(layout.clone(), Part::WHOLE, kinds, device),
            adamw: AdamW::new(&optimizer, self.seed.cast_unsigned()),
            clip: optimizer.clip,
        }
    }

    fn input(&self, device: Device, documents: Option<&Documents>) -> LossInput {
        let random = || {
            let shape = [self.batch, self.tokens];
            Tensor::randint(self.config.vocab, shape, (Kind::Int64, device))
        };
        let [inputs_bt, targets_bt] = match &self.given {
            Some(given) => [&given.inputs_bt, &given.targets_bt].map(|ids| ids.to_device(device)),
            None => [random(), random()],
        };
        LossInput {
            inputs_bt,
            targets_bt,
            mask_bt: Tensor::ones([self.batch, self.tokens], (Kind::Bool, device)),
            documents: documents.map(|documents| documents.to_device(device)),
        }
    }

    /// Where documents begin: at the first token and at other random ones.
    fn documents(&self, device: Device) -> Option<Documents> {
        if self.documents <= 1 {
            return None;
        }
        let mut random = ChaCha8Rng::seed_from_u64(self.seed.cast_unsigned());
        let (tokens, others) = (self.tokens as usize - 1, self.documents as usize - 1);
        let rows: Vec<Vec<u32>> = (0..self.batch)
            .map(|_| {
                let inner = index::sample(&mut random, tokens, others.min(tokens));
                let mut starts: Vec<u32> = inner.iter().map(|at| at as u32 + 1).collect();
                starts.push(0);
                starts.sort_unstable();
                starts
            })
            .collect();
        Some(Documents::from_starts(&rows, self.tokens as usize).to_device(device))
    }
}

/// What a benchmark computes on.
enum State {
    Passes {
        weights: Params,
        gradients: Params,
        /// All gradients, flat.
        gradient: Tensor,
    },
    Steps {
        replica: Replica,
        adamw: AdamW,
        clip: f64,
    },
}

impl State {
    fn weights(&self) -> &Params {
        match self {
            State::Passes { weights, .. } => weights,
            State::Steps { replica, .. } => replica.params(),
        }
    }

    fn gradients(&self) -> &Params {
        match self {
            State::Passes { gradients, .. } => gradients,
            State::Steps { replica, .. } => replica.gradients(),
        }
    }

    /// A step forgets the gradient of the one before; without steps gradients add up over all passes.
    fn begin(&mut self) {
        if let State::Steps { replica, .. } = self {
            replica.zero_gradient();
        }
    }

    /// Updates the weights as training does, if steps are measured.
    fn update(&mut self, kernels: &dyn Kernels, targets: f64) {
        let State::Steps {
            replica,
            adamw,
            clip,
        } = self
        else {
            return;
        };
        let norm = kernels
            .squared_norm(&replica.gradient_of(Part::WHOLE))
            .sqrt()
            / targets;
        let scale = clip::coefficient(norm, *clip) / targets;
        let Ok(()) = adamw.update(kernels, replica, LEARNING_RATE, scale, |_| {
            Ok::<_, Infallible>(())
        });
    }

    /// L2 norm of the gradient sum.
    fn gradient_norm(&self, kernels: &dyn Kernels) -> f64 {
        let squares = match self {
            State::Passes { gradient, .. } => kernels.squared_norm(std::slice::from_ref(gradient)),
            State::Steps { replica, .. } => kernels.squared_norm(&replica.gradient_of(Part::WHOLE)),
        };
        squares.sqrt()
    }
}

fn draw(weight: &mut Tensor, slot: &Slot) {
    let _ = match slot.shape.len() {
        1 if slot.name.ends_with("norm.weight") => weight.fill_(1.0),
        1 => weight.zero_(),
        _ => weight.normal_(0.0, SPREAD),
    };
}

fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}
