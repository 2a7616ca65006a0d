//! `supra-worker serve`: a model behind OpenAI's completions interface.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use supra_proto::Token;
use supra_worker::inference::serve::{Limits, News, Options, Source, serve};

use super::{
    failure::Failure,
    logging::{self, LogFormat},
    options::{DeviceOptions, Dtype},
    out, parent,
};

/// Serves a model to programs that speak OpenAI's completions interface: POST /v1/completions, GET /v1/models, /health, /metrics.
/// Many requests are computed at once; a SUPRA model needs the same memory for each, however long its text. SIGTERM lets answers
/// end first.
#[derive(Debug, Args)]
pub struct Serve {
    /// Model directory, file of weights in one, checkpoint, folder of a run's checkpoints (the newest complete one is taken), or a
    /// URL of these (s3://, gs://)
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Address and port; port 0 takes any that is free
    #[arg(long, default_value = "127.0.0.1:8000", value_name = "IP:PORT")]
    listen: SocketAddr,
    /// Name by which clients ask for the model [default: the name of its directory]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// File with the key that clients have to send as `Authorization: Bearer KEY`
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Completions that are computed at once
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    slots: u32,
    /// Read every prompt from its first token on, also where another one began alike: clients then cannot tell from the time that an
    /// answer takes what others have asked
    #[arg(long)]
    no_prefix_reuse: bool,
    /// Requests that may be under way beyond one for each slot; more get 429
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(..=1 << 16))]
    queue: u32,
    /// Most new tokens of one completion
    #[arg(long, default_value_t = 4096, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens_per_request: u32,
    /// Most tokens of one prompt
    #[arg(long, default_value_t = 131_072, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_prompt_tokens: u32,
    /// Most bytes of one request
    #[arg(long, default_value_t = 8 << 20, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1024..))]
    max_body: u32,
    /// Most open connections; more wait to be taken
    #[arg(long, default_value_t = 1024, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    connections: u32,
    /// From the arrival of a request to the last token of its answer
    #[arg(long, default_value_t = 600, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    request_timeout: u32,
    /// How long a client may stand still: while it sends a request, between two requests, and while it reads an answer
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    stall_timeout: u32,
    /// How long answers have to end after SIGTERM
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    grace: u32,
    /// Serve each newer checkpoint as soon as the run has published it; answers under way end on the weights that they began with,
    /// for which there has to be memory beside the newer ones
    #[arg(long)]
    follow: bool,
    /// Number format to compute in
    #[arg(long, value_enum, default_value_t)]
    dtype: Dtype,
    /// How log lines on stderr look
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    log_format: LogFormat,
    #[command(flatten)]
    device: DeviceOptions,
}

impl Serve {
    /// Serves until it is told to stop.
    pub fn execute(self) -> Result<(), Failure> {
        logging::start(self.log_format);
        parent::end_with_parent()?;
        let options = self.options()?;
        if options.key.is_none() && !options.listen.ip().is_loopback() {
            tracing::warn!(
                listen = %options.listen,
                "everybody who reaches this address can use the model: give --api-key-file, or listen on 127.0.0.1"
            );
        }
        let place = self.device.open()?;
        let source = Source {
            location: self.model,
            device: place.device,
            kind: self.dtype.into(),
        };
        let tell = |news: News<'_>| {
            let line = match news {
                News::Listening(address) => format!("listening on http://{address}"),
                News::Ready {
                    id,
                    location,
                    remark,
                } => format!(
                    "ready: {id} from {location}{}",
                    remark.map_or(String::new(), |remark| format!("; {remark}"))
                ),
            };
            // The server does not end because nobody reads this.
            let _ = out::line(&line);
        };
        Ok(serve(&source, options, tell)?)
    }

    fn options(&self) -> Result<Options, Failure> {
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        Ok(Options {
            listen: self.listen,
            name: self.name.clone(),
            key: self
                .api_key_file
                .as_deref()
                .map(Token::from_file)
                .transpose()?,
            slots: self.slots as usize,
            share_prefixes: !self.no_prefix_reuse,
            queue: self.queue as usize,
            limits: Limits {
                max_tokens: self.max_tokens_per_request as usize,
                max_prompt_tokens: self.max_prompt_tokens as usize,
            },
            max_body: self.max_body as usize,
            connections: self.connections as usize,
            request_timeout: seconds(self.request_timeout),
            stall_timeout: seconds(self.stall_timeout),
            grace: seconds(self.grace),
            follow: self.follow,
        })
    }
}
