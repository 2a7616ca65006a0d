//! Answers that are right.

use std::thread;

use serde_json::{Value, json};
use supra_tests::http::post;
use supra_tests::models::quickstart;
use supra_tests::server::COMPLETIONS;
use supra_tests::{Failure, Result, Server};

use super::{SOON, Stage, text};

#[test]
fn completions_are_those_of_the_command_line_in_whatever_form_they_are_asked_for() -> Result<()> {
    let stage = Stage::new()?;
    let server = stage.serve(&["--slots", "6", "--name", "m"])?;
    let prompts = [
        "The river",
        "In the beginning the people of the old town were",
        "  é",
    ];
    let greedy = json!({ "prompt": prompts, "max_tokens": 40, "temperature": 0 });
    let together = server.complete(&greedy)?;
    assert_eq!(together["object"], "text_completion");
    assert_eq!(together["model"], "m");
    for (at, prompt) in prompts.iter().enumerate() {
        let choice = &together["choices"][at];
        assert_eq!(choice["index"], at);
        assert_eq!(
            text(&choice["text"]),
            stage.generate(&stage.model, prompt, 40)?,
            "{prompt}"
        );
    }

    // Several draws: each seed gives the same whatever else is computed, whole or in pieces.
    let draws =
        json!({ "prompt": prompts[1], "n": 4, "max_tokens": 60, "seed": 7, "temperature": 1.3 });
    let whole = server.complete(&draws)?;
    let mut streamed = draws.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({ "include_usage": true });
    let crowd: Vec<_> = (0..4u32)
        .map(|seed| {
            let address = server.address;
            let noise = json!({ "prompt": "noise", "max_tokens": 50, "seed": seed });
            thread::spawn(move || post(address, COMPLETIONS, &noise).and_then(|answer| answer.ok()))
        })
        .collect();
    let mut pieces = vec![String::new(); 4];
    let mut ends = vec![Value::Null; 4];
    let events = server.stream(&streamed)?.rest()?;
    for piece in &events {
        assert_eq!(piece["id"], events[0]["id"]);
        for choice in piece["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().unwrap_or(99) as usize;
            pieces[index] += &text(&choice["text"]);
            assert!(ends[index].is_null(), "after the end");
            ends[index] = choice["finish_reason"].clone();
        }
    }
    for (at, piece) in pieces.iter().enumerate() {
        assert_eq!(*piece, text(&whole["choices"][at]["text"]), "choice {at}");
        assert_eq!(ends[at], whole["choices"][at]["finish_reason"]);
    }
    assert_ne!(pieces[0], pieces[1], "each draws for itself");
    assert_eq!(
        events.last().map(|last| &last["usage"]),
        Some(&whole["usage"])
    );
    for noise in crowd {
        noise.join().map_err(|_| Failure::new("a client broke"))??;
    }
    server.expect_idle(6, SOON)
}

#[test]
fn log_probabilities_stop_strings_and_token_ids_fit_the_text() -> Result<()> {
    let stage = Stage::new()?;
    // The trained softmax base: its text has words.
    let base = quickstart("base");
    let server = Server::start(
        &stage.programs,
        stage.directory.path(),
        &base,
        &["--slots", "3"],
    )?;
    assert_eq!(
        text(
            &server.complete(&json!({ "prompt": "The", "max_tokens": 24, "temperature": 0 }))?["choices"]
                [0]["text"]
        ),
        stage.generate(&base, "The", 24)?
    );

    let told = server.complete(&json!({ "prompt": "The old man", "max_tokens": 12, "temperature": 0, "logprobs": 3, "echo": true }))?;
    let choice = &told["choices"][0];
    let (whole, logprobs) = (text(&choice["text"]), &choice["logprobs"]);
    assert!(whole.starts_with("The old man"), "{whole}");
    let list = |name: &str| logprobs[name].as_array().cloned().unwrap_or_default();
    let (tokens, offsets) = (list("tokens"), list("text_offset"));
    let (own, top) = (list("token_logprobs"), list("top_logprobs"));
    assert_eq!(
        tokens.len() as u64,
        told["usage"]["total_tokens"].as_u64().unwrap_or(0)
    );
    assert!(
        own[0].is_null() && top[0].is_null(),
        "nothing precedes the first token"
    );
    for at in 1..tokens.len() {
        let offset = offsets[at].as_u64().unwrap_or(999) as usize;
        let token = text(&tokens[at]);
        assert!(
            whole[offset..].starts_with(&token),
            "{token:?} at {offset} of {whole:?}"
        );
        let candidates = top[at].as_object().cloned().unwrap_or_default();
        assert_eq!(candidates[&token], own[at]);
        assert!((3..=4).contains(&candidates.len()), "{candidates:?}");
        assert!(own[at].as_f64().is_some_and(|logprob| logprob <= 0.0));
    }
    // What evaluation harnesses send: the same numbers without a new token, and from ids.
    let ids = server.complete(&json!({ "prompt": "The old man", "max_tokens": 0, "logprobs": 1, "echo": true, "return_token_ids": true }))?;
    let scored = &ids["choices"][0];
    assert_eq!(text(&scored["text"]), "The old man");
    let prompt = scored["token_ids"].clone();
    let length = prompt.as_array().map_or(0, Vec::len);
    let close =
        |a: &Value, b: &Value| (a.as_f64().unwrap_or(0.0) - b.as_f64().unwrap_or(0.0)).abs() < 1e-4;
    let again = server.complete(&json!({ "prompt": [prompt, prompt], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": true }))?;
    for at in 0..length {
        assert!(
            close(&own[at], &scored["logprobs"]["token_logprobs"][at]),
            "token {at}"
        );
        for choice in 0..2 {
            assert!(close(
                &own[at],
                &again["choices"][choice]["logprobs"]["token_logprobs"][at]
            ));
        }
    }
    assert_eq!(
        again["choices"][1]["text"],
        whole[..whole.len()]
            .get(..text(&again["choices"][1]["text"]).len())
            .unwrap_or("")
    );

    // A stop string is cut out, wherever tokens end, and ends the completion early.
    let free =
        server.complete(&json!({ "prompt": "The old man", "max_tokens": 12, "temperature": 0 }))?;
    let free = text(&free["choices"][0]["text"]);
    let middle = free
        .char_indices()
        .nth(free.chars().count() / 2)
        .map_or(0, |(at, _)| at);
    let stop: String = free[middle..].chars().take(3).collect();
    let stopped = json!({ "prompt": "The old man", "max_tokens": 12, "temperature": 0, "stop": ["never there", stop], "logprobs": 0 });
    let answer = server.complete(&stopped)?;
    let cut = text(&answer["choices"][0]["text"]);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(Some(cut.len()), free.find(&stop));
    let offsets = answer["choices"][0]["logprobs"]["text_offset"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    assert!(
        offsets.iter().all(|offset| offset
            .as_u64()
            .is_some_and(|offset| offset < cut.chars().count() as u64)),
        "{offsets:?} in {cut:?}"
    );
    let mut streamed = stopped.clone();
    streamed["stream"] = true.into();
    let pieces = server.stream(&streamed)?.rest()?;
    let pieces: String = pieces
        .iter()
        .map(|piece| text(&piece["choices"][0]["text"]))
        .collect();
    assert_eq!(pieces, cut);
    server.expect_idle(3, SOON)
}
