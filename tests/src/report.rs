//! What a campaign leaves behind: `docs/benchmarks/YYYY-MM-DD-NAME.{json,md}`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::failure::{Failure, Result};
use crate::programs::repository;

/// One line of a report's table: columns in order, with numbers or short texts. All rows of a report
/// have the same columns.
#[derive(Clone, Debug, Default)]
pub struct Row(Vec<(&'static str, Value)>);

impl Row {
    /// A row without columns.
    pub fn new() -> Self {
        Self::default()
    }

    /// The row with one more column.
    pub fn with(mut self, column: &'static str, value: impl Into<Value>) -> Self {
        self.0.push((column, value.into()));
        self
    }

    fn to_json(&self) -> Value {
        self.0
            .iter()
            .map(|(column, value)| ((*column).to_owned(), value.clone()))
            .collect()
    }
}

/// A number with so many digits behind the point as a reader needs.
pub fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}

/// A campaign under way.
pub struct Report {
    name: String,
    command: String,
    commit: String,
    dirty: bool,
    started: Timestamp,
    clock: Instant,
}

impl Report {
    /// Starts the clock. `command` repeats the campaign.
    ///
    /// # Errors
    /// When git does not say which commit this is: asked now, not after an hour.
    pub fn begin(name: &str, command: &str) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            command: command.to_owned(),
            commit: git(&["rev-parse", "HEAD"])?,
            dirty: !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty(),
            started: Timestamp::now(),
            clock: Instant::now(),
        })
    }

    /// Where and how it ran, and what came out.
    pub fn to_json(&self, rows: &[Row]) -> Value {
        json!({
            "name": self.name,
            "commit": self.commit,
            "dirty": self.dirty,
            "command": self.command,
            "machine": machine(),
            "started": self.started.to_string(),
            "seconds": rounded(self.clock.elapsed().as_secs_f64(), 1),
            "rows": rows.iter().map(Row::to_json).collect::<Vec<_>>(),
        })
    }

    /// Writes both files and returns the path of the Markdown one. `about` says in a paragraph what
    /// the rows show.
    pub fn write(&self, about: &str, rows: &[Row], directory: &Path) -> Result<std::path::PathBuf> {
        fs::create_dir_all(directory)?;
        let stem = self.stem();
        let json = self.to_json(rows);
        fs::write(
            directory.join(format!("{stem}.json")),
            format!("{json:#}\n"),
        )?;
        let path = directory.join(format!("{stem}.md"));
        fs::write(&path, markdown(&json, about, rows))?;
        Ok(path)
    }

    /// `YYYY-MM-DD-NAME`.
    pub fn stem(&self) -> String {
        format!("{}-{}", self.started.strftime("%Y-%m-%d"), self.name)
    }
}

fn markdown(json: &Value, about: &str, rows: &[Row]) -> String {
    let text = |key: &str| cell(&json[key]);
    let mut page = format!("# {}\n\n{about}\n\n", text("name"));
    let dirty = if json["dirty"] == true {
        ", with uncommitted changes"
    } else {
        ""
    };
    let _ = write!(
        page,
        "`{}`, commit {}{dirty}, {}; started {}, took {} s.\n\n",
        text("command"),
        text("commit"),
        text("machine"),
        text("started"),
        text("seconds"),
    );
    page.push_str(&table(rows));
    page
}

/// The rows as a Markdown table.
pub fn table(rows: &[Row]) -> String {
    let Some(first) = rows.first() else {
        return String::new();
    };
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut table = line(
        first
            .0
            .iter()
            .map(|(column, _)| (*column).to_owned())
            .collect(),
    );
    table.push_str(&line(first.0.iter().map(|_| "---".to_owned()).collect()));
    for row in rows {
        table.push_str(&line(row.0.iter().map(|(_, value)| cell(value)).collect()));
    }
    table
}

fn cell(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn git(arguments: &[&str]) -> Result<String> {
    let output = Command::new("git")
        .args(arguments)
        .current_dir(repository())
        .output()?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::new(format!(
            "git {}: {error}",
            arguments.join(" ")
        )));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Processor, cores, memory and GPUs, in words.
fn machine() -> String {
    let field = |file: &str, key: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split(':').nth(1))
            .map(|value| value.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let model =
        field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown processor".to_owned());
    let memory = field("/proc/meminfo", "MemTotal")
        .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok())
        .map_or_else(String::new, |kib| format!(", {} GiB", kib / (1 << 20)));
    let gpus: String = fs::read_dir("/proc/driver/nvidia/gpus")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|gpu| field(&gpu.path().join("information").to_string_lossy(), "Model"))
        .map(|gpu| format!(", {gpu}"))
        .collect();
    format!("{cores} cores of {model}{memory}{gpus}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_per_row() {
        let rows = [
            Row::new().with("b", 1).with("a", "x"),
            Row::new().with("b", 2.5).with("a", "y"),
        ];
        assert_eq!(
            table(&rows),
            "| b | a |\n| --- | --- |\n| 1 | x |\n| 2.5 | y |\n"
        );
        assert_eq!(table(&[]), "");
    }
}
