//! `supra-worker eval`: loss on a dataset, tasks, and tables of their results.

use std::{
    fs::File,
    io::{BufWriter, IsTerminal, Write},
    path::{Path, PathBuf},
};

use clap::{ArgGroup, Args, ValueEnum};
use serde::Serialize;
use supra_checkpoint::fetch::ModelDirectory;
use supra_data::Reader;
use supra_worker::inference::{
    evaluate::{EvaluateOptions, Evaluation, evaluate},
    load::LoadedModel,
    report::{self, Results},
    scorer::{ScoreForm, Scorer, usual_slots},
    statistics::Estimate,
    tasks::{self, Format, Judged, Shots, Task, TaskFile, TaskOptions, TaskResult},
};

use super::{
    failure::Failure,
    options::{DeviceOptions, Dtype},
    out,
};

/// Measures a model directory: softmax (Hugging Face, open_lm, Meta), SUPRA, or a training checkpoint. With --data the loss on held-out
/// text, windows taken in the dataset's own order; with --task accuracies as lm-evaluation-harness counts them; with both, both. With
/// --report it renders earlier results.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("what").required(true).multiple(true).args(["data", "task", "report"])))]
pub struct Eval {
    /// Model directory, file of weights in one, checkpoint, or a checkpoint's URL (s3://, gs://)
    #[arg(long, value_name = "MODEL", required_unless_present = "report")]
    model: Option<String>,
    /// Dataset manifest (dataset.json, heldout.json), or its directory
    #[arg(long, value_name = "MANIFEST")]
    data: Option<PathBuf>,
    /// Task: a file with one JSON object per line; may be given several times. NAME is what results call it [default: the file's name]
    #[arg(long, value_name = "[NAME=]FILE")]
    task: Vec<TaskFile>,
    /// Print the paper's tables as Markdown, with the results in these files (what --json printed) as rows of their own
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["model", "data", "task"])]
    report: Vec<PathBuf>,
    /// Form of the model: all give the same numbers up to rounding
    #[arg(long, value_enum, default_value_t)]
    form: FormName,
    /// Tokens per window [default: those that the model was made for, at most 2048]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    sequence_length: Option<u64>,
    /// Windows to measure, from the first on [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    windows: Option<u64>,
    /// Windows, or sequences of a task, that are in memory at once [default: 4 windows, as many sequences as fit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// Let documents see the ones before them in the same window
    #[arg(long)]
    ignore_documents: bool,
    /// Format of the tasks: hellaswag, piqa, winogrande, arc, mmlu, choice, cloze, lambada, qasper or narrativeqa [default: by their fields]
    #[arg(long, value_name = "FORMAT", requires = "task")]
    format: Option<Format>,
    /// Solved examples before each question: the first ones of --shots-from, of the same subject where there are subjects
    #[arg(long, default_value_t = 0, value_name = "N", requires = "task")]
    shots: usize,
    /// Task file with the examples
    #[arg(long, value_name = "FILE", requires = "task")]
    shots_from: Option<PathBuf>,
    /// Items of each task, from the first on [default: all]
    #[arg(long, value_name = "N", requires = "task", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Most tokens of a task that the model reads at once: longer contexts lose their beginning [default: the model's positions]
    #[arg(long, value_name = "TOKENS", requires = "task", value_parser = clap::value_parser!(u32).range(2..))]
    context: Option<u32>,
    /// What stands between a question and its answer [default: a space]
    #[arg(long, value_name = "TEXT", requires = "task")]
    delimiter: Option<String>,
    /// Most tokens of an answer that the model writes itself
    #[arg(long, default_value_t = 256, value_name = "N", requires = "task", value_parser = clap::value_parser!(u32).range(1..))]
    answer_tokens: u32,
    /// Write what became of each item to a file, one JSON object per line
    #[arg(long, value_name = "FILE", requires = "task")]
    items: Option<PathBuf>,
    /// What reports call the model [default: as --model names it]
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Number format to compute in
    #[arg(long, value_enum, default_value_t)]
    dtype: Dtype,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceOptions,
}

/// Form of the model.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum FormName {
    /// By chunks, as in training
    #[default]
    Chunkwise,
    /// Every token with every earlier one: quadratic in the length
    Parallel,
    /// Token by token
    Recurrent,
}

impl From<FormName> for ScoreForm {
    fn from(name: FormName) -> ScoreForm {
        match name {
            FormName::Chunkwise => ScoreForm::Chunkwise,
            FormName::Parallel => ScoreForm::Parallel,
            FormName::Recurrent => ScoreForm::Recurrent,
        }
    }
}

/// A line of the file of items.
#[derive(Serialize)]
struct ItemLine<'a> {
    task: &'a str,
    #[serde(flatten)]
    judged: &'a Judged,
}

impl Eval {
    /// Measures and prints.
    pub fn execute(self) -> Result<(), Failure> {
        let Some(name) = self.model.as_deref() else {
            return self.render();
        };
        // Before the weights: what is wrong in a task's file is told at once.
        let tasks = self.tasks()?;
        let shots = self.shots()?;
        let mut items = self.items.as_deref().map(Items::create).transpose()?;

        let files = ModelDirectory::open(name)?;
        let place = self.device.open()?;
        let model = LoadedModel::open(files.path(), place.device, self.dtype.into())?;
        out::complain(&format!("{name}: {}", model.report));
        let sequence_length = self
            .sequence_length
            .unwrap_or_else(|| model.usual_sequence_length());
        let tokenizer = match tasks.is_empty() {
            true => None,
            false => Some(tasks::tokenizer(&model)?),
        };
        let mut results = Results {
            model: name.to_owned(),
            name: self.name.clone(),
            attention: model.attention().to_owned(),
            parameters: model.params.elements().cast_unsigned(),
            dtype: self.dtype.name().to_owned(),
            form: self.form.into(),
            data: self.data.as_ref().map(|data| data.display().to_string()),
            evaluation: None,
            tasks: Vec::new(),
        };
        let options = self.task_options(shots);
        let context = options.context.unwrap_or(sequence_length as usize);
        let slots = match self.batch {
            // Whole windows need no states.
            _ if tasks.is_empty() && results.form != ScoreForm::Recurrent => 1,
            Some(batch) => batch as usize,
            None => usual_slots(&model, context, place.free_memory),
        };
        let mut scorer = Scorer::new(model, results.form, slots)?;
        if let Some(data) = &self.data {
            results.evaluation = Some(self.heldout(&mut scorer, data, sequence_length)?);
        }
        for task in &tasks {
            let Some(tokenizer) = &tokenizer else { break };
            let progress = self.progress(&task.name);
            let (result, judged) = tasks::run(&mut scorer, tokenizer, task, &options, progress)?;
            if let Some(items) = &mut items {
                items.write(&task.name, &judged)?;
            }
            results.tasks.push(result);
        }
        if self.json {
            return out::json(&results);
        }
        show(&results)
    }

    fn render(&self) -> Result<(), Failure> {
        let mut results = Vec::new();
        for path in &self.report {
            results.extend(report::read(path)?);
        }
        out::write(&report::render(&results))
    }

    fn tasks(&self) -> Result<Vec<Task>, Failure> {
        let read = |file| Ok(Task::read(file, self.format)?);
        self.task.iter().map(read).collect()
    }

    fn shots(&self) -> Result<Option<Shots>, Failure> {
        match (self.shots, &self.shots_from) {
            (0, None) => Ok(None),
            (0, Some(_)) => Err(Failure::input(
                "--shots-from has examples, but --shots does not say how many to take".to_owned(),
            )),
            (count, None) => Err(Failure::input(format!(
                "--shots {count} takes examples: say with --shots-from which file they are from"
            ))),
            (count, Some(path)) => {
                // The name of the task itself: it may decide the format.
                let name = self
                    .task
                    .first()
                    .map_or_else(String::new, |task| task.name.clone());
                let file = TaskFile {
                    name,
                    path: path.clone(),
                };
                let from = Task::read(&file, self.format)?;
                Ok(Some(Shots { count, from }))
            }
        }
    }

    fn task_options(&self, shots: Option<Shots>) -> TaskOptions {
        let delimiter = self.delimiter.as_deref().unwrap_or(Format::DELIMITER);
        TaskOptions {
            limit: self.limit.map(|limit| limit as usize),
            shots,
            delimiter: delimiter.to_owned(),
            context: self.context.map(|context| context as usize),
            answer_tokens: self.answer_tokens as usize,
        }
    }

    fn heldout(
        &self,
        scorer: &mut Scorer,
        data: &Path,
        sequence_length: u64,
    ) -> Result<Evaluation, Failure> {
        let mut reader = Reader::open(data, sequence_length)?;
        let options = EvaluateOptions {
            windows: self.windows,
            batch: self.batch.unwrap_or(4) as usize,
            reset_at_document: !self.ignore_documents,
        };
        let mut progress = self.progress("windows");
        let progress = |done: u64, of: u64| progress(done as usize, of as usize);
        Ok(evaluate(scorer, &mut reader, options, progress)?)
    }

    /// Shows how far something is, to a person.
    fn progress(&self, what: &str) -> impl FnMut(usize, usize) + use<> {
        let show = std::io::stderr().is_terminal() && !self.json;
        let what = what.to_owned();
        move |done, of| {
            if show {
                let end = if done == of { "\n" } else { "" };
                let _ = write!(std::io::stderr(), "\r{what}: {done} of {of}{end}");
            }
        }
    }
}

/// The file of items.
struct Items {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Items {
    fn create(path: &Path) -> Result<Items, Failure> {
        let path = path.to_owned();
        match File::create(&path) {
            Ok(file) => Ok(Items {
                path,
                file: BufWriter::new(file),
            }),
            Err(error) => Err(Failure::input(format!(
                "cannot create {}: {error}",
                path.display()
            ))),
        }
    }

    fn write(&mut self, task: &str, judged: &[Judged]) -> Result<(), Failure> {
        let mut write = || {
            for judged in judged {
                serde_json::to_writer(&mut self.file, &ItemLine { task, judged })?;
                self.file.write_all(b"\n")?;
            }
            self.file.flush()
        };
        write().map_err(|error| {
            Failure::failed(format!("cannot write to {}: {error}", self.path.display()))
        })
    }
}

/// Prints results for a person.
fn show(results: &Results) -> Result<(), Failure> {
    let name = results.name.as_ref().unwrap_or(&results.model);
    if let Some(evaluation) = &results.evaluation {
        show_heldout(name, &results.attention, evaluation)?;
    }
    for task in &results.tasks {
        show_task(name, &results.attention, task)?;
    }
    Ok(())
}

fn show_heldout(name: &str, attention: &str, evaluation: &Evaluation) -> Result<(), Failure> {
    let error = |stderr: Option<f64>| stderr.map_or_else(String::new, |x| format!(" ± {x:.4}"));
    let bytes = evaluation.per_byte.map_or_else(String::new, |per_byte| {
        format!(", {:.4} bits per byte", per_byte.bits_per_byte)
    });
    out::line(&format!(
        "{name} ({attention}): loss {:.4}{}, perplexity {:.2}{bytes}, over {} tokens in {} windows of {}, {:.1} s",
        evaluation.loss,
        error(evaluation.loss_stderr),
        evaluation.perplexity,
        evaluation.targets,
        evaluation.windows,
        evaluation.sequence_length,
        evaluation.seconds
    ))?;
    out::line("  tokens seen          loss")?;
    for bin in &evaluation.positions {
        let range = match bin.first == bin.last {
            true => bin.first.to_string(),
            false => format!("{}-{}", bin.first, bin.last),
        };
        out::line(&format!(
            "{range:>13}  {:>12.4}{}, {} tokens",
            bin.loss,
            error(bin.loss_stderr),
            bin.targets
        ))?;
    }
    Ok(())
}

fn show_task(name: &str, attention: &str, task: &TaskResult) -> Result<(), Failure> {
    let figure = |(metric, value): (&String, &Estimate)| {
        let error = value
            .stderr
            .map_or_else(String::new, |stderr| format!(" ± {stderr:.4}"));
        format!("{metric} {:.4}{error}", value.value)
    };
    let figures: Vec<String> = task.metrics.iter().map(figure).collect();
    let cut = match task.cut {
        0 => String::new(),
        cut => format!(", {cut} cut to {} tokens", task.context),
    };
    out::line(&format!(
        "{name} ({attention}): {} ({}, {} items, shots: {}{cut}): {}, {:.1} s",
        task.task,
        task.format,
        task.items,
        task.shots,
        figures.join(", "),
        task.seconds
    ))
}
