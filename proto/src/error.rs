//! What can go wrong between a client and the coordinator, told to people.

use tonic::{Code, Status};

use crate::token::TokenError;

/// A call to the coordinator failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address cannot be one.
    #[error("the coordinator's address {url:?} is not usable: {cause}\n  {remedy}")]
    BadUrl {
        /// Address as given.
        url: String,
        /// What is wrong with it.
        cause: String,
        /// What to do.
        remedy: &'static str,
    },

    /// The token file is missing or holds no token.
    #[error(transparent)]
    Token(#[from] TokenError),

    /// Nobody answers there, or the connection broke.
    #[error("the coordinator at {url} is unreachable: {cause}\n  {remedy}")]
    Unreachable {
        /// Address of the coordinator.
        url: String,
        /// The innermost cause.
        cause: String,
        /// What to do.
        remedy: &'static str,
    },

    /// The coordinator asks for a token and got none, or another one.
    #[error(
        "the coordinator at {url} does not let us in: {message}\n  give the token file that it was started with"
    )]
    Unauthenticated {
        /// Address of the coordinator.
        url: String,
        /// What the coordinator said.
        message: String,
    },

    /// The coordinator answered with an error.
    #[error("{message}")]
    Status {
        /// Its kind.
        code: Code,
        /// What the coordinator said; a rendered report where the input was bad.
        message: String,
    },
}

impl ClientError {
    /// Sorts the status of a call to the coordinator at `url`.
    pub fn from_status(url: &str, status: &Status) -> ClientError {
        match status.code() {
            // tonic reports a broken transport as one of these, with the cause as source. A status
            // that the coordinator itself sent has none.
            Code::Unavailable => unreachable(url, status),
            Code::Unknown | Code::Internal if std::error::Error::source(status).is_some() => {
                unreachable(url, status)
            }
            Code::Unauthenticated => ClientError::Unauthenticated {
                url: url.to_owned(),
                message: status.message().to_owned(),
            },
            code => ClientError::Status {
                code,
                message: status.message().to_owned(),
            },
        }
    }

    /// Exit code of a program that ends with this error: 3 = unreachable, 2 = bad input, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            ClientError::Unreachable { .. } => 3,
            ClientError::BadUrl { .. }
            | ClientError::Token(_)
            | ClientError::Unauthenticated { .. } => 2,
            ClientError::Status { code, .. } => match code {
                Code::InvalidArgument
                | Code::NotFound
                | Code::AlreadyExists
                | Code::FailedPrecondition => 2,
                _ => 1,
            },
        }
    }

    /// Whether another try may succeed without anybody changing anything here.
    pub fn is_transient(&self) -> bool {
        match self {
            ClientError::Unreachable { .. } => true,
            ClientError::Status { code, .. } => !matches!(
                code,
                Code::InvalidArgument
                    | Code::NotFound
                    | Code::Unimplemented
                    | Code::PermissionDenied
            ),
            _ => false,
        }
    }
}

/// `Unreachable` with the innermost cause of `error` and the remedy for it.
pub(crate) fn unreachable(url: &str, error: &(dyn std::error::Error + 'static)) -> ClientError {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let kind = cause
        .downcast_ref::<std::io::Error>()
        .map(std::io::Error::kind);
    let remedy = match kind {
        Some(std::io::ErrorKind::ConnectionRefused) => {
            "nothing listens there: start supra-coordinator, or check host and port"
        }
        Some(std::io::ErrorKind::TimedOut) => "check the host, and that no firewall stands between",
        _ => "check that supra-coordinator runs there, and the host and port",
    };
    let cause = match error.downcast_ref::<Status>() {
        // Without a source there is only the message.
        Some(status) if std::error::Error::source(status).is_none() => status.message().to_owned(),
        _ => cause.to_string(),
    };
    ClientError::Unreachable {
        url: url.to_owned(),
        cause,
        remedy,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_of_the_coordinator_is_not_a_broken_connection() {
        let error = ClientError::from_status("http://h:1", &Status::internal("journal is full"));
        assert_eq!(error.exit_code(), 1);
        assert_eq!(error.to_string(), "journal is full");
    }

    #[test]
    fn bad_input_and_wrong_token_end_with_two() {
        let status = [
            Status::invalid_argument("x"),
            Status::not_found("x"),
            Status::unauthenticated("x"),
        ];
        for status in status {
            assert_eq!(
                ClientError::from_status("http://h:1", &status).exit_code(),
                2,
                "{status}"
            );
        }
        assert_eq!(
            ClientError::from_status("http://h:1", &Status::unavailable("gone")).exit_code(),
            3
        );
    }
}
