//! Errors of recipes, rendered with the line they point at.

use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme, NamedSource, SourceSpan};

use super::position::{Position, Span};

/// Columns that a report may fill.
const WIDTH: usize = 110;
/// Bytes of a line that a report may show; miette panics on lines beyond 65535.
const LONGEST_LINE: usize = 1000;

/// A recipe that cannot be used.
///
/// Displays as the whole report: what is wrong, file, line and column, the line itself with the place marked, and what to
/// do about it. The parts are there for programs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{report}")]
pub struct RecipeError {
    file: String,
    position: Option<Position>,
    message: String,
    help: String,
    report: String,
}

impl RecipeError {
    /// The file as it was named to [`super::Recipe::parse`] or [`super::Recipe::load`].
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Line of the error, from 1; `None` when the whole file is meant.
    pub fn line(&self) -> Option<usize> {
        self.position.map(|position| position.line)
    }

    /// Column of the error in characters, from 1; `None` when the whole file is meant.
    pub fn column(&self) -> Option<usize> {
        self.position.map(|position| position.column)
    }

    /// What is wrong.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What to do about it.
    pub fn help(&self) -> &str {
        &self.help
    }
}

/// What is wrong and where, before it is rendered with the text around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    pub span: Option<Span>,
    pub message: String,
    /// A few words at the marked place, such as the spelling that was probably meant.
    pub label: Option<String>,
    pub help: String,
}

impl Finding {
    pub(super) fn new(
        span: Option<Span>,
        message: impl Into<String>,
        help: impl Into<String>,
    ) -> Finding {
        Finding {
            span,
            message: message.into(),
            label: None,
            help: help.into(),
        }
    }

    /// The finding as an error of `file`, which holds `text`.
    pub(super) fn render(self, file: &str, text: &str) -> RecipeError {
        let shown = self.span.and_then(|span| self.snippet(file, text, span));
        let report = shown.unwrap_or_else(|| {
            let place = self
                .span
                .map(|span| format!(":{}:{}", span.start.line, span.start.column));
            format!(
                "{file}{}: {}\n  help: {}",
                place.unwrap_or_default(),
                self.message,
                self.help
            )
        });
        RecipeError {
            file: file.to_owned(),
            position: self.span.map(|span| span.start),
            message: self.message,
            help: self.help,
            report,
        }
    }

    /// The report with the marked line and its neighbours; `None` when they are too long to be shown.
    fn snippet(&self, file: &str, text: &str, span: Span) -> Option<String> {
        let neighbours = text.lines().skip(span.start.line.saturating_sub(2)).take(3);
        if neighbours.into_iter().any(|line| line.len() > LONGEST_LINE) {
            return None;
        }
        let diagnostic = Marked {
            message: self.message.clone(),
            help: self.help.clone(),
            label: self.label.clone(),
            text: NamedSource::new(file, text.to_owned()),
            span: SourceSpan::from((span.offset, span.length)),
        };
        let handler = GraphicalReportHandler::new_themed(GraphicalTheme::unicode_nocolor())
            .with_width(WIDTH)
            .with_links(false)
            .with_context_lines(1);
        let mut report = String::new();
        handler.render_report(&mut report, &diagnostic).ok()?;
        Some(report.trim_matches('\n').to_owned())
    }
}

/// The shape in which miette takes a finding.
#[derive(Debug, thiserror::Error, Diagnostic)]
#[error("{message}")]
struct Marked {
    message: String,
    #[help]
    help: String,
    label: Option<String>,
    #[source_code]
    text: NamedSource<String>,
    #[label("{}", label.as_deref().unwrap_or("here"))]
    span: SourceSpan,
}
