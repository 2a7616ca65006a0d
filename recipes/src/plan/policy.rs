//! What the forward pass keeps for the backward pass.

use std::fmt;

use serde::Serialize;

use crate::schema::Activations;

/// How much of a block's work is kept, and how much is done twice. All give the same gradients to the bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Each block's input only: the whole block is computed again, but for its last matrix product.
    Recompute,
    /// What matrix products and attention made: everything else is computed again.
    Lean,
    /// Everything.
    Save,
}

impl Policy {
    /// All of them, the one that computes least twice first.
    pub const ALL: [Policy; 3] = [Policy::Save, Policy::Lean, Policy::Recompute];

    /// Whether a recipe that says `activations` lets a worker take this one.
    pub fn allowed_by(self, activations: Activations) -> bool {
        match activations {
            Activations::Auto => true,
            Activations::Save => self == Policy::Save,
            Activations::Lean => self == Policy::Lean,
            Activations::Recompute => self == Policy::Recompute,
        }
    }
}

impl fmt::Display for Policy {
    /// As recipes spell it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Policy::Recompute => "recompute",
            Policy::Lean => "lean",
            Policy::Save => "save",
        })
    }
}
