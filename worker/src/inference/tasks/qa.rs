//! Questions about long texts, answered freely: SCROLLS' Qasper and NarrativeQA, and their measure, F1 over words.

use std::collections::HashMap;

use super::{TaskError, format::Fields, item::Question};

/// Reads an item: of SCROLLS, whose `input` is question, empty line and text; or of LongBench, whose `context` is the text.
pub fn question(fields: &Fields<'_>, qasper: bool) -> Result<Question, TaskError> {
    let input = fields.text("input")?;
    let (question, text) = match fields.optional_text("context")? {
        Some(text) => (input, text),
        None => input.split_once("\n\n").ok_or_else(|| {
            fields.wrong("`input` has no empty line between question and text".to_owned())
        })?,
    };
    let answers = if fields.values.contains_key("outputs") {
        fields.texts("outputs")?
    } else if fields.values.contains_key("answers") {
        fields.texts("answers")?
    } else {
        vec![fields.text("output")?.to_owned()]
    };
    if answers.is_empty() {
        return Err(fields.wrong("there is no right answer".to_owned()));
    }
    Ok(Question::Answer {
        context: format!("{text}\n\nQuestion: {question}\nAnswer:"),
        yes_no: qasper && are_yes_or_no(&answers),
        answers,
        silence: if qasper { "Unanswerable" } else { "" },
    })
}

/// Whether nothing but yes and no is right: such questions of Qasper are answered by comparing the two.
pub fn are_yes_or_no(answers: &[String]) -> bool {
    let is = |answer: &String| ["yes", "no"].contains(&normalized(answer).as_str());
    answers.iter().all(is)
}

/// The best F1 over words, from 0 to 1, of an answer against the right ones.
pub fn best_f1(answer: &str, right: &[String]) -> f64 {
    let scores = right.iter().map(|right| f1(answer, right));
    scores.fold(0.0, f64::max)
}

fn f1(answer: &str, right: &str) -> f64 {
    let (answer, right) = (normalized(answer), normalized(right));
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in right.split_whitespace() {
        *left.entry(word).or_default() += 1;
    }
    let (mut words, mut common) = (0usize, 0usize);
    for word in answer.split_whitespace() {
        words += 1;
        if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    if common == 0 {
        return 0.0;
    }
    let precision = common as f64 / words as f64;
    let recall = common as f64 / right.split_whitespace().count() as f64;
    2.0 * precision * recall / (precision + recall)
}

/// As SQuAD's script: small letters, no ASCII punctuation, no articles, one space between words.
fn normalized(text: &str) -> String {
    let mut bare = text.to_lowercase();
    bare.retain(|c| !c.is_ascii_punctuation());
    let in_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut kept = String::with_capacity(bare.len());
    let mut rest = bare.as_str();
    while let Some(first) = rest.chars().next() {
        let same = |c: char| in_word(c) == in_word(first);
        let end = rest.find(|c: char| !same(c)).unwrap_or(rest.len());
        let (run, later) = rest.split_at(end);
        kept += if ["a", "an", "the"].contains(&run) {
            " "
        } else {
            run
        };
        rest = later;
    }
    kept.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_compared_as_squad_does() {
        assert_eq!(
            normalized(" The  Cat's a-hat, an\u{2019}a \u{201c}The\u{201d}"),
            "cats ahat \u{2019} \u{201c} \u{201d}"
        );
        assert_eq!(f1("the cat sat", "a cat sat down"), 0.8);
        assert_eq!(f1("cat cat", "cat"), 2.0 / 3.0);
        assert_eq!(f1("dog", "cat"), 0.0);
        assert_eq!(f1("the", "the"), 0.0);
        let right = ["no".to_owned(), "a cat".to_owned()];
        assert_eq!(best_f1("Cat.", &right), 1.0);
    }

    #[test]
    fn yes_and_no_are_compared_only_where_nothing_else_is_right() {
        let answers = |texts: &[&str]| {
            texts
                .iter()
                .map(|&text| text.to_owned())
                .collect::<Vec<_>>()
        };
        assert!(are_yes_or_no(&answers(&["Yes", "no."])));
        assert!(!are_yes_or_no(&answers(&["Yes", "Yes, it does"])));
    }
}
