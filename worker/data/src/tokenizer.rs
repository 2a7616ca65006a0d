//! A Hugging Face tokenizer with what its own configuration says about the ends of documents.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::files;
use crate::{DataError, Manifest};

/// A tokenizer and the tokens that begin and end a document.
///
/// EOT and BOS come from `tokenizer_config.json`, else `special_tokens_map.json`, else `generation_config.json`, else
/// `config.json` beside `tokenizer.json`, and are never assumed.
#[derive(Debug)]
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    path: PathBuf,
    hash: String,
    eot: u32,
    bos: Option<u32>,
    adds_bos: bool,
    vocabulary: u32,
}

impl TextTokenizer {
    /// Loads the tokenizer at `path`: a directory with `tokenizer.json`, or that file.
    ///
    /// # Errors
    /// When it does not load, does not say which token ends a document, or does not fit the model beside it.
    pub fn load(path: &Path) -> Result<TextTokenizer, DataError> {
        let path = if path.is_dir() {
            path.join("tokenizer.json")
        } else {
            path.to_owned()
        };
        let directory = files::parent(&path);
        if !path.exists() && directory.join("tokenizer.model").exists() {
            return Err(DataError::content(
                &path,
                "is missing; there is only a SentencePiece model",
                "convert it: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) in Python's transformers",
            ));
        }
        let bytes = std::fs::read(&path).map_err(DataError::io("read the tokenizer", &path))?;
        let failed = |action: &str, source| DataError::Tokenizer {
            path: path.clone(),
            action: action.to_owned(),
            source,
        };
        let mut tokenizer = Tokenizer::from_bytes(&bytes)
            .map_err(|source| failed("is not a Hugging Face tokenizer", source))?;
        // A file may carry the settings of its last use; documents are neither cut nor padded.
        tokenizer
            .with_truncation(None)
            .map_err(|source| failed("cannot be used without truncation", source))?;
        tokenizer.with_padding(None);
        // A document that spells out "</s>" must not end there.
        tokenizer.set_encode_special_tokens(true);

        let vocabulary = tokenizer
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id + 1);
        let settings = Settings::read(directory)?;
        let eot = settings
            .token("eos", &tokenizer, vocabulary)?
            .ok_or_else(|| {
                DataError::content(
                    &path,
                    "nothing beside it says which token ends a document",
                    "put the tokenizer's tokenizer_config.json (eos_token) into the same directory",
                )
            })?;
        let bos = settings.token("bos", &tokenizer, vocabulary)?;
        settings.check_model(vocabulary)?;
        let adds_bos = match settings.adds_bos() {
            Some(adds) => adds && bos.is_some(),
            None => {
                let encoded = tokenizer
                    .encode("a", true)
                    .map_err(|source| failed("does not encode \"a\"", source))?;
                bos.is_some() && encoded.get_ids().first().copied() == bos
            }
        };
        let hash = blake3::hash(&bytes).to_hex().to_string();
        Ok(TextTokenizer {
            tokenizer,
            path,
            hash,
            eot,
            bos,
            adds_bos,
            vocabulary,
        })
    }

    /// Loads the tokenizer at `path`, which has to be the one that `manifest` was made with.
    ///
    /// # Errors
    /// As [`TextTokenizer::load`], and when it is another one.
    pub fn load_for(path: &Path, manifest: &Manifest) -> Result<TextTokenizer, DataError> {
        let tokenizer = TextTokenizer::load(path)?;
        if tokenizer.hash != manifest.tokenizer_hash() {
            let cause = "is not the tokenizer that the dataset was indexed with";
            return Err(DataError::content(&tokenizer.path, cause, "give that one"));
        }
        Ok(tokenizer)
    }

    /// The token that ends a document.
    pub fn eot(&self) -> u32 {
        self.eot
    }

    /// The token that begins a document, where there is one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether the tokenizer, used as its configuration says, puts BOS before a text.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Number of token ids: one more than the highest.
    pub fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    /// BLAKE3 of `tokenizer.json`, in hexadecimal.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// `tokenizer.json`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends the tokens of `text` to `tokens`, without BOS and EOT. Special tokens spelled out in `text` are text.
    ///
    /// # Errors
    /// When the tokenizer fails on this text.
    pub fn encode(&self, text: &str, tokens: &mut Vec<u32>) -> Result<(), DataError> {
        let encoding = self
            .tokenizer
            .encode_fast(text, false)
            .map_err(|source| self.failed("cannot encode", source))?;
        tokens.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// The text of `tokens`, special tokens spelled out.
    ///
    /// # Errors
    /// When the tokenizer fails on these tokens.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.tokenizer
            .decode(tokens, false)
            .map_err(|source| self.failed("cannot decode", source))
    }

    fn failed(&self, action: &str, source: tokenizers::Error) -> DataError {
        DataError::Tokenizer {
            path: self.path.clone(),
            action: action.to_owned(),
            source,
        }
    }
}

/// The JSON files beside `tokenizer.json` that name special tokens, the most binding first.
struct Settings {
    files: Vec<(PathBuf, Value)>,
}

impl Settings {
    fn read(directory: &Path) -> Result<Settings, DataError> {
        let mut found = Vec::new();
        for name in [
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
            "config.json",
        ] {
            let path = directory.join(name);
            if !path.exists() {
                continue;
            }
            let bytes = std::fs::read(&path).map_err(DataError::io("read", &path))?;
            let value = serde_json::from_slice(&bytes).map_err(|source| DataError::Json {
                path: path.clone(),
                what: "JSON",
                source,
            })?;
            found.push((path, value));
        }
        Ok(Settings { files: found })
    }

    /// The id of the `eos` or `bos` token: by name (`eos_token`) or by number (`eos_token_id`), in the first file that
    /// has it; of several numbers the first.
    fn token(
        &self,
        role: &str,
        tokenizer: &Tokenizer,
        vocabulary: u32,
    ) -> Result<Option<u32>, DataError> {
        let (by_name, by_id) = (format!("{role}_token"), format!("{role}_token_id"));
        for (path, value) in &self.files {
            let named = &value[&by_name];
            if let Some(name) = named.as_str().or_else(|| named["content"].as_str()) {
                let id = tokenizer.token_to_id(name).ok_or_else(|| {
                    let cause =
                        format!("its {by_name} {name:?} is not in the tokenizer's vocabulary");
                    DataError::content(
                        path,
                        cause,
                        "take tokenizer.json and its configuration from the same model",
                    )
                })?;
                return Ok(Some(id));
            }
            let number = &value[&by_id];
            if let Some(id) = number.as_u64().or_else(|| number[0].as_u64()) {
                if id >= u64::from(vocabulary) {
                    let cause =
                        format!("its {by_id} {id} is outside the tokenizer's {vocabulary} ids");
                    let remedy = "take tokenizer.json and its configuration from the same model";
                    return Err(DataError::content(path, cause, remedy));
                }
                return Ok(Some(id as u32));
            }
        }
        Ok(None)
    }

    fn adds_bos(&self) -> Option<bool> {
        self.files
            .iter()
            .find_map(|(_, value)| value["add_bos_token"].as_bool())
    }

    /// The model beside the tokenizer must have an embedding for every token.
    fn check_model(&self, vocabulary: u32) -> Result<(), DataError> {
        let model = self
            .files
            .iter()
            .find(|(path, _)| path.ends_with("config.json"));
        let Some((path, size)) =
            model.and_then(|(path, value)| Some((path, value["vocab_size"].as_u64()?)))
        else {
            return Ok(());
        };
        if size >= u64::from(vocabulary) {
            return Ok(());
        }
        let cause = format!(
            "the model has {size} embeddings but the tokenizer beside it has ids up to {}",
            vocabulary - 1
        );
        Err(DataError::content(
            path,
            cause,
            "give the tokenizer of this model",
        ))
    }
}
