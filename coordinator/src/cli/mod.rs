//! The `supra` command line: thin commands over the coordinator's client and the library crates.
//!
//! Exit codes: 0 done, 1 failed, 2 bad input, 3 unreachable, 4 audit or checkpoint broken, or a comparison that
//! found a difference, 75 stopped and resumable, 130 interrupted.

mod adopt;
mod audit;
mod capsule;
mod checkpoints;
mod connect;
mod data;
mod describe;
mod diff;
mod drain;
mod failure;
mod format;
mod heads;
mod json;
mod ledger;
mod out;
mod plan;
mod progress;
mod replay;
mod runs;
mod samples;
mod up;
mod validate;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use connect::block_on;
use failure::{Exit, Failure};

/// Uptrain a pretrained softmax transformer into a recurrent linear-attention model (SUPRA)
#[derive(Parser, Debug)]
#[command(
    name = "supra",
    version = supra_proto::BUILD,
    max_term_width = 100,
    after_help = "Exit codes: 0 done, 1 failed, 2 bad input, 3 coordinator unreachable, 4 audit or checkpoint broken\n\
                  or what was compared differs, 75 stopped and resumable, 130 interrupted."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Start a coordinator and workers on this machine, and train a recipe
    Up(up::Up),
    /// Check recipes without running them
    Validate(validate::Validate),
    /// Show what a recipe will do and need: budget, steps, schedule, memory, checkpoints
    Plan(plan::Plan),
    /// Queue a recipe
    Submit(runs::Submit),
    /// List all runs, newest first
    Runs(runs::Runs),
    /// Show one run
    Status(runs::OfRun),
    /// Follow a run to its end
    Watch(runs::OfRun),
    /// Show a run's log lines
    Logs(runs::Logs),
    /// Ask a run for a checkpoint and a stop
    Cancel(runs::Cancel),
    /// Queue a stopped run again, from its last checkpoint; or rebuild one whose head node is gone (--adopt)
    Resume(runs::Resume),
    /// List a run's checkpoints, oldest first, verify, keep or prune them
    Checkpoints(checkpoints::command::Checkpoints),
    /// List the workers, attached and lost
    Workers(runs::Runs),
    /// Have a worker finish its step, leave its generation and train no more
    Drain(drain::Drain),
    /// Prove from the ledger that every sample was trained exactly once
    Audit(audit::Audit),
    /// Rebuild the exact batch of a step from ledger, recipe and data, compare it with what was fed, and run it again
    Replay(replay::Replay),
    /// Pack all that is known of a run beside its weights: recipe, versions, ledger, metrics, receipt
    Capsule(capsule::Pack),
    /// Explain why two runs differ, from seed to library version, and at which step they part
    Diff(diff::Diff),
    /// Prepare and look at training data
    #[command(subcommand)]
    Data(data::Data),
}

/// Runs the command line of this process; gives its exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    run(cli.command).unwrap_or_else(Failure::report).into()
}

fn run(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Up(command) => block_on(up::run(command)),
        Command::Validate(command) => validate::run(&command),
        Command::Plan(command) => plan::run(&command),
        Command::Submit(command) => block_on(runs::submit(command)),
        Command::Runs(command) => block_on(runs::runs(command)),
        Command::Status(command) => block_on(runs::status(command)),
        Command::Watch(command) => block_on(runs::watch(command)),
        Command::Logs(command) => block_on(runs::logs(command)),
        Command::Cancel(command) => block_on(runs::cancel(command)),
        Command::Resume(command) => block_on(runs::resume(command)),
        Command::Checkpoints(command) => block_on(checkpoints::command::run(command)),
        Command::Workers(command) => block_on(runs::workers(command)),
        Command::Drain(command) => block_on(drain::run(command)),
        Command::Audit(command) => block_on(audit::run(command)),
        Command::Replay(command) => block_on(replay::run(command)),
        Command::Capsule(command) => block_on(capsule::run(command)),
        Command::Diff(command) => block_on(diff::run(command)),
        Command::Data(command) => data::run(command),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }
}
