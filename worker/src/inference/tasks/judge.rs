//! From likelihoods and written answers to figures.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    super::{scorer::Scored, statistics::Estimate},
    item::{Item, Question},
    qa,
};

/// What became of an item.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judged {
    /// Its line in the task's file, from 1.
    pub line: usize,
    /// Its subject.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// Log-probability of each continuation, in nats.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<f64>,
    /// Whether each continuation is what the model would write.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub greedy: Vec<bool>,
    /// Index of the right continuation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gold: Option<usize>,
    /// What the model wrote, or chose of yes and no.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Whether the beginning of its context was cut.
    pub cut: bool,
    /// What it adds to each figure.
    #[serde(flatten)]
    pub values: BTreeMap<&'static str, f64>,
}

/// The figure of log-probabilities, whose mean is taken before exp.
const LOGPROB: &str = "logprob";

/// Judges an item by the scores of its pairs, or by what the model wrote.
pub fn judge(item: &Item, scored: &[Scored], written: Option<String>, cut: bool) -> Judged {
    let logprobs: Vec<f64> = scored.iter().map(|scored| scored.logprob).collect();
    let mut values = BTreeMap::new();
    let (mut text, mut right) = (None, None);
    match &item.question {
        Question::Choices {
            choices,
            gold,
            lengths,
            ..
        } => {
            right = Some(*gold);
            values.insert("acc", hit(&logprobs, *gold, |_| 1.0));
            if *lengths {
                // The harness divides by characters, not by tokens or bytes, and without the space before the choice.
                let characters = |choice: usize| choices[choice].chars().count() as f64;
                values.insert("acc_norm", hit(&logprobs, *gold, characters));
                let bytes = |choice: usize| choices[choice].len() as f64;
                values.insert("acc_bytes", hit(&logprobs, *gold, bytes));
            }
        }
        Question::Contexts { gold, .. } => {
            right = Some(*gold);
            values.insert("acc", hit(&logprobs, *gold, |_| 1.0));
        }
        Question::Cloze { .. } => {
            let greedy = scored.iter().all(|scored| scored.greedy);
            values.insert("acc", f64::from(u8::from(greedy)));
            values.insert(LOGPROB, logprobs.iter().sum());
        }
        Question::Answer {
            answers, silence, ..
        } => {
            let answer = written.unwrap_or_else(|| {
                let yes = logprobs.first() > logprobs.get(1);
                if yes { "yes" } else { "no" }.to_owned()
            });
            let answer = match answer.trim() {
                "" => (*silence).to_owned(),
                _ => answer,
            };
            values.insert("f1", qa::best_f1(&answer, answers));
            text = Some(answer);
        }
    }
    Judged {
        line: item.line,
        subject: item.subject.clone(),
        greedy: scored.iter().map(|scored| scored.greedy).collect(),
        logprobs,
        gold: right,
        text,
        cut,
        values,
    }
}

/// 1 if the right choice has the highest log-probability per length, else 0. Of equal ones the first counts.
fn hit(logprobs: &[f64], gold: usize, length: impl Fn(usize) -> f64) -> f64 {
    let per_length = |choice: usize| logprobs[choice] / length(choice);
    let best = (1..logprobs.len()).fold(0, |best, choice| {
        if per_length(choice) > per_length(best) {
            choice
        } else {
            best
        }
    });
    f64::from(u8::from(best == gold))
}

/// The figures of a task: means over its items, and the perplexity of what was to be continued. Errors of tasks with subjects are
/// pooled over these.
pub fn metrics(judged: &[Judged]) -> BTreeMap<String, Estimate> {
    let mut figures: BTreeMap<&'static str, BTreeMap<Option<&str>, Vec<f64>>> = BTreeMap::new();
    for item in judged {
        for (&name, &value) in &item.values {
            let subjects = figures.entry(name).or_default();
            let subject = subjects.entry(item.subject.as_deref()).or_default();
            subject.push(value);
        }
    }
    let figure = |(name, groups): (&str, BTreeMap<Option<&str>, Vec<f64>>)| {
        let groups: Vec<Vec<f64>> = groups.into_values().collect();
        let mean = Estimate::pooled(&groups)?;
        Some(match name {
            LOGPROB => ("perplexity".to_owned(), mean.scaled(-1.0).exp()),
            _ => (name.to_owned(), mean),
        })
    };
    figures.into_iter().filter_map(figure).collect()
}

/// The figures of each subject.
pub fn by_subject(judged: &[Judged]) -> BTreeMap<String, BTreeMap<String, Estimate>> {
    let mut subjects: BTreeMap<&str, Vec<Judged>> = BTreeMap::new();
    for item in judged {
        if let Some(subject) = &item.subject {
            subjects.entry(subject).or_default().push(item.clone());
        }
    }
    subjects
        .into_iter()
        .map(|(subject, judged)| (subject.to_owned(), metrics(&judged)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(logprobs: &[f64]) -> Vec<Scored> {
        logprobs
            .iter()
            .map(|&logprob| Scored {
                logprob,
                greedy: logprob > -1.0,
            })
            .collect()
    }

    fn item(subject: Option<&str>, question: Question) -> Item {
        Item {
            line: 1,
            subject: subject.map(str::to_owned),
            question,
        }
    }

    fn choices(texts: &[&str], gold: usize) -> Question {
        Question::Choices {
            context: String::new(),
            choices: texts.iter().map(|&text| text.to_owned()).collect(),
            gold,
            lengths: true,
        }
    }

    #[test]
    fn lengths_are_of_characters_and_of_bytes() {
        // -6 / 3 characters, -5 / 2 characters, -8 / 4 characters = 8 bytes.
        let item = item(None, choices(&["abc", "ab", "üüüü"], 0));
        let judged = judge(&item, &scored(&[-6.0, -5.0, -8.0]), None, false);
        let values: Vec<_> = judged.values.into_iter().collect();
        assert_eq!(
            values,
            [("acc", 0.0), ("acc_bytes", 0.0), ("acc_norm", 1.0)]
        );
    }

    #[test]
    fn of_equal_choices_the_first_counts() {
        assert_eq!(hit(&[-1.0, -1.0], 0, |_| 1.0), 1.0);
        assert_eq!(hit(&[-1.0, -1.0], 1, |_| 1.0), 0.0);
    }

    #[test]
    fn a_cloze_is_right_if_it_would_be_written() {
        let question = || Question::Cloze {
            context: String::new(),
            continuation: "x".to_owned(),
        };
        let judged = [-0.5, -1.5]
            .map(|logprob| judge(&item(None, question()), &scored(&[logprob]), None, false));
        let metrics = metrics(&judged);
        assert_eq!(metrics["acc"].value, 0.5);
        assert_eq!(metrics["perplexity"].value, 1f64.exp());
        // exp(1) times the error of the mean of 0.5 and 1.5.
        let stderr = metrics["perplexity"].stderr.unwrap();
        assert!((stderr - 1f64.exp() * 0.5).abs() < 1e-12, "{stderr}");
        assert!(!metrics.contains_key(LOGPROB));
    }

    #[test]
    fn every_item_counts_the_same_whatever_its_subject() {
        let of = |subject, logprobs: &[f64]| {
            judge(
                &item(Some(subject), choices(&["a", "b"], 0)),
                &scored(logprobs),
                None,
                false,
            )
        };
        let judged = [
            of("law", &[-1.0, -2.0]),
            of("law", &[-2.0, -1.0]),
            of("law", &[-2.0, -3.0]),
            of("art", &[-2.0, -1.0]),
        ];
        assert_eq!(metrics(&judged)["acc"].value, 0.5);
        let subjects = by_subject(&judged);
        assert_eq!(subjects["art"]["acc"].value, 0.0);
        assert_eq!(subjects["law"]["acc"].value, 2.0 / 3.0);
    }

    #[test]
    fn yes_or_no_is_what_is_likelier_and_silence_is_an_answer() {
        let question = |yes_no, right: &str| Question::Answer {
            context: String::new(),
            answers: vec![right.to_owned()],
            yes_no,
            silence: "Unanswerable",
        };
        let no = judge(
            &item(None, question(true, "No")),
            &scored(&[-2.0, -1.0]),
            None,
            false,
        );
        assert_eq!((no.text.as_deref(), no.values["f1"]), (Some("no"), 1.0));
        let silent = judge(
            &item(None, question(false, "unanswerable")),
            &[],
            Some(" ".to_owned()),
            true,
        );
        assert_eq!(silent.values["f1"], 1.0);
        assert!(silent.cut);
    }
}
