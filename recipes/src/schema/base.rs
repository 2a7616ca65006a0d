//! The model that training begins with: a directory, or random weights in a shape that people know.

use std::fmt;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error as DeError, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::paths;

/// The model that training begins with.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(into = "Keys")]
#[schemars(with = "Keys")]
pub enum Base {
    /// Configuration, weights and tokenizer of a model directory.
    Pretrained(PathBuf),
    /// Configuration and tokenizer of such a directory, with weights from the recipe's seed.
    Untrained(PathBuf),
    /// Weights from the recipe's seed in a shape that needs no directory. No tokenizer comes with it.
    Random(Shape),
}

/// Shapes of models that people know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Shape {
    /// Mistral 7B: 32 query heads on 8 key/value heads.
    #[serde(rename = "mistral-7b")]
    Mistral7b,
    /// Llama 2 7B: 32 heads.
    #[serde(rename = "llama2-7b")]
    Llama2_7b,
}

impl Base {
    /// The directory of configuration and tokenizer, if there is one.
    pub fn directory(&self) -> Option<&Path> {
        match self {
            Base::Pretrained(path) | Base::Untrained(path) => Some(path),
            Base::Random(_) => None,
        }
    }

    /// The same base with a relative path taken from `base_dir`.
    pub(super) fn resolved(self, base_dir: &Path) -> Base {
        match self {
            Base::Pretrained(path) => Base::Pretrained(base_dir.join(path)),
            Base::Untrained(path) => Base::Untrained(base_dir.join(path)),
            Base::Random(shape) => Base::Random(shape),
        }
    }
}

/// What the mapping `base` may hold.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Base", extend("oneOf" = [{ "required": ["path"] }, { "required": ["random"] }]))]
struct Keys {
    /// A model directory: `config.json`, weights, `tokenizer.json` (docs/models.md).
    #[serde(
        default,
        deserialize_with = "paths::optional_path",
        serialize_with = "paths::write_optional",
        skip_serializing_if = "Option::is_none"
    )]
    path: Option<PathBuf>,
    /// Whether the directory's weights are taken: `pretrained` unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weights: Option<Weights>,
    /// In place of a directory: a shape, whose weights are drawn from the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    random: Option<Shape>,
}

/// Where the first weights come from.
#[derive(Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Weights {
    /// From the base directory.
    Pretrained,
    /// From the seed; only configuration and tokenizer of the base directory are read.
    Random,
}

impl From<Base> for Keys {
    fn from(base: Base) -> Keys {
        let from = |path, weights| Keys {
            path: Some(path),
            weights: Some(weights),
            random: None,
        };
        match base {
            Base::Pretrained(path) => from(path, Weights::Pretrained),
            Base::Untrained(path) => from(path, Weights::Random),
            Base::Random(shape) => Keys {
                random: Some(shape),
                ..Keys::default()
            },
        }
    }
}

impl TryFrom<Keys> for Base {
    type Error = &'static str;

    fn try_from(keys: Keys) -> Result<Base, &'static str> {
        match (keys.path, keys.weights, keys.random) {
            (Some(path), None | Some(Weights::Pretrained), None) => Ok(Base::Pretrained(path)),
            (Some(path), Some(Weights::Random), None) => Ok(Base::Untrained(path)),
            (None, None, Some(shape)) => Ok(Base::Random(shape)),
            (None, _, None) => {
                Err("it names no model: write `path: DIRECTORY`, or `random: mistral-7b`")
            }
            (Some(_), _, Some(_)) => Err("`path` together with `random`: keep one of them"),
            (None, Some(_), Some(_)) => {
                Err("`weights` says what is taken from `path`: remove it beside `random`")
            }
        }
    }
}

// Not derived from the conversion: an error from inside the mapping carries the mapping's place.
impl<'de> Deserialize<'de> for Base {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Base, D::Error> {
        struct BaseVisitor;
        impl<'de> Visitor<'de> for BaseVisitor {
            type Value = Base;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("struct Base")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Base, A::Error> {
                let keys = Keys::deserialize(MapAccessDeserializer::new(map))?;
                keys.try_into().map_err(A::Error::custom)
            }
        }
        deserializer.deserialize_map(BaseVisitor)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Shape::Mistral7b => "mistral-7b",
            Shape::Llama2_7b => "llama2-7b",
        })
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Base::Pretrained(path) | Base::Untrained(path) => write!(f, "{}", path.display()),
            Base::Random(shape) => shape.fmt(f),
        }
    }
}
