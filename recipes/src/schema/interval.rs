//! How much is trained from one checkpoint to the next.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserializer, Error as DeError, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::units::Tokens;

/// What leaves the interval to the coordinator.
const AUTO: &str = "auto";

/// The interval between checkpoints: so many tokens, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointInterval {
    /// So many tokens.
    Tokens(Tokens),
    /// What the measured cost of a checkpoint and the observed failures make worth while; the coordinator asks for each.
    Auto,
}

impl CheckpointInterval {
    /// Tokens from one checkpoint to the next; `None` when the coordinator decides.
    pub fn tokens(self) -> Option<u64> {
        match self {
            CheckpointInterval::Tokens(tokens) => Some(tokens.0),
            CheckpointInterval::Auto => None,
        }
    }
}

impl From<Tokens> for CheckpointInterval {
    fn from(tokens: Tokens) -> Self {
        CheckpointInterval::Tokens(tokens)
    }
}

impl fmt::Display for CheckpointInterval {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            CheckpointInterval::Tokens(tokens) => tokens.fmt(f),
            CheckpointInterval::Auto => f.write_str(AUTO),
        }
    }
}

impl Serialize for CheckpointInterval {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            CheckpointInterval::Tokens(tokens) => tokens.serialize(serializer),
            CheckpointInterval::Auto => serializer.serialize_str(AUTO),
        }
    }
}

impl<'de> Deserialize<'de> for CheckpointInterval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IntervalVisitor;
        impl Visitor<'_> for IntervalVisitor {
            type Value = CheckpointInterval;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("`auto`, or a token count such as 1B, 500k or 131072")
            }
            fn visit_u64<E: DeError>(self, value: u64) -> Result<CheckpointInterval, E> {
                tokens(value)
            }
            fn visit_i64<E: DeError>(self, value: i64) -> Result<CheckpointInterval, E> {
                tokens(value)
            }
            fn visit_f64<E: DeError>(self, value: f64) -> Result<CheckpointInterval, E> {
                tokens(value)
            }
            fn visit_str<E: DeError>(self, value: &str) -> Result<CheckpointInterval, E> {
                if value.trim() == AUTO {
                    return Ok(CheckpointInterval::Auto);
                }
                let parsed = value.parse().map(CheckpointInterval::Tokens);
                parsed.map_err(|error| E::custom(format!("{error}; or write `{AUTO}`")))
            }
        }
        deserializer.deserialize_any(IntervalVisitor)
    }
}

/// Reads a plain number as a token count is read.
fn tokens<'de, T, E: DeError>(value: T) -> Result<CheckpointInterval, E>
where
    T: serde::de::IntoDeserializer<'de, E>,
{
    Tokens::deserialize(value.into_deserializer()).map(CheckpointInterval::Tokens)
}

impl JsonSchema for CheckpointInterval {
    fn schema_name() -> Cow<'static, str> {
        "CheckpointInterval".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A number of tokens, or `auto`.",
            "anyOf": [generator.subschema_for::<Tokens>(), { "const": AUTO }]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_auto_or_tokens_and_reads_back() {
        for (text, tokens) in [("auto", None), ("500k", Some(500_000)), ("192", Some(192))] {
            let interval: CheckpointInterval = serde_yaml::from_str(text).unwrap();
            assert_eq!(interval.tokens(), tokens);
            assert_eq!(interval.to_string(), text);
            assert_eq!(serde_yaml::to_string(&interval).unwrap().trim(), text);
        }
    }

    #[test]
    fn what_is_neither_names_both() {
        for text in ["auto5", "0", "1.5", "often"] {
            let error = serde_yaml::from_str::<CheckpointInterval>(text).unwrap_err();
            let error = error.to_string();
            assert!(error.contains("token"), "{text}: {error}");
        }
        let error = serde_yaml::from_str::<CheckpointInterval>("automatic").unwrap_err();
        assert!(error.to_string().contains("or write `auto`"), "{error}");
    }
}
