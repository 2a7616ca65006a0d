//! Reductions.

use std::ffi::c_int;

/// How the values of the ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Their sum.
    Sum,
    /// Their product.
    Product,
    /// The largest.
    Max,
    /// The smallest.
    Min,
    /// Their sum divided by the number of ranks; integers are rounded towards zero.
    Average,
}

impl Op {
    /// `ncclRedOp_t`.
    pub(crate) fn raw(self) -> c_int {
        match self {
            Op::Sum => 0,
            Op::Product => 1,
            Op::Max => 2,
            Op::Min => 3,
            Op::Average => 4,
        }
    }
}
