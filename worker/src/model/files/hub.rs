//! What the transformers library wants of a SUPRA model beside its weights: the code of the model, which it loads when told to
//! trust it (`trust_remote_code=True`), and the settings that its own models bring along.

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::draft::Draft;
use super::huggingface::eos_json;
use super::published;
use crate::model::{ModelConfig, ModelError, RopeFrequencies};

/// `model_type` of such a directory.
pub const MODEL_TYPE: &str = "supra";
/// Its entry in `architectures`.
pub const ARCHITECTURE: &str = "SupraForCausalLM";

const CODE: [(&str, &str); 2] = [
    (
        "configuration_supra.py",
        include_str!("huggingface/configuration_supra.py"),
    ),
    (
        "modeling_supra.py",
        include_str!("huggingface/modeling_supra.py"),
    ),
];

/// The `config.json`: the published fields, and where the library finds the code.
pub fn render(config: &ModelConfig, dtype: &str) -> Value {
    let bf16 = config
        .supra()
        .is_some_and(|supra| supra.rope_frequencies == RopeFrequencies::Bf16);
    let mut json = published::render(config);
    for (field, value) in [
        ("architectures", json!([ARCHITECTURE])),
        ("model_type", json!(MODEL_TYPE)),
        (
            "auto_map",
            json!({
                "AutoConfig": "configuration_supra.SupraConfig",
                "AutoModelForCausalLM": format!("modeling_supra.{ARCHITECTURE}"),
            }),
        ),
        ("rotary_base_frequency", json!(config.rope_theta)),
        (
            "rope_frequencies",
            json!(if bf16 { "bf16" } else { "exact" }),
        ),
        ("tie_word_embeddings", json!(config.tied)),
        ("torch_dtype", json!(dtype)),
        ("use_cache", json!(true)),
    ] {
        json[field] = value;
    }
    json
}

/// Writes the code, and of the settings for tokenizer and generation those that did not come with the base.
pub fn complete(draft: &Draft, config: &ModelConfig) -> Result<(), ModelError> {
    for (name, text) in CODE {
        draft.write(name, text.as_bytes())?;
    }
    let generation = json!({
        "bos_token_id": config.bos,
        "eos_token_id": eos_json(&config.eos),
        "use_cache": true,
    });
    draft.write_if_missing("generation_config.json", &pretty(&generation))?;
    let path = draft.path.join("tokenizer.json");
    if path.is_file() {
        // By its model type alone the library would not know the class of the tokenizer.
        let tokenizer = Tokenizer::from_file(&path).ok();
        let token = |id: Option<i64>| {
            let id = u32::try_from(id?).ok()?;
            tokenizer.as_ref()?.id_to_token(id)
        };
        let settings = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token(config.bos),
            "eos_token": token(config.eos.first().copied()),
            "clean_up_tokenization_spaces": false,
        });
        draft.write_if_missing("tokenizer_config.json", &pretty(&settings))?;
    }
    Ok(())
}

fn pretty(json: &Value) -> Vec<u8> {
    format!("{json:#}\n").into_bytes()
}
