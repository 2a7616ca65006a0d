//! Reading tasks from files of one JSON object per line.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde_json::{Map, Value};

use super::{
    TaskError,
    format::{Fields, Format},
    item::{Item, Question},
    qa,
};

/// Where a task is, and what it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskFile {
    /// Its name in results and reports.
    pub name: String,
    /// The file.
    pub path: PathBuf,
}

/// `NAME=FILE`, or `FILE`, whose name without its ending is the task's.
impl FromStr for TaskFile {
    type Err = String;

    fn from_str(text: &str) -> Result<TaskFile, String> {
        let (name, path) = match text.split_once('=') {
            Some((name, path)) if !name.contains('/') => (Some(name.to_owned()), path),
            _ => (None, text),
        };
        let path = PathBuf::from(path);
        let stem = || Some(path.file_stem()?.to_string_lossy().into_owned());
        match name.or_else(stem) {
            Some(name) if !name.is_empty() => Ok(TaskFile { name, path }),
            _ => Err("a file, or NAME=FILE".to_owned()),
        }
    }
}

/// A task that was read.
#[derive(Clone, Debug)]
pub struct Task {
    /// Its name.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Its items, in the order of the file.
    pub items: Vec<Item>,
}

impl Task {
    /// Reads a task, in the format that its first line is in unless one is given.
    pub fn read(file: &TaskFile, format: Option<Format>) -> Result<Task, TaskError> {
        let TaskFile { name, path } = file;
        let bytes = fs::read(path).map_err(|source| TaskError::Read {
            path: path.clone(),
            source,
        })?;
        let mut format = format;
        let mut items: Vec<Item> = Vec::new();
        let mut of_id: HashMap<String, usize> = HashMap::new();
        for (line, text) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
            if text.trim_ascii().is_empty() {
                continue;
            }
            let values = object(path, line, text)?;
            let fields = Fields {
                values: &values,
                path,
                line,
            };
            let format = match format {
                Some(format) => format,
                None => *format.insert(detected(&fields, name)?),
            };
            let item = format.read(&fields)?;
            match scrolls_id(&fields, format).map(|id| (of_id.get(&id).copied(), id)) {
                // Another right answer to a question that was read.
                Some((Some(known), _)) => merge(&mut items[known], item, format),
                Some((None, id)) => {
                    of_id.insert(id, items.len());
                    items.push(item);
                }
                None => items.push(item),
            }
        }
        match format {
            Some(format) if !items.is_empty() => Ok(Task {
                name: name.clone(),
                path: path.clone(),
                format,
                items,
            }),
            _ => Err(TaskError::File {
                path: path.clone(),
                problem: "there is no item in it: a task has one JSON object per line".to_owned(),
            }),
        }
    }
}

fn object(path: &Path, line: usize, text: &[u8]) -> Result<Map<String, Value>, TaskError> {
    serde_json::from_slice(text).map_err(|error| TaskError::Line {
        path: path.to_owned(),
        line,
        problem: format!(
            "not a JSON object, at its column {}: {}",
            error.column(),
            // The library counts lines of the piece that it sees, which is one.
            error
                .to_string()
                .split(" at line ")
                .next()
                .unwrap_or_default()
        ),
    })
}

fn detected(fields: &Fields<'_>, task: &str) -> Result<Format, TaskError> {
    Format::detect(fields.values, task).ok_or_else(|| {
        let seen: Vec<&str> = fields.values.keys().map(String::as_str).collect();
        fields.wrong(format!(
            "no known format has the fields {}. Known are {}. Rename the fields, or say --format",
            seen.join(", "),
            Format::known()
        ))
    })
}

/// SCROLLS gives each right answer a line of its own.
fn scrolls_id(fields: &Fields<'_>, format: Format) -> Option<String> {
    let id = fields.values.get("id")?.as_str()?;
    let answered = fields.values.get("output")?.is_string();
    let answers = matches!(format, Format::Qasper | Format::NarrativeQa);
    (answers && answered).then(|| id.to_owned())
}

fn merge(known: &mut Item, more: Item, format: Format) {
    if let (
        Question::Answer {
            answers, yes_no, ..
        },
        Question::Answer { answers: more, .. },
    ) = (&mut known.question, more.question)
    {
        answers.extend(more);
        *yes_no = format == Format::Qasper && qa::are_yes_or_no(answers);
    }
}
