//! The shared secret of a coordinator that listens beyond loopback.
//!
//! It comes from a file, never from a recipe or a command line, and travels as the request
//! metadata `authorization: Bearer TOKEN`.

use std::path::{Path, PathBuf};

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

const HEADER: &str = "authorization";
const SCHEME: &str = "Bearer ";

/// Shorter ones are guessed too easily.
const MIN_LENGTH: usize = 16;

/// A secret. `Debug` does not show it.
#[derive(Clone)]
pub struct Token {
    header: MetadataValue<Ascii>,
}

/// A token that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read the token file {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },

    /// What it holds is no token.
    #[error("{place}: {cause}\n  write one line there, for example from: openssl rand -hex 32")]
    Unfit {
        /// The file, or "the token".
        place: String,
        /// What is wrong.
        cause: &'static str,
    },
}

impl Token {
    /// The token in the first and only line of a file; white space around it is ignored.
    pub fn from_file(path: &Path) -> Result<Token, TokenError> {
        let text = std::fs::read_to_string(path).map_err(|cause| TokenError::Read {
            path: path.to_owned(),
            cause,
        })?;
        Token::parse(&text, &format!("the token file {}", path.display()))
    }

    /// A token from memory.
    pub fn new(text: &str) -> Result<Token, TokenError> {
        Token::parse(text, "the token")
    }

    fn parse(text: &str, place: &str) -> Result<Token, TokenError> {
        let text = text.trim();
        let unfit = |cause| TokenError::Unfit {
            place: place.to_owned(),
            cause,
        };
        if text.is_empty() {
            return Err(unfit("is empty"));
        }
        if text.len() < MIN_LENGTH {
            return Err(unfit("is shorter than 16 characters"));
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(unfit("holds white space, control or non-ASCII characters"));
        }
        let mut header = MetadataValue::try_from(format!("{SCHEME}{text}"))
            .map_err(|_| unfit("holds characters that no HTTP header may hold"))?;
        header.set_sensitive(true);
        Ok(Token { header })
    }

    /// Whether `presented` is this token's header value. Takes the same time for every wrong one.
    pub fn matches(&self, presented: &[u8]) -> bool {
        // Hashes compare in constant time and hide the length too.
        blake3::hash(self.header.as_bytes()) == blake3::hash(presented)
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Client side: adds the token, if there is one, to every call.
#[derive(Clone, Debug, Default)]
pub struct Bearer(pub Option<Token>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert(HEADER, token.header.clone());
        }
        Ok(request)
    }
}

/// Server side: lets only calls with the token through; all when there is none.
#[derive(Clone, Debug, Default)]
pub struct TokenCheck(pub Option<Token>);

impl Interceptor for TokenCheck {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(token) = &self.0 else {
            return Ok(request);
        };
        match request.metadata().get(HEADER) {
            None => Err(Status::unauthenticated(
                "this coordinator asks for a token and the call brought none",
            )),
            Some(presented) if token.matches(presented.as_bytes()) => Ok(request),
            Some(_) => Err(Status::unauthenticated("the call brought a wrong token")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> Token {
        Token::new(text).unwrap()
    }

    fn present(bearer: &mut Bearer, check: &mut TokenCheck) -> Result<(), tonic::Code> {
        let request = bearer.call(Request::new(())).unwrap();
        check
            .call(request)
            .map(drop)
            .map_err(|status| status.code())
    }

    #[test]
    fn only_the_same_token_passes() {
        let mut check = TokenCheck(Some(token("0123456789abcdef")));
        let denied = Err(tonic::Code::Unauthenticated);
        assert_eq!(
            present(&mut Bearer(Some(token(" 0123456789abcdef\n"))), &mut check),
            Ok(())
        );
        assert_eq!(
            present(&mut Bearer(Some(token("0123456789abcdeF"))), &mut check),
            denied
        );
        assert_eq!(present(&mut Bearer(None), &mut check), denied);
    }

    #[test]
    fn without_a_token_everybody_passes() {
        let mut open = TokenCheck::default();
        assert_eq!(present(&mut Bearer(None), &mut open), Ok(()));
        assert_eq!(
            present(&mut Bearer(Some(token("0123456789abcdef"))), &mut open),
            Ok(())
        );
    }

    #[test]
    fn unfit_tokens_name_their_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        for (text, cause) in [
            ("\n", "empty"),
            ("short", "shorter"),
            ("two words of a token", "white space"),
        ] {
            std::fs::write(&path, text).unwrap();
            let message = Token::from_file(&path).unwrap_err().to_string();
            assert!(
                message.contains(cause) && message.contains("/token"),
                "{message}"
            );
        }
        let missing = Token::from_file(&directory.path().join("none"))
            .unwrap_err()
            .to_string();
        assert!(missing.contains("/none"), "{missing}");
    }

    #[test]
    fn debug_does_not_tell() {
        assert!(!format!("{:?}", Bearer(Some(token("0123456789abcdef")))).contains("0123"));
    }
}
