//! What a run measures of itself while it trains.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bounds;
use super::units::Tokens;

/// The loss on held-out text, and how well attention stands its linearisation. Both only read the model: the weights of a
/// run that is measured are those of one that is not, to the bit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Eval {
    /// The held-out loss is measured before the first step, at each step that reaches a multiple of this, and at the last.
    pub every_tokens: Tokens,
    /// Windows of `data.heldout` that are taken, of `batch.sequence_length` tokens, from its first on: the same ones every
    /// time. All that it has, if it has fewer.
    #[serde(deserialize_with = "bounds::counting")]
    #[schemars(range(min = 1))]
    pub windows: u64,
    /// Held-out loss that the run is to reach, nats per token; it says so early when it will not.
    #[serde(
        deserialize_with = "bounds::optional_positive",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub target_loss: Option<f64>,
}

impl Default for Eval {
    fn default() -> Self {
        Eval {
            every_tokens: Tokens(100_000_000),
            windows: 64,
            target_loss: None,
        }
    }
}
