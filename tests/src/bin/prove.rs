//! `scripts/prove NAME`: runs a campaign large and writes what it showed to `docs/benchmarks`.
#![forbid(unsafe_code)]

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use supra_tests::campaigns::big::{self, Big};
use supra_tests::campaigns::chaos::{self, Chaos};
use supra_tests::campaigns::checkpoint_kills::{self, CheckpointKills};
use supra_tests::campaigns::corruption::{self, Corruption};
use supra_tests::campaigns::curves::{self, Curves};
use supra_tests::campaigns::inference::{self, Inference};
use supra_tests::campaigns::kills::{self, Kills};
use supra_tests::campaigns::models::{self, Models};
use supra_tests::campaigns::precision::{self, Precision};
use supra_tests::campaigns::recovery::{self, Recovery};
use supra_tests::campaigns::serve::{self, Serve};
use supra_tests::campaigns::simulation::{self, Simulation};
use supra_tests::campaigns::uptrain::{self, Uptrain};
use supra_tests::campaigns::{checkpoint, components, feed, scale, step, worlds};
use supra_tests::failure::Result;
use supra_tests::models::quickstart;
use supra_tests::programs::repository;
use supra_tests::report::{Report, table};
use supra_tests::{Device, Programs};

/// Runs a proof campaign with the programs of this build.
#[derive(Parser)]
struct Arguments {
    /// Which campaign.
    #[arg(value_enum)]
    campaign: Campaign,
    /// Run it small and write nothing.
    #[arg(long)]
    quick: bool,
    /// Where big, checkpoint, uptrain, models, precision [default: cuda; with --quick cpu] and recovery [default: cpu] train, and
    /// serve [default: cpu] computes.
    #[arg(long, value_enum)]
    device: Option<Device>,
    /// Folder with text (parquet, column `content`) that uptrain and models take in place of the quickstart's.
    #[arg(long, value_name = "DIR")]
    text: Option<PathBuf>,
    /// Folder with arc_easy.jsonl and lambada_openai.jsonl that models takes in place of tests/evals.
    #[arg(long, value_name = "DIR")]
    evals: Option<PathBuf>,
    /// Model directory that serve serves in place of the quickstart's.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Repeat only the case of this seed (simulation, chaos, checkpoint-kills), or damage by it (corruption), and write nothing.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How many schedules of chaos, or runs of checkpoint-kills, there are side by side [default: one for every two cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
}

impl Arguments {
    fn device(&self) -> Device {
        let usual = if self.quick {
            Device::Cpu
        } else {
            Device::Cuda
        };
        self.device.unwrap_or(usual)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Campaign {
    /// 200 runs while processes die and stand still, connections break, disks fill up, workers come and go.
    Chaos,
    /// What a checkpoint of a 7B model costs: standing still, writing, reading; needs an NVIDIA GPU of 141 GB and as much host memory.
    Checkpoint,
    /// kill -9 of workers, coordinator and everything, 50 times.
    Kills,
    /// Bit flips, cuts and swaps at random places of every kind of file that has to be right, 18,000 of them.
    Corruption,
    /// kill -9 while a checkpoint is written, 500 times, and storage that refuses, is full or hangs; needs a C++ compiler.
    CheckpointKills,
    /// Loss of the uptrained quickstart model, of one from random weights, and of the softmax base.
    Curves,
    /// Tokens per second that one thread reads in the order of a run, from parquet and from the packed store.
    Feed,
    /// One coordinator with 10 to 10,000 simulated workers: latency, memory, and how fast a death is told.
    Scale,
    /// World sizes 1, 2 and 4 give the same losses.
    Worlds,
    /// Speed of the training step of a 7B model beside PyTorch's; needs an NVIDIA GPU and the peer's Python packages.
    Step,
    /// Speed of the training step alone, at other shapes of 7B models; needs an NVIDIA GPU of 141 GB.
    Shapes,
    /// Speed of a token step of a 7B model beside PyTorch's; needs an NVIDIA GPU of 141 GB and PyTorch.
    Decode,
    /// How fast a 7B model reads prompts; needs an NVIDIA GPU of 80 GB.
    Prefill,
    /// Time and memory of the next token behind up to 131,072 others, beside softmax attention; needs an NVIDIA GPU of 80 GB.
    Flat,
    /// Where the time of the step of a 7B model goes; needs an NVIDIA GPU of 141 GB.
    Components,
    /// 20 real steps of a model with 7.81 B parameters; needs an NVIDIA GPU of 141 GB and room for a checkpoint of 94 GB below TMPDIR.
    Big,
    /// A model of 30 M parameters is pretrained and uptrained, by one rank and by two; needs an NVIDIA GPU.
    Uptrain,
    /// What a softmax model of 29 M parameters, its uptrained form, and a linear one from random weights can do; needs an NVIDIA GPU.
    Models,
    /// The coordinator's and the workers' state machines in simulated time, with everything going wrong.
    Simulation,
    /// bf16 on a GPU learns like fp32 on the processor; needs an NVIDIA GPU.
    Precision,
    /// The server under load, and under 10,000 requests that no client should send; needs the load generator hey.
    Serve,
    /// How long it takes from kill -9 of a worker to training again; with --device cuda between ranks of NCCL.
    Recovery,
}

impl Campaign {
    /// Name of what it writes.
    fn page<'a>(&self, name: &'a str, device: Option<Device>) -> &'a str {
        match (self, device) {
            (Campaign::Scale, _) => "coordinator-scale",
            (Campaign::Recovery, Some(Device::Cuda)) => "nccl-recovery",
            _ => name,
        }
    }
}

fn main() -> ExitCode {
    match prove(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn prove(arguments: &Arguments) -> Result<()> {
    if let (Campaign::Simulation, Some(seed)) = (arguments.campaign, arguments.seed) {
        return simulation::replay(seed, |line| println!("{line}"));
    }
    let programs = Programs::find()?;
    let scratch = tempfile::tempdir()?;
    let name = arguments
        .campaign
        .to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_owned());
    let said: Vec<String> = env::args().skip(1).collect();
    let report = Report::begin(
        arguments.campaign.page(&name, arguments.device),
        &format!("scripts/prove {}", said.join(" ")),
    )?;
    let benchmarks = repository().join("docs/benchmarks");
    let plot = if arguments.quick {
        scratch.path()
    } else {
        &benchmarks
    };
    let plot = plot.join(format!("{}.svg", report.stem()));
    let (about, rows) = match arguments.campaign {
        Campaign::Kills => (
            kills::ABOUT,
            kills(arguments.quick).run(&programs, scratch.path())?,
        ),
        Campaign::Chaos => {
            let mut chaos = Chaos::schedules(if arguments.quick { 6 } else { 200 });
            chaos.seeds = arguments.seed.map_or(chaos.seeds, |seed| vec![seed]);
            chaos.jobs = arguments.jobs.map_or(chaos.jobs, usize::from);
            (chaos::ABOUT, chaos.run(&programs, scratch.path())?)
        }
        Campaign::Corruption => {
            let corruption = Corruption {
                cases: if arguments.quick { 40 } else { 1200 },
                seed: arguments.seed.unwrap_or(1),
            };
            (
                corruption::ABOUT,
                corruption.run(&programs, scratch.path())?,
            )
        }
        Campaign::CheckpointKills => {
            let mut campaign = match (arguments.seed, arguments.quick) {
                (Some(seed), _) => CheckpointKills::of_seed(seed),
                (None, true) => CheckpointKills::small(),
                (None, false) => CheckpointKills::whole(500),
            };
            campaign.jobs = arguments.jobs.map_or(campaign.jobs, usize::from);
            (
                checkpoint_kills::ABOUT,
                campaign.run(&programs, scratch.path())?,
            )
        }
        Campaign::Worlds => {
            let steps = if arguments.quick { 20 } else { 200 };
            (
                worlds::ABOUT,
                worlds::run(&programs, scratch.path(), steps)?,
            )
        }
        Campaign::Feed => (
            feed::ABOUT,
            feed::run(&programs, scratch.path(), arguments.quick)?,
        ),
        Campaign::Scale => (
            scale::ABOUT,
            scale::run(&programs, scratch.path(), arguments.quick)?,
        ),
        Campaign::Step => (
            step::ABOUT,
            step::run(&programs, scratch.path(), arguments.quick, |rows| {
                report.write(step::ABOUT, rows, &benchmarks).map(drop)
            })?,
        ),
        Campaign::Shapes => (
            step::ABOUT_SHAPES,
            step::shapes(&programs, arguments.quick, |rows| {
                report
                    .write(step::ABOUT_SHAPES, rows, &benchmarks)
                    .map(drop)
            })?,
        ),
        Campaign::Checkpoint => (
            checkpoint::ABOUT,
            checkpoint::run(
                &programs,
                scratch.path(),
                arguments.device(),
                arguments.quick,
            )?,
        ),
        Campaign::Decode => {
            let inference = Inference {
                quick: arguments.quick,
            };
            (inference::ABOUT_DECODE, inference.decode(&programs)?)
        }
        Campaign::Prefill => {
            let inference = Inference {
                quick: arguments.quick,
            };
            (inference::ABOUT_PREFILL, inference.prefill(&programs)?)
        }
        Campaign::Flat => {
            let inference = Inference {
                quick: arguments.quick,
            };
            (inference::ABOUT_FLAT, inference.flat(&programs, &plot)?)
        }
        Campaign::Components => (
            components::ABOUT,
            components::run(&programs, arguments.quick)?,
        ),
        Campaign::Big => {
            let big = Big {
                quick: arguments.quick,
                device: arguments.device(),
            };
            (big::ABOUT, big.run(&programs, scratch.path())?)
        }
        Campaign::Uptrain => {
            let uptrain = Uptrain {
                quick: arguments.quick,
                device: arguments.device(),
                text: arguments.text.clone().unwrap_or_else(|| quickstart("text")),
            };
            (uptrain::ABOUT, uptrain.run(&programs, scratch.path())?)
        }
        Campaign::Models => {
            let models = Models {
                quick: arguments.quick,
                device: arguments.device(),
                text: arguments.text.clone().unwrap_or_else(|| quickstart("text")),
                evals: arguments.evals.clone().unwrap_or_else(models::own_evals),
            };
            (models::ABOUT, models.run(&programs, scratch.path())?)
        }
        Campaign::Simulation => {
            let simulation = if arguments.quick {
                Simulation::QUICK
            } else {
                Simulation::WHOLE
            };
            (simulation::ABOUT, simulation.run()?)
        }
        Campaign::Precision => {
            let precision = Precision {
                quick: arguments.quick,
                device: arguments.device(),
            };
            (precision::ABOUT, precision.run(&programs, scratch.path())?)
        }
        Campaign::Recovery => {
            let device = arguments.device.unwrap_or(Device::Cpu);
            let recovery = Recovery {
                kills: if arguments.quick { 3 } else { 25 },
                ranks: if device == Device::Cpu { 4 } else { 2 },
                device,
                limit_s: if device == Device::Cpu { 2.0 } else { 5.0 },
            };
            (recovery::ABOUT, recovery.run(&programs, scratch.path())?)
        }
        Campaign::Serve => {
            let serve = Serve {
                quick: arguments.quick,
                model: arguments.model.clone(),
                device: arguments.device.unwrap_or(Device::Cpu),
            };
            (serve::ABOUT, serve.run(&programs, scratch.path())?)
        }
        Campaign::Curves => {
            let curves = if arguments.quick {
                Curves {
                    shorter: 40,
                    checkpoints: 2,
                    windows: Some(32),
                    plot,
                }
            } else {
                Curves {
                    shorter: 1,
                    checkpoints: 8,
                    windows: None,
                    plot,
                }
            };
            (curves::ABOUT, curves.run(&programs, scratch.path())?)
        }
    };
    print!("{}", table(&rows));
    if !arguments.quick && arguments.seed.is_none() {
        let path = report.write(about, &rows, &benchmarks)?;
        println!(
            "\nwritten to {}",
            path.strip_prefix(repository())
                .unwrap_or(Path::new(&path))
                .display()
        );
    }
    Ok(())
}

fn kills(quick: bool) -> Kills {
    if quick {
        Kills {
            kills: 4,
            steps: 150,
            pause: Duration::from_secs(2),
            seed: 11,
        }
    } else {
        Kills {
            kills: 50,
            steps: 400,
            pause: Duration::from_secs(4),
            seed: 11,
        }
    }
}
