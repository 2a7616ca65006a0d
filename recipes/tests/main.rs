//! Behaviour of the recipe crate as its users see it.

mod bad_recipes;
mod committed;
mod good_recipes;
mod plan;
