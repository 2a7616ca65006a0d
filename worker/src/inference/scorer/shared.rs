//! Requests that read what they share once.

use std::collections::HashMap;

use super::{
    ENOUGH, ScoreError, Scored, Scorer, of_piece,
    sharing::{Group, Part, Request, batches},
};
use crate::inference::engine::{Piece, Slot, Want};

impl Scorer {
    /// What a family and a group begin with is read once, then its state is copied for each that goes on from there.
    pub(super) fn requests_shared(
        &mut self,
        requests: &[Request],
        groups: &[Group],
        found: &mut [Option<Scored>],
        progress: &mut impl FnMut(usize, usize),
    ) -> Result<(), ScoreError> {
        let mut headers: HashMap<usize, Slot> = HashMap::new();
        let mut done = 0;
        for batch in batches(groups, self.engine.slots()) {
            let gone: Vec<usize> = headers
                .keys()
                .filter(|&&family| batch.iter().all(|part| part.group.family != family))
                .copied()
                .collect();
            let gone = gone
                .iter()
                .filter_map(|family| headers.remove(family))
                .collect();
            self.close(gone);
            self.read_headers(requests, &batch, &mut headers)?;
            let bases = self.read_bases(requests, &batch, &headers)?;
            let tails = self.fork_for_members(&batch, bases);
            let pieces: Vec<(usize, Vec<u32>)> = batch
                .iter()
                .flat_map(|part| {
                    part.members
                        .iter()
                        .map(|&member| (part.group.shared, member))
                })
                .map(|(shared, member)| (member, tail(&requests[member], shared)))
                .collect();
            let wanted: Vec<Piece<'_>> = pieces
                .iter()
                .zip(&tails)
                .map(|((member, tokens), slot)| Piece {
                    slot,
                    tokens,
                    want: Want::Scores {
                        next: &requests[*member].continuation,
                        top: 0,
                    },
                })
                .collect();
            let outputs = self.engine.advance(&wanted)?;
            for ((member, _), output) in pieces.iter().zip(outputs) {
                found[*member] = Some(Scored::of(&of_piece(output)));
            }
            self.close(tails);
            done += pieces.len();
            progress(done, requests.len());
        }
        self.close(headers.into_values().collect());
        Ok(())
    }

    /// Reads the headers of families that are new in a batch.
    fn read_headers(
        &mut self,
        requests: &[Request],
        batch: &[Part<'_>],
        headers: &mut HashMap<usize, Slot>,
    ) -> Result<(), ScoreError> {
        let new: Vec<&Group> = batch
            .chunk_by(|a, b| a.group.family == b.group.family)
            .map(|family| family[0].group)
            .filter(|group| group.header > 0 && !headers.contains_key(&group.family))
            .collect();
        let slots = self.open(new.len());
        let pieces: Vec<Piece<'_>> = new
            .iter()
            .zip(&slots)
            .map(|(group, slot)| Piece {
                slot,
                tokens: &requests[group.members[0]].context[..group.header],
                want: Want::Nothing,
            })
            .collect();
        self.read(&pieces)?;
        headers.extend(new.iter().map(|group| group.family).zip(slots));
        Ok(())
    }

    /// A state for each part of a batch, behind all that its members share.
    fn read_bases(
        &mut self,
        requests: &[Request],
        batch: &[Part<'_>],
        headers: &HashMap<usize, Slot>,
    ) -> Result<Vec<Slot>, ScoreError> {
        let bases: Vec<Slot> = batch
            .iter()
            .map(|part| match headers.get(&part.group.family) {
                Some(header) => self.engine.fork(header),
                None => self.engine.open(),
            })
            .map(|slot| slot.expect(ENOUGH))
            .collect();
        let pieces: Vec<Piece<'_>> = batch
            .iter()
            .zip(&bases)
            .filter(|(part, _)| !part.group.own().is_empty())
            .map(|(part, slot)| Piece {
                slot,
                tokens: &requests[part.members[0]].context[part.group.own()],
                want: Want::Nothing,
            })
            .collect();
        self.read(&pieces)?;
        Ok(bases)
    }

    /// A state for each member, in order: the part's own for the last one, copies for those before it.
    fn fork_for_members(&mut self, batch: &[Part<'_>], bases: Vec<Slot>) -> Vec<Slot> {
        let mut slots = Vec::new();
        for (part, base) in batch.iter().zip(bases) {
            for _ in 1..part.members.len() {
                slots.push(self.engine.fork(&base).expect(ENOUGH));
            }
            slots.push(base);
        }
        slots
    }

    fn read(&mut self, pieces: &[Piece<'_>]) -> Result<(), ScoreError> {
        if !pieces.is_empty() {
            self.engine.advance(pieces)?;
        }
        Ok(())
    }
}

/// What of a request is read behind the shared tokens: the rest of its context and all of its continuation but the last token.
fn tail(request: &Request, shared: usize) -> Vec<u32> {
    let (_, before_last) = request
        .continuation
        .split_last()
        .expect("invariant: a continuation has a token");
    [&request.context[shared..], before_last].concat()
}
