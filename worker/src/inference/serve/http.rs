//! The addresses of the server and who may use them.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};

use super::{
    completions::completions, fault::Fault, metrics::MEDIA_TYPE, served::Served, shared::Shared,
};

/// All addresses.
pub fn router(shared: Arc<Shared>) -> Router {
    let key = middleware::from_fn_with_state(Arc::clone(&shared), ask_for_key);
    let open = Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics));
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .method_not_allowed_fallback(no_method)
        .route_layer(key)
        .merge(open.method_not_allowed_fallback(no_method))
        .fallback(no_path)
        .with_state(shared)
}

/// A response of JSON.
pub fn json_response(value: &Value) -> Response {
    let json = [(header::CONTENT_TYPE, "application/json")];
    (json, value.to_string()).into_response()
}

async fn ask_for_key(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Result<Response, Fault> {
    if let Some(key) = &shared.options.key {
        let presented = request.headers().get(header::AUTHORIZATION);
        if !presented.is_some_and(|presented| key.matches(presented.as_bytes())) {
            return Err(Fault::no_key());
        }
    }
    Ok(next.run(request).await)
}

async fn health(State(shared): State<Arc<Shared>>) -> Response {
    match shared.served() {
        Ok(served) => json_response(
            &json!({ "status": "ok", "model": served.id, "checkpoint": served.fingerprint }),
        ),
        Err(fault) => fault.into_response(),
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let kind = [(header::CONTENT_TYPE, MEDIA_TYPE)];
    (StatusCode::OK, kind, shared.metrics.text()).into_response()
}

async fn models(State(shared): State<Arc<Shared>>) -> Result<Response, Fault> {
    let served = shared.served()?;
    Ok(json_response(
        &json!({ "object": "list", "data": [describe(&served)] }),
    ))
}

async fn model(
    State(shared): State<Arc<Shared>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Fault> {
    let served = shared.served()?;
    let Path(id) = id.map_err(|wrong| Fault::bad(wrong.body_text()))?;
    if id != served.id {
        return Err(Fault::no_model(&id, &served.id));
    }
    Ok(json_response(&describe(&served)))
}

fn describe(served: &Served) -> Value {
    json!({
        "id": served.id,
        "object": "model",
        "created": served.created,
        "owned_by": "supra",
        "checkpoint": served.fingerprint,
        // Null: memory and time do not grow with the text.
        "max_model_len": served.context,
    })
}

async fn no_path(request: Request) -> Fault {
    Fault::no_path(request.uri().path())
}

async fn no_method(request: Request) -> Fault {
    Fault::no_method(request.method().as_str(), request.uri().path())
}
