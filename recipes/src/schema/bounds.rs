//! Numbers with bounds, checked while the parser still knows where they stand.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as DeError, Visitor};

/// A visitor for numbers for which `accept` holds; `what` completes "expected …".
struct Bounded {
    what: &'static str,
    accept: fn(f64) -> bool,
}

impl Visitor<'_> for Bounded {
    type Value = f64;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.what)
    }

    fn visit_f64<E: DeError>(self, value: f64) -> Result<f64, E> {
        if !(self.accept)(value) {
            return Err(E::custom(format!(
                "`{value}` is out of range, expected {}",
                self.what
            )));
        }
        Ok(value)
    }

    fn visit_u64<E: DeError>(self, value: u64) -> Result<f64, E> {
        self.visit_f64(value as f64)
    }

    fn visit_i64<E: DeError>(self, value: i64) -> Result<f64, E> {
        self.visit_f64(value as f64)
    }
}

/// A finite number above 0.
pub fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    deserializer.deserialize_any(Bounded {
        what: "a number above 0",
        accept: |x| x > 0.0 && x.is_finite(),
    })
}

/// The same where the key may be left out.
pub fn optional_positive<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<f64>, D::Error> {
    positive(deserializer).map(Some)
}

/// A finite number, 0 or above.
pub fn not_negative<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    deserializer.deserialize_any(Bounded {
        what: "a number, 0 or above",
        accept: |x| x >= 0.0 && x.is_finite(),
    })
}

/// A number above 0 and at most 1.
pub fn fraction<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    deserializer.deserialize_any(Bounded {
        what: "a fraction above 0 and at most 1",
        accept: |x| x > 0.0 && x <= 1.0,
    })
}

/// Two decay rates of moments, each from 0 to below 1.
pub fn betas<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(f64, f64), D::Error> {
    struct Beta(f64);
    impl<'de> Deserialize<'de> for Beta {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let bounded = Bounded {
                what: "a number from 0 to below 1",
                accept: |x| (0.0..1.0).contains(&x),
            };
            deserializer.deserialize_any(bounded).map(Beta)
        }
    }
    <(Beta, Beta)>::deserialize(deserializer).map(|(first, second)| (first.0, second.0))
}

/// A whole number of at least 1 that fits `T`.
struct Counting<T>(std::marker::PhantomData<T>);

impl<T: TryFrom<u64>> Visitor<'_> for Counting<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a whole number of at least 1")
    }

    fn visit_u64<E: DeError>(self, value: u64) -> Result<T, E> {
        if value == 0 {
            return Err(E::custom(
                "`0` is out of range, expected a whole number of at least 1",
            ));
        }
        T::try_from(value).map_err(|_| E::custom(format!("`{value}` is too large")))
    }

    fn visit_i64<E: DeError>(self, value: i64) -> Result<T, E> {
        match u64::try_from(value) {
            Ok(value) => self.visit_u64(value),
            Err(_) => Err(E::custom(format!(
                "`{value}` is out of range, expected a whole number of at least 1"
            ))),
        }
    }
}

/// A whole number of at least 1.
pub fn counting<'de, T: TryFrom<u64>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    deserializer.deserialize_any(Counting(std::marker::PhantomData))
}
