//! Requests that are wrong.

use std::fs;

use serde_json::{Value, json};
use supra_tests::Result;
use supra_tests::http::{self, get};
use supra_tests::server::COMPLETIONS;

use super::{SOON, Stage, text};

#[test]
fn what_is_wrong_is_told_by_field_with_a_remedy() -> Result<()> {
    let stage = Stage::new()?;
    let key = stage.directory.path().join("key");
    fs::write(&key, "a-key-of-some-length\n")?;
    let server = stage.serve(&[
        "--name",
        "m",
        "--max-prompt-tokens",
        "300",
        "--max-body",
        "20000",
        "--api-key-file",
        &key.to_string_lossy(),
    ])?;
    let send = |body: &str, more: &str| {
        let head = format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}content-length: {}\r\n\r\n{body}",
            body.len()
        );
        http::raw(server.address, head.as_bytes())
    };
    let authorized = "authorization: Bearer a-key-of-some-length\r\n";
    let many: Vec<&str> = vec!["a"; 300];
    for (body, status, param, words) in [
        (
            json!({ "prompt": "a", "model": "other" }),
            404,
            json!("model"),
            "`m`",
        ),
        (json!({ "model": "m" }), 400, json!("prompt"), "missing"),
        (json!({ "prompt": [] }), 400, json!("prompt"), "empty"),
        (
            json!({ "prompt": "" }),
            400,
            json!("prompt"),
            "nothing to continue",
        ),
        (json!({ "prompt": ["a", 1] }), 400, json!("prompt"), "array"),
        (
            json!({ "prompt": { "a": 1 } }),
            400,
            json!("prompt"),
            "array",
        ),
        (
            json!({ "prompt": [1, 99999] }),
            400,
            json!("prompt"),
            "99999",
        ),
        (
            json!({ "prompt": [1, -1] }),
            400,
            json!("prompt"),
            "token ids",
        ),
        (
            json!({ "prompt": vec![5; 301] }),
            400,
            json!("prompt"),
            "--max-prompt-tokens",
        ),
        (
            json!({ "prompt": many }),
            400,
            json!("prompt"),
            "several requests",
        ),
        (
            json!({ "prompt": "a", "max_tokens": -1 }),
            400,
            json!("max_tokens"),
            "from 0 to 4096",
        ),
        (
            json!({ "prompt": "a", "max_tokens": "7" }),
            400,
            json!("max_tokens"),
            "whole number",
        ),
        (
            json!({ "prompt": "a", "temperature": "hot" }),
            400,
            json!("temperature"),
            "number",
        ),
        (
            json!({ "prompt": "a", "temperature": -1 }),
            400,
            json!("temperature"),
            "from 0",
        ),
        (
            json!({ "prompt": "a", "top_p": 2 }),
            400,
            json!("top_p"),
            "to 1",
        ),
        (json!({ "prompt": "a", "n": 0 }), 400, json!("n"), "from 1"),
        (
            json!({ "prompt": "a", "best_of": 3 }),
            400,
            json!("best_of"),
            "leave it out",
        ),
        (
            json!({ "prompt": "a", "suffix": "b" }),
            400,
            json!("suffix"),
            "leave it out",
        ),
        (
            json!({ "prompt": "a", "presence_penalty": 1 }),
            400,
            json!("presence_penalty"),
            "repetition_penalty",
        ),
        (
            json!({ "prompt": "a", "stop": ["1", "2", "3", "4", "5"] }),
            400,
            json!("stop"),
            "4",
        ),
        (
            json!({ "prompt": "a", "stop": "" }),
            400,
            json!("stop"),
            "empty",
        ),
        (
            json!({ "prompt": "a", "logprobs": 21 }),
            400,
            json!("logprobs"),
            "to 20",
        ),
        (
            json!({ "prompt": "a", "stream_options": {} }),
            400,
            json!("stream_options"),
            "`stream`",
        ),
        (
            json!({ "prompt": "a", "echo": "yes" }),
            400,
            json!("echo"),
            "true or false",
        ),
        (json!(["prompt"]), 400, Value::Null, "not a JSON object"),
    ] {
        let answer = send(&body.to_string(), authorized)?;
        let error = answer.json()?["error"].clone();
        assert_eq!(
            (answer.status, &error["param"]),
            (status, &param),
            "{body}: {error}"
        );
        assert!(text(&error["message"]).contains(words), "{body}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    // Null is as good as nothing, and what nobody knows is left alone.
    let odd = json!({ "prompt": "a", "max_tokens": 1, "stop": null, "n": null, "user": "u", "unknown": { "deep": [1] } });
    send(&odd.to_string(), authorized)?.ok()?;

    assert_eq!(send(r#"{"prompt": "a""#, authorized)?.status, 400);
    assert_eq!(send(r#"{"prompt": "a"}"#, "")?.status, 401);
    assert_eq!(
        send(r#"{"prompt": "a"}"#, "authorization: Bearer wrong\r\n")?.status,
        401
    );
    let form = format!("{authorized}content-type: application/x-www-form-urlencoded\r\n");
    assert_eq!(send(r#"{"prompt": "a"}"#, &form)?.status, 415);
    assert_eq!(
        send(
            &format!("{{\"prompt\": \"{}\"}}", "a".repeat(30_000)),
            authorized
        )?
        .status,
        413
    );
    for (path, status, code) in [
        ("/v1/nothing", 404, "not_found"),
        ("/v1/completions", 401, "invalid_api_key"),
        ("/v1/models", 401, "invalid_api_key"),
    ] {
        let answer = get(server.address, path)?;
        assert_eq!(
            (answer.status, &answer.json()?["error"]["code"]),
            (status, &json!(code)),
            "{path}"
        );
    }
    let head =
        format!("GET {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{authorized}\r\n");
    assert_eq!(http::raw(server.address, head.as_bytes())?.status, 405);
    assert_eq!(get(server.address, "/health")?.ok()?["status"], "ok");
    server.expect_idle(16, SOON)
}
