//! Finding the coordinator, and the blocking shell around asynchronous commands.

use std::path::PathBuf;

use clap::Args;
use supra_proto::{Client, ClientError, Token};

use super::failure::{Exit, Failure};
use crate::address;

/// Where a coordinator listens unless told otherwise.
const DEFAULT_URL: &str = "http://127.0.0.1:7070";

/// Which coordinator to ask.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Coordinator")]
pub struct Connect {
    /// Address of the coordinator [default: http://127.0.0.1:7070]
    #[arg(long, value_name = "URL", env = "SUPRA_COORDINATOR")]
    pub coordinator: Option<String>,

    /// State directory of a coordinator on this machine: its address is read from DIR/address
    /// (goes before --coordinator)
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,

    #[command(flatten)]
    pub token: TokenFile,
}

/// The shared secret of a coordinator that listens beyond this machine.
#[derive(Args, Clone, Debug, Default)]
pub struct TokenFile {
    /// File that holds the coordinator's token, if it asks for one
    #[arg(
        long,
        value_name = "FILE",
        env = "SUPRA_TOKEN_FILE",
        help_heading = "Coordinator"
    )]
    pub token_file: Option<PathBuf>,
}

impl TokenFile {
    /// Reads the token.
    ///
    /// # Errors
    /// When the file cannot be read or holds no token.
    pub fn read(&self) -> Result<Option<Token>, Failure> {
        let read = |path: &PathBuf| {
            Token::from_file(path).map_err(|error| ClientError::Token(error).into())
        };
        self.token_file.as_ref().map(read).transpose()
    }
}

impl Connect {
    /// The coordinator's address, by `--state`, `--coordinator`, `SUPRA_COORDINATOR` or default.
    ///
    /// # Errors
    /// When the state directory names no address.
    pub fn url(&self) -> Result<String, Failure> {
        let Some(state) = &self.state else {
            return Ok(self
                .coordinator
                .clone()
                .unwrap_or_else(|| DEFAULT_URL.to_owned()));
        };
        address::read(state).map_err(|error| {
            let file = address::path(state);
            Failure::unreachable(format!(
                "cannot read the coordinator's address from {}: {error}. A coordinator writes it while it runs: start \
                 one with `supra up --state {}`, or name one with --coordinator URL.",
                file.display(),
                state.display()
            ))
        })
    }

    /// Connects.
    ///
    /// # Errors
    /// When nobody answers; says which setting the address came from.
    pub async fn client(&self) -> Result<Client, Failure> {
        let url = self.url()?;
        let source = match (&self.state, &self.coordinator) {
            (Some(state), _) => format!("The address is from {}", address::path(state).display()),
            (None, Some(_)) => "The address is from --coordinator or SUPRA_COORDINATOR".to_owned(),
            (None, None) => "This is the default address".to_owned(),
        };
        Client::connect(&url, self.token.read()?).await.map_err(|error| match Failure::from(error) {
            Failure::Told { exit: Exit::Unreachable, message } => Failure::unreachable(format!(
                "{message}\n  {source}. Start a coordinator here with `supra up`, or name one with --coordinator URL or \
                 --state DIR."
            )),
            other => other,
        })
    }
}

/// Runs an asynchronous command to its end on this thread.
///
/// # Errors
/// Those of the command.
pub fn block_on<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start the event loop: {error}.")))?
        .block_on(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_directory_goes_before_the_address() {
        let state = tempfile::tempdir().unwrap();
        let mut connect = Connect {
            coordinator: Some("http://there:1".to_owned()),
            ..Connect::default()
        };
        assert_eq!(connect.url().unwrap(), "http://there:1");
        connect.state = Some(state.path().to_owned());
        let error = connect.url().unwrap_err();
        assert!(
            matches!(
                error,
                Failure::Told {
                    exit: Exit::Unreachable,
                    ..
                }
            ),
            "{error}"
        );
        assert!(error.to_string().contains("supra up"), "{error}");
        address::write(state.path(), "127.0.0.1:4242".parse().unwrap()).unwrap();
        assert_eq!(connect.url().unwrap(), "http://127.0.0.1:4242");
    }

    #[test]
    fn a_missing_token_file_is_bad_input() {
        let token = TokenFile {
            token_file: Some("/nowhere/token".into()),
        };
        let error = token.read().unwrap_err();
        assert!(matches!(
            &error,
            Failure::Told {
                exit: Exit::Input,
                ..
            }
        ));
        assert!(error.to_string().contains("/nowhere/token"), "{error}");
    }
}
