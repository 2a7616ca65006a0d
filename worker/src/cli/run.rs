//! `supra-worker run`: a supervisor and the child that trains.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::Args;
use supra_agent::{
    Advertise, Exit, WorkerOptions, run_worker,
    supervisor::{self, Role},
};
use supra_proto::{BUILD, Token};
use supra_worker::checkpoint::saver;

use super::{
    failure::Failure,
    logging::{self, LogFormat},
    options::DeviceOptions,
    parent,
};

/// Joins a coordinator and trains until it says goodbye. Runs as two processes: a small one that restarts the one
/// that computes. Where checkpoints go to s3:// or gs://, credentials are those of the environment (AWS_* or GOOGLE_*).
#[derive(Debug, Args)]
pub struct Run {
    /// Address of the coordinator
    #[arg(
        long,
        env = "SUPRA_COORDINATOR",
        default_value = "http://127.0.0.1:7070",
        value_name = "URL"
    )]
    coordinator: String,
    /// Name for people [default: host name and device]
    #[arg(long)]
    name: Option<String>,
    /// Name or address at which the other workers reach this one, and the port if it is not the one on which it listens
    /// [default: the address of the route to the coordinator]
    #[arg(long, value_name = "HOST[:PORT]")]
    advertise: Option<Advertise>,
    /// Address and port on which to listen for the other workers [default: the advertised ones, any port if there is none]
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<SocketAddr>,
    /// File that holds the coordinator's token
    #[arg(long, env = "SUPRA_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// How log lines on stderr look
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    log_format: LogFormat,
    #[command(flatten)]
    device: DeviceOptions,
}

impl Run {
    /// Supervises, or, in the child, trains.
    pub fn execute(self) -> Result<ExitCode, Failure> {
        logging::start(self.log_format);
        // Before libtorch is touched: the supervisor has to stay small and must never hold a device.
        let birth = match supervisor::role()
            .map_err(|error| Failure::with_code(error.exit_code(), &error))?
        {
            Role::Supervisor => {
                parent::end_with_parent()?;
                return Ok(supervisor::supervise());
            }
            Role::Child(birth) => birth,
        };
        let token = self
            .token_file
            .as_deref()
            .map(Token::from_file)
            .transpose()?;
        let place = self.device.open()?;
        let device = place.name();
        tracing::info!(%device, nccl = ?place.nccl, model = %place.model, threads = place.threads, "device is open");
        let options = WorkerOptions {
            name: self.name,
            advertise: self.advertise,
            listen: self.listen,
            token,
            birth,
            ..WorkerOptions::new(self.coordinator, device.to_string(), BUILD)
        };
        let mut kept = None;
        let exit = run_worker(options, |job| {
            supra_worker::trainer::train(job, &place, BUILD, &mut kept)
        })
        .map_err(|error| Failure::with_code(error.exit_code(), &error))?;
        // libtorch must not end below a thread that works with it.
        saver::join_left();
        if let Exit::Refused(reason) = &exit {
            super::out::complain(&format!(
                "error: the coordinator refuses this worker: {reason}"
            ));
        }
        Ok(ExitCode::from(exit.exit_code()))
    }
}
