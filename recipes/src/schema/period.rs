//! Lengths of time: a number with its unit.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserializer, Error as DeError, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::units::{UnitError, exact_product};

/// Units and their milliseconds, largest first.
const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("min", 60_000), ("s", 1000), ("ms", 1)];

/// A length of time in whole milliseconds: `500 ms`, `1.5 s`, `2 min`, `1 h`.
///
/// A bare number is refused, because it does not say its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Period {
    milliseconds: u64,
}

impl Period {
    /// So many whole seconds.
    pub const fn seconds(seconds: u32) -> Period {
        Period {
            milliseconds: seconds as u64 * 1000,
        }
    }

    /// The same as the standard library has it.
    pub fn duration(self) -> Duration {
        Duration::from_millis(self.milliseconds)
    }
}

fn refusal(text: impl fmt::Display) -> UnitError {
    UnitError::new(format!(
        "`{text}` is not a length of time: write a number with ms, s, min or h, such as `500 ms` or `2 min`"
    ))
}

impl FromStr for Period {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let trimmed = text.trim();
        let split = trimmed
            .find(|c: char| !(c.is_ascii_digit() || c == '.'))
            .unwrap_or(trimmed.len());
        let (digits, unit) = trimmed.split_at(split);
        let (_, factor) = UNITS
            .iter()
            .find(|(known, _)| *known == unit.trim_start())
            .ok_or_else(|| refusal(text))?;
        let milliseconds = exact_product(digits, *factor).map_err(|_| refusal(text))?;
        Ok(Period { milliseconds })
    }
}

impl fmt::Display for Period {
    /// Exact: in the largest unit that divides it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = UNITS.iter().find(|(_, factor)| {
            self.milliseconds >= *factor && self.milliseconds.is_multiple_of(*factor)
        });
        match whole {
            Some((unit, factor)) => write!(f, "{} {unit}", self.milliseconds / factor),
            None => f.write_str("0 s"),
        }
    }
}

impl Serialize for Period {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Period {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PeriodVisitor;
        impl Visitor<'_> for PeriodVisitor {
            type Value = Period;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a length of time such as `500 ms` or `2 min`")
            }
            fn visit_u64<E: DeError>(self, value: u64) -> Result<Period, E> {
                Err(E::custom(refusal(value)))
            }
            fn visit_i64<E: DeError>(self, value: i64) -> Result<Period, E> {
                Err(E::custom(refusal(value)))
            }
            fn visit_f64<E: DeError>(self, value: f64) -> Result<Period, E> {
                Err(E::custom(refusal(value)))
            }
            fn visit_str<E: DeError>(self, value: &str) -> Result<Period, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(PeriodVisitor)
    }
}

impl JsonSchema for Period {
    fn schema_name() -> Cow<'static, str> {
        "Period".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A length of time: a number with ms, s, min or h; a whole number of milliseconds.",
            "type": "string",
            "pattern": r"^[0-9]+(\.[0-9]+)? ?(ms|s|min|h)$"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_exact_and_reads_back() {
        for (text, milliseconds, shown) in [
            ("500 ms", 500, "500 ms"),
            ("1.5s", 1500, "1500 ms"),
            ("60 s", 60_000, "1 min"),
            ("90 s", 90_000, "90 s"),
            ("1 h", 3_600_000, "1 h"),
            ("0 ms", 0, "0 s"),
        ] {
            let period: Period = text.parse().unwrap();
            assert_eq!(period.duration(), Duration::from_millis(milliseconds));
            assert_eq!(period.to_string(), shown);
            assert_eq!(shown.parse(), Ok(period));
        }
    }

    #[test]
    fn what_is_no_length_of_time_is_refused_with_an_example() {
        for text in ["", "5", "s", "-1 s", "1 day", "0.0001 s", "1e3 s"] {
            let error = text.parse::<Period>().unwrap_err().to_string();
            assert!(error.contains("such as `500 ms`"), "{text}: {error}");
        }
    }
}
