//! Contradictions between keys, each pointing at the key that the recipe wrote.

use super::chaos::ChaosKind;
use super::period::Period;
use super::position;
use super::recipe::{Attention, Recipe};
use super::report::Finding;

/// The first contradiction in `recipe`, which was read from `text`.
pub(super) fn check(recipe: &Recipe, text: &str) -> Result<(), Finding> {
    let checks = [
        budget,
        batch,
        schedule,
        workers,
        coordinator,
        chaos,
        attention,
        resume,
        eval,
    ];
    checks
        .iter()
        .find_map(|check| check(recipe, text))
        .map_or(Ok(()), Err)
}

/// A finding at the first of `paths` that the text has; a default cannot be pointed at.
fn at(text: &str, paths: &[&[&str]], message: String, help: String) -> Option<Finding> {
    let span = paths.iter().find_map(|path| position::of_key(text, path));
    Some(Finding::new(span, message, help))
}

fn budget(recipe: &Recipe, text: &str) -> Option<Finding> {
    let budget = &recipe.budget;
    let length = u64::from(recipe.batch.sequence_length);
    if budget.tokens.is_some() && (budget.pretraining_tokens.is_some() || budget.fraction.is_some())
    {
        let message =
            "`budget.tokens` together with `pretraining_tokens` or `fraction`: which is it?";
        let help = "keep either `tokens`, or `pretraining_tokens` with `fraction`";
        return at(text, &[&["budget", "tokens"]], message.into(), help.into());
    }
    if budget.tokens.is_none() && budget.pretraining_tokens.is_none() {
        let help = "write `budget: { pretraining_tokens: 2T, fraction: 0.05 }` or `budget: { tokens: 20B }`";
        return at(
            text,
            &[&["budget"]],
            "the budget names no tokens".into(),
            help.into(),
        );
    }
    if budget.tokens() < length {
        let message = format!(
            "the budget of {} tokens is smaller than one sample of {length}",
            budget.tokens()
        );
        let help =
            "a sample is `batch.sequence_length` tokens: raise the budget or shorten the samples";
        return at(text, &[&["budget"]], message, help.into());
    }
    None
}

fn batch(recipe: &Recipe, text: &str) -> Option<Finding> {
    let (tokens, length) = (
        recipe.batch.tokens.0,
        u64::from(recipe.batch.sequence_length),
    );
    if tokens.is_multiple_of(length) {
        return None;
    }
    let below = tokens - tokens % length;
    let above = below.checked_add(length);
    let neighbours: Vec<String> = [Some(below), above]
        .into_iter()
        .flatten()
        .filter(|n| *n > 0)
        .map(|n| n.to_string())
        .collect();
    let message = format!(
        "`batch.tokens` = {tokens} is not a multiple of `batch.sequence_length` = {length}"
    );
    let help = format!("the nearest multiples are {}", neighbours.join(" and "));
    at(
        text,
        &[&["batch", "tokens"], &["batch", "sequence_length"]],
        message,
        help,
    )
}

fn schedule(recipe: &Recipe, text: &str) -> Option<Finding> {
    let optimizer = &recipe.optimizer;
    if optimizer.final_lr > optimizer.lr {
        let message = format!(
            "`final_lr` = {} is above `lr` = {}",
            optimizer.final_lr, optimizer.lr
        );
        let help = "the learning rate falls from `lr` to `final_lr`: swap or lower them".into();
        return at(
            text,
            &[&["optimizer", "final_lr"], &["optimizer", "lr"]],
            message,
            help,
        );
    }
    let budget = recipe.budget.tokens();
    let warmup = optimizer.warmup.tokens(recipe.batch.tokens.0);
    if warmup.is_none_or(|warmup| warmup > budget) {
        let message = format!(
            "the warm-up of {} in batches of {} tokens is longer than the budget of {budget} tokens",
            optimizer.warmup, recipe.batch.tokens
        );
        let help = "shorten `optimizer.warmup` (1000 steps unless said) or `batch.tokens`, or raise the budget".into();
        return at(
            text,
            &[&["optimizer", "warmup"], &["batch", "tokens"], &["budget"]],
            message,
            help,
        );
    }
    None
}

/// The longest `workers.grace`: training stands still for it after every change of membership.
const MAX_GRACE: Period = Period::seconds(600);

fn workers(recipe: &Recipe, text: &str) -> Option<Finding> {
    let (workers, samples) = (&recipe.workers, recipe.batch.samples());
    if workers.min > workers.max {
        let message = format!(
            "`workers.min` = {} is above `workers.max` = {}",
            workers.min, workers.max
        );
        return at(
            text,
            &[&["workers", "min"], &["workers", "max"]],
            message,
            "raise `max` or lower `min`".into(),
        );
    }
    if u64::from(workers.min) > samples {
        let message = format!(
            "`workers.min` = {} but a step has only {samples} samples to share",
            workers.min
        );
        let help = "lower `workers.min` or raise `batch.tokens`".into();
        return at(text, &[&["workers", "min"]], message, help);
    }
    if workers.grace > MAX_GRACE {
        let message = format!("`workers.grace` = {} is above {MAX_GRACE}", workers.grace);
        let help = "every generation may wait that long for stragglers; `workers.min` waits for as long as it takes";
        return at(text, &[&["workers", "grace"]], message, help.into());
    }
    None
}

/// The longest `coordinator.away`: a coordinator that starts again waits that long for workers that are gone.
const MAX_AWAY: Period = Period::seconds(3600);

fn coordinator(recipe: &Recipe, text: &str) -> Option<Finding> {
    let away = recipe.coordinator.away;
    if away <= MAX_AWAY {
        return None;
    }
    let message = format!("`coordinator.away` = {away} is above {MAX_AWAY}");
    let help =
        "a coordinator that starts again may have to wait that long for workers that are gone";
    at(text, &[&["coordinator", "away"]], message, help.into())
}

/// The shortest `chaos.every`: below it nothing is trained between two faults.
const MIN_CHAOS: Period = Period::seconds(1);

fn chaos(recipe: &Recipe, text: &str) -> Option<Finding> {
    let chaos = recipe.chaos.as_ref()?;
    let found = |key: &str, message: String, help: &str| {
        at(text, &[&["chaos", key], &["chaos"]], message, help.into())
    };
    if chaos.kinds.is_empty() {
        let message = "`chaos.kinds` names no fault".to_owned();
        return found(
            "kinds",
            message,
            "name some, or remove the key for all of them",
        );
    }
    if chaos.every < MIN_CHAOS {
        let message = format!("`chaos.every` = {} is below {MIN_CHAOS}", chaos.every);
        return found(
            "every",
            message,
            "the run has to recover from one fault before the next",
        );
    }
    let reset = chaos.kinds.iter().all(|kind| *kind == ChaosKind::Reset);
    if reset && recipe.workers.max == 1 {
        let message = "`reset` breaks connections between ranks, and `workers.max` = 1".to_owned();
        return found("kinds", message, "raise `workers.max`, or name other kinds");
    }
    None
}

/// The most steps that are compared after a restore: the journal keeps what they came to.
const MAX_VERIFY_STEPS: u32 = 1000;

fn resume(recipe: &Recipe, text: &str) -> Option<Finding> {
    let steps = recipe.resume.verify_steps;
    if steps <= MAX_VERIFY_STEPS {
        return None;
    }
    let message = format!("`resume.verify_steps` = {steps} is above {MAX_VERIFY_STEPS}");
    let help = "two steps show a wrong restore; `replica_check.every_steps` compares replicas while they train";
    at(text, &[&["resume", "verify_steps"]], message, help.into())
}

fn eval(recipe: &Recipe, text: &str) -> Option<Finding> {
    recipe.eval.as_ref()?;
    if recipe.data.heldout.is_some() {
        return None;
    }
    let message = "`eval` measures the loss on held-out text, and `data.heldout` names none";
    let help = "write `data: { train: DIRECTORY, heldout: DIRECTORY/heldout.json }` (`supra data tokenize --heldout 1000` makes \
                it), or remove `eval`";
    at(text, &[&["eval"]], message.into(), help.into())
}

/// Keys of `model` that only linear attention reads.
pub(super) const SUPRA_ONLY: [&str; 3] = ["decay", "qk_norm", "chunk"];

fn attention(recipe: &Recipe, text: &str) -> Option<Finding> {
    if recipe.attention == Attention::Supra {
        return None;
    }
    SUPRA_ONLY.iter().find_map(|key| {
        let span = position::of_key(text, &["model", key])?;
        let message = format!("`model.{key}` has no meaning with `attention: softmax`");
        Some(Finding::new(
            Some(span),
            message,
            format!("remove `{key}`, or write `attention: supra`"),
        ))
    })
}
