//! Behaviour of the recipe crate as its users see it.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is how a test's helper fails, too"
)]

mod bad_recipes;
mod committed;
mod good_recipes;
mod plan;
