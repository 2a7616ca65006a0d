//! What the linearisation gates of a checkpoint cost a 7B model.

use std::time::Instant;

use supra_recipes::schema::Shape;
use supra_worker::{
    bench::decode::random_model,
    inference::gates::{ROWS, TOKENS, measure},
    model::{AttentionKind, ModelConfig, SupraConfig},
};
use tch::{Kind, Tensor};

use super::bench::{GPU, sanitized};
use super::gpu;

/// Seconds that nobody misses: an hour of training has some checkpoints.
const CHEAP: f64 = 10.0;

#[test]
fn gpu_gates_of_a_7b_model_are_cheap() {
    if gpu("gpu_gates_of_a_7b_model_are_cheap").is_none() || sanitized() {
        return;
    }
    let supra = AttentionKind::Supra(SupraConfig::default());
    let config = ModelConfig::named(Shape::Mistral7b).with_attention(supra);
    let vocab = config.vocab;
    let model = random_model(config, (Kind::BFloat16, GPU), 3).unwrap();
    let ids_bt = Tensor::randint(vocab, [ROWS as i64, TOKENS], (Kind::Int64, GPU));
    let config = model.transformer.config();
    // The first time the library chooses its algorithms.
    for time in ["first", "next"] {
        let clock = Instant::now();
        let gates = measure(config, &model.params, &ids_bt, None, &|| false).unwrap();
        let seconds = clock.elapsed().as_secs_f64();
        println!(
            "kernel {time} gates of 7.81 B parameters: {seconds:.2} s, forms {:.2e} apart, logits {:.2e}",
            gates.form_error, gates.logit_rms
        );
        assert!(
            gates.form_error < gates.logit_rms,
            "{} apart",
            gates.form_error
        );
        assert!(seconds < CHEAP, "{seconds} s");
    }
}
