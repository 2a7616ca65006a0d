//! Values with a unit or a fixed spelling: token counts, fractions, warm-up lengths, run names.
//!
//! Each reads itself with a visitor and fails inside `visit_*`, because only there does the YAML parser still know the
//! line and column of the scalar.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserializer, Error as DeError, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// Suffixes of token counts and their exact factors, largest first.
const SUFFIXES: [(&str, u64); 8] = [
    ("Ti", 1 << 40),
    ("T", 1_000_000_000_000),
    ("Gi", 1 << 30),
    ("B", 1_000_000_000),
    ("Mi", 1 << 20),
    ("M", 1_000_000),
    ("Ki", 1 << 10),
    ("k", 1_000),
];

/// Largest integer below which every integer is an exact `f64`.
const EXACT_F64: f64 = 9_007_199_254_740_992.0;

/// Why a scalar is not the value it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnitError(String);

impl UnitError {
    pub(super) fn new(text: String) -> UnitError {
        UnitError(text)
    }
}

/// A number of tokens, at least 1: `2T`, `1.5M`, `2Mi`, `131072`, optionally followed by `tokens`.
///
/// `k`, `M`, `B`, `T` are powers of 1000; `Ki`, `Mi`, `Gi`, `Ti` powers of 1024. The value must be a whole number of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tokens(pub u64);

impl Tokens {
    /// The count.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for Tokens {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let refuse = |why: &str| UnitError(format!("`{text}` is not a token count: {why}"));
        let trimmed = text.trim();
        let bare = trimmed
            .strip_suffix("tokens")
            .map_or(trimmed, str::trim_end);
        let split = bare
            .find(|c: char| !(c.is_ascii_digit() || c == '.'))
            .unwrap_or(bare.len());
        let (digits, suffix) = bare.split_at(split);
        let factor = match suffix.trim_start() {
            "" => 1,
            suffix => SUFFIXES
                .iter()
                .find(|(known, _)| *known == suffix)
                .map(|(_, factor)| *factor)
                .ok_or_else(|| {
                    refuse("write an integer, or a number with one of k, M, B, T, Ki, Mi, Gi, Ti")
                })?,
        };
        let count = exact_product(digits, factor).map_err(refuse)?;
        if count == 0 {
            return Err(refuse("it must be at least 1"));
        }
        Ok(Tokens(count))
    }
}

/// `digits` (a decimal without sign or exponent) times `factor`, exactly.
pub(super) fn exact_product(digits: &str, factor: u64) -> Result<u64, &'static str> {
    const SHAPE: &str = "write an integer, or a number with one of k, M, B, T, Ki, Mi, Gi, Ti";
    const LARGE: &str = "it is larger than 2^64 - 1";
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() || (digits.contains('.') && part.is_empty()) || part.contains('.') {
        return Err(SHAPE);
    }
    let part = part.trim_end_matches('0');
    let mut count = whole
        .parse::<u64>()
        .map_err(|_| LARGE)?
        .checked_mul(factor)
        .ok_or(LARGE)?;
    if !part.is_empty() {
        let scale = u32::try_from(part.len())
            .ok()
            .and_then(|places| 10u128.checked_pow(places))
            .ok_or(SHAPE)?;
        let numerator = part
            .parse::<u128>()
            .ok()
            .and_then(|n| n.checked_mul(u128::from(factor)))
            .ok_or(SHAPE)?;
        if numerator % scale != 0 {
            return Err("it is not a whole number of tokens");
        }
        let rest = u64::try_from(numerator / scale).map_err(|_| LARGE)?;
        count = count.checked_add(rest).ok_or(LARGE)?;
    }
    Ok(count)
}

impl fmt::Display for Tokens {
    /// Exact: the shortest spelling with a suffix that divides the count, else all digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffixed = SUFFIXES
            .iter()
            .filter(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor));
        match suffixed.min_by_key(|(_, factor)| self.0 / factor) {
            Some((suffix, factor)) => write!(f, "{}{suffix}", self.0 / factor),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for Tokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = self.to_string();
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            serializer.serialize_u64(self.0)
        } else {
            serializer.serialize_str(&text)
        }
    }
}

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TokensVisitor;
        impl Visitor<'_> for TokensVisitor {
            type Value = Tokens;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a token count such as 2T, 1.5M, 2Mi or 131072")
            }
            fn visit_u64<E: DeError>(self, value: u64) -> Result<Tokens, E> {
                match value {
                    0 => Err(E::custom("a token count must be at least 1")),
                    _ => Ok(Tokens(value)),
                }
            }
            fn visit_i64<E: DeError>(self, value: i64) -> Result<Tokens, E> {
                u64::try_from(value)
                    .map_err(|_| {
                        E::custom(format!("a token count cannot be negative, it is {value}"))
                    })
                    .and_then(|value| self.visit_u64(value))
            }
            fn visit_f64<E: DeError>(self, value: f64) -> Result<Tokens, E> {
                if value.fract() != 0.0 || !(1.0..=EXACT_F64).contains(&value) {
                    return Err(E::custom(format!(
                        "`{value}` is not a whole number of tokens"
                    )));
                }
                Ok(Tokens(value as u64))
            }
            fn visit_str<E: DeError>(self, value: &str) -> Result<Tokens, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(TokensVisitor)
    }
}

impl JsonSchema for Tokens {
    fn schema_name() -> Cow<'static, str> {
        "Tokens".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A number of tokens: an integer, or a number with k, M, B, T (powers of 1000) or Ki, Mi, Gi, Ti (powers of 1024).",
            "anyOf": [
                { "type": "integer", "minimum": 1 },
                { "type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?(k|M|B|T|Ki|Mi|Gi|Ti)?( ?tokens)?$" }
            ]
        })
    }
}

/// Length of the learning rate's warm-up: `1000 steps`, or tokens with a unit (`2B`, `131072 tokens`).
///
/// A bare number is refused, because steps and tokens are both plausible readings of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Warmup {
    /// So many full optimizer steps.
    Steps(u64),
    /// So many tokens.
    Tokens(Tokens),
}

impl Warmup {
    /// The warm-up in tokens for batches of `batch_tokens`; `None` when that leaves 64 bits.
    pub fn tokens(self, batch_tokens: u64) -> Option<u64> {
        match self {
            Warmup::Steps(steps) => steps.checked_mul(batch_tokens),
            Warmup::Tokens(tokens) => Some(tokens.0),
        }
    }
}

impl FromStr for Warmup {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let refuse = || {
            UnitError(format!(
                "`{text}` is not a warm-up: write `1000 steps`, `2B` or `131072 tokens`"
            ))
        };
        let text = text.trim();
        if let Some(steps) = text
            .strip_suffix("steps")
            .or_else(|| text.strip_suffix("step"))
        {
            return steps
                .trim_end()
                .parse()
                .map(Warmup::Steps)
                .map_err(|_| refuse());
        }
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(refuse());
        }
        text.parse().map(Warmup::Tokens).map_err(|_| refuse())
    }
}

impl fmt::Display for Warmup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Warmup::Steps(1) => f.write_str("1 step"),
            Warmup::Steps(steps) => write!(f, "{steps} steps"),
            Warmup::Tokens(tokens) => write!(f, "{tokens} tokens"),
        }
    }
}

impl Serialize for Warmup {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Warmup {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WarmupVisitor;
        impl Visitor<'_> for WarmupVisitor {
            type Value = Warmup;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a warm-up such as `1000 steps` or `2B tokens`")
            }
            fn visit_u64<E: DeError>(self, value: u64) -> Result<Warmup, E> {
                Err(E::custom(format!(
                    "`{value}` steps or tokens? write `{value} steps` or `{value} tokens`"
                )))
            }
            fn visit_str<E: DeError>(self, value: &str) -> Result<Warmup, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(WarmupVisitor)
    }
}

impl JsonSchema for Warmup {
    fn schema_name() -> Cow<'static, str> {
        "Warmup".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "`1000 steps`, or tokens with a unit: `2B`, `131072 tokens`.",
            "type": "string",
            "pattern": r"^([0-9]+ ?steps?|[0-9]+(\.[0-9]+)? ?((k|M|B|T|Ki|Mi|Gi|Ti)( ?tokens)?|tokens))$"
        })
    }
}

/// A share of something: above 0, at most 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Fraction(pub f64);

impl<'de> Deserialize<'de> for Fraction {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        super::bounds::fraction(deserializer).map(Fraction)
    }
}

impl JsonSchema for Fraction {
    fn schema_name() -> Cow<'static, str> {
        "Fraction".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "number", "exclusiveMinimum": 0, "maximum": 1 })
    }
}

/// Name of a run: 1 to 63 of `a-z`, `0-9` and `-`, beginning with a letter or a digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct RunName(String);

impl RunName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RunName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for RunName {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if text.is_empty() || text.len() > 63 || text.starts_with('-') || !text.bytes().all(allowed)
        {
            return Err(UnitError(format!(
                "`{text}` is not a run name: use 1 to 63 of a-z, 0-9 and `-`, beginning with a letter or a digit"
            )));
        }
        Ok(RunName(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for RunName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameVisitor;
        impl Visitor<'_> for NameVisitor {
            type Value = RunName;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a run name of a-z, 0-9 and `-`")
            }
            fn visit_str<E: DeError>(self, value: &str) -> Result<RunName, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(NameVisitor)
    }
}

impl JsonSchema for RunName {
    fn schema_name() -> Cow<'static, str> {
        "RunName".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^[a-z0-9][a-z0-9-]{0,62}$" })
    }
}
