//! HellaSwag's own way of cleaning its text, as lm-evaluation-harness does it.

use super::{TaskError, format::Fields, item::Question};

/// Reads an item.
pub fn question(fields: &Fields<'_>) -> Result<Question, TaskError> {
    let context = format!(
        "{}: {} {}",
        fields.text("activity_label")?,
        fields.text("ctx_a")?,
        capitalized(fields.text("ctx_b")?)
    );
    let endings = fields.choices("endings")?;
    let choices: Vec<String> = endings.iter().map(|ending| cleaned(ending)).collect();
    if let Some(at) = choices.iter().position(String::is_empty) {
        return Err(fields.wrong(format!("ending {at} has no text: nothing can be scored")));
    }
    Ok(Question::Choices {
        context: cleaned(&context),
        gold: fields.index("label", 0, choices.len())?,
        choices,
        lengths: true,
    })
}

/// Without the marks that WikiHow's pages left.
fn cleaned(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    without_brackets(&text).replace("  ", " ")
}

/// Without `[...]`, each up to the next closing bracket on its line.
fn without_brackets(text: &str) -> String {
    let (mut kept, mut rest) = (String::new(), text);
    while let Some(open) = rest.find('[') {
        let inside = &rest[open + 1..];
        let close = inside.find([']', '\n']);
        match close.filter(|&close| inside[close..].starts_with(']')) {
            Some(close) => {
                kept += &rest[..open];
                rest = &inside[close + 1..];
            }
            None => {
                kept += &rest[..=open];
                rest = inside;
            }
        }
    }
    kept + rest
}

/// The first letter large, all others small.
fn capitalized(text: &str) -> String {
    let small = text.to_lowercase();
    let mut letters = text.chars();
    match letters.next() {
        None => String::new(),
        Some(first) => {
            let first_small = first.to_lowercase().map(char::len_utf8).sum();
            first
                .to_uppercase()
                .chain(small[first_small..].chars())
                .collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cleaned_as_the_harness_does() {
        // What its `preprocess` and Python's `capitalize` give.
        assert_eq!(
            cleaned(" [header] How to sit [title] Take a  chair. [substeps] Sit [down\n] now. "),
            " How to sit. Take a chair. Sit [down\n] now."
        );
        assert_eq!(without_brackets("a [b [c] d] e"), "a  d] e");
        assert_eq!(capitalized("éCOLE Is ΟΔΟΣ"), "École is οδος");
        assert_eq!(capitalized(""), "");
    }
}
