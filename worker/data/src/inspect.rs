//! `supra data inspect`: shows a window or a sample as text, with the document boundaries.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use supra_recipes::{Plan, Recipe};

use crate::{DataError, Reader, TextTokenizer};

/// Which part of the stream to show.
#[derive(Debug, Clone)]
pub enum At {
    /// Window `number` of the stream.
    Window {
        /// Counts from 0.
        number: u64,
        /// Tokens per window.
        sequence_length: u64,
    },
    /// Sample `number` of a run of `recipe`, whose sequence length and order hold.
    Sample {
        /// Counts from 0 over the whole run.
        number: u64,
        /// The recipe.
        recipe: Box<Recipe>,
    },
}

/// What `supra data inspect` is asked to show.
#[derive(Debug, Clone)]
pub struct InspectOptions {
    /// A manifest, or the directory of `dataset.json`.
    pub dataset: PathBuf,
    /// The tokenizer that made the tokens; without it token ids are shown.
    pub tokenizer: Option<PathBuf>,
    /// What to show.
    pub at: At,
}

/// The part of one document that lies in the window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Passage {
    /// Position of its first token in the window.
    pub position: u64,
    /// Whether the document begins here, rather than before the window.
    pub begins_document: bool,
    /// The token ids.
    pub tokens: Vec<u32>,
    /// The text; absent without a tokenizer.
    pub text: Option<String>,
}

/// A decoded window. `Display` shows it with the document boundaries; `Serialize` is its JSON form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inspected {
    /// Number of the window.
    pub window: u64,
    /// Number of the sample, when asked for by sample.
    pub sample: Option<u64>,
    /// Windows of the dataset.
    pub windows: u64,
    /// Tokens of the window: inputs and targets, one more than its sequence length.
    pub tokens: u64,
    /// The window cut at document boundaries.
    pub passages: Vec<Passage>,
}

impl fmt::Display for Inspected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(sample) = self.sample {
            write!(f, "sample {sample} is ")?;
        }
        writeln!(
            f,
            "window {} of {} ({} tokens)",
            self.window, self.windows, self.tokens
        )?;
        for passage in &self.passages {
            let what = if passage.begins_document {
                "a document begins"
            } else {
                "a document goes on"
            };
            writeln!(
                f,
                "--- position {}: {what} ({} tokens)",
                passage.position,
                passage.tokens.len()
            )?;
            match &passage.text {
                Some(text) => writeln!(f, "{text}")?,
                None => writeln!(f, "{:?}", passage.tokens)?,
            }
        }
        Ok(())
    }
}

/// Reads and decodes one window.
///
/// # Errors
/// When there is no such window or sample, when the data cannot be read, or when the tokenizer is another one.
pub fn inspect(options: &InspectOptions) -> Result<Inspected, DataError> {
    let length = match &options.at {
        At::Window {
            sequence_length, ..
        } => *sequence_length,
        At::Sample { recipe, .. } => u64::from(recipe.batch.sequence_length),
    };
    let mut reader = Reader::open(&options.dataset, length)?;
    let (window, sample) = match &options.at {
        At::Window { number, .. } => (*number, None),
        At::Sample { number, recipe } => {
            let plan = Plan::new(recipe, reader.windows(), reader.manifest().hash())?;
            if *number >= plan.samples {
                return Err(DataError::Request(format!(
                    "there is no sample {number}, the budget has {}",
                    plan.samples
                )));
            }
            (plan.window(*number), Some(*number))
        }
    };
    let tokenizer = options
        .tokenizer
        .as_deref()
        .map(|path| TextTokenizer::load_for(path, reader.manifest()))
        .transpose()?;
    let (tokens, starts) = reader.window(window)?;
    let passages = passages(&tokens, &starts, tokenizer.as_ref())?;
    Ok(Inspected {
        window,
        sample,
        windows: reader.windows(),
        tokens: tokens.len() as u64,
        passages,
    })
}

/// Cuts a window, given by its tokens and the positions at which documents begin, at document boundaries.
///
/// # Errors
/// When the tokenizer fails on the tokens.
pub fn passages(
    tokens: &[u32],
    starts: &[u32],
    tokenizer: Option<&TextTokenizer>,
) -> Result<Vec<Passage>, DataError> {
    let mut bounds: Vec<usize> = starts.iter().map(|start| *start as usize).collect();
    let begins_at_0 = bounds.first() == Some(&0);
    if !begins_at_0 {
        bounds.insert(0, 0);
    }
    bounds.push(tokens.len());
    let passage = |(nth, pair): (usize, &[usize])| {
        let tokens = tokens[pair[0]..pair[1]].to_vec();
        let text = tokenizer
            .map(|tokenizer| tokenizer.decode(&tokens))
            .transpose()?;
        Ok(Passage {
            position: pair[0] as u64,
            begins_document: nth > 0 || begins_at_0,
            tokens,
            text,
        })
    };
    bounds.windows(2).enumerate().map(passage).collect()
}
