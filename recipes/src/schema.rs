//! The typed recipe: units, defaults, validation, and errors that point at the line.

mod base;
mod bounds;
mod chaos;
mod check;
mod eval;
mod explain;
mod interval;
mod paths;
mod period;
mod position;
mod read;
mod recipe;
mod report;
mod syntax;
mod units;

pub use base::{Base, Shape};
pub use chaos::{Chaos, ChaosKind};
pub use eval::Eval;
pub use interval::CheckpointInterval;
pub use period::Period;
pub use recipe::{
    Activations, Attention, Batch, Budget, Checkpoint, Coordinator, Data, Decay, Model, NonFinite,
    Optimizer, Precision, Recipe, Recovery, Reduction, ReplicaCheck, RopeFrequencies, Sharding,
    Workers, json_schema,
};
pub use report::RecipeError;
pub use units::{Fraction, RunName, Tokens, UnitError, Warmup};
