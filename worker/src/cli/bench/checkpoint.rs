//! `supra-worker bench checkpoint`: what a checkpoint costs on this machine.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use supra_worker::{
    bench::checkpoint::{CheckpointBench, Files, Measured},
    kernels::{self, Choice},
    model::{AttentionKind, ModelConfig, SupraConfig},
};
use tch::Kind;

use super::{Shape, failed};
use crate::cli::{
    failure::Failure,
    options::{DeviceOptions, Dtype},
    out,
};

/// Times what a checkpoint costs one of some ranks: for how long training stands still (its part of the state is copied to host
/// memory), and how fast that is written and read, beside plain writes and reads of as many bytes. Needs host memory for the copy.
#[derive(Debug, Args)]
pub struct Checkpoint {
    /// Shape of the model
    #[arg(long, value_enum, default_value_t = Shape::Mistral7b)]
    shape: Shape,
    /// Model directory whose shape to take in its place
    #[arg(long, value_name = "DIR", conflicts_with = "shape")]
    model: Option<PathBuf>,
    /// Ranks that write together: the part of one of them is copied, written and read; with 1, all of the state
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    ranks: u32,
    /// Empty or new directory to write to, on the storage in question; what is written is removed. Several are measured one after
    /// the other; without any, only the copy is
    #[arg(long = "directory", value_name = "DIR")]
    directories: Vec<PathBuf>,
    /// Number format that the model computes in; masters are fp32 either way
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceOptions,
}

/// The JSON answer.
#[derive(Serialize)]
struct Answer {
    device: String,
    parameters: i64,
    /// Of its part of the state, as it is copied to host memory.
    state_bytes: u64,
    /// Getting that memory, once.
    room_seconds: f64,
    /// Medians, like all below.
    stall_seconds: f64,
    copy_seconds: f64,
    /// In each directory.
    files: Vec<FilesAnswer>,
}

#[derive(Serialize)]
struct FilesAnswer {
    directory: PathBuf,
    bytes: u64,
    write_seconds: f64,
    raw_write_seconds: f64,
    read_seconds: f64,
    raw_read_seconds: f64,
}

impl Checkpoint {
    /// Measures and prints.
    pub fn execute(self) -> Result<(), Failure> {
        let place = self.device.open()?;
        let config = match &self.model {
            Some(model) => ModelConfig::load(model)?,
            None => ModelConfig::named(self.shape.into()),
        };
        let bench = CheckpointBench {
            config: config.with_attention(AttentionKind::Supra(SupraConfig::default())),
            precision: self.dtype.into(),
            moments: Kind::Float,
            ranks: self.ranks,
            directories: self.directories,
        };
        let choice = kernels::on(place.device, bench.precision, &bench.config);
        let Choice { kernels, note } = choice.map_err(|error| failed(&error))?;
        if let Some(note) = note {
            out::complain(&format!("warning: {note}"));
        }
        let measured = bench.run(&place, kernels.as_ref());
        let measured = measured.map_err(|error| failed(&error))?;
        let answer = Answer::new(place.model, &measured);
        if self.json {
            return out::json(&answer);
        }
        out::line(&answer.text())
    }
}

impl Answer {
    fn new(device: String, measured: &Measured) -> Answer {
        Answer {
            device,
            parameters: measured.parameters,
            state_bytes: measured.state_bytes,
            room_seconds: measured.room,
            stall_seconds: measured.stall,
            copy_seconds: measured.copy,
            files: measured.files.iter().map(FilesAnswer::new).collect(),
        }
    }

    fn text(&self) -> String {
        let mut text = format!(
            "{:.2} B parameters on {}: training stands still for {:.2} s, of which {:.1} GB to host memory take {:.2} s; \
             getting that memory took {:.1} s, once",
            self.parameters as f64 / 1e9,
            self.device,
            self.stall_seconds,
            self.state_bytes as f64 / 1e9,
            self.copy_seconds,
            self.room_seconds,
        );
        for files in &self.files {
            text.push('\n');
            text.push_str(&files.text());
        }
        text
    }
}

impl FilesAnswer {
    fn new(files: &Files) -> FilesAnswer {
        FilesAnswer {
            directory: files.directory.clone(),
            bytes: files.bytes,
            write_seconds: files.write,
            raw_write_seconds: files.raw_write,
            read_seconds: files.read,
            raw_read_seconds: files.raw_read,
        }
    }

    fn text(&self) -> String {
        let rate = |seconds: f64| self.bytes as f64 / seconds / 1e9;
        format!(
            "{}: {:.1} GB written at {:.2} GB/s (plain files {:.2}), read at {:.2} GB/s (plain files {:.2})",
            self.directory.display(),
            self.bytes as f64 / 1e9,
            rate(self.write_seconds),
            rate(self.raw_write_seconds),
            rate(self.read_seconds),
            rate(self.raw_read_seconds),
        )
    }
}
