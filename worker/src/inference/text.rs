//! The text of new tokens as they come: whole characters, and together exactly what all tokens at once decode to.

use tokenizers::{Error, Tokenizer};

/// What stands for bytes that are no character.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Tokens of the prompt that are decoded again with the first new one.
const TAIL: usize = 8;

/// Decodes tokens one by one.
///
/// What a token says depends on what stands before it: a space that begins a text is dropped, a character may be bytes of
/// several tokens, and one wrong byte spoils the whole run of byte tokens that it is in. So a window of tokens is decoded, those
/// that are said already and those that wait, and what is certain to stay is given out. A run of SentencePiece's byte tokens
/// waits until it ends, other bytes until their character does.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Whether tokens such as `<0x0A>` stand for bytes.
    byte_fallback: bool,
    /// The tokens said last, and those that wait; none that the decoder does not see.
    window: Vec<u32>,
    /// How many of the window's tokens are said.
    said: usize,
    /// The part of the window's text that has been given out, or stood in the prompt.
    shown: String,
}

impl<'a> TextStream<'a> {
    /// A stream of what comes after these tokens. Special tokens have no text.
    ///
    /// # Errors
    ///
    /// The tokenizer cannot decode.
    pub fn after(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Result<TextStream<'a>, Error> {
        let byte_fallback = match tokenizer.token_to_id("<0x41>") {
            Some(token) => tokenizer.decode(&[token], true)? == "A",
            None => false,
        };
        let mut stream = TextStream {
            tokenizer,
            byte_fallback,
            window: Vec::new(),
            said: 0,
            shown: String::new(),
        };
        let mut length = TAIL;
        loop {
            let mut start = prompt.len().saturating_sub(length);
            // Not from inside a run of bytes: what it says is decided by all of it.
            while start > 0 && stream.part(prompt[start]) != Part::Text {
                start -= 1;
            }
            let seen = prompt[start..].iter().copied();
            stream.window = seen
                .filter(|&token| stream.part(token) != Part::Nothing)
                .collect();
            stream.shown = tokenizer.decode(&stream.window, true)?;
            if start == 0 || !stream.shown.is_empty() {
                stream.said = stream.window.len();
                return Ok(stream);
            }
            length *= 2;
        }
    }

    /// Takes a token; gives the text that is certain now.
    ///
    /// # Errors
    ///
    /// The tokenizer cannot decode.
    pub fn push(&mut self, token: u32) -> Result<String, Error> {
        match self.part(token) {
            Part::Nothing => Ok(String::new()),
            Part::Byte => {
                self.window.push(token);
                Ok(String::new())
            }
            Part::Text => {
                self.window.push(token);
                self.release(false)
            }
        }
    }

    /// The text of what still waits, when no more tokens come. Bytes that are no character are U+FFFD.
    ///
    /// # Errors
    ///
    /// The tokenizer cannot decode.
    pub fn finish(&mut self) -> Result<String, Error> {
        match self.said == self.window.len() {
            true => Ok(String::new()),
            false => self.release(true),
        }
    }

    fn release(&mut self, at_end: bool) -> Result<String, Error> {
        let mut text = self.tokenizer.decode(&self.window, true)?;
        // Of a prompt that ends inside a character, the rest of it comes with the new text.
        let stem = self.shown.trim_end_matches(REPLACEMENT);
        let from = if text.starts_with(&self.shown) {
            self.shown.len()
        } else if text.starts_with(stem) {
            stem.len()
        } else {
            // The decoder takes back what has been read already. That stays, and what is new stands alone.
            self.window.drain(..self.said);
            self.said = 0;
            text = self.tokenizer.decode(&self.window, true)?;
            self.shown.clear();
            0
        };
        // The last character may still be completed.
        let certain = match text.strip_suffix(REPLACEMENT) {
            Some(whole) if !at_end => whole.len(),
            _ => text.len(),
        };
        if certain < from {
            return Ok(String::new());
        }
        let piece = text[from..certain].to_owned();
        if certain == text.len() {
            self.forget(text)?;
        } else {
            text.truncate(certain);
            self.shown = text;
        }
        Ok(piece)
    }

    /// All of the window is said: it need not keep more than what the next token has to stand behind.
    fn forget(&mut self, text: String) -> Result<(), Error> {
        let last = self.tokenizer.decode(&self.window[self.said..], true)?;
        self.shown = match last.is_empty() {
            true => text,
            false => {
                self.window.drain(..self.said);
                last
            }
        };
        self.said = self.window.len();
        Ok(())
    }

    fn part(&self, token: u32) -> Part {
        let Some(word) = self.tokenizer.id_to_token(token) else {
            return Part::Nothing;
        };
        let special = self.tokenizer.get_added_vocabulary();
        if special.is_special_token(&word) {
            Part::Nothing
        } else if self.byte_fallback && is_byte(&word) {
            Part::Byte
        } else {
            Part::Text
        }
    }
}

/// What the decoder makes of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// It does not see it.
    Nothing,
    /// A byte, whose meaning its neighbours decide.
    Byte,
    /// Text, or bytes of it.
    Text,
}

/// Whether SentencePiece writes a byte like this.
fn is_byte(word: &str) -> bool {
    let digits = word
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// What a token says inside a text: with the space that it begins with, and special tokens by name. Bytes that are no character
/// alone are U+FFFD.
///
/// # Errors
///
/// The tokenizer cannot decode.
pub fn token_text(tokenizer: &Tokenizer, token: u32) -> Result<String, Error> {
    // Behind itself no token begins a text.
    let once = tokenizer.decode(&[token], false)?;
    let twice = tokenizer.decode(&[token, token], false)?;
    Ok(twice
        .strip_prefix(&once)
        .map_or_else(|| once.clone(), str::to_owned))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;

    fn special(id: u32, content: &str) -> Value {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    }

    fn tokenizer(
        words: &[String],
        merges: Value,
        byte_fallback: bool,
        decoder: Value,
    ) -> Tokenizer {
        let ids = words.iter().zip(0u32..);
        let vocabulary: Map<String, Value> =
            ids.map(|(word, id)| (word.clone(), json!(id))).collect();
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0, "</s>")], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
            "model": { "type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": byte_fallback }
        });
        file.to_string().parse().unwrap()
    }

    /// GPT-2's kind: tokens are bytes, some of them several, some of those parts of characters.
    fn byte_level() -> Tokenizer {
        // Its letters for bytes: those that can be printed stand for themselves, the others follow behind 255.
        let printed = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let hidden = (0..256).filter(|&byte| !printed(byte)).collect::<Vec<_>>();
        let letter = |byte: u32| match hidden.iter().position(|&other| other == byte) {
            Some(place) => char::from_u32(256 + place as u32).unwrap(),
            None => char::from_u32(byte).unwrap(),
        };
        let mut words = vec!["</s>".to_owned()];
        words.extend((0..256).map(|byte| letter(byte).to_string()));
        let pairs = [(b' ', b'a'), (0xE4, 0xBD), (0xA0, 0xF0), (0x9F, 0x98)];
        let merges = pairs.map(|(a, b)| [letter(a.into()), letter(b.into())].map(String::from));
        words.extend(merges.iter().map(|pair| pair.concat()));
        let decoder = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
        tokenizer(&words, json!(merges), false, decoder)
    }

    /// Llama's kind: words with a mark for the space, and tokens for single bytes.
    fn sentence_piece() -> Tokenizer {
        let mut words = vec!["</s>".to_owned()];
        words.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        words.extend(["▁", "a", "▁a", "▁▁", "é", "�", "."].map(String::from));
        let decoder = json!({ "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 }
        ] });
        let merges = json!([["▁", "a"], ["▁", "▁"]]);
        tokenizer(&words, merges, true, decoder)
    }

    /// Tokens that often make characters, and often do not.
    fn tokens(vocabulary: u32) -> impl Strategy<Value = Vec<u32>> {
        let character = prop::sample::select(vec!["é", "你", "😀", "a", " "]);
        let bytes =
            character.prop_map(|text| text.bytes().map(|byte| u32::from(byte) + 1).collect());
        let run = prop_oneof![
            3 => bytes,
            1 => prop::collection::vec(0..vocabulary + 2, 1..3),
            3 => prop::collection::vec(257..vocabulary, 1..3),
        ];
        prop::collection::vec(run, 0..9).prop_map(|runs: Vec<Vec<u32>>| runs.concat())
    }

    /// What a stream says, and what of that only at the end.
    fn streamed(tokenizer: &Tokenizer, prompt: &[u32], tokens: &[u32]) -> (String, String) {
        let mut stream = TextStream::after(tokenizer, prompt).unwrap();
        let pieces: String = tokens
            .iter()
            .map(|&token| stream.push(token).unwrap())
            .collect();
        (pieces, stream.finish().unwrap())
    }

    proptest! {
        #[test]
        fn pieces_are_the_whole(tokens in tokens(261), cut in 0usize..40) {
            let tokenizer = byte_level();
            let whole = tokenizer.decode(&tokens, true).unwrap();
            let (pieces, rest) = streamed(&tokenizer, &[], &tokens);
            prop_assert_eq!(format!("{pieces}{rest}"), whole.clone());
            prop_assert!(rest.is_empty() || rest == "\u{FFFD}", "{rest:?}");
            let (prompt, new) = tokens.split_at(cut.min(tokens.len()));
            let before = tokenizer.decode(prompt, true).unwrap();
            if !before.ends_with(REPLACEMENT) {
                let (pieces, rest) = streamed(&tokenizer, prompt, new);
                prop_assert_eq!(format!("{before}{pieces}{rest}"), whole);
            }
        }

        #[test]
        fn pieces_are_the_whole_of_byte_fallback(tokens in tokens(264), cut in 0usize..40) {
            let tokenizer = sentence_piece();
            let whole = tokenizer.decode(&tokens, true).unwrap();
            let (pieces, rest) = streamed(&tokenizer, &[], &tokens);
            prop_assert_eq!(format!("{pieces}{rest}"), whole.clone());
            let (prompt, new) = tokens.split_at(cut.min(tokens.len()));
            let before = tokenizer.decode(prompt, true).unwrap();
            if prompt.last().is_some_and(|&last| (257..264).contains(&last)) && !before.ends_with(REPLACEMENT) {
                let (pieces, rest) = streamed(&tokenizer, prompt, new);
                prop_assert_eq!(format!("{before}{pieces}{rest}"), whole);
            }
        }
    }

    #[test]
    fn a_character_waits_for_its_bytes() {
        let tokenizer = byte_level();
        let mut stream = TextStream::after(&tokenizer, &[]).unwrap();
        let bytes = "a你.".bytes().map(|byte| u32::from(byte) + 1);
        let pieces: Vec<String> = bytes.map(|token| stream.push(token).unwrap()).collect();
        assert_eq!(pieces, ["a", "", "", "你", "."]);
        // A character that the prompt began belongs to the new text.
        let mut stream = TextStream::after(&tokenizer, &[0xE4 + 1, 0xBD + 1]).unwrap();
        assert_eq!(stream.push(0xA0 + 1).unwrap(), "你");
    }

    #[test]
    fn a_space_begins_a_text_only_behind_another() {
        let tokenizer = sentence_piece();
        assert_eq!(streamed(&tokenizer, &[0], &[259, 259]).0, "a a");
        assert_eq!(streamed(&tokenizer, &[258], &[259, 259]).0, " a a");
        assert_eq!(token_text(&tokenizer, 259).unwrap(), " a");
        assert_eq!(token_text(&tokenizer, 0).unwrap(), "</s>");
        assert_eq!(token_text(&tokenizer, 0xE4 + 1).unwrap(), "\u{FFFD}");
    }
}
