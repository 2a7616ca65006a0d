//! Linearisation gates: how well the attention of a state stands that it is linear now, and what of that is worth a word.
//!
//! `docs/recipes.md` says under *Evaluation* what each number is of. Drift has no limit: uptraining may find outputs of its own, and what
//! counts is the loss.

use serde::{Deserialize, Deserializer, Serialize};
use supra_proto::v1;

/// Most that logits of two forms may differ by, as a share of their root mean square (of 1, if that is less): of a model that
/// computes in fp32, and of one that computes in bf16, where the last of eight bits may fall either way in every layer.
const FORM_ERROR: f64 = 5e-4;
const ROUNDED_FORM_ERROR: f64 = 0.25;

/// Largest share of features of a block that may never be anything but zero.
const DEAD: f64 = 0.5;

/// How many times what it was before the first step the input of a block's head norms may be.
const GROWTH: f64 = 10.0;

/// The gates of one state. The words are those of [`v1::Gates`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gates {
    /// Step that the state is behind.
    pub step: u64,
    /// Greatest difference between logits of the parallel and of the recurrent form.
    #[serde(deserialize_with = "number")]
    pub form_error: f64,
    /// Root mean square of the logits.
    #[serde(deserialize_with = "number")]
    pub logit_rms: f64,
    /// The model computes in bf16.
    pub rounded: bool,
    /// Block by block.
    pub layers: Vec<Layer>,
    /// Wall time, seconds.
    #[serde(deserialize_with = "number")]
    pub seconds: f64,
}

/// The attention of one block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    /// Difference of attention's output from that of the base, relative; none without a base.
    pub drift: Option<f64>,
    /// Cosine of the angle between them.
    pub cosine: Option<f64>,
    /// Share of dead features of queries.
    #[serde(deserialize_with = "number")]
    pub dead_queries: f64,
    /// And of keys.
    #[serde(deserialize_with = "number")]
    pub dead_keys: f64,
    /// Root mean square of what head norms read.
    #[serde(deserialize_with = "number")]
    pub norm_input: f64,
    /// The same before the first step; none when the base could not be read again.
    pub norm_input_at_start: Option<f64>,
}

/// JSON has `null` where a number is none.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let number = Option::<f64>::deserialize(deserializer)?;
    Ok(number.unwrap_or(f64::NAN))
}

impl Layer {
    /// How many times what it was the input of the head norms is; 1 when that is not known.
    pub fn growth(&self) -> f64 {
        self.norm_input_at_start
            .map_or(1.0, |at_start| self.norm_input / at_start)
    }
}

impl Gates {
    /// The largest of something over all blocks, and the block. What is not a number is larger than any.
    pub fn worst(&self, of: impl Fn(&Layer) -> f64) -> Option<(usize, f64)> {
        let values = self.layers.iter().map(|layer| match of(layer) {
            value if value.is_nan() => f64::INFINITY,
            value => value,
        });
        let each = values.enumerate();
        each.max_by(|(_, left), (_, right)| left.total_cmp(right))
    }

    /// What is wrong, a line each; nothing when all is well.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let limit = if self.rounded {
            ROUNDED_FORM_ERROR
        } else {
            FORM_ERROR
        };
        let limit = limit * self.logit_rms.max(1.0);
        if self.form_error.is_nan() || self.form_error > limit {
            warnings.push(format!(
                "logits of the recurrent form differ from those of the parallel form by {:.2e}, more than {limit:.2e}: the model \
                 does not run as it is trained",
                self.form_error
            ));
        }
        let queries = self.worst(|layer| layer.dead_queries);
        let keys = self.worst(|layer| layer.dead_keys);
        for (of, worst) in [("query", queries), ("key", keys)] {
            if let Some((block, worst)) = worst.filter(|(_, worst)| *worst > DEAD) {
                warnings.push(format!(
                    "{:.0} % of the {of} features of block {block} are zero at every token of the sample: its feature map dies; \
                     lower optimizer.lr",
                    100.0 * worst
                ));
            }
        }
        if let Some((block, growth)) = self.worst(Layer::growth).filter(|(_, it)| *it > GROWTH) {
            warnings.push(format!(
                "what the head norms of block {block} read is {growth:.1} times what it was before the first step: attention that \
                 is not normalised by its weights becomes unstable like this; lower optimizer.lr or optimizer.clip"
            ));
        }
        warnings
    }
}

impl From<v1::Gates> for Gates {
    fn from(gates: v1::Gates) -> Gates {
        let finite = |number: Option<f64>| number.filter(|it| it.is_finite());
        let layer = |layer: v1::LayerGates| Layer {
            drift: finite(layer.drift),
            cosine: finite(layer.cosine),
            dead_queries: layer.dead_queries,
            dead_keys: layer.dead_keys,
            norm_input: layer.norm_input,
            norm_input_at_start: finite(layer.norm_input_at_start),
        };
        Gates {
            step: gates.step,
            form_error: gates.form_error,
            logit_rms: gates.logit_rms,
            rounded: gates.rounded,
            layers: gates.layers.into_iter().map(layer).collect(),
            seconds: gates.seconds,
        }
    }
}

impl From<&Gates> for v1::Gates {
    fn from(gates: &Gates) -> v1::Gates {
        let layer = |layer: &Layer| v1::LayerGates {
            drift: layer.drift,
            cosine: layer.cosine,
            dead_queries: layer.dead_queries,
            dead_keys: layer.dead_keys,
            norm_input: layer.norm_input,
            norm_input_at_start: layer.norm_input_at_start,
        };
        v1::Gates {
            step: gates.step,
            form_error: gates.form_error,
            logit_rms: gates.logit_rms,
            rounded: gates.rounded,
            layers: gates.layers.iter().map(layer).collect(),
            seconds: gates.seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> Gates {
        let layer = Layer {
            drift: Some(0.4),
            cosine: Some(0.9),
            dead_queries: 0.02,
            dead_keys: 0.01,
            norm_input: 3.0,
            norm_input_at_start: Some(2.0),
        };
        Gates {
            step: 4,
            form_error: 1e-5,
            logit_rms: 2.0,
            rounded: false,
            layers: vec![layer; 3],
            seconds: 0.1,
        }
    }

    #[test]
    fn a_healthy_state_gives_no_word_and_each_gate_its_own() {
        assert_eq!(healthy().warnings(), [""; 0]);
        let broken = |break_it: &dyn Fn(&mut Gates), says: &str| {
            let mut gates = healthy();
            break_it(&mut gates);
            let warnings = gates.warnings();
            assert!(
                warnings.len() == 1 && warnings[0].contains(says),
                "{warnings:?}"
            );
        };
        broken(&|gates| gates.form_error = 2e-3, "recurrent form");
        broken(&|gates| gates.form_error = f64::NAN, "recurrent form");
        let dead = "75 % of the key features of block 1";
        broken(&|gates| gates.layers[1].dead_keys = 0.75, dead);
        let grown = "block 2 read is 15.0 times";
        broken(&|gates| gates.layers[2].norm_input = 30.0, grown);
        broken(&|gates| gates.layers[0].norm_input = f64::NAN, "block 0");
        let bf16 = Gates {
            form_error: 0.1,
            rounded: true,
            ..healthy()
        };
        assert_eq!(bf16.warnings(), [""; 0], "rounding alone");
    }

    #[test]
    fn what_is_not_a_number_survives_the_journal() {
        let mut gates = healthy();
        gates.layers[0].norm_input = f64::NAN;
        gates.form_error = f64::INFINITY;
        let json = serde_json::to_string(&gates).unwrap();
        let again: Gates = serde_json::from_str(&json).unwrap();
        assert!(again.form_error.is_nan() && again.layers[0].norm_input.is_nan());
        assert_eq!(again.layers[1], gates.layers[1]);
    }
}
