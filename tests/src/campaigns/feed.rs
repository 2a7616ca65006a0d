//! How fast one thread reads training data, sample by sample in the order of a run: from token parquet with small and with
//! huge row groups, and from the packed store. A 7B model takes some 13 thousand tokens per second and GPU.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{Int32Array, ListArray, RecordBatch};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::failure::{Failure, Result, While};
use crate::fixture::write_tokenizer;
use crate::process;
use crate::programs::Programs;
use crate::report::{Row, rounded, table};

/// What the report says above its table.
pub const ABOUT: &str = "`supra data bench`: one thread calls `sample(i)` for the samples of a run in their order, windows of 2048 \
    tokens, over 1 Mi documents of 100 to 1100 tokens each, drawn by Zipf's law from 32,000. `parquet` is list<int32>, zstd, no \
    dictionary, in row groups of so many rows (documents); `packed` is what `supra data pack` makes of it. Round 1 begins with \
    nothing read: a row group is decoded as a whole and compared with its checksum when it is first met, and so is a chunk of the packed \
    store. Round 2 reads the same samples again. `digests` is BLAKE3 of the samples, which a worker takes of what it feeds, \
    without reading. `tokens_cpu_s` counts the thread's processor time, for other programs may take the core meanwhile, and is \
    what `target` is of: the campaign fails if round 2 is below it.";

const ROWS: usize = 1 << 20;
/// Rows of the small row groups.
const SMALL: usize = 1 << 13;
/// Of the quick form, which shows nothing but that it works.
const QUICK: (usize, usize) = (1 << 12, 1 << 9);
const VOCABULARY: usize = 32_000;
const SEQUENCE_LENGTH: u64 = 2048;
/// 64 pools of the plan.
const SAMPLES: u64 = 1 << 16;
const LIMIT: Duration = Duration::from_secs(1800);

/// Tokens per second that one core has to read.
const PARQUET_TARGET: f64 = 10e6;
const PACKED_TARGET: f64 = 1e9;

/// Writes the data and times every way of reading it.
///
/// # Errors
/// When a program fails, or, unless `quick`, a target is missed.
pub fn run(programs: &Programs, directory: &Path, quick: bool) -> Result<Vec<Row>> {
    let (rows, small) = if quick { QUICK } else { (ROWS, SMALL) };
    write_tokenizer(directory, VOCABULARY)?;
    let mut study = Study {
        programs,
        directory,
        quick,
        report: Vec::new(),
    };
    let packed = directory.join("packed");
    for row_group in [small, rows] {
        let data = directory.join("tokens");
        fs::create_dir(&data)?;
        write_tokens(&data.join("part-00000.parquet"), rows, row_group)?;
        let mut index = programs.supra();
        index
            .args(["data", "index", "--append-eot", "always"])
            .arg(&data);
        index
            .arg("--tokenizer")
            .arg(directory.join("tokenizer.json"));
        process::run(index, LIMIT)?.expect_code(0)?;
        study.read("parquet", &data, row_group, PARQUET_TARGET)?;
        if row_group == small {
            let mut pack = programs.supra();
            pack.args(["data", "pack"])
                .arg(&data)
                .arg("--output")
                .arg(&packed);
            process::run(pack, LIMIT)?.expect_code(0)?;
        }
        // Gigabytes: one at a time.
        fs::remove_dir_all(&data)?;
    }
    study.read("packed", &packed, 0, PACKED_TARGET)?;
    Ok(study.report)
}

/// Documents as a file of token parquet, `row_group` to a row group.
fn write_tokens(path: &Path, rows: usize, row_group: usize) -> Result<()> {
    let item = Arc::new(Field::new("element", DataType::Int32, false));
    let list = DataType::List(Arc::clone(&item));
    let schema = Arc::new(Schema::new(vec![Field::new("input_ids", list, false)]));
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_dictionary_enabled(false)
        .set_max_row_group_row_count(Some(row_group))
        .build();
    let file = File::create(path)?;
    let mut writer = ArrowWriter::try_new(file, Arc::clone(&schema), Some(properties))?;
    let mut random = ChaCha8Rng::seed_from_u64(3);
    for _ in (0..rows).step_by(QUICK.1) {
        let lengths: Vec<usize> = (0..QUICK.1)
            .map(|_| random.random_range(100..1100))
            .collect();
        let tokens: Int32Array = (0..lengths.iter().sum())
            .map(|_| zipf(&mut random))
            .collect();
        let offsets = OffsetBuffer::from_lengths(lengths);
        let lists = ListArray::try_new(Arc::clone(&item), offsets, Arc::new(tokens), None)?;
        writer.write(&RecordBatch::try_new(
            Arc::clone(&schema),
            vec![Arc::new(lists)],
        )?)?;
    }
    writer.close()?;
    Ok(())
}

/// A token that is no special one; the nth most frequent is n times as rare as the first.
fn zipf(random: &mut ChaCha8Rng) -> i32 {
    let words = (VOCABULARY - 3) as f64;
    let rank = words.powf(random.random_range(0.0..1.0)) as i32;
    2 + rank.clamp(1, VOCABULARY as i32 - 3)
}

struct Study<'a> {
    programs: &'a Programs,
    directory: &'a Path,
    quick: bool,
    report: Vec<Row>,
}

impl Study<'_> {
    /// Times reading of the dataset at `data`.
    fn read(&mut self, source: &str, data: &Path, row_group: usize, target: f64) -> Result<()> {
        let mut bench = self.programs.supra();
        bench.args(["data", "bench", "--json", "--recipe"]);
        bench.arg(self.recipe(data)?);
        let output = process::run(bench, LIMIT)?.expect_code(0)?;
        let answer: Value = serde_json::from_str(&output.stdout)?;
        let rounds = answer["reading"].as_array().cloned().unwrap_or_default();
        for (number, round) in (1..).zip(&rounds) {
            let name = format!("{source}, round {number}");
            let rate = self.add(&name, row_group, round, Some(target))?;
            if number == rounds.len() && !self.quick && rate < target {
                return Err(Failure::new(format!(
                    "{name}, row groups of {row_group} rows: {rate} tokens per CPU second, {target} are wanted"
                )));
            }
        }
        if source == "packed" {
            self.add("digests", 0, &answer["digests"], None)?;
        }
        Ok(())
    }

    /// A line of the report; returns tokens per CPU second.
    fn add(
        &mut self,
        source: &str,
        row_group: usize,
        round: &Value,
        target: Option<f64>,
    ) -> Result<f64> {
        let number = |key: &str| {
            let found = round[key].as_f64();
            found.ok_or_else(|| Failure::new(format!("no number `{key}` in {round}")))
        };
        let rate = number("tokens_per_cpu_second")?;
        let row = Row::new()
            .with("source", source)
            .with("row_group", row_group)
            .with("tokens_s", number("tokens_per_second")?.round())
            .with("tokens_cpu_s", rate.round())
            .with("cpu_s", rounded(number("cpu_seconds")?, 3))
            .with("target", target);
        print!("{}", table(std::slice::from_ref(&row)));
        self.report.push(row);
        Ok(rate)
    }

    /// A recipe that trains on `data` once, or on the first samples of it.
    fn recipe(&self, data: &Path) -> Result<PathBuf> {
        let path = self.directory.join("feed.yaml");
        let samples = if self.quick { SAMPLES >> 4 } else { SAMPLES };
        let text = format!(
            "name: feed\n\
             base: {{ path: {} }}\n\
             data: {{ train: {}, repeat: true }}\n\
             budget: {{ tokens: {} }}\n\
             batch: {{ tokens: {}, micro_batch: 4, sequence_length: {SEQUENCE_LENGTH} }}\n\
             optimizer: {{ warmup: 1 steps }}\n",
            self.directory.display(),
            data.display(),
            samples * SEQUENCE_LENGTH,
            64 * SEQUENCE_LENGTH,
        );
        fs::write(&path, text).while_doing("writing the recipe")?;
        Ok(path)
    }
}
