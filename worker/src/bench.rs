//! How fast the training step is: forward and backward over random tokens, with random weights of a model's shape; or with
//! given ones, to compare what comes out with another program's.
//!
//! Random weights are drawn on the device: matrices from N(0, 0.02), norms' gains 1, biases 0. Tokens are fresh in every pass,
//! since a GPU computes faster on numbers that it has seen, and much faster on zeros.

use std::{collections::BTreeMap, rc::Rc, time::Instant};

use rand::{SeedableRng, seq::index};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::{
    device::Place,
    kernels::{
        Kernels, Timed,
        timed::{Component, Cost},
    },
    model::{Documents, LossInput, ModelConfig, Params},
    optim::{Layout, Slot},
    step::{Policy, Step, StepError},
};

/// Standard deviation of the entries of matrices.
const SPREAD: f64 = 0.02;
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
    /// Seconds of each timed pass, forward and backward of one micro-batch.
    pub seconds: Vec<f64>,
    /// Mean loss of the last pass, in nats per token.
    pub loss: f64,
    /// L2 norm of the gradient of the mean loss over all passes, the untimed ones too.
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
        let layout = Layout::new(&self.config.params(), false);
        let weights_flat = Tensor::zeros([layout.elements()], (self.precision, device));
        let gradient_flat = Tensor::zeros([layout.elements()], (Kind::Float, device));
        for slot in layout.slots() {
            let mut weight = slot.view(&weights_flat);
            match &self.given {
                Some(given) => weight.copy_(given.weights.get(&slot.name)),
                None => draw(&mut weight, slot),
            }
        }
        let (weights, gradients) = (layout.views(&weights_flat), layout.views(&gradient_flat));
        let documents = self.documents(device);
        let timed = Rc::new(Timed::new(kernels.clone(), device)?);
        let mut step = Step::new(self.config.clone(), timed.clone(), self.policy, device);
        let mut loss = f64::NAN;
        let mut pass = || -> Result<f64, StepError> {
            synchronize(device);
            let clock = Instant::now();
            let input = self.input(device, documents.as_ref());
            step.accumulate(&weights, &gradients, &input, 0.0, &|| false)?;
            synchronize(device);
            let seconds = clock.elapsed().as_secs_f64();
            loss = step.take_loss().cross_entropy / self.targets();
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
        let passes = f64::from(self.warmup + self.passes + WATCHED);
        let norm = kernels.squared_norm(&gradient_flat).sqrt();
        kernels.check()?;
        Ok(Measured {
            parameters: layout.elements(),
            seconds: seconds?,
            loss,
            gradient_norm: norm / (passes * self.targets()),
            components: components.collect(),
            watched,
            bandwidth: timed.bandwidth(),
        })
    }

    fn targets(&self) -> f64 {
        (self.batch * self.tokens) as f64
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
