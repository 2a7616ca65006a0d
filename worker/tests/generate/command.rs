//! `supra-worker generate` as a process.

use std::{
    fs,
    io::{Read, Write},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{SUPRA, model_dir};
use crate::{
    cli::worker,
    fixture::{Generation, World},
};

/// Runs the command; exit code, stdout and stderr.
fn command(model: &Path, arguments: &[&str]) -> (i32, String, String) {
    let model = model.display().to_string();
    worker(&[&["generate", "--model", &model], arguments].concat())
}

/// Its JSON answers.
fn answers(model: &Path, arguments: &[&str]) -> Vec<Value> {
    let (code, out, err) = command(model, &[arguments, &["--json"]].concat());
    assert_eq!(code, 0, "{err}");
    out.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn the_command_continues_prompts_files_and_states() {
    let world = World::new(40);
    let dir = model_dir(&world, SUPRA, 8);
    let path = |name: &str| world.dir.path().join(name).display().to_string();
    let (file, state) = (path("prompt.txt"), path("text.state"));
    fs::write(&file, "w5 w9\n").unwrap();
    let greedy = ["--temperature", "0", "--max-tokens"];
    let texts = answers(
        &dir,
        &[
            &[
                "--prompt",
                "w7",
                "--prompt-file",
                &file,
                "-n",
                "2",
                "--seed",
                "3",
                "--max-tokens",
                "6",
                "--logprobs",
                "2",
            ][..],
            &[],
        ]
        .concat(),
    );
    let names: Vec<(&str, u64)> = texts
        .iter()
        .map(|text| {
            (
                text["prompt"].as_str().unwrap(),
                text["continuation"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(names, [("w7", 0), ("w7", 1), ("w5 w9", 0), ("w5 w9", 1)]);
    for text in &texts {
        let tokens = text["logprobs"].as_array().unwrap();
        assert_eq!(tokens.len() as u64, text["tokens"]);
        let words = tokens.iter().map(|token| token["text"].as_str().unwrap());
        // Special tokens have a name and no text.
        let said: String = words.filter(|word| !word.contains('<')).collect();
        assert_eq!(said, text["text"].as_str().unwrap());
        assert!(
            tokens
                .iter()
                .all(|token| token["top"].as_array().unwrap().len() == 2)
        );
    }

    // Eight tokens at once are five, kept, and three more.
    let whole = &answers(
        &dir,
        &[&["--prompt", "w5 w9"], &greedy[..], &["8"]].concat(),
    )[0];
    let (code, first, err) = command(
        &dir,
        &[
            &["--prompt", "w5 w9", "--save-state", &state],
            &greedy[..],
            &["5"],
        ]
        .concat(),
    );
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("7 tokens and their state are in"), "{err}");
    let rest = &answers(
        &dir,
        &[&["--load-state", &state], &greedy[..], &["3"]].concat(),
    )[0];
    let first = first.strip_prefix("w5 w9").unwrap().trim_end_matches('\n');
    assert_eq!(
        format!("{first}{}", rest["text"].as_str().unwrap()),
        whole["text"].as_str().unwrap()
    );
    assert_eq!(
        (&rest["prompt_tokens"], &rest["finish_reason"]),
        (&7.into(), &"length".into())
    );
    // A prompt behind the state goes on from it.
    let more = &answers(
        &dir,
        &[
            &["--load-state", &state, "--prompt", "w3"],
            &greedy[..],
            &["1"],
        ]
        .concat(),
    )[0];
    assert_eq!(more["prompt_tokens"], 8);

    let compared = answers(&dir, &["--prompt", "w5 w9", "--compare", "--dtype", "bf16"]);
    let comparison = &compared[0]["comparison"];
    assert_eq!(comparison["apart"].as_array().unwrap().len(), 3);
    let (code, out, err) = command(&dir, &["--prompt", "w5 w9", "--compare"]);
    assert_eq!(code, 0, "{err}");
    assert!(
        out.starts_with("w5 w9 ") && out.contains("parallel - recurrent"),
        "{out}"
    );

    let other = model_dir(&world, SUPRA, 9);
    for (model, arguments, code, word) in [
        (&other, vec!["--load-state", &state], 2, "other weights"),
        (&dir, vec!["--load-state", &file], 2, "no saved state"),
        (&dir, vec!["--prompt", ""], 2, "write a prompt"),
        (&dir, vec!["--prompt-file", "/nowhere"], 2, "/nowhere"),
        (
            &dir,
            vec!["--prompt", "w3", "--stop", ""],
            2,
            "stop string is empty",
        ),
        (
            &dir,
            vec!["--prompt", "w3", "-n", "2", "--save-state", &state],
            2,
            "one text",
        ),
        (&dir, vec!["--max-tokens", "3"], 2, "--prompt"),
    ] {
        let (found, out, err) = command(model, &arguments);
        assert_eq!(found, code, "{arguments:?}: {err}");
        assert!(
            err.contains(word) && out.is_empty() && !err.contains("panicked"),
            "{arguments:?}: {err}"
        );
    }
    broken_models_are_told(&dir);
}

/// Without its tokenizer, and with a weight that is no number.
fn broken_models_are_told(dir: &Path) {
    let tokenizer = fs::read(dir.join("tokenizer.json")).unwrap();
    fs::remove_file(dir.join("tokenizer.json")).unwrap();
    let (code, _, err) = command(dir, &["--prompt", "w3"]);
    assert!(code == 2 && err.contains("tokenizer.json"), "{code} {err}");
    fs::write(dir.join("tokenizer.json"), tokenizer).unwrap();
    let weights = dir.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    let (code, _, err) = command(dir, &["--prompt", "w3"]);
    assert!(code == 2 && err.contains("NaN"), "{code} {err}");
}

#[test]
fn a_run_that_trains_is_used_at_its_newest_checkpoint() {
    let world = World::new(120);
    let recipe = world.recipe("");
    let root = world.checkpoints("a");
    let ranks = Generation::new(&recipe, &root).run(1);
    let [.., before, last] = &ranks[0].checkpoints[..] else {
        panic!("too few checkpoints")
    };
    let (code, _, err) = command(&root, &["--prompt", "w5"]);
    assert!(code == 0 && err.contains(&last.path), "{err}");
    // One that is being written does not count.
    fs::remove_file(root.join(&last.path).join("manifest.json")).unwrap();
    let (code, _, err) = command(&root, &["--prompt", "w5"]);
    assert!(code == 0 && err.contains(&before.path), "{err}");
    for checkpoint in &ranks[0].checkpoints {
        let _ = fs::remove_file(root.join(&checkpoint.path).join("manifest.json"));
    }
    let (code, _, err) = command(&root, &["--prompt", "w5"]);
    assert!(code == 2 && err.contains("no complete checkpoint"), "{err}");
}

#[test]
fn standard_input_is_a_prompt_and_ctrl_c_an_end() {
    let world = World::new(40);
    let dir = model_dir(&world, SUPRA, 10);
    // A text without an end.
    let config = dir.join("config.json");
    let mut fields: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    fields.as_object_mut().unwrap().remove("eos_token_id");
    fs::write(&config, fields.to_string()).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_supra-worker"))
        .args([
            "generate",
            "--prompt-file",
            "-",
            "--max-tokens",
            "100000000",
            "--model",
        ])
        .arg(&dir)
        .env("SUPRA_LOCAL_WORKERS", "4096")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"w5 w9\n").unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut begun = [0; 16];
    stdout.read_exact(&mut begun).unwrap();
    assert!(begun.starts_with(b"w5 w9 w"), "{begun:?}");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with('\n'), "what was written is whole");
    let deadline = Instant::now() + Duration::from_secs(60);
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None => assert!(Instant::now() < deadline, "it does not end"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(130));
}
