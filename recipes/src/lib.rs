//! The SUPRA recipe: what a run is ([`schema`]) and what follows from it ([`plan`]).
//!
//! Coordinator and workers link this crate and evaluate the same pure functions; neither libtorch nor any other crate
//! of the workspace is needed.
#![forbid(unsafe_code)]

pub mod panic;
pub mod plan;
pub mod schema;

pub use plan::{Digest, Plan, PlanError};
pub use schema::{Recipe, RecipeError, json_schema};
