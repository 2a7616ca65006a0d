//! Where the time of a training step goes, component by component, beside what the GPU's peaks would allow: one
//! micro-batch forward and backward, and a whole optimizer step.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::failure::{Failure, Result, While};
use crate::process;
use crate::programs::Programs;
use crate::report::{Row, rounded, table};

/// What the report says above its table.
pub const ABOUT: &str = "Mistral-7B-SUPRA (7.81 B parameters, bf16, gradients added in fp32) on one GPU, random weights, fresh \
    random tokens: `supra-worker bench step`. `pass` is forward and backward of one micro-batch of 4 x 2048 tokens, `step` a whole \
    optimizer step of 8 micro-batches of 2 x 2048 with clipping and AdamW. Each call is marked on the GPU's stream; `ms` are means of \
    two passes or steps. `roofline_ms` is the larger of its operations at 989 TFLOP/s and its bytes at the memory's full speed, \
    every operand read or written once. The last component is what no mark covers: small operations of libtorch and an idle GPU. The \
    row `all` is the median of unmarked passes (`share` is then the utilization of 989 TFLOP/s); `watts` and `mhz` are medians of what \
    nvidia-smi read every half second while the GPU drew more than half of `limit_watts`.";

const LIMIT: Duration = Duration::from_secs(300);

/// One call of the benchmark.
struct Part {
    name: &'static str,
    arguments: &'static [&'static str],
}

const PARTS: [Part; 2] = [
    Part {
        name: "pass",
        arguments: &["--batch", "4", "--policy", "save"],
    },
    Part {
        name: "step",
        arguments: &[
            "--batch",
            "2",
            "--policy",
            "lean",
            "--micro-batches",
            "8",
            "--passes",
            "3",
        ],
    },
];

/// Runs both parts; with two blocks only if `quick`.
///
/// # Errors
/// When there is no GPU, or it has not enough memory.
pub fn run(programs: &Programs, quick: bool) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for part in &PARTS {
        let mut command = programs.worker();
        command.args(["bench", "step", "--device", "cuda:0", "--json"]);
        command.args(part.arguments);
        if quick {
            command.args(["--layers", "2"]);
        }
        let power = Power::watch();
        let output = process::run(command, LIMIT)?.expect_code(0)?;
        let power = power.median();
        let answer: Value = serde_json::from_str(&output.stdout)
            .while_doing(format_args!("reading {:?}", output.stdout))?;
        let new = part.rows(&answer, power)?;
        print!("{}", table(&new));
        rows.extend(new);
    }
    Ok(rows)
}

impl Part {
    fn rows(&self, answer: &Value, power: Option<[f64; 3]>) -> Result<Vec<Row>> {
        let components = answer["components"]
            .as_array()
            .ok_or_else(|| Failure::new(format!("no `components` in {answer}")))?;
        let mut rows = Vec::new();
        for line in components {
            let name = line["component"].as_str().unwrap_or_default().to_owned();
            rows.push(
                self.row(&name, number(line, "milliseconds")?, number(line, "share")?)
                    .with(
                        "tflop_s",
                        rounded(number(line, "flops_per_second")? / 1e12, 0),
                    )
                    .with("tb_s", rounded(number(line, "bytes_per_second")? / 1e12, 2))
                    .with(
                        "roofline_ms",
                        line["roofline_milliseconds"]
                            .as_f64()
                            .map(|ms| rounded(ms, 1)),
                    )
                    .with("tok_s", Value::Null)
                    .with("peak_gb", Value::Null)
                    .with("watts", Value::Null)
                    .with("limit_watts", Value::Null)
                    .with("mhz", Value::Null),
            );
        }
        let utilization = number(answer, "model_flops_utilization")?;
        rows.push(
            self.row("all", number(answer, "milliseconds")?, utilization)
                .with("tflop_s", rounded(989.0 * utilization, 0))
                .with("tb_s", Value::Null)
                .with("roofline_ms", Value::Null)
                .with("tok_s", number(answer, "tokens_per_second")?.round())
                .with("peak_gb", rounded(number(answer, "peak_bytes")? / 1e9, 1))
                .with("watts", power.map(|[watts, ..]| watts.round()))
                .with("limit_watts", power.map(|[_, limit, _]| limit.round()))
                .with("mhz", power.map(|[.., mhz]| mhz)),
        );
        Ok(rows)
    }

    fn row(&self, component: &str, ms: f64, share: f64) -> Row {
        Row::new()
            .with("what", self.name)
            .with("component", component)
            .with("ms", rounded(ms, 1))
            .with("share", rounded(share, 3))
    }
}

/// nvidia-smi at work beside a benchmark.
struct Power(Option<Child>);

impl Power {
    /// Begins to read. A machine without nvidia-smi tells nothing.
    fn watch() -> Power {
        let mut command = Command::new("nvidia-smi");
        command.args([
            "--id=0",
            "--query-gpu=power.draw.instant,power.limit,clocks.sm",
            "--format=csv,noheader,nounits",
            "--loop-ms=500",
        ]);
        command.stdin(Stdio::null()).stderr(Stdio::null());
        Power(command.stdout(Stdio::piped()).spawn().ok())
    }

    /// Medians of watts, limit and megahertz while the GPU was at work.
    fn median(self) -> Option<[f64; 3]> {
        let mut child = self.0?;
        child.kill().ok()?;
        let output = child.wait_with_output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let samples = text.lines().filter_map(|line| {
            let mut numbers = line.split(", ").map(|number| number.trim().parse::<f64>());
            let sample = [
                numbers.next()?.ok()?,
                numbers.next()?.ok()?,
                numbers.next()?.ok()?,
            ];
            (sample[0] > sample[1] / 2.0).then_some(sample)
        });
        let samples: Vec<[f64; 3]> = samples.collect();
        let middle = |column: usize| {
            let mut numbers: Vec<f64> = samples.iter().map(|sample| sample[column]).collect();
            numbers.sort_by(f64::total_cmp);
            numbers.get(numbers.len() / 2).copied()
        };
        Some([middle(0)?, middle(1)?, middle(2)?])
    }
}

fn number(answer: &Value, key: &str) -> Result<f64> {
    answer[key]
        .as_f64()
        .ok_or_else(|| Failure::new(format!("no number `{key}` in {answer}")))
}
