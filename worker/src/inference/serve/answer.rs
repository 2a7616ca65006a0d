//! The JSON of answers, in the form of OpenAI's completions.

use serde::Serialize;
use serde_json::{Value, json};

use super::{
    choice::Part,
    served::{Served, unix_time},
};

/// Tokens of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Of the prompts, each counted once.
    prompt_tokens: usize,
    /// New ones.
    completion_tokens: usize,
    /// All.
    total_tokens: usize,
}

impl Usage {
    /// The sum of both.
    pub fn new(prompt_tokens: usize, completion_tokens: usize) -> Usage {
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

/// What all pieces of an answer have in common.
pub struct Answer<'a> {
    id: String,
    created: u64,
    served: &'a Served,
}

impl<'a> Answer<'a> {
    /// The answer to the request of this number.
    pub fn new(request: u64, served: &'a Served) -> Answer<'a> {
        Answer {
            // Unique also among the servers of one machine, and after a restart.
            id: format!("cmpl-{:016x}{request:08x}", rand::random::<u64>()),
            created: unix_time(),
            served,
        }
    }

    /// All completions at once.
    pub fn whole(&self, parts: Vec<Part>, usage: Usage) -> Value {
        let choices = parts.into_iter().enumerate();
        let choices = choices.map(|(index, part)| choice(index, part)).collect();
        self.value(choices, Some(json!(usage)))
    }

    /// A piece of one completion. Where tokens are counted at the end, pieces say so.
    pub fn piece(&self, index: usize, part: Part, counted: bool) -> Value {
        self.value(vec![choice(index, part)], counted.then_some(Value::Null))
    }

    /// The last piece, which counts the tokens.
    pub fn count(&self, usage: Usage) -> Value {
        self.value(Vec::new(), Some(json!(usage)))
    }

    fn value(&self, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let mut value = json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.served.id,
            "system_fingerprint": self.served.fingerprint,
            "choices": choices,
        });
        if let Some(usage) = usage {
            value["usage"] = usage;
        }
        value
    }
}

fn choice(index: usize, part: Part) -> Value {
    let mut choice = json!({
        "index": index,
        "text": part.text,
        "logprobs": part.logprobs,
        "finish_reason": part.finish,
    });
    if !part.token_ids.is_empty() {
        choice["token_ids"] = json!(part.token_ids);
    }
    choice
}
