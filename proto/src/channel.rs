//! The connection to a coordinator.

use std::time::Duration;

use tokio_stream::Stream;
use tonic::Streaming;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use crate::error::unreachable;
use crate::v1::workers_client::WorkersClient;
use crate::v1::{CoordinatorMessage, LedgerRequest, WorkerMessage};
use crate::{Bearer, ClientError, Token};

/// How long a connection may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Time between HTTP/2 pings, on both ends.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// How long the answer to a ping may take before the connection counts as broken, on both ends.
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Calls go out through this: the connection, and the token on every call.
pub(crate) type Authorized = InterceptedService<Channel, Bearer>;

/// Connects to the coordinator at `url`, `http://host:port`.
pub(crate) async fn connect(url: &str, token: Option<Token>) -> Result<Authorized, ClientError> {
    let channel = endpoint(url)?
        .connect()
        .await
        .map_err(|error| unreachable(url, &error))?;
    Ok(InterceptedService::new(channel, Bearer(token)))
}

/// Opens the one stream of a worker; `outgoing` has to begin with a Hello.
///
/// # Errors
///
/// `Unreachable` when nobody answers, `Unauthenticated` when the token is not the coordinator's.
pub async fn attach(
    url: &str,
    token: Option<Token>,
    outgoing: impl Stream<Item = WorkerMessage> + Send + 'static,
) -> Result<Streaming<CoordinatorMessage>, ClientError> {
    let mut client = WorkersClient::new(connect(url, token).await?);
    let response = client.attach(outgoing).await;
    Ok(response
        .map_err(|status| ClientError::from_status(url, &status))?
        .into_inner())
}

/// The file of a run's ledger, up to the record that is asked for.
///
/// # Errors
///
/// `Unreachable` when nobody answers or the answer breaks off; a `Status` when the run has no such record.
pub async fn ledger(
    url: &str,
    token: Option<Token>,
    request: LedgerRequest,
) -> Result<Vec<u8>, ClientError> {
    let mut client = WorkersClient::new(connect(url, token).await?);
    let failed = |status: tonic::Status| ClientError::from_status(url, &status);
    let mut parts = client.ledger(request).await.map_err(failed)?.into_inner();
    let mut file = Vec::new();
    while let Some(part) = parts.message().await.map_err(failed)? {
        file.extend(part.data);
    }
    Ok(file)
}

fn endpoint(url: &str) -> Result<Endpoint, ClientError> {
    let bad = |cause: String| ClientError::BadUrl {
        url: url.to_owned(),
        cause,
        remedy: "write http://HOST:PORT, for example http://127.0.0.1:7070",
    };
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| bad(error.to_string()))?;
    let uri = endpoint.uri();
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => return Err(bad("TLS is not supported yet".to_owned())),
        Some(other) => return Err(bad(format!("the scheme {other:?} is not http"))),
        None => return Err(bad("it does not begin with http://".to_owned())),
    }
    if uri.port_u16().is_none() {
        return Err(bad("it names no port".to_owned()));
    }
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unusable_addresses_say_why() {
        for (url, cause) in [
            ("https://head:7070", "TLS"),
            ("head:7070", "http"),
            ("ftp://head:7070", "\"ftp\""),
            ("http://head", "port"),
            ("http://", "not usable"),
            ("", "not usable"),
        ] {
            let message = endpoint(url)
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default();
            assert!(message.contains(cause), "{url:?}: {message:?}");
        }
        assert!(endpoint("http://head:7070").is_ok());
        assert!(endpoint("http://[::1]:7070").is_ok());
    }

    #[tokio::test]
    async fn nobody_there_names_the_address_and_the_remedy() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let error = connect(&url, None).await.err().unwrap();
        assert_eq!(error.exit_code(), 3);
        let message = error.to_string();
        assert!(
            message.contains(&url) && message.contains("refused"),
            "{message}"
        );
        assert!(message.contains("start supra-coordinator"), "{message}");
    }
}
