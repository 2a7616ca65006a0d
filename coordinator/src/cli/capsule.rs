//! `supra capsule`: packs all that is known of a run beside its weights.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::connect::{Connect, TokenFile};
use super::failure::{Exit, Failure};
use super::format;
use super::ledger::Offline;
use super::out;
use super::runs::{Json, Which};
use crate::capsule::{Capsule, CapsuleError, gather};

/// Arguments of `supra capsule`.
#[derive(Args, Debug)]
pub struct Pack {
    #[command(flatten)]
    which: Which,
    /// Where it is written: a file if the name ends with .tar.zst, else a directory; nothing is overwritten
    /// [default: RUN.tar.zst]
    #[arg(long, value_name = "FILE.tar.zst|DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    source: Source,
}

/// Where runs are looked up.
#[derive(Args, Debug)]
pub struct Source {
    /// Read journal and metrics of this state directory instead of asking a coordinator: changes nothing, and works whether
    /// or not a coordinator runs there
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Address of the coordinator [default: http://127.0.0.1:7070]
    #[arg(
        long,
        value_name = "URL",
        env = "SUPRA_COORDINATOR",
        help_heading = "Coordinator"
    )]
    coordinator: Option<String>,
    #[command(flatten)]
    token: TokenFile,
}

impl Source {
    /// The capsule of a run.
    ///
    /// # Errors
    /// An unreachable coordinator, an unreadable journal, or an unknown run.
    pub async fn capsule(&self, run: &str) -> Result<Capsule, Failure> {
        if let Some(state) = &self.state {
            let known = Offline::open(state, run)?;
            return Ok(gather(state, known.journal(), known.run.number)?);
        }
        let connect = Connect {
            coordinator: self.coordinator.clone(),
            state: None,
            token: self.token.clone(),
        };
        let mut client = connect.client().await?;
        let mut parts = client.capsule(run).await?;
        let mut bytes = Vec::new();
        while let Some(part) = parts.next().await? {
            bytes.extend(part.data);
        }
        Ok(Capsule::from_bytes(
            &bytes,
            Path::new("the coordinator's answer"),
        )?)
    }
}

impl From<CapsuleError> for Failure {
    fn from(error: CapsuleError) -> Failure {
        let exit = match &error {
            CapsuleError::Taken(_) | CapsuleError::Newer { .. } | CapsuleError::NoRun(_) => {
                Exit::Input
            }
            CapsuleError::Damaged { .. } | CapsuleError::Ledger(_) => Exit::Broken,
            CapsuleError::Io { .. } | CapsuleError::Journal(_) | CapsuleError::Telemetry { .. } => {
                Exit::Failed
            }
        };
        let message = format!("{error}.");
        Failure::Told { exit, message }
    }
}

/// Packs the capsule and says what is in it and what is missing.
///
/// # Errors
/// An unreachable coordinator, an unreadable journal, an unknown run, or a place that is taken.
pub async fn run(command: Pack) -> Result<Exit, Failure> {
    if let Some(out) = command.out.as_ref().filter(|out| out.exists()) {
        return Err(CapsuleError::Taken(out.clone()).into());
    }
    let capsule = command.source.capsule(&command.which.run).await?;
    let index = capsule.index();
    let out = command.out;
    let out = out.unwrap_or_else(|| format!("{}.tar.zst", index.run).into());
    let bytes = capsule.write(&out)?;
    if command.json.json {
        out::json(&json!({
            "path": out, "bytes": bytes, "run": index.run, "members": index.members, "missing": index.missing,
        }))?;
        return Ok(Exit::Done);
    }
    let mut text = format!(
        "Run {} is packed in {}: {}, {}.\n",
        index.run,
        out.display(),
        format::counted(index.members.len() as u64, "member"),
        format::bytes(bytes)
    );
    for (member, why) in &index.missing {
        text.push_str(&format!("  without {member}: {why}\n"));
    }
    out::text(&text)?;
    Ok(Exit::Done)
}
