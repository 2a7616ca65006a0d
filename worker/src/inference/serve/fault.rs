//! What a client is told when it gets no answer, in the words and with the codes of OpenAI's interface.

use std::time::Duration;

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::json;

/// Seconds after which a client that was sent away may come again.
const RETRY_AFTER: &str = "1";

/// Why a request has no answer, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Status of the response.
    pub status: StatusCode,
    /// Cause and remedy.
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<&'static str>,
}

#[derive(Serialize)]
struct Body<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl Fault {
    fn new(status: StatusCode, code: Option<&'static str>, message: String) -> Fault {
        Fault {
            status,
            message,
            param: None,
            code,
        }
    }

    /// The request cannot be understood.
    pub fn bad(message: impl Into<String>) -> Fault {
        Fault::new(StatusCode::BAD_REQUEST, None, message.into())
    }

    /// A field of the request is wrong.
    pub fn field(field: &str, problem: impl Into<String>) -> Fault {
        Fault {
            param: Some(field.to_owned()),
            ..Fault::bad(format!("`{field}`: {}", problem.into()))
        }
    }

    /// The text is longer than the model or this server takes.
    pub fn too_long(field: &str, problem: impl Into<String>) -> Fault {
        Fault {
            code: Some("context_length_exceeded"),
            ..Fault::field(field, problem)
        }
    }

    /// No key, or a wrong one.
    pub fn no_key() -> Fault {
        let message = "this server asks for an API key: send the header `Authorization: Bearer KEY` with the key that it was started with";
        let code = Some("invalid_api_key");
        Fault::new(StatusCode::UNAUTHORIZED, code, message.to_owned())
    }

    /// Another model than the one that is here.
    pub fn no_model(asked: &str, here: &str) -> Fault {
        let message = format!("there is no model `{asked}` here; this server has `{here}`");
        Fault {
            param: Some("model".to_owned()),
            ..Fault::new(StatusCode::NOT_FOUND, Some("model_not_found"), message)
        }
    }

    /// An address that leads nowhere.
    pub fn no_path(path: &str) -> Fault {
        let message = format!(
            "there is no {path} here; this server has POST /v1/completions, GET /v1/models, /health and /metrics"
        );
        Fault::new(StatusCode::NOT_FOUND, Some("not_found"), message)
    }

    /// An address with another method.
    pub fn no_method(method: &str, path: &str) -> Fault {
        let message =
            format!("{path} does not take {method}: POST completions, GET everything else");
        let code = Some("method_not_allowed");
        Fault::new(StatusCode::METHOD_NOT_ALLOWED, code, message)
    }

    /// A body above the limit, bytes.
    pub fn too_large(limit: usize) -> Fault {
        let message = format!(
            "the request is larger than {limit} bytes: send fewer or shorter prompts at a time, or start the server with a larger --max-body"
        );
        Fault::new(StatusCode::PAYLOAD_TOO_LARGE, Some("too_large"), message)
    }

    /// A body that is no JSON.
    pub fn not_json(found: &str) -> Fault {
        let message =
            format!("the request is {found}: send JSON with `Content-Type: application/json`");
        Fault::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, None, message)
    }

    /// The client sent only a part of its request.
    pub fn slow_request(limit: Duration) -> Fault {
        let message = format!("the rest of the request did not come within {limit:?}");
        Fault::new(StatusCode::REQUEST_TIMEOUT, Some("timeout"), message)
    }

    /// Everything is taken.
    pub fn busy(waiting: usize) -> Fault {
        let message = format!(
            "{waiting} requests wait already, as many as may: come again, or start the server with a larger --queue or more --slots"
        );
        Fault::new(StatusCode::TOO_MANY_REQUESTS, Some("queue_full"), message)
    }

    /// The weights are being read.
    pub fn loading() -> Fault {
        let message = "the model is being loaded: come again when /health says 200";
        Fault::new(
            StatusCode::SERVICE_UNAVAILABLE,
            Some("loading"),
            message.to_owned(),
        )
    }

    /// The server is about to end.
    pub fn draining() -> Fault {
        let message = "this server is shutting down: ask another one, or come again";
        let code = Some("shutting_down");
        Fault::new(StatusCode::SERVICE_UNAVAILABLE, code, message.to_owned())
    }

    /// The answer took too long.
    pub fn late(limit: Duration) -> Fault {
        let message = format!(
            "there was no whole answer within {limit:?}: ask for fewer tokens, or start the server with a larger --request-timeout"
        );
        Fault::new(StatusCode::GATEWAY_TIMEOUT, Some("timeout"), message)
    }

    /// The client does not take what it is sent.
    pub fn stalled(limit: Duration) -> Fault {
        let message =
            format!("the answer was not read for {limit:?}, and what was left of it is gone");
        Fault::new(StatusCode::REQUEST_TIMEOUT, Some("stalled"), message)
    }

    /// It is ours.
    pub fn internal(message: impl Into<String>) -> Fault {
        Fault::new(StatusCode::INTERNAL_SERVER_ERROR, None, message.into())
    }

    /// Its kind, as OpenAI's clients know it.
    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => "timeout",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// `{"error": {"message", "type", "param", "code"}}`.
    pub fn to_json(&self) -> serde_json::Value {
        json!({ "error": Body {
            message: &self.message,
            r#type: self.kind(),
            param: self.param.as_deref(),
            code: self.code,
        }})
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let json = [(header::CONTENT_TYPE, "application/json")];
        let mut response = (self.status, json, self.to_json().to_string()).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}
