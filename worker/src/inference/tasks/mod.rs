//! Tasks: questions with known answers, in the formats and by the arithmetic of EleutherAI's lm-evaluation-harness.
//!
//! A task is a file with one JSON object per line ([`read`]). Its [`format`] makes a prompt of each; [`encode`] turns prompts and
//! answers into tokens; the [`Scorer`] says how likely they are; [`judge`] makes figures of that. Every step gives what the harness
//! gives, to the item.

pub mod encode;
pub mod error;
pub mod format;
mod hellaswag;
pub mod item;
pub mod judge;
pub mod qa;
pub mod read;
mod write;

use std::{
    collections::{BTreeMap, btree_map::Entry},
    time::Instant,
};

use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use super::{
    load::{LoadError, LoadedModel},
    scorer::{Scorer, sharing::Request},
    statistics::Estimate,
};
use encode::{Encoder, Refused};
pub use error::TaskError;
pub use format::Format;
use item::{Item, Question};
pub use judge::Judged;
pub use read::{Task, TaskFile};
use write::Limits;

/// Examples before each question.
#[derive(Clone, Debug)]
pub struct Shots {
    /// How many: the first ones of the question's subject.
    pub count: usize,
    /// Where they are from.
    pub from: Task,
}

/// How a task is run.
#[derive(Clone, Debug)]
pub struct TaskOptions {
    /// Items from the first on; none = all.
    pub limit: Option<usize>,
    /// Examples before each question; none = none.
    pub shots: Option<Shots>,
    /// What stands between a question and its answer.
    pub delimiter: String,
    /// Most tokens that the model reads: contexts lose their beginning. None = the positions that the model was made for.
    pub context: Option<usize>,
    /// Most tokens of an answer that the model writes.
    pub answer_tokens: usize,
}

impl TaskOptions {
    fn items<'a>(&self, task: &'a Task) -> &'a [Item] {
        let count = self.limit.unwrap_or(usize::MAX).min(task.items.len());
        &task.items[..count]
    }

    fn context(&self, model: &LoadedModel) -> usize {
        let config = model.transformer.config();
        let window = config.sliding_window.unwrap_or(i64::MAX);
        let positions = config.max_positions.min(window).max(2);
        self.context.unwrap_or(positions as usize)
    }
}

/// What a task came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskResult {
    /// Its name.
    pub task: String,
    /// Its file.
    pub file: String,
    /// Its format.
    pub format: Format,
    /// Examples before each question.
    pub shots: usize,
    /// Most tokens that the model read.
    pub context: usize,
    /// Items.
    pub items: usize,
    /// Items whose context was cut to fit.
    pub cut: usize,
    /// Figures by name, with standard errors.
    pub metrics: BTreeMap<String, Estimate>,
    /// The figures of each subject, where the task has subjects.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub subjects: BTreeMap<String, BTreeMap<String, Estimate>>,
    /// Wall time.
    pub seconds: f64,
}

/// The tokenizer beside a model, without the cutting and padding that it may have been saved with.
pub fn tokenizer(model: &LoadedModel) -> Result<Tokenizer, LoadError> {
    let mut tokenizer = model.tokenizer()?;
    let path = || model.dir.join("tokenizer.json");
    tokenizer
        .with_truncation(None)
        .map_err(|cause| LoadError::Tokenizer {
            path: path(),
            cause,
        })?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// Items whose texts are tokens at the same time before they are scored.
const ENCODED_AT_ONCE: usize = 512;

/// Runs a task; gives its figures and what became of each item, in the order of the file. `progress` hears how many of how many
/// things to score or to write are done.
pub fn run(
    scorer: &mut Scorer,
    tokenizer: &Tokenizer,
    task: &Task,
    options: &TaskOptions,
    mut progress: impl FnMut(usize, usize),
) -> Result<(TaskResult, Vec<Judged>), TaskError> {
    let clock = Instant::now();
    let items = options.items(task);
    let prepared = prepare(scorer.model(), tokenizer, task, options)?;

    let mut scores = scorer
        .requests(&prepared.requests, &mut progress)?
        .into_iter();
    let stop = scorer.model().stop_tokens();
    let limits = Limits {
        tokens: options.answer_tokens,
        stop: &stop,
    };
    let written = write::write(
        scorer.engine(),
        tokenizer,
        &prepared.prompts,
        limits,
        &mut progress,
    )
    .map_err(|error| error.of(&task.path))?;
    let mut written = written.into_iter();

    let judged: Vec<Judged> = items
        .iter()
        .zip(&prepared.cut)
        .map(|(item, &cut)| {
            let scored = scores
                .by_ref()
                .take(item.question.pairs("").len())
                .collect::<Vec<_>>();
            let text = match item.question {
                Question::Answer { yes_no: false, .. } => written.next(),
                _ => None,
            };
            judge::judge(item, &scored, text, cut)
        })
        .collect();
    let result = TaskResult {
        task: task.name.clone(),
        file: task.path.display().to_string(),
        format: task.format,
        shots: options.shots.as_ref().map_or(0, |shots| shots.count),
        context: options.context(scorer.model()),
        items: items.len(),
        cut: prepared.cut.iter().filter(|&&cut| cut).count(),
        metrics: judge::metrics(&judged),
        subjects: judge::by_subject(&judged),
        seconds: clock.elapsed().as_secs_f64(),
    };
    Ok((result, judged))
}

/// Items as tokens.
#[derive(Debug, Default)]
pub struct Prepared {
    /// What is scored, item by item.
    pub requests: Vec<Request>,
    /// What the model goes on from, for the items whose answer it writes.
    pub prompts: Vec<Vec<u32>>,
    /// For each item, whether a context of it was cut.
    pub cut: Vec<bool>,
}

/// Makes prompts of the items of a task, and tokens of the prompts.
pub fn prepare(
    model: &LoadedModel,
    tokenizer: &Tokenizer,
    task: &Task,
    options: &TaskOptions,
) -> Result<Prepared, TaskError> {
    let encoder = Encoder::new(model, tokenizer, options.context(model));
    let items = options.items(task);
    let mut headers: BTreeMap<Option<&str>, String> = BTreeMap::new();
    let mut prepared = Prepared::default();
    for some in items.chunks(ENCODED_AT_ONCE) {
        let mut pairs = Vec::new();
        for item in some {
            let subject = item.subject.as_deref();
            let before = match headers.entry(subject) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(header(task, options, subject)?),
            };
            let own = item.question.pairs(&options.delimiter);
            pairs.extend(
                own.into_iter()
                    .map(|(context, rest)| (format!("{before}{context}"), rest)),
            );
        }
        let wrong = |line: usize| move |refused: Refused| refused.of(task, line);
        let mut encoded = encoder
            .pairs(&pairs)
            .map_err(wrong(some[0].line))?
            .into_iter();
        for item in some {
            let mut any_cut = false;
            for encoded in encoded.by_ref().take(item.question.pairs("").len()) {
                let encoded = encoded.map_err(Refused::Text).map_err(wrong(item.line))?;
                any_cut |= encoded.cut;
                prepared.requests.push(encoded.request);
            }
            if let Question::Answer {
                context,
                yes_no: false,
                ..
            } = &item.question
            {
                let before = &headers[&item.subject.as_deref()];
                let (prompt, cut) = encoder
                    .prompt(&format!("{before}{context}"), options.answer_tokens)
                    .map_err(wrong(item.line))?;
                any_cut |= cut;
                prepared.prompts.push(prompt);
            }
            prepared.cut.push(any_cut);
        }
    }
    Ok(prepared)
}

/// What stands before every question of a subject: what it is about, and solved examples.
fn header(task: &Task, options: &TaskOptions, subject: Option<&str>) -> Result<String, TaskError> {
    let mut header = task.format.description(subject);
    let Some(Shots { count, from }) = &options.shots else {
        return Ok(header);
    };
    let same = || {
        from.items
            .iter()
            .filter(|example| example.subject.as_deref() == subject)
    };
    if same().count() < *count {
        let of = subject.map_or_else(String::new, |subject| format!(" of the subject {subject}"));
        return Err(TaskError::File {
            path: from.path.clone(),
            problem: format!(
                "it has {} examples{of}, {count} are asked for: give --shots-from a file with more, or fewer --shots",
                same().count()
            ),
        });
    }
    for example in same().take(*count) {
        header += &example.question.solved(&options.delimiter);
        header += "\n\n";
    }
    Ok(header)
}

impl Refused {
    fn of(self, task: &Task, line: usize) -> TaskError {
        match self {
            Refused::Tokenizer(cause) => TaskError::Tokenizer {
                path: task.path.clone(),
                cause,
            },
            Refused::Text(problem) => TaskError::Line {
                path: task.path.clone(),
                line,
                problem,
            },
        }
    }
}
