//! The command line.

mod bench;
mod convert;
mod eval;
mod export;
mod failure;
mod generate;
mod interrupt;
mod logging;
mod options;
mod out;
mod parent;
mod replay;
mod run;
mod serve;
mod texts;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::Failure;

/// Trains and uses SUPRA models: softmax transformers turned into recurrent networks.
#[derive(Debug, Parser)]
#[command(name = "supra-worker", version = supra_proto::BUILD, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Join a coordinator and train what it assigns
    Run(run::Run),
    /// Turn a softmax model into a SUPRA model that is not trained yet
    Convert(convert::Convert),
    /// Turn a training checkpoint into a model that other programs load
    Export(export::Export),
    /// Prove that an exported or converted model is what was written
    Verify(verify::Verify),
    /// Measure loss on held-out text and accuracies in tasks
    Eval(eval::Eval),
    /// Continue a text
    Generate(generate::Generate),
    /// Answer programs that speak OpenAI's completions interface
    Serve(serve::Serve),
    /// Train some steps of a run again from a checkpoint, and write nothing
    Replay(replay::Replay),
    /// Measure speed on this machine
    Bench(bench::Bench),
}

/// Parses the command line, does what it says, and reports how that ended.
pub fn main() -> ExitCode {
    let Cli { command } = Cli::parse();
    let result = match command {
        Command::Run(run) => return run.execute().unwrap_or_else(Failure::report),
        Command::Convert(convert) => convert.execute(),
        Command::Export(export) => export.execute(),
        Command::Verify(verify) => verify.execute(),
        Command::Eval(eval) => eval.execute(),
        Command::Generate(generate) => generate.execute(),
        Command::Serve(serve) => serve.execute(),
        Command::Replay(replay) => replay.execute(),
        Command::Bench(bench) => bench.execute(),
    };
    result.map_or_else(Failure::report, |()| ExitCode::SUCCESS)
}
