//! Finds out how token parquet made by others marks its documents.

use std::path::PathBuf;

use crate::index::Auto3;
use crate::manifest::Documents;
use crate::rows::Rows;
use crate::scan::TokenFile;
use crate::stream::Rules;
use crate::{DataError, TextTokenizer};

/// Files that a sample looks into, and rows of their first and last row groups.
const FILES: usize = 8;
const ROWS: usize = 512;

/// The lengths of rows, and whether EOT stands inside them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shape {
    rows: u64,
    /// Least and greatest length of the rows that are not a file's last.
    body: Option<(usize, usize)>,
    /// Least and greatest length of the files' last rows.
    tail: Option<(usize, usize)>,
    /// Rows with EOT neither first nor last.
    eot_inside: u64,
    last: Option<usize>,
}

impl Shape {
    /// Takes in the next rows of a file.
    pub(crate) fn observe(&mut self, rows: Rows<'_>, eot: u32) {
        for row in rows.iter() {
            if let Some(previous) = self.last.replace(row.len()) {
                self.body = Some(widened(self.body, (previous, previous)));
            }
            self.rows += 1;
            let inside = row.get(1..row.len().saturating_sub(1)).unwrap_or_default();
            self.eot_inside += u64::from(inside.contains(&eot));
        }
    }

    /// The file ends.
    pub(crate) fn end_file(&mut self) {
        if let Some(last) = self.last.take() {
            self.tail = Some(widened(self.tail, (last, last)));
        }
    }

    /// Takes in the shape of other files.
    pub(crate) fn merge(&mut self, other: &Shape) {
        self.rows += other.rows;
        self.eot_inside += other.eot_inside;
        self.body = other
            .body
            .map(|lengths| widened(self.body, lengths))
            .or(self.body);
        self.tail = other
            .tail
            .map(|lengths| widened(self.tail, lengths))
            .or(self.tail);
    }

    /// The length that all rows have; only the last row of a file may be shorter.
    fn fixed_length(&self) -> Option<usize> {
        let (least, greatest) = self.body.or(self.tail)?;
        (least == greatest && self.tail.is_none_or(|(_, longest)| longest <= greatest))
            .then_some(greatest)
    }

    /// What a document is.
    pub(crate) fn documents(&self) -> Documents {
        if self.eot_inside > 0 && self.fixed_length().is_some() {
            Documents::EndOfText
        } else {
            Documents::Row
        }
    }

    /// What a document is and why, for the user.
    pub(crate) fn finding(&self, eot: u32) -> String {
        let rows = self.rows;
        match (self.documents(), self.fixed_length()) {
            (Documents::EndOfText, Some(length)) => format!(
                "documents: all {rows} rows hold {length} tokens (a file's last may hold fewer) and {} of them have EOT \
                 ({eot}) inside, so a document ends at EOT",
                self.eot_inside
            ),
            (_, Some(length)) => format!(
                "documents: all {rows} rows hold {length} tokens but none has EOT ({eot}) inside, so every row is a document"
            ),
            (_, None) => {
                format!("documents: the {rows} rows differ in length, so every row is a document")
            }
        }
    }
}

fn widened(range: Option<(usize, usize)>, by: (usize, usize)) -> (usize, usize) {
    range.map_or(by, |(least, greatest)| {
        (least.min(by.0), greatest.max(by.1))
    })
}

/// What a sample of the rows showed.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    pub shape: Shape,
    /// Rows with a token other than EOT and BOS.
    documents: u64,
    /// Those of them that end with EOT, begin with EOT, begin with BOS.
    end_with_eot: u64,
    begin_with_eot: u64,
    begin_with_bos: u64,
    /// Rows of EOT and BOS only, empty ones not counted.
    hollow: u64,
}

/// How documents are marked, and how that was found out.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub rules: Rules,
    pub findings: Vec<String>,
}

impl Survey {
    /// Looks at the first and last row groups of some of the files.
    pub(crate) fn of(
        paths: &[PathBuf],
        column: &str,
        tokenizer: &TextTokenizer,
    ) -> Result<Survey, DataError> {
        let mut survey = Survey::default();
        let stride = paths.len().div_ceil(FILES).max(1);
        for path in paths.iter().step_by(stride) {
            let file = TokenFile::open(path, column, tokenizer.vocabulary())?;
            let Some(last) = file.file().row_groups().checked_sub(1) else {
                continue;
            };
            let groups = if last == 0 { vec![0] } else { vec![0, last] };
            for group in groups {
                let mut seen = 0;
                file.scan(group, |rows| {
                    survey.observe(rows, tokenizer);
                    seen += rows.bounds.len() - 1;
                    seen < ROWS
                })?;
            }
            survey.shape.end_file();
        }
        Ok(survey)
    }

    fn observe(&mut self, rows: Rows<'_>, tokenizer: &TextTokenizer) {
        let (eot, bos) = (tokenizer.eot(), tokenizer.bos());
        self.shape.observe(rows, eot);
        for row in rows.iter() {
            if row.iter().all(|token| *token == eot || Some(*token) == bos) {
                self.hollow += u64::from(!row.is_empty());
                continue;
            }
            self.documents += 1;
            self.end_with_eot += u64::from(row.last() == Some(&eot));
            self.begin_with_eot += u64::from(row.first() == Some(&eot));
            self.begin_with_bos += u64::from(bos.is_some() && row.first().copied() == bos);
        }
    }

    /// Settles whether EOT and BOS are added when a document is `documents`.
    pub(crate) fn layout(
        &self,
        documents: Documents,
        tokenizer: &TextTokenizer,
        append_eot: Auto3,
        prepend_bos: Auto3,
    ) -> Result<Layout, DataError> {
        if documents == Documents::EndOfText
            && (append_eot == Auto3::Always || prepend_bos == Auto3::Always)
        {
            return Err(DataError::Request(
                "rows of one length with EOT inside are a stream that already has its EOT; nothing can be added to it: \
                 pass --append-eot auto --prepend-bos auto"
                    .to_owned(),
            ));
        }
        let mut findings = Vec::new();
        let append = match append_eot {
            Auto3::Never => false,
            Auto3::Always => true,
            Auto3::Auto if documents == Documents::EndOfText => false,
            Auto3::Auto => self.needs_eot(tokenizer, &mut findings)?,
        };
        let prepend = match prepend_bos {
            Auto3::Never => None,
            Auto3::Always => Some(tokenizer.bos().ok_or_else(|| {
                let remedy =
                    "name it in tokenizer_config.json (bos_token), or pass --prepend-bos never";
                DataError::content(
                    tokenizer.path(),
                    "no file beside it names a token that begins a document",
                    remedy,
                )
            })?),
            Auto3::Auto if documents == Documents::EndOfText => None,
            Auto3::Auto => self.needs_bos(tokenizer, &mut findings)?,
        };
        let eot = tokenizer.eot();
        Ok(Layout {
            rules: Rules {
                documents,
                prepend,
                append: append.then_some(eot),
                eot,
            },
            findings,
        })
    }

    fn needs_eot(
        &self,
        tokenizer: &TextTokenizer,
        findings: &mut Vec<String>,
    ) -> Result<bool, DataError> {
        let (eot, sampled) = (tokenizer.eot(), self.documents);
        let found = format!(
            "append_eot: {} of {sampled} sampled documents end with EOT ({eot})",
            self.end_with_eot
        );
        let (add, why) = match self.end_with_eot {
            0 if sampled == 0 && self.hollow > 0 => (
                false,
                "the rows hold nothing but EOT and BOS; none is added",
            ),
            0 if sampled > 0 && tokenizer.bos() == Some(eot) && self.begin_with_eot == sampled => {
                (false, "but all begin with it, so none is added")
            }
            0 => (true, "so it is added"),
            all if all == sampled => (false, "so none is added"),
            _ => {
                let remedy = "pass --append-eot never if the rows are as they should be, or --append-eot always";
                return Err(DataError::Request(format!(
                    "{found}, which leaves open whether to add it: {remedy}"
                )));
            }
        };
        findings.push(format!("{found}, {why}"));
        Ok(add)
    }

    fn needs_bos(
        &self,
        tokenizer: &TextTokenizer,
        findings: &mut Vec<String>,
    ) -> Result<Option<u32>, DataError> {
        let Some(bos) = tokenizer.bos() else {
            findings.push("prepend_bos: the tokenizer has no BOS".to_owned());
            return Ok(None);
        };
        let (with, sampled) = (self.begin_with_bos, self.documents);
        let found =
            format!("prepend_bos: {with} of {sampled} sampled documents begin with BOS ({bos})");
        let (add, why) = match with {
            0 if tokenizer.adds_bos() => (
                Some(bos),
                "and the tokenizer's configuration asks for it, so it is added",
            ),
            0 => (
                None,
                "and the tokenizer's configuration does not ask for it, so none is added",
            ),
            all if all == sampled => (None, "so none is added"),
            _ => {
                let remedy = "pass --prepend-bos never if the rows are as they should be, or --prepend-bos always";
                return Err(DataError::Request(format!(
                    "{found}, which leaves open whether to add it: {remedy}"
                )));
            }
        };
        findings.push(format!("{found}, {why}"));
        Ok(add)
    }
}
