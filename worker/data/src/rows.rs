//! From pages to whole rows: puts rows together that a page's end cuts in two.

use std::mem;
use std::ops::Range;

use crate::pages::Decoded;

/// Some rows of a row group.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Their tokens, one row after the other.
    pub tokens: &'a [u32],
    /// Where rows begin and end in `tokens`: one more than there are rows, from 0 to `tokens.len()`.
    pub bounds: &'a [usize],
}

impl<'a> Rows<'a> {
    /// The rows one by one.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &'a [u32]> {
        let tokens = self.tokens;
        self.bounds
            .windows(2)
            .map(move |pair| &tokens[pair[0]..pair[1]])
    }
}

/// Where some rows of a row group lie: enough to decode them and nothing else.
#[derive(Debug, Clone)]
pub(crate) struct Extent {
    /// The pages from the one in which the first of them begins to the one in which the last ends.
    pub pages: Range<u32>,
    /// Rows that begin in the first of these pages before them.
    before: u32,
    /// How many they are.
    rows: u32,
}

/// Rows under way: what earlier pages hold of them, and the page that was decoded last.
#[derive(Default)]
pub(crate) struct Batch {
    /// The next page.
    pub page: Decoded,
    /// Pages taken in, all in all.
    pages: u32,
    held: Decoded,
    /// Where the first held row begins: its page, and how many rows begin there before it.
    first: (u32, u32),
    /// The last held row, likewise.
    last: (u32, u32),
    /// Rows that were handed on.
    done: u64,
    bounds: Vec<usize>,
}

impl Batch {
    /// Rows that were handed on.
    pub(crate) fn rows_done(&self) -> u64 {
        self.done
    }

    /// Rows that begin in pages taken in.
    pub(crate) fn rows_begun(&self) -> u64 {
        self.done + self.held.begins.len() as u64
    }

    /// Whether the next page has tokens that belong to no row.
    pub(crate) fn is_headless(&self) -> bool {
        let first = self.page.begins.first().copied();
        self.rows_begun() == 0 && first.unwrap_or(self.page.tokens.len()) > 0
    }

    /// The held rows that the next page shows to be complete: all, if a row begins it, else all but the last.
    pub(crate) fn complete(&mut self) -> Option<(Rows<'_>, Extent)> {
        let whole = self.page.begins.first() == Some(&0);
        let rows = self.held.begins.len() - usize::from(!whole && !self.held.begins.is_empty());
        self.hand_on(rows)
    }

    /// The held rows, when there is no page any more.
    pub(crate) fn rest(&mut self) -> Option<(Rows<'_>, Extent)> {
        self.hand_on(self.held.begins.len())
    }

    fn hand_on(&mut self, rows: usize) -> Option<(Rows<'_>, Extent)> {
        if rows == 0 {
            return None;
        }
        let begins = &self.held.begins;
        let end = begins.get(rows).copied().unwrap_or(self.held.tokens.len());
        self.bounds.clear();
        self.bounds.extend_from_slice(&begins[..rows]);
        self.bounds.push(end);
        self.done += rows as u64;
        let extent = Extent {
            pages: self.first.0..self.pages,
            before: self.first.1,
            rows: rows as u32,
        };
        let rows = Rows {
            tokens: &self.held.tokens[..end],
            bounds: &self.bounds,
        };
        Some((rows, extent))
    }

    /// Forgets what [`Batch::complete`] handed on and takes the next page in.
    pub(crate) fn advance(&mut self) {
        let handed_on = self.bounds.len().saturating_sub(1);
        if handed_on > 0 {
            let end = self.bounds[handed_on];
            self.held.tokens.drain(..end);
            self.held.begins.drain(..handed_on);
            self.held.begins.iter_mut().for_each(|begin| *begin -= end);
            self.first = self.last;
            self.bounds.clear();
        }
        self.append();
    }

    /// Takes the next page in.
    pub(crate) fn append(&mut self) {
        if !self.page.begins.is_empty() {
            if self.held.begins.is_empty() {
                self.first = (self.pages, 0);
            }
            self.last = (self.pages, self.page.begins.len() as u32 - 1);
        }
        self.pages += 1;
        if self.held.tokens.is_empty() && self.held.begins.is_empty() {
            mem::swap(&mut self.held, &mut self.page);
            return;
        }
        let here = self.held.tokens.len();
        self.held.tokens.extend_from_slice(&self.page.tokens);
        let begins = self.page.begins.iter().map(|begin| here + begin);
        self.held.begins.extend(begins);
    }

    /// The rows at `extent` of its pages, which are all that was taken in. None: there are not so many.
    pub(crate) fn slice(&mut self, extent: &Extent) -> Option<Rows<'_>> {
        let (before, rows) = (extent.before as usize, extent.rows as usize);
        let begins = self.held.begins.get(before..before + rows)?;
        let first = *begins.first()?;
        let next = self.held.begins.get(before + rows).copied();
        let end = next.unwrap_or(self.held.tokens.len());
        self.bounds.clear();
        self.bounds.extend(begins.iter().map(|begin| begin - first));
        self.bounds.push(end - first);
        Some(Rows {
            tokens: &self.held.tokens[first..end],
            bounds: &self.bounds,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(tokens: &[u32], begins: &[usize]) -> Decoded {
        Decoded {
            tokens: tokens.to_vec(),
            begins: begins.to_vec(),
        }
    }

    /// Rows of 2, 0, 4, 1, 5, 0 and 2 tokens, cut by pages at and inside rows.
    fn pages() -> [Decoded; 5] {
        [
            page(&[1, 1, 3, 3], &[0, 2, 2]),
            page(&[3, 3, 4, 5], &[2, 3]),
            page(&[5, 5], &[]),
            page(&[5, 5], &[]),
            page(&[7, 7], &[0, 0]),
        ]
    }

    fn lists(rows: Rows<'_>) -> Vec<Vec<u32>> {
        rows.iter().map(<[u32]>::to_vec).collect()
    }

    /// What each batch holds, and where it says that it lies.
    fn batches() -> Vec<(Vec<Vec<u32>>, Extent)> {
        let (mut batch, mut found) = (Batch::default(), Vec::new());
        let mut keep = |handed_on: Option<(Rows<'_>, Extent)>| {
            found.extend(handed_on.map(|(rows, extent)| (lists(rows), extent)));
        };
        for page in pages() {
            batch.page = page;
            assert!(!batch.is_headless());
            keep(batch.complete());
            batch.advance();
        }
        keep(batch.rest());
        assert_eq!(batch.rows_done(), 7);
        found
    }

    #[test]
    fn rows_come_whole_and_in_order_wherever_pages_end() {
        let rows: Vec<_> = batches().into_iter().flat_map(|(rows, _)| rows).collect();
        let expected: [&[u32]; 7] = [
            &[1, 1],
            &[],
            &[3, 3, 3, 3],
            &[4],
            &[5, 5, 5, 5, 5],
            &[],
            &[7, 7],
        ];
        assert_eq!(rows, expected);
    }

    #[test]
    fn every_batch_can_be_had_again_from_its_pages_alone() {
        let batches = batches();
        assert!(batches.len() > 2);
        for (rows, extent) in batches {
            let mut batch = Batch::default();
            let span = extent.pages.start as usize..extent.pages.end as usize;
            for page in pages().into_iter().skip(span.start).take(span.len()) {
                batch.page = page;
                batch.append();
            }
            assert_eq!(lists(batch.slice(&extent).unwrap()), rows, "{extent:?}");
        }
    }

    #[test]
    fn tokens_before_the_first_row_are_noticed() {
        let mut batch = Batch {
            page: page(&[3, 4], &[1]),
            ..Batch::default()
        };
        assert!(batch.is_headless());
        batch.page = page(&[3, 4], &[]);
        assert!(batch.is_headless());
        batch.page = page(&[], &[]);
        assert!(!batch.is_headless());
    }
}
