//! Tables like those of the SUPRA paper: what others have published, and the results of our own evaluations below it.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{evaluate::Evaluation, scorer::ScoreForm, statistics::Estimate, tasks::TaskResult};

/// What one call of `supra-worker eval --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// The model, as it was named.
    pub model: String,
    /// What reports call it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `softmax` or `supra`.
    pub attention: String,
    /// Its parameters.
    #[serde(default)]
    pub parameters: u64,
    /// Number format of its weights.
    #[serde(default)]
    pub dtype: String,
    /// How it read.
    #[serde(default)]
    pub form: ScoreForm,
    /// Held-out data, where there was some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// The loss on it.
    #[serde(flatten)]
    pub evaluation: Option<Evaluation>,
    /// Tasks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<TaskResult>,
}

impl Results {
    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.model)
    }
}

/// Why there is no report.
#[derive(Debug, Error)]
pub enum ReportError {
    /// A file cannot be read.
    #[error("cannot read the results {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{path} does not hold what `supra-worker eval --json` prints: {source}", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A file holds nothing.
    #[error("{path} is empty: write what `supra-worker eval --json` prints into it", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Reads the results in a file: one or more answers of `eval --json`, one after the other.
pub fn read(path: &Path) -> Result<Vec<Results>, ReportError> {
    let bytes = fs::read(path).map_err(|source| ReportError::Read {
        path: path.to_owned(),
        source,
    })?;
    let results: Vec<Results> = serde_json::Deserializer::from_slice(&bytes)
        .into_iter()
        .collect::<Result<_, _>>()
        .map_err(|source| ReportError::Content {
            path: path.to_owned(),
            source,
        })?;
    if results.is_empty() {
        return Err(ReportError::Empty {
            path: path.to_owned(),
        });
    }
    Ok(results)
}

/// The published figures: `published.json`.
#[derive(Debug, Deserialize)]
struct Published {
    source: String,
    tables: Vec<Table>,
}

#[derive(Debug, Deserialize)]
struct Table {
    title: String,
    /// What is said of each model besides its figures.
    about: Vec<String>,
    /// Digits behind the point.
    digits: usize,
    /// Whether the mean of all figures has a column.
    average: bool,
    columns: Vec<Column>,
    rows: Vec<PublishedRow>,
}

/// What stands in a column.
#[derive(Debug, Deserialize)]
struct Column {
    task: String,
    title: String,
    metric: String,
    shots: usize,
    /// Most tokens that were read; none where it does not matter.
    context: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct PublishedRow {
    model: String,
    about: Vec<String>,
    /// In percent.
    values: Vec<Option<f64>>,
}

impl Column {
    fn holds(&self, task: &TaskResult) -> bool {
        let lengths = self.context.is_none_or(|context| context == task.context);
        task.task == self.task && lengths
    }

    /// The newest result of a model for this column.
    fn of<'a>(&self, runs: &[&'a Results]) -> Option<(&'a TaskResult, Estimate)> {
        let mut tasks = runs.iter().flat_map(|run| &run.tasks);
        let task = tasks.rfind(|task| self.holds(task))?;
        Some((task, *task.metrics.get(&self.metric)?))
    }
}

/// Renders all results as Markdown: the two tables of the paper, and what they do not have. Results of one name share a row.
pub fn render(results: &[Results]) -> String {
    let published: Published = serde_json::from_str(include_str!("published.json"))
        .expect("invariant: the published figures are valid");
    let mut names: Vec<&str> = Vec::new();
    for run in results {
        if !names.contains(&run.name()) {
            names.push(run.name());
        }
    }
    let models: Vec<(&str, Vec<&Results>)> = names
        .iter()
        .map(|&name| {
            (
                name,
                results.iter().filter(|run| run.name() == name).collect(),
            )
        })
        .collect();
    let mut page = format!(
        "Published rows: {}. Accuracies and F1 in percent; ± is the standard error. Rows of ours are bold.\n\n",
        published.source
    );
    for table in &published.tables {
        table.render(&mut page, &models);
    }
    others(&mut page, &published, results);
    heldout(&mut page, results);
    page
}

/// Where there is no figure.
const NOTHING: &str = "–";

fn row(page: &mut String, cells: &[String]) {
    let _ = writeln!(page, "| {} |", cells.join(" | "));
}

fn head(page: &mut String, titles: &[String]) {
    row(page, titles);
    row(page, &vec!["---".to_owned(); titles.len()]);
}

/// A share in percent, or a dash.
fn percent(value: Option<Estimate>, digits: usize) -> String {
    let Some(Estimate { value, stderr }) = value else {
        return NOTHING.to_owned();
    };
    let error = stderr.map_or_else(String::new, |stderr| {
        format!(" ± {:.digits$}", 100.0 * stderr)
    });
    format!("{:.digits$}{error}", 100.0 * value)
}

impl Table {
    fn render(&self, page: &mut String, models: &[(&str, Vec<&Results>)]) {
        let _ = writeln!(page, "## {}\n", self.title);
        let mut titles = vec!["Model".to_owned()];
        titles.extend_from_slice(&self.about);
        titles.extend(self.columns.iter().map(|column| column.title.clone()));
        titles.extend(self.average.then(|| "Average".to_owned()));
        head(page, &titles);
        for known in &self.rows {
            let mut cells = vec![known.model.clone()];
            cells.extend_from_slice(&known.about);
            let values: Vec<Option<Estimate>> = known.values.iter().map(published).collect();
            cells.extend(self.figures(&values));
            row(page, &cells);
        }
        let mut notes = Vec::new();
        for (name, runs) in models {
            let found: Vec<_> = self.columns.iter().map(|column| column.of(runs)).collect();
            if found.iter().all(Option::is_none) {
                continue;
            }
            let mut cells = vec![format!("**{name}**")];
            cells.extend(self.about.iter().map(|about| match about.as_str() {
                "Size" => size(runs),
                _ => NOTHING.to_owned(),
            }));
            let values: Vec<_> = found.iter().map(|found| Some(found.as_ref()?.1)).collect();
            cells.extend(self.figures(&values));
            row(page, &cells);
            notes.extend(remarks(name, &self.columns, &found));
        }
        for note in &notes {
            let _ = write!(page, "\n{note}");
        }
        page.push_str(if notes.is_empty() { "\n" } else { "\n\n" });
    }

    fn figures(&self, values: &[Option<Estimate>]) -> Vec<String> {
        let average = self.average.then(|| average(values));
        let all = values.iter().copied().chain(average);
        all.map(|value| percent(value, self.digits)).collect()
    }
}

/// A published figure: a share without an error.
fn published(percent: &Option<f64>) -> Option<Estimate> {
    percent.map(|percent| Estimate {
        value: percent / 100.0,
        stderr: None,
    })
}

/// What makes a figure another one than the published ones beside it.
fn remarks(
    name: &str,
    columns: &[Column],
    found: &[Option<(&TaskResult, Estimate)>],
) -> Vec<String> {
    let found = columns.iter().zip(found).filter_map(|(column, found)| {
        let (task, _) = found.as_ref()?;
        (task.shots != column.shots).then(|| {
            format!(
                "{name}, {}: {} examples before each question, the published rows had {}.",
                column.title, task.shots, column.shots
            )
        })
    });
    found.collect()
}

/// The mean of all columns, if a model has all.
fn average(values: &[Option<Estimate>]) -> Option<Estimate> {
    let all: Vec<Estimate> = values.iter().copied().collect::<Option<_>>()?;
    let n = all.len() as f64;
    let variances: Option<Vec<f64>> = all.iter().map(|one| Some(one.stderr?.powi(2))).collect();
    Some(Estimate {
        value: all.iter().map(|one| one.value).sum::<f64>() / n,
        stderr: variances.map(|variances| variances.iter().sum::<f64>().sqrt() / n),
    })
}

fn size(runs: &[&Results]) -> String {
    match runs.last().map_or(0, |run| run.parameters) {
        0 => NOTHING.to_owned(),
        count if count >= 100_000_000 => format!("{:.2}B", count as f64 / 1e9),
        count => format!("{:.1}M", count as f64 / 1e6),
    }
}

/// Tasks that the paper's tables lack.
fn others(page: &mut String, published: &Published, results: &[Results]) {
    let in_a_table = |task: &TaskResult| {
        let mut columns = published.tables.iter().flat_map(|table| &table.columns);
        columns.any(|column| column.holds(task))
    };
    let rows: Vec<(&Results, &TaskResult)> = results
        .iter()
        .flat_map(|run| run.tasks.iter().map(move |task| (run, task)))
        .filter(|(_, task)| !in_a_table(task))
        .collect();
    if rows.is_empty() {
        return;
    }
    page.push_str("## Other tasks\n\n");
    head(
        page,
        &["Model", "Task", "Shots", "Items", "Figures"].map(str::to_owned),
    );
    for (run, task) in rows {
        let figures: Vec<String> = task
            .metrics
            .iter()
            .map(|(metric, value)| match metric.as_str() {
                "perplexity" => format!("{metric} {}", plain(*value)),
                _ => format!("{metric} {}", percent(Some(*value), 1)),
            })
            .collect();
        row(
            page,
            &[
                format!("**{}**", run.name()),
                task.task.clone(),
                task.shots.to_string(),
                task.items.to_string(),
                figures.join(", "),
            ],
        );
    }
    page.push('\n');
}

fn plain(value: Estimate) -> String {
    let error = value
        .stderr
        .map_or_else(String::new, |stderr| format!(" ± {stderr:.2}"));
    format!("{:.2}{error}", value.value)
}

fn heldout(page: &mut String, results: &[Results]) {
    let rows: Vec<(&Results, &Evaluation)> = results
        .iter()
        .filter_map(|run| Some((run, run.evaluation.as_ref()?)))
        .collect();
    if rows.is_empty() {
        return;
    }
    page.push_str("## Held-out text\n\n");
    let titles = [
        "Model",
        "Attention",
        "Targets",
        "Loss",
        "Perplexity",
        "Bits per byte",
    ];
    head(page, &titles.map(str::to_owned));
    for (run, evaluation) in &rows {
        let error = |stderr: Option<f64>| stderr.map_or_else(String::new, |x| format!(" ± {x:.4}"));
        let bits = evaluation.per_byte.map(|per_byte| per_byte.bits_per_byte);
        row(
            page,
            &[
                format!("**{}**", run.name()),
                run.attention.clone(),
                evaluation.targets.to_string(),
                format!("{:.4}{}", evaluation.loss, error(evaluation.loss_stderr)),
                format!("{:.2}", evaluation.perplexity),
                bits.map_or_else(|| NOTHING.to_owned(), |bits| format!("{bits:.4}")),
            ],
        );
    }
    positions(page, &rows);
}

/// Loss by tokens seen, a column for each model.
fn positions(page: &mut String, rows: &[(&Results, &Evaluation)]) {
    page.push_str("\nLoss by tokens seen:\n\n");
    let longest = rows
        .iter()
        .max_by_key(|(_, evaluation)| evaluation.positions.len());
    let Some((_, longest)) = longest else { return };
    let mut titles = vec!["Tokens seen".to_owned()];
    titles.extend(rows.iter().map(|(run, _)| run.name().to_owned()));
    head(page, &titles);
    for bin in &longest.positions {
        let mut cells = vec![if bin.first == bin.last {
            bin.first.to_string()
        } else {
            format!("{}–{}", bin.first, bin.last)
        }];
        cells.extend(rows.iter().map(|(_, evaluation)| {
            let same = evaluation
                .positions
                .iter()
                .find(|other| other.first == bin.first);
            same.map_or_else(
                || NOTHING.to_owned(),
                |found| {
                    let error = found
                        .loss_stderr
                        .map_or_else(String::new, |x| format!(" ± {x:.3}"));
                    format!("{:.3}{error}", found.loss)
                },
            )
        }));
        row(page, &cells);
    }
    page.push('\n');
}
