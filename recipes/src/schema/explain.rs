//! Turns the deserializer's errors into findings: what is wrong in the recipe's words, and the nearest right spelling.

use serde_json::Value;

use super::position;
use super::recipe::Recipe;
use super::report::Finding;

/// What to write for a required key.
const REQUIRED: [(&str, &str); 5] = [
    ("name", "`name: my-run`"),
    (
        "base",
        "`base: { path: DIRECTORY }`, the directory of the model",
    ),
    (
        "data",
        "`data: { train: DIRECTORY }`, the directory that holds dataset.json",
    ),
    (
        "train",
        "`train: DIRECTORY`, the directory that holds dataset.json",
    ),
    (
        "budget",
        "`budget: { pretraining_tokens: 2T, fraction: 0.05 }` or `budget: { tokens: 20B }`",
    ),
];

/// The deserializer's types in a reader's words.
const WORDS: [(&str, &str); 8] = [
    ("expected struct", "expected the keys of"),
    ("expected a boolean", "expected true or false"),
    ("expected u64", "expected a whole number, 0 or above"),
    ("expected u32", "expected a whole number, 0 or above"),
    ("expected a tuple of size", "expected a list of length"),
    ("field identifier", "a key"),
    ("unit value", "nothing"),
    ("EOF while parsing a value", "the recipe is empty"),
];

/// The finding behind `error`, which reading `text` as any YAML gave.
pub(super) fn yaml(text: &str, error: &serde_yaml::Error) -> Finding {
    let help = "this is not valid YAML: look for an open quote or bracket, or wrong indentation, here or just above";
    Finding::new(
        position::of_error(text, error),
        in_words(without_place(&error.to_string())),
        help,
    )
}

/// The finding behind `error`, which reading `text` as a recipe gave.
pub(super) fn recipe(text: &str, error: &serde_yaml::Error) -> Finding {
    let span = position::of_error(text, error);
    let raw = error.to_string();
    let message = without_place(&raw);
    let (subject, detail) = split_path(message);
    if let Some((name, allowed)) = unknown(detail, "unknown field ") {
        return unknown_name(
            Finding::new(span, format!("unknown key `{name}`{}", below(subject)), ""),
            &name,
            &allowed,
            "keys",
        );
    }
    if let Some((name, allowed)) = unknown(detail, "unknown variant ") {
        let message = format!("unknown value `{name}` of `{}`", subject.unwrap_or("?"));
        return unknown_name(Finding::new(span, message, ""), &name, &allowed, "values");
    }
    if let Some(key) = detail
        .strip_prefix("missing field ")
        .map(|key| key.trim_matches('`'))
    {
        let help = REQUIRED
            .iter()
            .find(|(known, _)| *known == key)
            .map_or("add it", |(_, example)| example);
        return Finding::new(
            span,
            format!("the key `{key}` is missing{}", below(subject)),
            format!("add {help}"),
        );
    }
    let message = match subject {
        Some(path) => format!("`{path}`: {}", in_words(detail)),
        None => in_words(detail),
    };
    Finding::new(
        span,
        message,
        "docs/recipes.md lists every key with its unit and default",
    )
}

/// The parser's message without the place that it ends with.
fn without_place(message: &str) -> &str {
    message.split(" at line ").next().unwrap_or_default()
}

fn in_words(message: &str) -> String {
    WORDS
        .iter()
        .fold(message.to_owned(), |message, (from, to)| {
            message.replace(from, to)
        })
}

/// Splits `optimizer.lr: invalid type …` into path and rest.
fn split_path(message: &str) -> (Option<&str>, &str) {
    let is_path = |path: &str| {
        !path.is_empty()
            && path
                .chars()
                .all(|c| c.is_ascii_lowercase() || matches!(c, '_' | '.' | '[' | ']' | '0'..='9'))
    };
    match message.split_once(": ") {
        Some((path, rest)) if is_path(path) => (Some(path), rest),
        _ => (None, message),
    }
}

fn below(subject: Option<&str>) -> String {
    subject
        .map(|path| format!(" below `{path}`"))
        .unwrap_or_default()
}

/// The offending name and the allowed ones of `unknown field `x`, expected one of `a`, `b``.
fn unknown(detail: &str, prefix: &str) -> Option<(String, Vec<String>)> {
    let rest = detail.strip_prefix(prefix)?;
    let (name, expected) = rest
        .rsplit_once(", expected ")
        .or_else(|| rest.rsplit_once(", there are"))?;
    let allowed = expected
        .split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect();
    Some((name.trim_matches('`').to_owned(), allowed))
}

/// Adds the nearest allowed name, and where a key belongs that other mappings know.
fn unknown_name(mut finding: Finding, name: &str, allowed: &[String], kind: &str) -> Finding {
    let nearest = nearest(name, allowed);
    finding.label = nearest.map(|nearest| format!("did you mean `{nearest}`?"));
    let homes = if kind == "keys" && nearest.is_none() {
        homes_of(name)
    } else {
        Vec::new()
    };
    finding.help = match homes.as_slice() {
        [] => format!("{kind} allowed here: {}", allowed.join(", ")),
        homes => format!(
            "`{name}` belongs below `{}`; {kind} allowed here: {}",
            homes.join("` or `"),
            allowed.join(", ")
        ),
    };
    finding
}

/// The mappings of the recipe that know `key`.
fn homes_of(key: &str) -> Vec<String> {
    let schema = schemars::schema_for!(Recipe).to_value();
    let properties = |schema: &Value| {
        schema
            .get("properties")
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default()
    };
    let definition = |property: &Value| {
        let reference = property.get("$ref").and_then(Value::as_str)?;
        schema.pointer(reference.trim_start_matches('#')).cloned()
    };
    properties(&schema)
        .iter()
        .filter(|(_, property)| {
            definition(property).is_some_and(|known| properties(&known).contains_key(key))
        })
        .map(|(parent, _)| parent.clone())
        .collect()
}

/// The allowed name nearest to `name`, unless even that one is quite another word.
pub(super) fn nearest<'a>(name: &str, allowed: &'a [String]) -> Option<&'a str> {
    let plain = |name: &str| name.to_lowercase().replace('-', "_");
    let limit = (name.chars().count() / 3).max(1) + 1;
    allowed
        .iter()
        .map(|known| (distance(&plain(name), &plain(known)), known.as_str()))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, known)| *distance <= limit && *distance < known.chars().count())
        .map(|(_, known)| known)
}

/// Edit distance: insertions, deletions, replacements and swaps of neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swap_of_neighbours_is_one_edit() {
        assert_eq!(distance("weigth_decay", "weight_decay"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("same", "same"), 0);
    }

    #[test]
    fn only_similar_names_are_suggested() {
        let allowed = [
            "learning".to_owned(),
            "lr".to_owned(),
            "final_lr".to_owned(),
        ];
        assert_eq!(nearest("final-lr", &allowed), Some("final_lr"));
        assert_eq!(nearest("Lr", &allowed), Some("lr"));
        assert_eq!(nearest("momentum", &allowed), None);
    }

    #[test]
    fn a_key_of_another_mapping_is_sent_home() {
        assert_eq!(homes_of("sequence_length"), ["batch"]);
        assert_eq!(homes_of("seed"), ["data"]);
    }
}
