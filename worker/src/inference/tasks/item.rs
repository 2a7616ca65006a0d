//! One item of a task: what is asked, and which answer is right.

/// An item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Line of its file, from 1.
    pub line: usize,
    /// Part of the task that it belongs to, where the task has parts: MMLU's subject.
    pub subject: Option<String>,
    /// The question.
    pub question: Question,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// Which of several continuations is likeliest after a context.
    Choices {
        /// What stands before.
        context: String,
        /// The continuations.
        choices: Vec<String>,
        /// Index of the right one.
        gold: usize,
        /// Whether their lengths tell them apart, so that likelihoods per length are of interest.
        lengths: bool,
    },
    /// After which of several contexts a continuation is likeliest.
    Contexts {
        /// The contexts.
        contexts: Vec<String>,
        /// What stands behind each.
        continuation: String,
        /// Index of the right one.
        gold: usize,
    },
    /// How likely the continuation of a context is, and whether it is what the model would write.
    Cloze {
        /// What stands before.
        context: String,
        /// What follows.
        continuation: String,
    },
    /// What the model writes after a context, up to the end of the line.
    Answer {
        /// What stands before.
        context: String,
        /// Right answers: one is enough.
        answers: Vec<String>,
        /// Whether the two answers "yes" and "no" are compared instead.
        yes_no: bool,
        /// What stands for nothing written.
        silence: &'static str,
    },
}

impl Question {
    /// The question with its right answer, as an example for others.
    pub fn solved(&self, delimiter: &str) -> String {
        match self {
            Question::Choices {
                context,
                choices,
                gold,
                ..
            } => format!("{context}{delimiter}{}", choices[*gold]),
            Question::Contexts {
                contexts,
                continuation,
                gold,
            } => format!("{}{delimiter}{continuation}", contexts[*gold]),
            Question::Cloze {
                context,
                continuation,
            } => format!("{context}{delimiter}{continuation}"),
            Question::Answer {
                context, answers, ..
            } => format!("{context} {}", answers.join(", ")),
        }
    }

    /// Context and continuation of everything whose likelihood decides.
    pub fn pairs(&self, delimiter: &str) -> Vec<(String, String)> {
        match self {
            Question::Choices {
                context, choices, ..
            } => choices
                .iter()
                .map(|choice| (format!("{context}{delimiter}"), choice.clone()))
                .collect(),
            Question::Contexts {
                contexts,
                continuation,
                ..
            } => contexts
                .iter()
                .map(|context| (format!("{context}{delimiter}"), continuation.clone()))
                .collect(),
            Question::Cloze {
                context,
                continuation,
            } => vec![(format!("{context}{delimiter}"), continuation.clone())],
            Question::Answer {
                context,
                yes_no: true,
                ..
            } => ["yes", "no"]
                .map(|answer| (format!("{context} "), answer.to_owned()))
                .to_vec(),
            Question::Answer { .. } => Vec::new(),
        }
    }
}
