//! A piece on its way through the model, which may take several turns.

use std::ops::Range;

use super::{Output, Piece, Want};
use crate::inference::{rows::Rows, score::scores};

/// A piece of which a part has been read.
pub struct UnderWay<'a> {
    /// What was asked for.
    pub piece: &'a Piece<'a>,
    /// Tokens of the sequence, with those of the piece that have been read.
    pub position: u64,
    /// Tokens of the piece that have been read.
    done: usize,
    /// What was wanted of it, as far as that is known.
    pub output: Output,
}

impl<'a> UnderWay<'a> {
    /// Nothing of it read yet, of a sequence that has `position` tokens.
    pub fn new(piece: &'a Piece<'a>, position: u64) -> UnderWay<'a> {
        let output = match piece.want {
            Want::Scores { next, .. } => Output::Scores(Vec::with_capacity(next.len())),
            _ => Output::Nothing,
        };
        UnderWay {
            piece,
            position,
            done: 0,
            output,
        }
    }

    /// Tokens that are left.
    pub fn left(&self) -> i64 {
        (self.piece.tokens.len() - self.done) as i64
    }

    /// Adds its next tokens to `ids`, and tells the logits of which of them are wanted.
    pub fn take(&mut self, tokens: i64, ids: &mut Vec<i64>) -> Range<i64> {
        let (from, until) = (self.done, self.done + tokens as usize);
        ids.extend(
            self.piece.tokens[from..until]
                .iter()
                .map(|&id| i64::from(id)),
        );
        self.done = until;
        self.position += tokens.cast_unsigned();
        let all = self.piece.tokens.len();
        let first = match self.piece.want {
            Want::Nothing => all,
            Want::Greedy | Want::Logits => all - 1,
            Want::Scores { next, .. } => all - next.len(),
        };
        (first.clamp(from, until) - from) as i64..tokens
    }

    /// Notes what is wanted of its next rows of logits; none if they are not numbers.
    pub fn tell(&mut self, rows: &Rows, first: usize, count: usize) -> Option<()> {
        match (self.piece.want, &mut self.output) {
            (Want::Nothing, _) => {}
            (Want::Greedy, output) => *output = Output::Greedy(rows.likeliest(first)?),
            (Want::Logits, output) => *output = Output::Logits(rows.logits(first)?),
            (Want::Scores { next, top }, Output::Scores(told)) => {
                let asked = &next[told.len()..told.len() + count];
                told.extend(scores(&rows.some(first as i64, count as i64), asked, top)?);
            }
            (Want::Scores { .. }, _) => unreachable!("invariant: scores are collected"),
        }
        Some(())
    }
}
