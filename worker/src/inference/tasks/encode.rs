//! From text to tokens, as lm-evaluation-harness does it.

use std::sync::Arc;

use tokenizers::{Encoding, Tokenizer};

use super::super::{load::LoadedModel, scorer::sharing::Request};

/// Turns contexts and continuations into tokens.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    /// What stands before a continuation that has no context: BOS, else EOS.
    prefix: Option<u32>,
    vocabulary: u32,
    /// Most tokens that the model reads.
    limit: usize,
}

/// A request, and whether its context was cut to fit.
pub struct Encoded {
    /// The tokens.
    pub request: Request,
    /// Whether the beginning of the context is missing.
    pub cut: bool,
}

/// What cannot be done with a text.
pub enum Refused {
    /// The tokenizer fails.
    Tokenizer(tokenizers::Error),
    /// The text is no question for this model.
    Text(String),
}

impl<'a> Encoder<'a> {
    /// For a model, with contexts cut at their beginning so that it reads at most `limit` tokens.
    pub fn new(model: &LoadedModel, tokenizer: &'a Tokenizer, limit: usize) -> Encoder<'a> {
        let config = model.transformer.config();
        let special = config.bos.or(config.eos.first().copied());
        Encoder {
            tokenizer,
            prefix: special.and_then(|token| token.try_into().ok()),
            vocabulary: config.vocab.try_into().unwrap_or(u32::MAX),
            limit,
        }
    }

    /// Requests of pairs of context and continuation, in their order.
    ///
    /// White space at the end of a context belongs to the continuation. Context and both together are encoded with the special tokens
    /// that the tokenizer adds by itself; the continuation is what both together have behind the length of the context.
    pub fn pairs(
        &self,
        pairs: &[(String, String)],
    ) -> Result<Vec<Result<Encoded, String>>, Refused> {
        let split: Vec<(&str, String)> = pairs
            .iter()
            .map(|(context, continuation)| {
                let bare = context.trim_end();
                (bare, format!("{}{continuation}", &context[bare.len()..]))
            })
            .collect();
        let contexts = split.iter().map(|(context, _)| (*context).to_owned());
        let wholes = split
            .iter()
            .map(|(context, continuation)| format!("{context}{continuation}"));
        let contexts = self.encode(contexts.collect(), true)?;
        let with_context = self.encode(wholes.collect(), true)?;
        let mut requests = Vec::with_capacity(pairs.len());
        let mut last: Option<Arc<[u32]>> = None;
        for ((bare, continuation), (context, whole)) in
            split.into_iter().zip(contexts.iter().zip(&with_context))
        {
            let (context, continuation) = if bare.is_empty() {
                self.without_context(&continuation)?
            } else {
                let context = context.get_ids();
                let behind = whole.get_ids().get(context.len()..).unwrap_or(&[]);
                (context.to_vec(), behind.to_vec())
            };
            requests.push(self.request(context, continuation, &mut last));
        }
        Ok(requests)
    }

    /// A context alone, cut at its beginning to leave room for `room` tokens; and whether it was cut.
    pub fn prompt(&self, context: &str, room: usize) -> Result<(Vec<u32>, bool), Refused> {
        let encoded = self.encode(vec![context.to_owned()], true)?;
        let ids = encoded.first().map_or(&[][..], Encoding::get_ids);
        self.check(ids).map_err(Refused::Text)?;
        let longest = self.limit.saturating_sub(room).max(1);
        let first = ids.len().saturating_sub(longest);
        match (&ids[first..], self.prefix) {
            ([], None) => Err(Refused::Text(NO_PREFIX.to_owned())),
            ([], Some(prefix)) => Ok((vec![prefix], false)),
            (kept, _) => Ok((kept.to_vec(), first > 0)),
        }
    }

    fn without_context(&self, continuation: &str) -> Result<(Vec<u32>, Vec<u32>), Refused> {
        let encoded = self.encode(vec![continuation.to_owned()], false)?;
        let ids = encoded.first().map_or(&[][..], Encoding::get_ids);
        match (self.prefix, ids.split_first()) {
            (Some(prefix), Some((first, rest))) if *first == prefix => {
                Ok((vec![prefix], rest.to_vec()))
            }
            (Some(prefix), _) => Ok((vec![prefix], ids.to_vec())),
            (None, _) => Err(Refused::Text(NO_PREFIX.to_owned())),
        }
    }

    fn request(
        &self,
        mut context: Vec<u32>,
        continuation: Vec<u32>,
        last: &mut Option<Arc<[u32]>>,
    ) -> Result<Encoded, String> {
        if context.is_empty() || continuation.is_empty() {
            return Err("context or continuation has no token of its own".to_owned());
        }
        if continuation.len() > self.limit {
            return Err(format!(
                "the continuation alone has {} tokens, more than the {} that the model is to read: raise --context",
                continuation.len(),
                self.limit
            ));
        }
        self.check(&context)?;
        self.check(&continuation)?;
        // The last token of the continuation is never read.
        let tokens = context.len() + continuation.len() - 1;
        let excess = tokens.saturating_sub(self.limit);
        context.drain(..excess);
        // Choices of a question hold one context among them.
        let same = last.take().filter(|last| **last == *context);
        let context = same.unwrap_or_else(|| context.into());
        *last = Some(context.clone());
        Ok(Encoded {
            request: Request {
                context,
                continuation,
            },
            cut: excess > 0,
        })
    }

    fn check(&self, ids: &[u32]) -> Result<(), String> {
        match ids.iter().find(|&&token| token >= self.vocabulary) {
            None => Ok(()),
            Some(token) => Err(format!(
                "it has token {token}, but the model's vocabulary has {} tokens: the tokenizer does not fit",
                self.vocabulary
            )),
        }
    }

    fn encode(&self, texts: Vec<String>, special: bool) -> Result<Vec<Encoding>, Refused> {
        self.tokenizer
            .encode_batch_fast(texts, special)
            .map_err(Refused::Tokenizer)
    }
}

const NO_PREFIX: &str = "there is no context, and the model's config.json names no bos_token_id or eos_token_id to stand for it";
