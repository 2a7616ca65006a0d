//! What commands do when nobody answers, and when nobody listens to them.

use std::process::Stdio;

use crate::support::{nobody, recipe, run, supra};

#[test]
fn an_unreachable_coordinator_ends_with_three_and_names_the_address() {
    let directory = tempfile::tempdir().unwrap();
    let recipe = recipe(directory.path());
    let url = nobody();
    let commands: [&[&str]; 11] = [
        &["submit", recipe.to_str().unwrap()],
        &["runs"],
        &["status"],
        &["watch"],
        &["logs"],
        &["cancel"],
        &["resume"],
        &["checkpoints"],
        &["workers"],
        &["drain", "a"],
        &["audit"],
    ];
    for command in commands {
        let answer = run(&[command, &["--coordinator", &url]].concat()).expect_code(3);
        assert!(
            answer.stderr.contains(&url),
            "{command:?}: {}",
            answer.stderr
        );
        assert!(
            answer.stderr.contains("supra up"),
            "{command:?}: {}",
            answer.stderr
        );
    }
}

#[test]
fn a_state_directory_without_coordinator_ends_with_three() {
    let state = tempfile::tempdir().unwrap();
    let path = state.path().to_str().unwrap();
    let answer = run(&["runs", "--state", path]).expect_code(3);
    assert!(answer.stderr.contains(path), "{}", answer.stderr);
}

#[test]
fn an_address_without_scheme_is_bad_input() {
    let answer = run(&["runs", "--coordinator", "localhost:7070"]).expect_code(2);
    assert!(answer.stderr.contains("http://"), "{}", answer.stderr);
}

#[test]
fn a_closed_stdout_ends_quietly() {
    let directory = tempfile::tempdir().unwrap();
    let recipe = recipe(directory.path());
    for command in [
        ["validate", recipe.to_str().unwrap()],
        ["plan", recipe.to_str().unwrap()],
        ["plan", "--help"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = supra()
            .args(command)
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{command:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{command:?}");
    }
}
