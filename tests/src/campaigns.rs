//! Long campaigns: `scripts/prove NAME` runs them large, the tests run the same code small.

pub mod big;
pub mod chaos;
pub mod checkpoint;
pub mod checkpoint_kills;
pub mod components;
pub mod corruption;
pub mod curves;
pub mod feed;
pub mod inference;
pub mod kills;
pub mod plot;
pub mod precision;
pub mod recovery;
pub mod scale;
mod side_by_side;
pub mod simulation;
pub mod step;
pub mod uptrain;
mod victim;
pub mod worlds;
