//! From rows to the packed stream: adds BOS and EOT, finds where documents begin, leaves out what is not selected.

use crate::manifest::{Content, Documents, Selection};
use crate::rows::Rows;

/// How rows become the packed stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub documents: Documents,
    /// Added before every document.
    pub prepend: Option<u32>,
    /// Added after every document.
    pub append: Option<u32>,
    pub eot: u32,
}

impl Rules {
    /// The rules of a manifest.
    pub(crate) fn of(content: &Content) -> Rules {
        Rules {
            documents: content.documents,
            prepend: content.bos.filter(|_| content.prepend_bos),
            append: content.append_eot.then_some(content.eot),
            eot: content.eot,
        }
    }
}

/// A piece of the packed stream.
#[derive(Clone, Copy)]
pub(crate) struct Chunk<'a> {
    pub tokens: &'a [u32],
    /// Ascending positions in `tokens` at which documents begin.
    pub starts: &'a [u32],
}

impl Chunk<'_> {
    /// BLAKE3 of the piece alone, as [`Checksum`] takes it.
    pub(crate) fn checksum(self) -> blake3::Hash {
        let mut checksum = Checksum::default();
        checksum.update(self);
        checksum.hash()
    }
}

/// Turns the rows of one row group into chunks, batch by batch.
pub(crate) struct Assembler {
    rules: Rules,
    /// Whether the next token begins a document ([`Documents::EndOfText`] only).
    at_start: bool,
    tokens: Vec<u32>,
    starts: Vec<u32>,
}

impl Assembler {
    /// For one row group; `continues` tells whether its first token continues a document.
    pub(crate) fn new(rules: Rules, continues: bool) -> Assembler {
        Assembler {
            rules,
            at_start: !continues,
            tokens: Vec::new(),
            starts: Vec::new(),
        }
    }

    /// Whether the next token begins a document ([`Documents::EndOfText`] only).
    pub(crate) fn at_start(&self) -> bool {
        self.at_start
    }

    /// Whether the row group after this one continues a document.
    pub(crate) fn next_continues(&self) -> bool {
        self.rules.documents == Documents::EndOfText && !self.at_start
    }

    /// What `rows` add to the stream.
    pub(crate) fn assemble<'a>(&'a mut self, rows: Rows<'a>) -> Chunk<'a> {
        self.starts.clear();
        match self.rules {
            Rules {
                documents: Documents::EndOfText,
                ..
            } => self.cut(rows.tokens),
            Rules {
                prepend: None,
                append: None,
                ..
            } => {
                let begins = rows.bounds.windows(2).filter(|pair| pair[0] < pair[1]);
                self.starts.extend(begins.map(|pair| pair[0] as u32));
            }
            Rules {
                prepend, append, ..
            } => {
                self.insert(rows, prepend, append);
                return Chunk {
                    tokens: &self.tokens,
                    starts: &self.starts,
                };
            }
        }
        Chunk {
            tokens: rows.tokens,
            starts: &self.starts,
        }
    }

    /// A document begins after every EOT.
    fn cut(&mut self, tokens: &[u32]) {
        for (position, token) in tokens.iter().enumerate() {
            if self.at_start {
                self.starts.push(position as u32);
            }
            self.at_start = *token == self.rules.eot;
        }
    }

    /// Copies `rows` with a token before and after each.
    fn insert(&mut self, rows: Rows<'_>, prepend: Option<u32>, append: Option<u32>) {
        self.tokens.clear();
        for row in rows.iter() {
            self.starts.push(self.tokens.len() as u32);
            self.tokens.extend(prepend);
            self.tokens.extend_from_slice(row);
            self.tokens.extend(append);
        }
    }
}

/// Lets the selected documents of one row group through.
pub(crate) struct Sieve<'a> {
    selection: &'a Selection,
    /// Number of the document that the last token belonged to.
    document: u32,
    tokens: Vec<u32>,
    starts: Vec<u32>,
}

impl<'a> Sieve<'a> {
    /// From the beginning of a row group on.
    pub(crate) fn new(selection: &'a Selection) -> Sieve<'a> {
        Sieve::after(selection, 0)
    }

    /// From where the last token belonged to document number `document`.
    pub(crate) fn after(selection: &'a Selection, document: u32) -> Sieve<'a> {
        Sieve {
            selection,
            document,
            tokens: Vec::new(),
            starts: Vec::new(),
        }
    }

    /// Number of the document that the last token belonged to.
    pub(crate) fn document(&self) -> u32 {
        self.document
    }

    /// The selected part of `chunk`.
    pub(crate) fn select<'b>(&'b mut self, chunk: Chunk<'b>) -> Chunk<'b> {
        if self.selection.is_all() {
            return chunk;
        }
        self.tokens.clear();
        self.starts.clear();
        let ends = chunk
            .starts
            .iter()
            .map(|start| *start as usize)
            .chain([chunk.tokens.len()]);
        let mut first = 0;
        for (nth, end) in ends.enumerate() {
            // The run before the nth start belongs to the document that began at the start before it.
            let number = self.document + nth as u32;
            if first < end && self.keeps(number) {
                if nth > 0 {
                    self.starts.push(self.tokens.len() as u32);
                }
                self.tokens.extend_from_slice(&chunk.tokens[first..end]);
            }
            first = end;
        }
        self.document += chunk.starts.len() as u32;
        Chunk {
            tokens: &self.tokens,
            starts: &self.starts,
        }
    }

    fn keeps(&self, document: u32) -> bool {
        match self.selection {
            Selection::All => true,
            Selection::Only(documents) => documents.binary_search(&document).is_ok(),
            Selection::Except(documents) => documents.binary_search(&document).is_err(),
        }
    }
}

/// Counts and hashes a stretch of the stream; the sum is [`crate::manifest::RowGroup::checksum`].
#[derive(Default)]
pub(crate) struct Checksum {
    hasher: blake3::Hasher,
    starts: Vec<u64>,
    tokens: u64,
}

impl Checksum {
    pub(crate) fn update(&mut self, chunk: Chunk<'_>) {
        self.hasher.update(bytemuck::cast_slice(chunk.tokens));
        self.starts.extend(
            chunk
                .starts
                .iter()
                .map(|start| self.tokens + u64::from(*start)),
        );
        self.tokens += chunk.tokens.len() as u64;
    }

    /// Tokens so far.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Documents begun so far.
    pub(crate) fn documents(&self) -> u64 {
        self.starts.len() as u64
    }

    /// The checksum, in hexadecimal.
    pub(crate) fn finish(self) -> String {
        self.hash().to_hex().to_string()
    }

    fn hash(mut self) -> blake3::Hash {
        self.hasher.update(bytemuck::cast_slice(&self.starts));
        self.hasher.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lists: &[&[u32]]) -> (Vec<u32>, Vec<usize>) {
        let mut bounds = vec![0];
        bounds.extend(lists.iter().scan(0, |end, list| {
            *end += list.len();
            Some(*end)
        }));
        (lists.concat(), bounds)
    }

    fn assemble(assembler: &mut Assembler, lists: &[&[u32]]) -> (Vec<u32>, Vec<u32>) {
        let (tokens, bounds) = rows(lists);
        let chunk = assembler.assemble(Rows {
            tokens: &tokens,
            bounds: &bounds,
        });
        (chunk.tokens.to_vec(), chunk.starts.to_vec())
    }

    #[test]
    fn an_empty_row_adds_its_eot_or_nothing() {
        let rules = Rules {
            documents: Documents::Row,
            prepend: None,
            append: Some(2),
            eot: 2,
        };
        let with = assemble(&mut Assembler::new(rules, false), &[&[5, 6], &[], &[7]]);
        assert_eq!(with, (vec![5, 6, 2, 2, 7, 2], vec![0, 3, 4]));
        let rules = Rules {
            append: None,
            ..rules
        };
        let without = assemble(
            &mut Assembler::new(rules, false),
            &[&[], &[5, 6], &[], &[2], &[]],
        );
        assert_eq!(without, (vec![5, 6, 2], vec![0, 2]));
    }

    #[test]
    fn in_fixed_rows_a_document_runs_over_rows_and_batches_until_eot() {
        let rules = Rules {
            documents: Documents::EndOfText,
            prepend: None,
            append: None,
            eot: 2,
        };
        let mut assembler = Assembler::new(rules, true);
        assert_eq!(
            assemble(&mut assembler, &[&[5, 2, 6], &[7, 8, 2]]).1,
            vec![2]
        );
        assert!(!assembler.next_continues());
        assert_eq!(assemble(&mut assembler, &[&[2, 2, 9]]).1, vec![0, 1, 2]);
        assert!(assembler.next_continues());
    }

    #[test]
    fn the_sieve_counts_documents_over_chunks() {
        let only = Selection::Only(vec![0, 2]);
        let mut sieve = Sieve::new(&only);
        let chunk = sieve.select(Chunk {
            tokens: &[9, 1, 1, 3],
            starts: &[1, 3],
        });
        assert_eq!((chunk.tokens, chunk.starts), (&[9, 3][..], &[1][..]));
        let chunk = sieve.select(Chunk {
            tokens: &[3, 4],
            starts: &[1],
        });
        assert_eq!(
            (chunk.tokens, chunk.starts),
            (&[3][..], &[][..]),
            "the second document goes on"
        );

        let except = Selection::Except(vec![1]);
        let mut sieve = Sieve::new(&except);
        let chunk = sieve.select(Chunk {
            tokens: &[1, 1, 3],
            starts: &[0, 2],
        });
        assert_eq!((chunk.tokens, chunk.starts), (&[3][..], &[0][..]));
    }
}
