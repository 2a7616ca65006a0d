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
