//! Every command explains itself.

use crate::support::{Output, run};

const COMMANDS: [&[&str]; 22] = [
    &["up"],
    &["validate"],
    &["plan"],
    &["submit"],
    &["runs"],
    &["status"],
    &["watch"],
    &["logs"],
    &["cancel"],
    &["resume"],
    &["checkpoints"],
    &["workers"],
    &["drain"],
    &["audit"],
    &["replay"],
    &["capsule"],
    &["diff"],
    &["data"],
    &["data", "tokenize"],
    &["data", "index"],
    &["data", "inspect"],
    &["data", "pack"],
];

#[test]
fn every_command_has_help_that_begins_with_what_it_does() {
    let all = run(&["--help"]).expect_code(0).stdout;
    for command in COMMANDS {
        let help = run(&[command, &["--help"]].concat()).expect_code(0).stdout;
        let first = help.lines().next().unwrap_or_default();
        assert!(
            first.chars().next().is_some_and(char::is_uppercase),
            "{command:?}: {first:?}"
        );
        let name = command[command.len() - 1];
        if command.len() == 1 {
            // The overview and the command's own help say the same.
            let start: String = first
                .split_whitespace()
                .take(3)
                .collect::<Vec<_>>()
                .join(" ");
            assert!(all.contains(&start), "{name}: {start:?} is not in\n{all}");
        }
        assert!(
            help.contains(&format!("Usage: supra {}", command.join(" "))),
            "{help}"
        );
    }
}

#[test]
fn options_that_a_machine_may_want_are_there() {
    for command in COMMANDS {
        if command == ["data"] {
            continue;
        }
        let help = run(&[command, &["--help"]].concat()).expect_code(0).stdout;
        assert!(help.contains("--json"), "{command:?}:\n{help}");
    }
}

#[test]
fn a_mistyped_command_is_bad_input_with_a_suggestion() {
    let Output { stderr, .. } = run(&["valdate"]).expect_code(2);
    assert!(stderr.contains("'validate'"), "{stderr}");
}

#[test]
fn exit_codes_are_listed() {
    assert!(
        run(&["--help"])
            .expect_code(0)
            .stdout
            .contains("75 stopped and resumable")
    );
}
