//! Paths as recipes write them.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::{Deserializer, Error as DeError, Visitor};
use serde::ser::Serializer;

/// A path on a local or shared file system.
struct Location(PathBuf);

impl<'de> Deserialize<'de> for Location {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LocationVisitor;
        impl Visitor<'_> for LocationVisitor {
            type Value = Location;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a path")
            }

            fn visit_str<E: DeError>(self, value: &str) -> Result<Location, E> {
                if value.is_empty() {
                    return Err(E::custom("the path is empty"));
                }
                if value == "~" || value.starts_with("~/") {
                    return Err(E::custom(format!(
                        "`{value}`: `~` is not expanded here, write the whole path"
                    )));
                }
                match value.split_once("://") {
                    Some(("file", path)) if path.starts_with('/') => Ok(Location(path.into())),
                    Some((scheme, _)) => Err(E::custom(format!(
                        "`{value}`: {scheme}:// is not supported, name a directory or file"
                    ))),
                    None => Ok(Location(value.into())),
                }
            }
        }
        deserializer.deserialize_str(LocationVisitor)
    }
}

/// A path.
pub(super) fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    Location::deserialize(deserializer).map(|location| location.0)
}

/// A path, or nothing.
pub(super) fn optional_path<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<PathBuf>, D::Error> {
    Ok(Option::<Location>::deserialize(deserializer)?.map(|location| location.0))
}

/// Writes a path as text. Recipes come from UTF-8 text and are resolved against UTF-8 directories, so nothing is lost.
pub(super) fn write<S: Serializer>(
    path: &std::path::Path,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// Writes a path as text, or nothing.
pub(super) fn write_optional<S: Serializer>(
    path: &Option<PathBuf>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match path {
        Some(path) => write(path, serializer),
        None => serializer.serialize_none(),
    }
}
