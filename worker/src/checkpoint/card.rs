//! The model card of an exported model: `README.md`, filled from what the checkpoint knows.

use std::fmt::Write;

use supra_checkpoint::Manifest;
use supra_checkpoint::manifest::Measured;
use supra_recipes::Recipe;
use supra_recipes::schema::{Base, Precision};

use super::Origin;
use crate::model::{Decay, ModelConfig, RopeFrequencies};

/// Name of the file.
pub const CARD: &str = "README.md";

/// Where the weights come from.
pub struct Training<'a> {
    /// The checkpoint's manifest.
    pub manifest: &'a Manifest,
    /// What goes into `supra_origin.json`.
    pub origin: &'a Origin<'a>,
    /// The model card of the base, if one lies beside its weights.
    pub base_card: Option<&'a str>,
}

/// The card of a model that is stored as `dtype`; `library` says that transformers loads the directory. Without `training`
/// nobody knows how the weights came to be, and the card says so.
pub fn render(
    config: &ModelConfig,
    dtype: &str,
    library: bool,
    training: Option<&Training>,
) -> String {
    let recipe = training.and_then(|training| {
        let manifest = training.manifest;
        Recipe::parse(&manifest.recipe, &manifest.run).ok()
    });
    let name = match (&recipe, training) {
        (Some(recipe), _) => recipe.name.to_string(),
        (None, Some(training)) => training.manifest.run.clone(),
        (None, None) => "A model".to_owned(),
    };
    let licence = training
        .and_then(|training| training.base_card)
        .and_then(licence_of);
    let mut card = front_matter(config, library, licence);
    let mut say = |text: &str| card += text;
    say(&format!("\n# {name}\n"));
    say(match config.supra() {
        Some(_) => {
            "\nA [SUPRA](https://arxiv.org/abs/2405.06640) model: a pretrained transformer whose softmax attention was replaced by\n\
             linear attention. It trains like a transformer and generates like a recurrent network: its state does not grow with\n\
             the text.\n"
        }
        None => "\nA transformer with softmax attention.\n",
    });
    if library {
        say(&usage(config));
    }
    say(&table("The model", &shape(config, dtype)));
    match training {
        Some(training) => say(&table("Training", &history(training, recipe.as_ref()))),
        None => say(
            "\n## Training\n\nNone recorded: the weights come from a model directory, not from a checkpoint.\n",
        ),
    }
    let measured = training.and_then(|training| training.manifest.measured.as_ref());
    match measured {
        Some(measured) => say(&table("Evaluation", &evaluation(measured, recipe.as_ref()))),
        None => say(
            "\n## Evaluation\n\nNone recorded. `supra-worker eval --model DIR --data MANIFEST` measures loss and perplexity.\n",
        ),
    }
    let licence = match (licence, training.map(|training| training.base_card)) {
        (Some(licence), _) => format!("The base's model card says `{licence}`."),
        (None, Some(Some(_))) => {
            "Unknown: the base's model card does not say what it is under.".to_owned()
        }
        (None, _) => "Unknown: there is no model card beside the base.".to_owned(),
    };
    say(&format!("\n## Licence\n\n{licence}\n"));
    if let Some(Training { manifest, .. }) = training {
        // As it is: names and paths in it are those of the run.
        say(&format!(
            "\n## Recipe\n\n````yaml\n{}\n````\n",
            manifest.recipe.trim_end()
        ));
    }
    card
}

/// What model hubs read.
fn front_matter(config: &ModelConfig, library: bool, licence: Option<&str>) -> String {
    let mut text = format!("---\nlicense: {}\n", licence.unwrap_or("unknown"));
    if library {
        text += "library_name: transformers\n";
    }
    text += "pipeline_tag: text-generation\n";
    if config.supra().is_some() {
        text += "tags: [supra, linear-attention]\n";
    }
    text + "---\n"
}

fn usage(config: &ModelConfig) -> String {
    let (argument, remark) = match config.supra() {
        Some(_) => (
            ", trust_remote_code=True",
            "\n`trust_remote_code` has the library run `modeling_supra.py` of this directory. Batches for generation are padded on the\n\
             left. Decay, state and norms are computed in fp32, whatever the weights are in.\n",
        ),
        None => ("", ""),
    };
    format!(
        "\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
         model = AutoModelForCausalLM.from_pretrained(\"DIR\"{argument})\n\
         tokenizer = AutoTokenizer.from_pretrained(\"DIR\")\n\
         inputs = tokenizer(\"Once upon a time\", return_tensors=\"pt\")\n\
         print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))\n```\n{remark}"
    )
}

type Row = (&'static str, String);

fn shape(config: &ModelConfig, dtype: &str) -> Vec<Row> {
    let parameters: i64 = config.params().iter().map(|spec| spec.elements()).sum();
    let mut rows = vec![
        ("parameters", parameters.to_string()),
        ("stored as", dtype.to_owned()),
        (
            "layers, width, feed-forward",
            format!("{}, {}, {}", config.layers, config.dim, config.ffn),
        ),
        (
            "heads, key/value heads",
            format!("{}, {}", config.heads, config.kv_heads),
        ),
        ("vocabulary", config.vocab.to_string()),
        ("rotary base", config.rope_theta.to_string()),
    ];
    if let Some(supra) = config.supra() {
        let decay = match supra.decay {
            Decay::Alibi => "exp(-s) with ALiBi's slopes s",
            Decay::Retnet => "RetNet's, 1 - 2^(-5-h)",
            Decay::None => "none",
        };
        let frequencies = match supra.rope_frequencies {
            RopeFrequencies::Exact => "exact",
            RopeFrequencies::Bf16 => "rounded to bf16",
        };
        let state = config.layers * config.heads * config.head_dim * config.head_dim * 4;
        rows.extend([
            ("decay of heads", decay.to_owned()),
            ("rotary frequencies", frequencies.to_owned()),
            ("norm of queries and keys", yes(supra.qk_norm)),
            ("state of a sequence", format!("{state} bytes, fp32")),
        ]);
    }
    rows
}

fn history(training: &Training, recipe: Option<&Recipe>) -> Vec<Row> {
    let Training {
        manifest, origin, ..
    } = training;
    let mut rows = vec![
        ("run", manifest.run.clone()),
        (
            "step",
            format!("{} (generation {})", manifest.step, manifest.generation),
        ),
        ("tokens behind the weights", manifest.tokens.to_string()),
    ];
    if let Some(recipe) = recipe {
        let budget = &recipe.budget;
        let of = match budget.pretraining_tokens {
            Some(pretraining) => format!(", a share of the {pretraining} of pretraining"),
            None => String::new(),
        };
        let base = match &recipe.base {
            Base::Pretrained(path) => format!("{}, pretrained", path.display()),
            Base::Untrained(path) => format!("{}, random weights", path.display()),
            Base::Random(shape) => format!("{shape}, random weights"),
        };
        rows.extend([
            ("budget in tokens", format!("{}{of}", budget.tokens())),
            ("base", base),
            ("data", recipe.data.train.display().to_string()),
            ("documents apart", yes(recipe.data.reset_at_document)),
            ("tokens per step", recipe.batch.tokens.0.to_string()),
            (
                "tokens per sample",
                recipe.batch.sequence_length.to_string(),
            ),
            ("precision", precision(recipe.model.precision)),
            ("optimizer's moments", precision(recipe.optimizer.moments)),
        ]);
    }
    let environment = &manifest.environment;
    rows.extend([
        ("dataset manifest, BLAKE3", manifest.dataset.clone()),
        ("tokenizer, BLAKE3", manifest.tokenizer.clone()),
        (
            "ranks",
            format!(
                "{} x {} ({})",
                manifest.world, environment.model, environment.device
            ),
        ),
        (
            "program",
            format!(
                "supra {}, libtorch {}",
                environment.build, environment.libtorch
            ),
        ),
        (
            "head of the ledger",
            match origin.ledger_head {
                "" => "not recorded".to_owned(),
                head => head.to_owned(),
            },
        ),
        ("checkpoint manifest, BLAKE3", origin.manifest_hash.clone()),
    ]);
    rows
}

/// What the run has measured.
fn evaluation(measured: &Measured, recipe: Option<&Recipe>) -> Vec<Row> {
    let mut rows = Vec::new();
    let number = |value: Option<f64>, show: fn(f64) -> String| {
        value.map_or_else(|| "not a finite number".to_owned(), show)
    };
    if let Some(heldout) = &measured.heldout {
        let data = recipe.and_then(|recipe| recipe.data.heldout.as_ref());
        let data = data.map_or_else(String::new, |data| format!(" of {}", data.display()));
        rows.extend([
            (
                "held-out loss, nats per token",
                number(heldout.loss, |loss| format!("{loss:.4}")),
            ),
            (
                "perplexity",
                number(heldout.loss.map(f64::exp), |it| format!("{it:.2}")),
            ),
            (
                "measured on",
                format!(
                    "{} targets of {} windows{data}",
                    heldout.targets, heldout.windows
                ),
            ),
        ]);
    }
    if let Some(gates) = &measured.gates {
        rows.extend([
            (
                "parallel against recurrent logits, greatest difference",
                number(gates.form_error, |it| format!("{it:.1e}")),
            ),
            (
                "features that are always zero, worst block",
                number(gates.dead_features, |it| format!("{:.1} %", 100.0 * it)),
            ),
        ]);
        // Not known without the base.
        let of_start = [
            (
                "drift of attention from the base's, worst block",
                gates.drift,
            ),
            (
                "growth of what head norms read, worst block",
                gates.norm_growth,
            ),
        ];
        let known = of_start
            .into_iter()
            .filter_map(|(name, it)| Some((name, it?)));
        rows.extend(known.map(|(name, it)| (name, format!("{it:.2}"))));
    }
    rows
}

fn yes(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

fn precision(precision: Precision) -> String {
    match precision {
        Precision::Bf16 => "bf16",
        Precision::Fp32 => "fp32",
    }
    .to_owned()
}

fn table(title: &str, rows: &[Row]) -> String {
    let mut text = format!("\n## {title}\n\n| | |\n|---|---|\n");
    for (what, value) in rows {
        let value = value.replace('|', "\\|").replace('\n', " ");
        writeln!(text, "| {what} | {value} |").expect("invariant: a string takes all text");
    }
    text
}

/// What a model card's front matter calls its licence.
fn licence_of(card: &str) -> Option<&str> {
    let body = card.strip_prefix("---")?.trim_start_matches('\r');
    let front = body.split("\n---").next()?;
    front
        .lines()
        .find_map(|line| line.strip_prefix("license:"))
        .map(|value| value.trim().trim_matches(['"', '\'']))
        .filter(|value| !value.is_empty() && !value.contains(char::is_whitespace))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::tests::small;
    use crate::model::{AttentionKind, SupraConfig};
    use supra_checkpoint::manifest::{Environment, Seeds};

    const RECIPE: &str = "name: small\nbase: { path: /models/a|b }\ndata: { train: /data/tokens }\n\
                          budget: { pretraining_tokens: 2T, fraction: 0.05 }\noptimizer: { moments: bf16 }\n";

    fn manifest(recipe: &str) -> Manifest {
        Manifest {
            format: 1,
            plan_version: 1,
            run: "run-7".to_owned(),
            generation: 2,
            world: 4,
            step: 11,
            tokens: 22528,
            next_sample: 0,
            updates: 11,
            seeds: Seeds { init: 1, data: 2 },
            replica_hash: String::new(),
            ledger_head: "abad1dea".to_owned(),
            recipe: recipe.to_owned(),
            dataset: "da7a".to_owned(),
            tokenizer: "70ce".to_owned(),
            environment: Environment {
                build: "0.1.0".to_owned(),
                libtorch: "2.11.0".to_owned(),
                device: "cuda".to_owned(),
                model: "NVIDIA H200".to_owned(),
                threads: 1,
                nccl: String::new(),
            },
            measured: None,
            tensors: [].into(),
            files: [].into(),
        }
    }

    fn card(recipe: &str, base_card: Option<&str>) -> String {
        let manifest = manifest(recipe);
        let origin = Origin::new(&manifest, [0xcd; 32]);
        let training = Training {
            manifest: &manifest,
            origin: &origin,
            base_card,
        };
        let config = small(AttentionKind::Supra(SupraConfig::default()));
        render(&config, "bf16", true, Some(&training))
    }

    #[test]
    fn it_says_what_the_checkpoint_knows() {
        let card = card(
            RECIPE,
            Some("---\ntags: [x]\nlicense: apache-2.0\n---\n# B\n"),
        );
        for line in [
            "license: apache-2.0\n",
            "# small\n",
            "trust_remote_code=True",
            "| step | 11 (generation 2) |",
            "| tokens behind the weights | 22528 |",
            "| budget in tokens | 100000000000, a share of the 2T of pretraining |",
            "| base | /models/a\\|b, pretrained |",
            "| data | /data/tokens |",
            "| optimizer's moments | bf16 |",
            "| dataset manifest, BLAKE3 | da7a |",
            "| ranks | 4 x NVIDIA H200 (cuda) |",
            "| head of the ledger | abad1dea |",
            "The base's model card says `apache-2.0`.",
            "budget: { pretraining_tokens: 2T, fraction: 0.05 }\n",
        ] {
            assert!(card.contains(line), "no {line:?} in:\n{card}");
        }
        assert!(card.contains(&"cd".repeat(32)));
    }

    #[test]
    fn what_it_does_not_know_it_says() {
        let without_base = card(RECIPE, None);
        assert!(without_base.contains("license: unknown\n"));
        assert!(without_base.contains("there is no model card beside the base"));
        assert!(without_base.contains("## Evaluation\n\nNone recorded."));
        let silent = card(RECIPE, Some("# A model\nlicense: mit\n"));
        assert!(
            silent.contains("license: unknown\n"),
            "only front matter counts"
        );
        // The recipe of another build stays readable for people.
        let foreign = card("name: x\nnovelty: 1\n", None);
        assert!(foreign.contains("# run-7\n") && foreign.contains("novelty: 1"));
        let softmax = render(&small(AttentionKind::Softmax), "fp32", true, None);
        assert!(!softmax.contains("trust_remote_code") && softmax.contains("None recorded: the"));
    }
}
