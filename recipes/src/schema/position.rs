//! Places in the text of a recipe, and where the key of a given path stands.

use std::collections::HashSet;
use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, Error as DeError, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

/// Line and column, both from 1; columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub line: usize,
    pub column: usize,
}

/// A marked stretch of one line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub start: Position,
    /// In bytes from the beginning of the text.
    pub offset: usize,
    /// In bytes.
    pub length: usize,
}

impl Span {
    /// The token that begins at `start`: a quoted string, or everything up to what ends a plain scalar.
    pub(super) fn token(text: &str, start: Position) -> Span {
        let offset = offset_of(text, start);
        let rest = text[offset..].lines().next().unwrap_or_default();
        let length = match rest.chars().next() {
            Some(quote @ ('"' | '\'')) => rest[1..].find(quote).map_or(rest.len(), |end| end + 2),
            Some(first) => {
                let ends = |(_, c): &(usize, char)| matches!(c, ',' | '}' | ']' | '#') || *c == ':';
                let end = rest
                    .char_indices()
                    .skip(1)
                    .find(ends)
                    .map_or(rest.len(), |(end, _)| end);
                rest[..end].trim_end().len().max(first.len_utf8())
            }
            None => 0,
        };
        Span {
            start,
            offset,
            length,
        }
    }

    /// The character at byte `offset`.
    pub(super) fn at(text: &str, offset: usize) -> Span {
        let before = &text[..offset];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let start = Position {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        };
        Span {
            start,
            offset,
            length: text[offset..].chars().next().map_or(0, char::len_utf8),
        }
    }

    /// From the beginning of this span to the end of `last`, if both are on one line.
    fn through(self, last: Span) -> Span {
        if self.start.line == last.start.line && last.offset >= self.offset {
            Span {
                length: last.offset + last.length - self.offset,
                ..self
            }
        } else {
            self
        }
    }
}

fn offset_of(text: &str, position: Position) -> usize {
    let line_start: usize = text
        .split_inclusive('\n')
        .take(position.line.saturating_sub(1))
        .map(str::len)
        .sum();
    let line = text[line_start..].lines().next().unwrap_or_default();
    line_start
        + line
            .char_indices()
            .nth(position.column.saturating_sub(1))
            .map_or(line.len(), |(offset, _)| offset)
}

/// Where the YAML parser says that `error` happened.
pub(super) fn of_error(text: &str, error: &serde_yaml::Error) -> Option<Span> {
    error.location().map(|place| {
        Span::token(
            text,
            Position {
                line: place.line(),
                column: place.column(),
            },
        )
    })
}

/// The key at `path` together with its value, if the text has it.
///
/// The parser itself is asked: it walks down `path` and fails on purpose at the end of it, and the error carries the place.
pub(super) fn of_key(text: &str, path: &[&str]) -> Option<Span> {
    let find = |stop: Stop| {
        let walk = Walk { path, stop };
        match walk.deserialize(serde_yaml::Deserializer::from_str(text)) {
            Err(error) if error.to_string().contains(FOUND) => of_error(text, &error),
            _ => None,
        }
    };
    let key = find(Stop::AtKey)?;
    Some(find(Stop::AtValue).map_or(key, |value| key.through(value)))
}

/// Why a text is no YAML that could be a recipe.
pub(super) enum Malformed {
    /// A mapping has this key twice; the second one is marked.
    Duplicate { span: Option<Span>, key: String },
    /// The parser refuses it.
    Yaml(serde_yaml::Error),
}

/// Reads the text as YAML of whatever shape, without duplicate keys.
pub(super) fn check_yaml(text: &str) -> Result<(), Malformed> {
    Unique
        .deserialize(serde_yaml::Deserializer::from_str(text))
        .map_err(|error| {
            let message = error.to_string();
            match message.split(DUPLICATE).nth(1) {
                Some(key) => Malformed::Duplicate {
                    span: of_error(text, &error),
                    key: key.to_owned(),
                },
                None => Malformed::Yaml(error),
            }
        })
}

/// Message of the deliberate error; cannot occur in an error of the parser.
const FOUND: &str = "\u{0}found\u{0}";
/// Frame of the key's name in the error of [`Unique`].
const DUPLICATE: &str = "\u{0}duplicate\u{0}";

#[derive(Clone, Copy, PartialEq)]
enum Stop {
    AtKey,
    AtValue,
}

/// Walks mappings along `path`.
#[derive(Clone, Copy)]
struct Walk<'a> {
    path: &'a [&'a str],
    stop: Stop,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.path.is_empty() {
            deserializer.deserialize_any(Fail)
        } else {
            deserializer.deserialize_map(self)
        }
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a mapping")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some((wanted, rest)) = self.path.split_first() else {
            return Ok(());
        };
        let fail = rest.is_empty() && self.stop == Stop::AtKey;
        while let Some(found) = map.next_key_seed(Key { wanted, fail })? {
            if found {
                map.next_value_seed(Walk { path: rest, ..self })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

/// Reads a key and says whether it is `wanted`, or fails on it.
struct Key<'a> {
    wanted: &'a str,
    fail: bool,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: DeError>(self, key: &str) -> Result<bool, E> {
        if key == self.wanted && self.fail {
            Err(E::custom(FOUND))
        } else {
            Ok(key == self.wanted)
        }
    }
}

/// Fails on whatever comes.
struct Fail;

impl<'de> Visitor<'de> for Fail {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(FOUND)
    }
}

/// Reads anything and fails at a key that its mapping already has.
struct Unique;

impl<'de> DeserializeSeed<'de> for Unique {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while map.next_key_seed(NewKey(&mut seen))?.is_some() {
            map.next_value_seed(Unique)?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        while sequence.next_element_seed(Unique)?.is_some() {}
        Ok(())
    }

    fn visit_bool<E: DeError>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: DeError>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: DeError>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_i128<E: DeError>(self, _: i128) -> Result<(), E> {
        Ok(())
    }

    fn visit_u128<E: DeError>(self, _: u128) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: DeError>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: DeError>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: DeError>(self) -> Result<(), E> {
        Ok(())
    }
}

/// Reads a key that is none of those already seen.
struct NewKey<'a>(&'a mut HashSet<String>);

impl<'de> DeserializeSeed<'de> for NewKey<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for NewKey<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: DeError>(self, key: &str) -> Result<(), E> {
        if !self.0.insert(key.to_owned()) {
            return Err(E::custom(format!("{DUPLICATE}{key}{DUPLICATE}")));
        }
        Ok(())
    }
}
