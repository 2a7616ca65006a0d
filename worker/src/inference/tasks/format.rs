//! The formats of tasks: which fields a line has, and which prompt lm-evaluation-harness makes of them.

use std::{fmt, path::Path, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    TaskError, hellaswag,
    item::{Item, Question},
    qa,
};

/// How a line is read. The prompts are those of the tasks of the same name in lm-evaluation-harness 0.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `ctx_a`, `ctx_b`, `activity_label`, `endings`, `label`.
    HellaSwag,
    /// `goal`, `sol1`, `sol2`, `label`.
    Piqa,
    /// `sentence` with a gap `_`, `option1`, `option2`, `answer` (1 or 2).
    WinoGrande,
    /// `question`, `choices` (`text`, `label`), `answerKey`.
    Arc,
    /// `question`, four `choices`, `answer` (0 to 3 or A to D); `subject`.
    Mmlu,
    /// `query`, `choices`, `gold`.
    Choice,
    /// `context`, `continuation`.
    Cloze,
    /// `text`, whose last word is asked.
    Lambada,
    /// `input` (question, empty line, text) and `output` or `outputs`, in SCROLLS; or `input`, `context`, `answers`, in LongBench.
    /// Where the answers are all yes or no, the two are compared.
    Qasper,
    /// The same fields; the model always writes.
    NarrativeQa,
}

/// Every format with its name and the fields that it needs. A line is in the first one whose fields it all has.
const FORMATS: [(Format, &str, &[&str]); 10] = [
    (
        Format::HellaSwag,
        "hellaswag",
        &["ctx_a", "ctx_b", "activity_label", "endings", "label"],
    ),
    (Format::Piqa, "piqa", &["goal", "sol1", "sol2", "label"]),
    (
        Format::WinoGrande,
        "winogrande",
        &["sentence", "option1", "option2", "answer"],
    ),
    (Format::Arc, "arc", &["question", "choices", "answerKey"]),
    (Format::Mmlu, "mmlu", &["question", "choices", "answer"]),
    (Format::Choice, "choice", &["query", "choices", "gold"]),
    (Format::Cloze, "cloze", &["context", "continuation"]),
    (Format::Qasper, "qasper", &["input"]),
    (Format::NarrativeQa, "narrativeqa", &["input"]),
    (Format::Lambada, "lambada", &["text"]),
];

impl Format {
    /// As it is written on the command line.
    pub fn name(self) -> &'static str {
        let (_, name, _) = self.row();
        name
    }

    /// What stands between context and continuation: a space.
    pub const DELIMITER: &'static str = " ";

    fn row(self) -> (Format, &'static str, &'static [&'static str]) {
        let row = FORMATS.into_iter().find(|(format, ..)| *format == self);
        row.expect("invariant: the table has every format")
    }

    /// The format of a line, by its fields. Qasper and NarrativeQA have the same ones: the task's name decides.
    pub fn detect(fields: &Map<String, Value>, task: &str) -> Option<Format> {
        let has = |needed: &[&str]| needed.iter().all(|field| fields.contains_key(*field));
        let answers = ["output", "outputs", "answers"];
        FORMATS
            .iter()
            .filter(|(_, _, needed)| has(needed))
            .map(|(format, ..)| *format)
            .find(|format| match format {
                Format::Qasper | Format::NarrativeQa => {
                    let answered = answers.iter().any(|field| fields.contains_key(*field));
                    let qasper = task.to_ascii_lowercase().contains("qasper");
                    answered && qasper == (*format == Format::Qasper)
                }
                _ => true,
            })
    }

    /// Every format with its fields, for a message.
    pub fn known() -> String {
        let rows: Vec<String> = FORMATS
            .iter()
            .map(|(format, name, needed)| match format {
                Format::Qasper | Format::NarrativeQa => {
                    format!("{name} (input and output, outputs or answers)")
                }
                _ => format!("{name} ({})", needed.join(", ")),
            })
            .collect();
        rows.join("; ")
    }

    /// What stands before the examples and questions of a subject.
    pub fn description(self, subject: Option<&str>) -> String {
        match (self, subject) {
            (Format::Mmlu, Some(subject)) => format!(
                "The following are multiple choice questions (with answers) about {}.\n\n",
                subject.replace('_', " ")
            ),
            _ => String::new(),
        }
    }

    /// Reads an item.
    pub fn read(self, fields: &Fields<'_>) -> Result<Item, TaskError> {
        let (question, subject) = match self {
            Format::HellaSwag => (hellaswag::question(fields)?, None),
            Format::Piqa => (piqa(fields)?, None),
            Format::WinoGrande => (winogrande(fields)?, None),
            Format::Arc => (arc(fields)?, None),
            Format::Mmlu => (mmlu(fields)?, fields.optional_text("subject")?),
            Format::Choice => (choice(fields)?, None),
            Format::Cloze => (cloze(fields)?, None),
            Format::Lambada => (lambada(fields)?, None),
            Format::Qasper => (qa::question(fields, true)?, None),
            Format::NarrativeQa => (qa::question(fields, false)?, None),
        };
        Ok(Item {
            line: fields.line,
            subject: subject.map(str::to_owned),
            question,
        })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Format, String> {
        let row = FORMATS.iter().find(|(_, name, _)| *name == text);
        let names = || FORMATS.map(|(_, name, _)| name).join(", ");
        row.map(|(format, ..)| *format)
            .ok_or_else(|| format!("one of {}", names()))
    }
}

fn piqa(fields: &Fields<'_>) -> Result<Question, TaskError> {
    let choices = vec![fields.choice("sol1")?, fields.choice("sol2")?];
    Ok(Question::Choices {
        context: format!("Question: {}\nAnswer:", fields.text("goal")?),
        gold: fields.index("label", 0, 2)?,
        choices,
        lengths: true,
    })
}

fn winogrande(fields: &Fields<'_>) -> Result<Question, TaskError> {
    let sentence = fields.text("sentence")?;
    let (before, after) = sentence
        .split_once('_')
        .ok_or_else(|| fields.wrong("`sentence` has no gap `_`".to_owned()))?;
    let continuation = after.trim().to_owned();
    if continuation.is_empty() {
        return Err(
            fields.wrong("nothing follows the gap of `sentence`: nothing can be scored".to_owned())
        );
    }
    let with = |option: &str| format!("{before}{option}");
    Ok(Question::Contexts {
        contexts: vec![with(fields.text("option1")?), with(fields.text("option2")?)],
        continuation,
        gold: fields.index("answer", 1, 2)?,
    })
}

fn arc(fields: &Fields<'_>) -> Result<Question, TaskError> {
    let inner = fields.object("choices")?;
    let choices = inner.choices("text")?;
    let labels = inner.texts("label")?;
    let key = fields.text("answerKey")?;
    let gold = labels.iter().position(|label| label == key);
    match gold {
        Some(gold) if gold < choices.len() => Ok(Question::Choices {
            context: format!("Question: {}\nAnswer:", fields.text("question")?),
            choices,
            gold,
            lengths: true,
        }),
        _ => Err(fields.wrong(format!(
            "`answerKey` is {key:?}, which is not among the labels {labels:?} of {} choices",
            choices.len()
        ))),
    }
}

fn mmlu(fields: &Fields<'_>) -> Result<Question, TaskError> {
    const LETTERS: [&str; 4] = ["A", "B", "C", "D"];
    let choices = fields.texts("choices")?;
    if choices.len() != LETTERS.len() {
        return Err(fields.wrong(format!("`choices` has {}, not 4", choices.len())));
    }
    let letter = fields.values.get("answer").and_then(Value::as_str);
    let gold = match letter.and_then(|letter| LETTERS.iter().position(|known| *known == letter)) {
        Some(gold) => gold,
        None => fields.index("answer", 0, 4)?,
    };
    let listed: String = LETTERS
        .iter()
        .zip(&choices)
        .map(|(letter, choice)| format!("{letter}. {choice}\n"))
        .collect();
    Ok(Question::Choices {
        context: format!("{}\n{listed}Answer:", fields.text("question")?.trim()),
        choices: LETTERS.map(str::to_owned).to_vec(),
        gold,
        lengths: false,
    })
}

fn choice(fields: &Fields<'_>) -> Result<Question, TaskError> {
    let choices = fields.choices("choices")?;
    Ok(Question::Choices {
        context: fields.text("query")?.to_owned(),
        gold: fields.index("gold", 0, choices.len())?,
        choices,
        lengths: true,
    })
}

fn cloze(fields: &Fields<'_>) -> Result<Question, TaskError> {
    Ok(Question::Cloze {
        context: fields.text("context")?.to_owned(),
        continuation: fields.choice("continuation")?,
    })
}

fn lambada(fields: &Fields<'_>) -> Result<Question, TaskError> {
    let text = fields.text("text")?;
    match text.rsplit_once(' ') {
        Some((context, continuation)) if !continuation.is_empty() => Ok(Question::Cloze {
            context: context.to_owned(),
            continuation: continuation.to_owned(),
        }),
        _ => Err(fields.wrong("`text` does not end in a word after a space".to_owned())),
    }
}

/// The fields of a line, with errors that name it.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a> {
    /// The fields.
    pub values: &'a Map<String, Value>,
    /// The file.
    pub path: &'a Path,
    /// The line, from 1.
    pub line: usize,
}

impl<'a> Fields<'a> {
    /// An error at this line.
    pub fn wrong(&self, problem: String) -> TaskError {
        TaskError::Line {
            path: self.path.to_owned(),
            line: self.line,
            problem,
        }
    }

    fn not(&self, field: &str, expected: &str) -> TaskError {
        match self.values.get(field) {
            None => self.wrong(format!("the field `{field}` is missing")),
            Some(value) => {
                let shown: String = value.to_string().chars().take(60).collect();
                self.wrong(format!("`{field}` should be {expected}, it is {shown}"))
            }
        }
    }

    /// A string.
    pub fn text(&self, field: &str) -> Result<&'a str, TaskError> {
        let value = self.values.get(field).and_then(Value::as_str);
        value.ok_or_else(|| self.not(field, "a string"))
    }

    /// A string, if the field is there.
    pub fn optional_text(&self, field: &str) -> Result<Option<&'a str>, TaskError> {
        match self.values.contains_key(field) {
            true => self.text(field).map(Some),
            false => Ok(None),
        }
    }

    /// A string that can be scored: not empty.
    pub fn choice(&self, field: &str) -> Result<String, TaskError> {
        match self.text(field)? {
            "" => Err(self.wrong(format!("`{field}` is empty: nothing can be scored"))),
            text => Ok(text.to_owned()),
        }
    }

    /// Strings.
    pub fn texts(&self, field: &str) -> Result<Vec<String>, TaskError> {
        let list = self.values.get(field).and_then(Value::as_array);
        let texts = list.and_then(|list| {
            list.iter()
                .map(|value| value.as_str().map(str::to_owned))
                .collect()
        });
        texts.ok_or_else(|| self.not(field, "a list of strings"))
    }

    /// At least one string, and none empty.
    pub fn choices(&self, field: &str) -> Result<Vec<String>, TaskError> {
        let choices = self.texts(field)?;
        match choices.iter().position(String::is_empty) {
            _ if choices.is_empty() => Err(self.wrong(format!("`{field}` is empty"))),
            Some(at) => Err(self.wrong(format!(
                "`{field}` has an empty string at {at}: nothing can be scored"
            ))),
            None => Ok(choices),
        }
    }

    /// Fields inside a field.
    fn object(&self, field: &str) -> Result<Fields<'a>, TaskError> {
        let values = self.values.get(field).and_then(Value::as_object);
        let values = values.ok_or_else(|| self.not(field, "an object"))?;
        Ok(Fields { values, ..*self })
    }

    /// One of `count` things that the file counts from `first`; the answer counts from 0.
    pub fn index(&self, field: &str, first: usize, count: usize) -> Result<usize, TaskError> {
        let value = self.values.get(field);
        let number = value.and_then(|value| match value.as_str() {
            Some(text) => text.parse().ok(),
            None => value.as_u64(),
        });
        let index = number.and_then(|number| usize::try_from(number).ok()?.checked_sub(first));
        index.filter(|&index| index < count).ok_or_else(|| {
            self.not(
                field,
                &format!("a number from {first} to {}", first + count - 1),
            )
        })
    }
}
