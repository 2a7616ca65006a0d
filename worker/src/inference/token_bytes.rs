//! How many bytes of text a token stands for.
//!
//! Tokens are not counted by decoding them: a character may be spread over tokens, and a window may end inside one. Each token's
//! own share of the UTF-8 text is fixed by the vocabulary, in the two families of tokenizers that can spell any text: byte-level BPE (one
//! character of the vocabulary is one byte) and SentencePiece's BPE with a fallback to bytes (`▁` is a space, `<0xE2>` one byte).

use serde_json::Value;
use tokenizers::Tokenizer;

/// Bytes per token of a vocabulary.
#[derive(Clone, Debug)]
pub struct TokenBytes {
    bytes: Vec<u32>,
    /// What the tokenizer puts before a text, and its decoder takes away again: bytes of the first token that no text stands behind.
    prefix: u32,
}

/// The two ways in which a vocabulary spells bytes.
enum Spelling {
    ByteLevel,
    SentencePiece { space: String, bytes: bool },
}

impl TokenBytes {
    /// Reads them from a tokenizer; none if it is of another family, whose tokens do not say which text they stand for.
    pub fn new(tokenizer: &Tokenizer) -> Option<TokenBytes> {
        let decoder = serde_json::to_value(tokenizer.get_decoder()?).ok()?;
        let spelling = Spelling::of(&decoder)?;
        let vocabulary = tokenizer.get_vocab(true);
        let size = vocabulary.values().max().map_or(0, |&id| id as usize + 1);
        let mut bytes = vec![0; size];
        for (token, id) in vocabulary {
            bytes[id as usize] = spelling.bytes(&token);
        }
        // Added tokens are spelled out as they are; special ones stand for no text.
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            bytes[id as usize] = if token.special {
                0
            } else {
                token.content.len() as u32
            };
        }
        let mut counted = TokenBytes { bytes, prefix: 0 };
        let probe = tokenizer.encode("a", false).ok()?;
        let probed: u32 = probe.get_ids().iter().map(|&id| counted.of(id)).sum();
        counted.prefix = probed.saturating_sub(1);
        Some(counted)
    }

    /// Bytes of a token inside a text; 0 for special tokens and outside of the vocabulary.
    pub fn of(&self, token: u32) -> u32 {
        self.bytes.get(token as usize).copied().unwrap_or(0)
    }

    /// Bytes of each token of a stream in which documents begin at the ascending positions `starts`.
    pub fn of_stream(&self, tokens: &[u32], starts: &[u32]) -> Vec<u32> {
        let mut starts = starts.iter().peekable();
        let mut fresh = false;
        (0..)
            .zip(tokens)
            .map(|(position, &token)| {
                fresh |= starts.next_if(|&&start| start <= position).is_some();
                let bytes = self.of(token);
                // BOS stands before the first token with text, not in its place.
                if bytes > 0 && std::mem::take(&mut fresh) {
                    bytes.saturating_sub(self.prefix)
                } else {
                    bytes
                }
            })
            .collect()
    }
}

impl Spelling {
    fn of(decoder: &Value) -> Option<Spelling> {
        let parts: Vec<&Value> = match decoder["decoders"].as_array() {
            Some(parts) => parts.iter().collect(),
            None => vec![decoder],
        };
        let kind = |part: &Value, name: &str| part["type"] == name;
        if parts.iter().any(|part| kind(part, "ByteLevel")) {
            return Some(Spelling::ByteLevel);
        }
        let space = parts.iter().find_map(|part| {
            let of = |value: &Value| value.as_str().map(str::to_owned);
            if kind(part, "Metaspace") {
                of(&part["replacement"])
            } else if kind(part, "Replace") && part["content"] == " " {
                of(&part["pattern"]["String"])
            } else {
                None
            }
        })?;
        let bytes = parts.iter().any(|part| kind(part, "ByteFallback"));
        Some(Spelling::SentencePiece { space, bytes })
    }

    fn bytes(&self, token: &str) -> u32 {
        match self {
            Spelling::ByteLevel => token.chars().count() as u32,
            Spelling::SentencePiece { bytes: true, .. } if is_byte(token) => 1,
            Spelling::SentencePiece { space, .. } => {
                token.replace(space.as_str(), " ").len() as u32
            }
        }
    }
}

/// `<0x00>` to `<0xFF>`.
fn is_byte(token: &str) -> bool {
    let digits = token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    #[test]
    fn every_byte_of_a_text_belongs_to_one_token() {
        let quickstart =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/quickstart/base/tokenizer.json");
        let tokenizer = Tokenizer::from_file(quickstart).unwrap();
        let counted = TokenBytes::new(&tokenizer).unwrap();
        for text in ["plain words", " Größe: 5 µm\n\n", "猫🐈‍⬛ and\ttabs", "a"] {
            let encoding = tokenizer.encode(text, false).unwrap();
            let bytes: u32 = encoding.get_ids().iter().map(|&id| counted.of(id)).sum();
            assert_eq!(bytes as usize, text.len(), "{text:?}");
        }
        assert_eq!(counted.of(u32::MAX), 0);
    }

    /// Llama's kind: a space before every text, bytes for what the vocabulary lacks.
    fn sentence_piece() -> Tokenizer {
        let special = json!({ "id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true });
        let mut vocabulary = json!({ "<s>": 0, "▁": 1, "a": 2, "▁a": 3, "ü": 4 });
        for byte in 0..=255 {
            vocabulary[format!("<0x{byte:02X}>")] = json!(5 + byte);
        }
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special],
            "normalizer": { "type": "Sequence", "normalizers": [
                { "type": "Prepend", "prepend": "▁" },
                { "type": "Replace", "pattern": { "String": " " }, "content": "▁" } ] },
            "pre_tokenizer": null, "post_processor": null,
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
                { "type": "ByteFallback" }, { "type": "Fuse" },
                { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] },
            "model": { "type": "BPE", "vocab": vocabulary, "merges": ["▁ a"], "byte_fallback": true,
                "unk_token": null, "fuse_unk": false }
        });
        Tokenizer::from_bytes(file.to_string()).unwrap()
    }

    #[test]
    fn the_space_before_a_document_is_no_text() {
        let tokenizer = sentence_piece();
        let counted = TokenBytes::new(&tokenizer).unwrap();
        let text = "aü 猫 a";
        let encoding = tokenizer.encode(text, false).unwrap();
        let mut tokens = vec![0];
        tokens.extend_from_slice(encoding.get_ids());
        let sum = |starts: &[u32]| counted.of_stream(&tokens, starts).iter().sum::<u32>() as usize;
        assert_eq!(sum(&[0]), text.len(), "after BOS");
        assert_eq!(sum(&[]), text.len() + 1, "a document that goes on");
        assert_eq!(counted.of(5), 1);
        assert_eq!(counted.of(0), 0);
    }

    #[test]
    fn words_do_not_say_what_stands_between_them() {
        let file = json!({ "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
            "model": { "type": "WordLevel", "vocab": { "a": 0, "?": 1 }, "unk_token": "?" } });
        let tokenizer = Tokenizer::from_bytes(file.to_string()).unwrap();
        assert!(TokenBytes::new(&tokenizer).is_none());
    }
}
