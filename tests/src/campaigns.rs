//! Long campaigns: `scripts/prove NAME` runs them large, the tests run the same code small.

pub mod components;
pub mod curves;
pub mod feed;
pub mod kills;
pub mod plot;
pub mod step;
pub mod worlds;
