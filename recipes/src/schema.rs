//! The typed recipe: units, defaults, validation, and errors that point at the line.

mod bounds;
mod check;
mod explain;
mod paths;
mod position;
mod read;
mod recipe;
mod report;
mod syntax;
mod units;

pub use recipe::{
    Activations, Attention, Base, Batch, Budget, Checkpoint, Data, Decay, Model, NonFinite,
    Optimizer, Precision, Recipe, Reduction, ReplicaCheck, RopeFrequencies, Sharding, Weights,
    Workers, json_schema,
};
pub use report::RecipeError;
pub use units::{Fraction, RunName, Tokens, UnitError, Warmup};
