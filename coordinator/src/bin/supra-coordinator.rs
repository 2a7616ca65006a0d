//! `supra-coordinator`: the server of the head node.

#![forbid(unsafe_code)]

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use supra_coordinator::address;
use supra_coordinator::machine::Limits;
use supra_coordinator::service::{Options, Service, ServiceError, Stopper};
use supra_proto::{BUILD, Token};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tracing_subscriber::EnvFilter;

/// Exit codes, as of every program here.
const FAILED: u8 = 1;
const BAD_INPUT: u8 = 2;
const RESUMABLE: u8 = 75;
const INTERRUPTED: u8 = 130;
/// Set to 1 by a program that holds a pipe to our standard input and wants the coordinator to end when it does.
const PARENT_PIPE: &str = "SUPRA_PARENT_PIPE";

/// The head node: decides who trains what and keeps the account of it.
#[derive(Parser)]
#[command(name = "supra-coordinator", version = BUILD, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the coordinator until it is told to stop
    ///
    /// SIGTERM or SIGINT stops it: the run in hand writes a checkpoint first and workers are told to leave. A second
    /// signal ends it at once; the journal is whole at any moment, so nothing is lost either way.
    ///
    /// Where checkpoints go to s3:// or gs://, credentials are those of the environment (AWS_* or GOOGLE_*).
    ///
    /// Exit codes: 0 stopped, 1 failed, 2 bad arguments, 75 stopped while a run was training (it can be resumed),
    /// 130 ended by a second signal.
    Run(Run),
}

#[derive(Args)]
struct Run {
    /// Where to listen; port 0 takes a free one, which is printed and written to DIR/address
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:7070",
        env = "SUPRA_LISTEN"
    )]
    listen: String,

    /// State directory: journal, metrics, logs, and the checkpoints of runs that name no other place
    #[arg(long, value_name = "DIR", env = "SUPRA_STATE")]
    state: PathBuf,

    /// File with a secret that every call must bring
    #[arg(long, value_name = "FILE", env = "SUPRA_TOKEN_FILE")]
    token_file: Option<PathBuf>,

    /// Listen beyond this machine without encryption, on a network that you trust; needs --token-file
    #[arg(long, requires = "token_file")]
    insecure_plaintext: bool,

    /// How log lines on standard error look
    #[arg(long, value_enum, default_value_t = LogFormat::Human)]
    log_format: LogFormat,

    /// Serve gRPC reflection, for tools such as grpcurl
    #[arg(long)]
    reflection: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    /// One line for people
    Human,
    /// One JSON object per line
    Json,
}

fn main() -> ExitCode {
    let Command::Run(run) = Cli::parse().command;
    log_to_stderr(run.log_format);
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(FAILED, &format!("cannot start threads: {error}")),
    };
    let code = runtime.block_on(serve(run));
    // A stream that somebody does not read must not keep the process.
    runtime.shutdown_background();
    code
}

fn log_to_stderr(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false);
    match format {
        LogFormat::Human => builder.init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}

async fn serve(run: Run) -> ExitCode {
    let token = match run.token_file.as_deref().map(Token::from_file).transpose() {
        Ok(token) => token,
        Err(error) => return fail(BAD_INPUT, &error.to_string()),
    };
    let signals = match Signals::catch() {
        Ok(signals) => signals,
        Err(error) => return fail(FAILED, &format!("cannot catch signals: {error}")),
    };
    let options = Options {
        listen: run.listen,
        state: run.state,
        token,
        insecure_plaintext: run.insecure_plaintext,
        reflection: run.reflection,
        limits: Limits::default(),
        build: BUILD.into(),
    };
    let shown = options.state.display().to_string();
    let service = match Service::start(options).await {
        Ok(service) => service,
        Err(error) => return failed(&error),
    };
    say(&format!(
        "listening on {}, state in {shown}",
        address::url(service.address())
    ));
    let stop = service.stopper();
    tokio::select! {
        ended = service.wait() => match ended {
            Ok(ending) if ending.stopped_a_run => ExitCode::from(RESUMABLE),
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        },
        code = signals.obey(stop) => code,
    }
}

/// What asks the coordinator to end. Caught from here on, so that nothing is lost between start and end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Speaks when the program that started us is gone; never, if nobody holds our standard input.
    parent: mpsc::Receiver<()>,
    /// Keeps `parent` open where no thread watches standard input.
    _open: mpsc::Sender<()>,
}

impl Signals {
    fn catch() -> std::io::Result<Signals> {
        let (sender, parent) = mpsc::channel(1);
        if std::env::var_os(PARENT_PIPE).is_some_and(|value| value == "1") {
            let gone = sender.clone();
            std::thread::Builder::new()
                .name("parent".into())
                .spawn(move || {
                    // Whatever comes, only the end of it matters.
                    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                    let _ = gone.blocking_send(());
                })?;
        }
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            parent,
            _open: sender,
        })
    }

    /// Asks for the end at the first signal; returns at the second.
    async fn obey(mut self, stop: Stopper) -> ExitCode {
        let first = self.next().await;
        stop.shut_down(first).await;
        let second = self.next().await;
        tracing::warn!("{second} after {first}: ending at once");
        ExitCode::from(INTERRUPTED)
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            Some(()) = self.parent.recv() => "the end of the program that started it",
        }
    }
}

/// To standard output; a closed one is nobody's fault.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn failed(error: &ServiceError) -> ExitCode {
    fail(
        if error.is_bad_input() {
            BAD_INPUT
        } else {
            FAILED
        },
        &error.to_string(),
    )
}

fn fail(code: u8, message: &str) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {message}");
    ExitCode::from(code)
}
