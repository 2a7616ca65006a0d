//! The model that answers now, as far as requests have to know it.

use std::{
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use tokenizers::Tokenizer;

use crate::{
    inference::load::{LoadError, LoadedModel},
    model::AttentionKind,
};

/// One set of weights with its tokenizer.
#[derive(Debug)]
pub struct Served {
    /// Name by which clients ask for it.
    pub id: String,
    /// Which weights these are: a checkpoint's name, or the directory's.
    pub fingerprint: String,
    /// Counts the weights that were served one after the other.
    pub number: u64,
    /// When it was loaded, seconds since 1970.
    pub created: u64,
    /// For text; a model without one takes and gives token ids.
    pub tokenizer: Option<Tokenizer>,
    /// Tokens of the vocabulary.
    pub vocabulary: u32,
    /// Tokens that end a text.
    pub stop_tokens: Arc<[u32]>,
    /// Tokens of prompt and completion together; none where memory does not grow with them.
    pub context: Option<usize>,
}

impl Served {
    /// What requests have to know of a model that was read from `location`.
    ///
    /// # Errors
    ///
    /// There is a tokenizer that cannot be read.
    pub fn new(
        model: &LoadedModel,
        id: &str,
        location: &str,
        number: u64,
    ) -> Result<Served, LoadError> {
        let config = model.transformer.config();
        let context = match config.attention {
            AttentionKind::Softmax => Some(config.max_positions),
            AttentionKind::Supra(_) => None,
        };
        let window = config.sliding_window.into_iter();
        Ok(Served {
            id: id.to_owned(),
            fingerprint: last_name(location),
            number,
            created: unix_time(),
            tokenizer: tokenizer(model)?,
            vocabulary: u32::try_from(config.vocab).unwrap_or(u32::MAX),
            stop_tokens: model.stop_tokens().into(),
            context: (context.into_iter().chain(window).min())
                .map(|tokens| tokens.max(0).cast_unsigned() as usize),
        })
    }
}

/// The name of a model that has none: its directory's.
pub fn last_name(location: &str) -> String {
    let name = Path::new(location).file_name();
    let name = name.map(|name| name.to_string_lossy().into_owned());
    name.filter(|name| !name.is_empty())
        .unwrap_or_else(|| "model".to_owned())
}

/// Seconds since 1970.
pub fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}

fn tokenizer(model: &LoadedModel) -> Result<Option<Tokenizer>, LoadError> {
    if !model.dir.join("tokenizer.json").exists() {
        return Ok(None);
    }
    model.tokenizer().map(Some)
}
