//! What a recipe may say, and what it means.

use std::path::Path;

use supra_recipes::Recipe;
use supra_recipes::plan::ModelShape;
use supra_recipes::schema::{Attention, Base, Budget, Decay, Precision, Shape, Tokens, Warmup};

const SMALLEST: &str =
    "name: t\nbase: { path: b }\ndata: { train: d }\nbudget: { pretraining_tokens: 2T }\n";

fn parse(text: &str) -> Recipe {
    Recipe::parse(text, "t.yaml").unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn the_defaults_are_the_papers() {
    let recipe = parse(SMALLEST);
    assert_eq!(recipe.attention, Attention::Supra);
    assert_eq!(recipe.base, Base::Pretrained("b".into()));
    assert_eq!(
        (
            recipe.model.decay,
            recipe.model.qk_norm,
            recipe.model.precision
        ),
        (Decay::Alibi, false, Precision::Bf16)
    );
    assert_eq!(recipe.budget.tokens(), 100_000_000_000);
    assert_eq!(
        (recipe.batch.tokens, recipe.batch.sequence_length),
        (Tokens(2_097_152), 2048)
    );
    let optimizer = &recipe.optimizer;
    assert_eq!(
        (optimizer.lr, optimizer.final_lr, optimizer.warmup),
        (3e-5, 1e-5, Warmup::Steps(1000))
    );
    assert_eq!(
        (optimizer.betas, optimizer.eps, optimizer.weight_decay),
        ((0.9, 0.95), 1e-8, 0.1)
    );
    assert_eq!(
        (
            optimizer.clip,
            optimizer.z_loss,
            optimizer.decay_norms_and_biases
        ),
        (1.0, 0.0, false)
    );
    assert_eq!(
        (recipe.checkpoint.every_tokens, recipe.checkpoint.keep),
        (Tokens(1_000_000_000).into(), 3)
    );
    assert!(recipe.data.reset_at_document && !recipe.data.repeat);
}

#[test]
fn random_weights_take_their_shape_from_a_directory_or_a_name() {
    let base = |keys: &str| {
        let recipe = parse(&SMALLEST.replace("path: b", keys)).resolved(Path::new("/r"));
        assert_eq!(parse(&recipe.to_yaml()), recipe);
        recipe.base
    };
    let untrained = base("path: b, weights: random");
    assert_eq!(untrained, Base::Untrained("/r/b".into()));
    assert_eq!(untrained.directory(), Some(Path::new("/r/b")));
    for (name, shape, known) in [
        ("mistral-7b", Shape::Mistral7b, ModelShape::MISTRAL_7B),
        ("llama2-7b", Shape::Llama2_7b, ModelShape::LLAMA2_7B),
    ] {
        let named = base(&format!("random: {name}"));
        assert_eq!(named, Base::Random(shape));
        assert_eq!(named.to_string(), name);
        assert_eq!(named.directory(), None);
        assert_eq!(ModelShape::from(shape), known);
    }
}

#[test]
fn the_resolved_recipe_says_everything() {
    insta::assert_snapshot!(parse(SMALLEST).resolved(Path::new("/recipes")).to_yaml());
}

#[test]
fn a_resolved_recipe_reads_back_as_itself() {
    for change in [
        "",
        "attention: softmax\n",
        "optimizer: { warmup: 2B, lr: 1, final_lr: 0 }\n",
        "checkpoint: { to: c }\n",
        "checkpoint: { to: s3://bucket/a/b/ }\n",
        "checkpoint: { every_tokens: auto }\n",
        "chaos: {}\n",
        "chaos: { faults: 3, every: 1500 ms, kinds: [kill, stop, kill], seed: 9 }\n",
    ] {
        let recipe = parse(&format!("{SMALLEST}{change}")).resolved(Path::new("/recipes"));
        assert_eq!(parse(&recipe.to_yaml()), recipe, "{change}");
    }
}

#[test]
fn checkpoints_go_to_a_directory_or_an_object_store() {
    for (to, path) in [
        ("c", "/recipes/c"),
        ("/c", "/c"),
        ("file:///c", "/c"),
        ("s3://bucket", "s3://bucket"),
        ("gs://bucket/a/b/", "gs://bucket/a/b"),
    ] {
        let recipe = parse(&format!("{SMALLEST}checkpoint: {{ to: '{to}' }}\n"));
        let resolved = recipe.resolved(Path::new("/recipes"));
        assert_eq!(resolved.checkpoint.to.as_deref(), Some(Path::new(path)));
    }
}

#[test]
fn chaos_is_every_kind_of_fault_unless_said_and_none_without_the_key() {
    assert_eq!(parse(SMALLEST).chaos, None);
    let chaos = parse(&format!("{SMALLEST}chaos: {{}}\n")).chaos.unwrap();
    assert_eq!(
        chaos.warning(),
        "this run breaks its own workers on purpose: 20 faults, one every 30 s (kill, stop, disconnect, reset, drain)"
    );
}

#[test]
fn a_run_is_evaluated_only_when_it_says_so() {
    assert_eq!(parse(SMALLEST).eval, None);
    let text = SMALLEST.replace("{ train: d }", "{ train: d, heldout: h }");
    let eval = |keys: &str| parse(&format!("{text}eval: {keys}\n")).eval.unwrap();
    let defaults = eval("{}");
    assert_eq!(
        (
            defaults.every_tokens,
            defaults.windows,
            defaults.target_loss
        ),
        (Tokens(100_000_000), 64, None)
    );
    let said = eval("{ every_tokens: 1B, windows: 8, target_loss: 2.25 }");
    assert_eq!((said.windows, said.target_loss), (8, Some(2.25)));
    let recipe = parse(&format!("{text}eval: {{ target_loss: 2 }}\n"));
    assert_eq!(parse(&recipe.to_yaml()), recipe);
}

#[test]
fn paths_are_taken_from_the_recipes_directory() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("r.yaml");
    std::fs::write(
        &file,
        SMALLEST.replace("{ train: d }", "{ train: /abs, heldout: h.json }"),
    )
    .unwrap();
    let recipe = Recipe::load(&file).unwrap();
    assert_eq!(recipe.base, Base::Pretrained(directory.path().join("b")));
    assert_eq!(recipe.data.train, Path::new("/abs"));
    assert_eq!(recipe.data.heldout, Some(directory.path().join("h.json")));
}

#[test]
fn token_counts_are_exact_in_every_spelling() {
    let spellings = [
        ("131072", 131_072),
        ("128Ki", 131_072),
        ("1.5M", 1_500_000),
        ("\"0.5k tokens\"", 500),
        ("20 B", 20_000_000_000),
        ("1e9", 1_000_000_000),
        ("1.25Gi", 1_342_177_280),
        ("18446744073709551615", u64::MAX),
    ];
    for (spelling, count) in spellings {
        let text = SMALLEST.replace("pretraining_tokens: 2T", &format!("tokens: {spelling}"));
        let text = format!(
            "{text}batch: {{ sequence_length: 1, tokens: 1 }}\noptimizer: {{ warmup: 1 step }}\n"
        );
        assert_eq!(parse(&text).budget.tokens(), count, "{spelling}");
    }
}

#[test]
fn a_token_count_displays_exactly_and_reads_back() {
    for count in [
        1,
        999,
        1_000,
        1_024,
        1_500,
        131_072,
        2_097_152,
        2_000_000_000_000,
        1_500_000,
        u64::MAX,
    ] {
        let text = Tokens(count).to_string();
        assert_eq!(text.parse(), Ok(Tokens(count)), "{text}");
    }
    assert_eq!(Tokens(2_097_152).to_string(), "2Mi");
    assert_eq!(Tokens(1_500_000).to_string(), "1500k");
}

#[test]
fn fractions_round_to_the_nearest_token() {
    for (share, expected) in [("0.29", 29), ("0.07", 7), ("1", 100)] {
        let text = SMALLEST.replace(
            "pretraining_tokens: 2T",
            &format!("pretraining_tokens: 100, fraction: {share}"),
        );
        let text = format!(
            "{text}batch: {{ sequence_length: 1, tokens: 1 }}\noptimizer: {{ warmup: 1 step }}\n"
        );
        assert_eq!(parse(&text).budget.tokens(), expected);
    }
    assert_eq!(Budget::exactly(Tokens(5)).tokens(), 5);
}

#[test]
fn comments_quotes_and_punctuation_inside_values_are_text() {
    let text = SMALLEST
        .replace("{ path: b }", "{ path: 'models/*&!/it''s' } # & * !")
        .replace("{ train: d }", "\n  train: /data/R, &D *x* [1] #1 !\n");
    let recipe = parse(&text);
    assert_eq!(recipe.base, Base::Pretrained("models/*&!/it's".into()));
    assert_eq!(recipe.data.train, Path::new("/data/R, &D *x* [1]"));
}
