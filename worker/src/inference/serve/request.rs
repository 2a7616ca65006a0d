//! A request for completions: what it may say, and what it means.

use std::sync::Arc;

use rand::RngExt;
use tokenizers::Tokenizer;

use super::{fault::Fault, fields::Fields, schedule::Order, served::Served};
use crate::inference::sampler::Sampling;

/// New tokens where nobody says how many, as at OpenAI.
const USUAL_TOKENS: usize = 16;
/// Completions of one request, over all prompts.
pub const MOST_CHOICES: usize = 256;
/// Completions of one prompt.
const MOST_OF_ONE: i64 = 128;
/// Likeliest tokens that are told beside each.
const MOST_LOGPROBS: i64 = 20;
/// Stop strings, as at OpenAI.
const MOST_STOPS: usize = 4;
/// What a prompt may be.
const PROMPT: &str =
    "a string, an array of strings, an array of token ids, or an array of such arrays";

/// What the server allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most new tokens of one completion.
    pub max_tokens: usize,
    /// Most tokens of one prompt.
    pub max_prompt_tokens: usize,
}

/// A prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// As it was given, if it was text.
    pub text: Option<String>,
    /// What the model reads.
    pub tokens: Arc<[u32]>,
}

/// What completions are to tell beside their text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// The prompt stands before the text.
    pub echo: bool,
    /// Log-probabilities, with those of so many of the likeliest tokens.
    pub logprobs: Option<usize>,
    /// The tokens' numbers.
    pub token_ids: bool,
}

/// A request that can be carried out.
#[derive(Clone, Debug)]
pub struct Request {
    /// At least one.
    pub prompts: Vec<Prompt>,
    /// Completions of each.
    pub n: usize,
    /// Most new tokens of each completion.
    pub max_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// What is told.
    pub wishes: Wishes,
    /// Whether the answer comes in pieces.
    pub stream: bool,
    /// Whether a last piece counts the tokens.
    pub include_usage: bool,
}

impl Request {
    /// Reads a request for the model that answers now.
    ///
    /// # Errors
    ///
    /// What is wrong, by field.
    pub fn parse(body: &[u8], served: &Served, limits: Limits) -> Result<Request, Fault> {
        let fields = Fields::parse(body)?;
        if let Some(model) = fields.get::<String>("model", "a string")?
            && model != served.id
        {
            return Err(Fault::no_model(&model, &served.id));
        }
        refuse(&fields)?;
        let n = fields.whole("n", 1..=MOST_OF_ONE)?.unwrap_or(1);
        if let Some(best_of) = fields.whole("best_of", 1..=MOST_OF_ONE)?
            && best_of != n
        {
            return Err(Fault::field(
                "best_of",
                format!("{best_of} is not `n`, {n}: every completion is given out; leave it out"),
            ));
        }
        let most = i64::try_from(limits.max_tokens).unwrap_or(i64::MAX);
        let max_tokens = fields.whole("max_tokens", 0..=most)?;
        let max_tokens = max_tokens.map_or(USUAL_TOKENS.min(limits.max_tokens), |max| max as usize);
        let logprobs = fields.whole("logprobs", 0..=MOST_LOGPROBS)?;
        let stream = fields.switch("stream")?;
        let request = Request {
            n: n as usize,
            max_tokens,
            sampling: sampling(&fields)?,
            stop: stops(&fields, served)?,
            wishes: Wishes {
                echo: fields.switch("echo")?,
                logprobs: logprobs.map(|count| count as usize),
                token_ids: fields.switch("return_token_ids")? || served.tokenizer.is_none(),
            },
            stream,
            include_usage: include_usage(&fields, stream)?,
            // What costs most comes last.
            prompts: prompts(&fields, served, n as usize)?,
        };
        request.check_lengths(served, limits)?;
        Ok(request)
    }

    fn check_lengths(&self, served: &Served, limits: Limits) -> Result<(), Fault> {
        for (number, prompt) in self.prompts.iter().enumerate() {
            let tokens = prompt.tokens.len();
            let which = match self.prompts.len() {
                1 => "it".to_owned(),
                _ => format!("number {number}"),
            };
            if tokens == 0 {
                return Err(Fault::field(
                    "prompt",
                    format!(
                        "{which} has no tokens, and the tokenizer adds none: there is nothing to continue"
                    ),
                ));
            }
            if tokens > limits.max_prompt_tokens {
                return Err(Fault::too_long(
                    "prompt",
                    format!(
                        "{which} has {tokens} tokens, and this server takes {} (--max-prompt-tokens): shorten it",
                        limits.max_prompt_tokens
                    ),
                ));
            }
            if let Some(context) = served
                .context
                .filter(|&most| tokens + self.max_tokens > most)
            {
                return Err(Fault::too_long(
                    "prompt",
                    format!(
                        "{which} has {tokens} tokens, and {} new ones were asked for, but the model sees {context} tokens in all: shorten the prompt or lower `max_tokens`",
                        self.max_tokens
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Completions of all prompts.
    pub fn choices(&self) -> usize {
        self.prompts.len() * self.n
    }

    /// The prompt of a completion. Those of one prompt are neighbours, as at OpenAI.
    pub fn prompt_of(&self, choice: usize) -> &Prompt {
        &self.prompts[choice / self.n]
    }

    /// What is to be computed for a completion. Completions of one prompt draw from seeds that follow each other, so that what one
    /// prompt gives does not depend on which others came with it.
    pub fn order(&self, choice: usize, served: &Served) -> Order {
        let seed = self.sampling.seed.wrapping_add((choice % self.n) as u64);
        Order {
            prompt: Arc::clone(&self.prompt_of(choice).tokens),
            score_prompt: self.wishes.echo && self.wishes.logprobs.is_some(),
            max_tokens: self.max_tokens,
            stop_tokens: Arc::clone(&served.stop_tokens),
            sampling: Sampling {
                seed,
                ..self.sampling
            },
            top: self.wishes.logprobs,
        }
    }
}

/// What OpenAI's interface knows and this server does not do.
fn refuse(fields: &Fields<'_>) -> Result<(), Fault> {
    for name in ["presence_penalty", "frequency_penalty"] {
        if fields.number(name, -2.0..=2.0, 0.0)? != 0.0 {
            return Err(Fault::field(
                name,
                "only 0 is possible here: use `repetition_penalty`",
            ));
        }
    }
    if fields.raw("suffix").is_some_and(|suffix| suffix != "\"\"") {
        return Err(Fault::field(
            "suffix",
            "text cannot be put between a prompt and a suffix: leave it out",
        ));
    }
    if fields.raw("logit_bias").is_some_and(|bias| bias != "{}") {
        return Err(Fault::field(
            "logit_bias",
            "logits cannot be changed here: leave it out",
        ));
    }
    Ok(())
}

fn sampling(fields: &Fields<'_>) -> Result<Sampling, Fault> {
    let usual = Sampling::default();
    // As at OpenAI, a seed may be negative.
    let seed = fields.whole("seed", i64::MIN..=i64::MAX)?;
    let top_k = fields.whole("top_k", -1..=i64::from(u32::MAX))?;
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0..=100.0, usual.temperature)?,
        top_k: top_k.map_or(usual.top_k, |top_k| top_k.max(0) as usize),
        // The smallest positive number takes the likeliest token.
        top_p: fields
            .number("top_p", 0.0..=1.0, usual.top_p)?
            .max(f64::MIN_POSITIVE),
        min_p: fields.number("min_p", 0.0..=1.0, usual.min_p)?,
        repetition_penalty: fields.number(
            "repetition_penalty",
            0.01..=100.0,
            usual.repetition_penalty,
        )?,
        seed: seed.map_or_else(|| rand::rng().random(), i64::cast_unsigned),
    })
}

fn stops(fields: &Fields<'_>, served: &Served) -> Result<Vec<String>, Fault> {
    let what = "a string or an array of at most 4 strings";
    let stops = match fields.raw("stop") {
        None => Vec::new(),
        Some(written) if written.starts_with('[') => {
            fields.get::<Vec<String>>("stop", what)?.unwrap_or_default()
        }
        Some(_) => fields.get::<String>("stop", what)?.into_iter().collect(),
    };
    let problem = if stops.len() > MOST_STOPS {
        format!("{} strings are more than {MOST_STOPS}", stops.len())
    } else if stops.iter().any(String::is_empty) {
        "an empty string would end every text at once: leave it out".to_owned()
    } else if served.tokenizer.is_none() && !stops.is_empty() {
        "this model has no tokenizer, so there is no text to look for it in: leave it out"
            .to_owned()
    } else {
        return Ok(stops);
    };
    Err(Fault::field("stop", problem))
}

fn include_usage(fields: &Fields<'_>, stream: bool) -> Result<bool, Fault> {
    let Some(written) = fields.raw("stream_options") else {
        return Ok(false);
    };
    if !stream {
        return Err(Fault::field(
            "stream_options",
            "only an answer that is streamed has them: set `stream` to true",
        ));
    }
    let wrong = |fault: Fault| Fault::field("stream_options", fault.message);
    let options = Fields::parse(written.as_bytes()).map_err(wrong)?;
    options.switch("include_usage").map_err(wrong)
}

fn prompts(fields: &Fields<'_>, served: &Served, n: usize) -> Result<Vec<Prompt>, Fault> {
    let Some(written) = fields.raw("prompt") else {
        return Err(Fault::field(
            "prompt",
            format!("it is missing: send {PROMPT}"),
        ));
    };
    let inside = written.strip_prefix('[').map(str::trim_start);
    let ids = "token ids, whole numbers from 0 on";
    let (texts, tokens): (Vec<String>, Vec<Vec<u32>>) =
        match inside.map(|inside| inside.as_bytes().first().copied()) {
            None => (
                fields
                    .get::<String>("prompt", PROMPT)?
                    .into_iter()
                    .collect(),
                Vec::new(),
            ),
            Some(Some(b'"')) => (
                fields
                    .get::<Vec<String>>("prompt", PROMPT)?
                    .unwrap_or_default(),
                Vec::new(),
            ),
            Some(Some(b'[')) => {
                let what = format!("an array of arrays of {ids}");
                (
                    Vec::new(),
                    fields
                        .get::<Vec<Vec<u32>>>("prompt", &what)?
                        .unwrap_or_default(),
                )
            }
            Some(Some(b']')) => {
                return Err(Fault::field(
                    "prompt",
                    format!("the array is empty: send {PROMPT}"),
                ));
            }
            Some(_) => {
                let what = format!("an array of {ids}, or of strings");
                (
                    Vec::new(),
                    fields
                        .get::<Vec<u32>>("prompt", &what)?
                        .into_iter()
                        .collect(),
                )
            }
        };
    let choices = (texts.len() + tokens.len()) * n;
    if choices > MOST_CHOICES {
        return Err(Fault::field(
            "prompt",
            format!(
                "{choices} completions in one request are more than {MOST_CHOICES}: send several requests"
            ),
        ));
    }
    let encoded = texts.into_iter().map(|text| encode(text, served));
    let given = tokens.into_iter().map(|tokens| {
        let stranger = tokens.iter().find(|&&token| token >= served.vocabulary);
        match stranger {
            Some(token) => Err(Fault::field(
                "prompt",
                format!(
                    "there is no token {token}: the model's vocabulary has {} tokens, from 0 on",
                    served.vocabulary
                ),
            )),
            None => Ok(Prompt {
                text: None,
                tokens: tokens.into(),
            }),
        }
    });
    encoded.chain(given).collect()
}

fn encode(text: String, served: &Served) -> Result<Prompt, Fault> {
    let Some(tokenizer) = &served.tokenizer else {
        return Err(Fault::field(
            "prompt",
            "this model's directory has no tokenizer.json, so text cannot be read: send token ids",
        ));
    };
    let tokens = tokens_of(tokenizer, &text)?;
    if let Some(token) = tokens.iter().find(|&&token| token >= served.vocabulary) {
        return Err(Fault::internal(format!(
            "the tokenizer gives token {token}, but the model's vocabulary has {} tokens: the tokenizer does not fit",
            served.vocabulary
        )));
    }
    Ok(Prompt {
        tokens: tokens.into(),
        text: Some(text),
    })
}

fn tokens_of(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Fault> {
    let encoding = tokenizer.encode_fast(text, true);
    let encoding = encoding
        .map_err(|error| Fault::field("prompt", format!("the tokenizer fails on it: {error}")))?;
    Ok(encoding.get_ids().to_vec())
}
