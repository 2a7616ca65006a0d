//! What a tokenizer's own configuration says.

use std::fs;

use serde_json::json;
use supra_data::TextTokenizer;

use crate::support::{BOS, EOT, Place, VOCABULARY, assert_error, tokenizer_json, write_json};

#[test]
fn eot_and_bos_come_from_the_configuration() {
    let place = Place::new();
    let load = || TextTokenizer::load(&place.tokenizer()).unwrap();
    let tokenizer = load();
    assert_eq!(
        (tokenizer.eot(), tokenizer.bos(), tokenizer.vocabulary()),
        (EOT, Some(BOS), VOCABULARY)
    );
    assert!(!tokenizer.adds_bos());
    assert_eq!(
        TextTokenizer::load(&place.tokenizer().join("tokenizer.json"))
            .unwrap()
            .eot(),
        EOT
    );

    place.configure(json!({"eos_token": null}));
    write_json(
        &place.tokenizer().join("config.json"),
        &json!({"eos_token_id": 9, "vocab_size": 512}),
    );
    assert_eq!((load().eot(), load().bos()), (9, None));
    write_json(
        &place.tokenizer().join("generation_config.json"),
        &json!({"eos_token_id": [8, 9], "bos_token_id": 7}),
    );
    assert_eq!((load().eot(), load().bos()), (8, Some(7)));
    write_json(
        &place.tokenizer().join("special_tokens_map.json"),
        &json!({"eos_token": {"content": "w6"}}),
    );
    assert_eq!(load().eot(), 6);
}

#[test]
fn a_post_processor_that_adds_bos_is_noticed() {
    let place = Place::new();
    let mut tokenizer = tokenizer_json();
    tokenizer["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}});
    write_json(&place.tokenizer().join("tokenizer.json"), &tokenizer);
    assert!(TextTokenizer::load(&place.tokenizer()).unwrap().adds_bos());
    place.configure(json!({"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": false}));
    assert!(!TextTokenizer::load(&place.tokenizer()).unwrap().adds_bos());
}

#[test]
fn a_tokenizer_that_does_not_fit_is_refused() {
    let place = Place::new();
    let load = || TextTokenizer::load(&place.tokenizer());
    place.configure(json!({}));
    assert_error(
        load(),
        &[
            "tokenizer.json",
            "which token ends a document",
            "tokenizer_config.json",
        ],
    );
    place.configure(json!({"eos_token": "<|end|>"}));
    assert_error(
        load(),
        &[
            "tokenizer_config.json",
            "\"<|end|>\" is not in the tokenizer's vocabulary",
        ],
    );
    place.configure(json!({"eos_token_id": 502}));
    assert_error(load(), &["502 is outside the tokenizer's 502 ids"]);
    place.configure(json!({"eos_token": "</s>"}));
    write_json(
        &place.tokenizer().join("config.json"),
        &json!({"vocab_size": 400}),
    );
    assert_error(load(), &["config.json", "400 embeddings", "ids up to 501"]);
    fs::write(place.tokenizer().join("config.json"), "{").unwrap();
    assert_error(load(), &["config.json: is not JSON"]);
    fs::remove_file(place.tokenizer().join("config.json")).unwrap();

    fs::write(place.tokenizer().join("tokenizer.json"), "{}").unwrap();
    assert_error(load(), &["tokenizer.json: is not a Hugging Face tokenizer"]);
    fs::remove_file(place.tokenizer().join("tokenizer.json")).unwrap();
    assert_error(load(), &["tokenizer.json", "No such file"]);
    fs::write(place.tokenizer().join("tokenizer.model"), "").unwrap();
    assert_error(load(), &["only a SentencePiece model", "save_pretrained"]);
}
