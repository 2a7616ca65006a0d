//! What the forward pass keeps for the backward pass.

/// How much of a block's work is kept, and how much is done twice. All give the same gradients to the bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Policy {
    /// Each block's input only: the whole block is computed again, but for its last matrix product.
    Recompute,
    /// What matrix products and attention made: everything else is computed again.
    Lean,
    /// Everything.
    Save,
}
