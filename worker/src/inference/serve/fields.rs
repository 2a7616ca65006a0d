//! The fields of a JSON object, each read as what it has to be, so that an error names the one that is wrong.

use std::{collections::BTreeMap, ops::RangeInclusive};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::fault::Fault;

/// An object whose fields are not looked at yet. Fields that nobody asks for may hold anything.
#[derive(Debug)]
pub struct Fields<'a>(BTreeMap<String, &'a RawValue>);

impl<'a> Fields<'a> {
    /// The fields of an object.
    ///
    /// # Errors
    ///
    /// It is no JSON object.
    pub fn parse(body: &'a [u8]) -> Result<Fields<'a>, Fault> {
        match serde_json::from_slice(body) {
            Ok(fields) => Ok(Fields(fields)),
            Err(_) if body.trim_ascii().is_empty() => {
                Err(Fault::bad("the request has no body: send a JSON object"))
            }
            Err(error) => Err(Fault::bad(format!(
                "the request is not a JSON object: {error}"
            ))),
        }
    }

    /// A field as it was written; none where it is missing or null.
    pub fn raw(&self, name: &str) -> Option<&'a str> {
        let written = self.0.get(name)?.get();
        (written != "null").then_some(written)
    }

    /// A field; none where it is missing or null. `what` says what it has to be.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn get<T: Deserialize<'a>>(&self, name: &str, what: &str) -> Result<Option<T>, Fault> {
        let Some(written) = self.raw(name) else {
            return Ok(None);
        };
        match serde_json::from_str(written) {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(Fault::field(
                name,
                format!("{} is not {what}", shortened(written)),
            )),
        }
    }

    /// A number in a range, or the usual one.
    ///
    /// # Errors
    ///
    /// It is no number, or outside.
    pub fn number(&self, name: &str, range: RangeInclusive<f64>, usual: f64) -> Result<f64, Fault> {
        let what = format!("a number from {} to {}", range.start(), range.end());
        match self.get::<f64>(name, &what)? {
            None => Ok(usual),
            Some(value) if range.contains(&value) => Ok(value),
            Some(value) => Err(Fault::field(name, format!("{value} is not {what}"))),
        }
    }

    /// A whole number in a range; none where it is missing.
    ///
    /// # Errors
    ///
    /// It is no whole number, or outside.
    pub fn whole(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, Fault> {
        let what = format!("a whole number from {} to {}", range.start(), range.end());
        match self.get::<i64>(name, &what)? {
            Some(value) if !range.contains(&value) => {
                Err(Fault::field(name, format!("{value} is not {what}")))
            }
            value => Ok(value),
        }
    }

    /// A switch, off where it is missing.
    ///
    /// # Errors
    ///
    /// It is neither true nor false.
    pub fn switch(&self, name: &str) -> Result<bool, Fault> {
        Ok(self.get(name, "true or false")?.unwrap_or(false))
    }
}

/// What was written, as far as it helps.
fn shortened(written: &str) -> String {
    const ENOUGH: usize = 60;
    match written.char_indices().nth(ENOUGH) {
        Some((end, _)) => format!("{}…", &written[..end]),
        None => written.to_owned(),
    }
}
