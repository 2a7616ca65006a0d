//! Paths as recipes write them.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error as DeError, IntoDeserializer, Visitor};
use serde::ser::Serializer;

use super::explain::nearest;

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

/// Schemes of object stores, as the checkpoints' store knows them.
const OBJECT_STORES: [&str; 2] = ["s3", "gs"];

/// A directory, or a prefix in an object store.
struct StoreLocation(PathBuf);

impl<'de> Deserialize<'de> for StoreLocation {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StoreVisitor;
        impl Visitor<'_> for StoreVisitor {
            type Value = StoreLocation;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a directory or the URL of an object store")
            }

            fn visit_str<E: DeError>(self, value: &str) -> Result<StoreLocation, E> {
                store_location(value)
            }
        }
        // From within the visitor an error has the place of the value, not that of the mapping around it.
        deserializer.deserialize_str(StoreVisitor)
    }
}

fn store_location<E: DeError>(value: &str) -> Result<StoreLocation, E> {
    let Some((scheme, rest)) = value.split_once("://") else {
        let directory = value.into_deserializer();
        return Location::deserialize(directory).map(|location| StoreLocation(location.0));
    };
    let wrong = |problem: String| Err(E::custom(format!("`{value}`: {problem}")));
    if scheme == "file" {
        return match rest.starts_with('/') {
            true => Ok(StoreLocation(rest.into())),
            false => wrong("a file:// URL has three slashes: file:///directory".into()),
        };
    }
    if !OBJECT_STORES.contains(&scheme) {
        let known = ["s3", "gs", "file"].map(str::to_owned);
        let meant = match nearest(scheme, &known) {
            Some(nearest) => format!(", did you mean {nearest}://?"),
            None => ":".to_owned(),
        };
        return wrong(format!(
            "{scheme}:// is not supported{meant} write a directory, file:///directory, s3://bucket/prefix or \
             gs://bucket/prefix"
        ));
    }
    let url = value.trim_end_matches('/');
    let mut parts = url[scheme.len() + 3..].split('/');
    if parts.any(|part| part.is_empty() || part == "." || part == "..") {
        return wrong(format!("write {scheme}://bucket/prefix"));
    }
    Ok(StoreLocation(url.into()))
}

/// Whether `checkpoint.to` names an object store: its path is then a URL.
pub fn is_url(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.contains("://"))
}

/// A directory or a prefix in an object store, or nothing.
pub(super) fn optional_store<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<PathBuf>, D::Error> {
    Ok(Option::<StoreLocation>::deserialize(deserializer)?.map(|location| location.0))
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
pub(super) fn write<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
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
