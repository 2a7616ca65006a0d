//! A model that reads and continues several sequences at once, each in a slot.
//!
//! For SUPRA a slot is a state of fixed size, and every token costs the same wherever it stands; a softmax model's slot is a
//! cache that grows. Sequences come and go independently of each other, and what one of them gives does not depend on which
//! others are there.

mod under_way;

use std::rc::Rc;

use tch::{Device, Kind, TchError, Tensor};
use thiserror::Error;
use under_way::UnderWay;

use super::{load::LoadedModel, reader::Reader, rows::Rows, score::Score};
use crate::{
    kernels::{
        CudaKernels, KernelError,
        cuda::{
            self,
            decode::{self, Decoder, Row},
        },
    },
    model::{ModelError, Slots, attention::ragged::Span},
};

/// Tokens that go through the model at once, at most; longer pieces take several turns.
const TURN: i64 = 4096;
/// Rows of logits that exist at once, at most.
const ROWS: usize = 1024;

/// How prompts are read. Both give the same result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineForm {
    /// Several tokens at once, by chunks.
    #[default]
    Chunkwise,
    /// Token by token.
    Recurrent,
}

/// A sequence that is open. Whoever has it gives it back with [`Engine::close`]; what is dropped stays taken.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Slot(usize);

/// What is wanted of the logits of a piece.
#[derive(Clone, Copy, Debug)]
pub enum Want<'a> {
    /// Nothing: the piece is only read.
    Nothing,
    /// The likeliest token after the last one.
    Greedy,
    /// The logits after the last token.
    Logits,
    /// How likely given tokens are.
    Scores {
        /// The i-th is asked for after the i-th of the piece's last `next.len()` tokens.
        next: &'a [u32],
        /// So many of the likeliest tokens are told beside each.
        top: usize,
    },
}

/// The next tokens of a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// Which sequence.
    pub slot: &'a Slot,
    /// At least one token.
    pub tokens: &'a [u32],
    /// What is to be told of them.
    pub want: Want<'a>,
}

/// What was wanted of a piece.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Nothing.
    Nothing,
    /// The likeliest next token, one of them where there are several.
    Greedy(u32),
    /// Logits of all tokens of the vocabulary.
    Logits(Vec<f32>),
    /// One for each token asked for.
    Scores(Vec<Score>),
}

/// A sequence as it can be kept: its tensors in host memory.
#[derive(Debug)]
pub struct SavedState {
    /// Tokens read.
    pub position: u64,
    /// What the blocks remember, by name.
    pub tensors: Vec<(String, Tensor)>,
}

/// Why an engine cannot go on.
#[derive(Debug, Error)]
pub enum EngineError {
    /// Too many slots for the memory.
    #[error("there is no memory for {slots} sequences{}: choose fewer slots", .each.map_or(String::new(), |bytes| format!(" of {:.1} MB each", bytes as f64 / 1e6)))]
    Memory {
        /// Slots asked for.
        slots: usize,
        /// Bytes of each, if that is fixed.
        each: Option<u64>,
        /// What libtorch says.
        source: TchError,
    },
    /// A token that the model does not have.
    #[error(
        "there is a token {token}, but the model's vocabulary has {vocabulary} tokens: the tokenizer does not fit"
    )]
    Vocabulary {
        /// The token.
        token: u32,
        /// Tokens of the model.
        vocabulary: u32,
    },
    /// The sequence is longer than the model can see.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The weights are broken.
    #[error(
        "the model's logits are not numbers after {position} tokens: its weights are damaged or did not converge"
    )]
    NotNumbers {
        /// Tokens read.
        position: u64,
    },
    /// The GPU cannot go on.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A state of another model.
    #[error("the saved state does not fit this model: {0}")]
    State(String),
    /// There is no place for one more sequence.
    #[error("all {slots} slots are taken")]
    Full {
        /// Slots of the engine.
        slots: usize,
    },
}

/// A model with memory for a number of sequences.
pub struct Engine {
    model: LoadedModel,
    form: EngineForm,
    memory: Slots,
    /// What computes single tokens, where they can be recorded.
    decoder: Option<Decoder>,
    /// What reads more tokens at once, where there are kernels for the model.
    reader: Option<Reader>,
    free: Vec<usize>,
    vocabulary: u32,
}

impl Engine {
    /// Room for so many sequences.
    pub fn new(model: LoadedModel, slots: usize) -> Result<Engine, EngineError> {
        let config = model.transformer.config();
        let (device, kind) = (model.params.device(), model.params.kind());
        let memory = Slots::new(config, slots, device, kind);
        let memory = memory.map_err(|source| EngineError::Memory {
            slots,
            each: Slots::bytes_of_each(config, kind),
            source,
        })?;
        let decoder = match device {
            Device::Cuda(index) if decode::misfit(config, kind).is_none() => {
                Some(Decoder::new(index, config, &model.params, &memory)?)
            }
            _ => None,
        };
        let reader = match (device, kind) {
            (Device::Cuda(index), Kind::BFloat16) if cuda::misfit(config).is_none() => {
                Some(Reader::new(Rc::new(CudaKernels::new(index)?)))
            }
            _ => None,
        };
        Ok(Engine {
            vocabulary: u32::try_from(config.vocab).unwrap_or(u32::MAX),
            model,
            form: EngineForm::default(),
            memory,
            decoder,
            reader,
            free: (0..slots).rev().collect(),
        })
    }

    /// The same, reading prompts in another form.
    pub fn with_form(self, form: EngineForm) -> Engine {
        Engine { form, ..self }
    }

    /// What it runs.
    pub fn model(&self) -> &LoadedModel {
        &self.model
    }

    /// Tokens of the vocabulary.
    pub fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    /// Sequences that can be open at once.
    pub fn slots(&self) -> usize {
        self.memory.positions_s.len()
    }

    /// Sequences that can still be opened.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// An empty sequence; none if all slots are taken.
    pub fn open(&mut self) -> Option<Slot> {
        let slot = self.free.pop()?;
        tch::no_grad(|| self.memory.clear(slot));
        Some(Slot(slot))
    }

    /// Gives a slot back.
    pub fn close(&mut self, slot: Slot) {
        self.free.push(slot.0);
    }

    /// Another sequence that goes on from where one is, without reading its tokens again; none if all slots are taken.
    pub fn fork(&mut self, from: &Slot) -> Option<Slot> {
        let slot = self.free.pop()?;
        tch::no_grad(|| self.memory.copy(from.0, slot));
        Some(Slot(slot))
    }

    /// Tokens that a sequence has.
    pub fn position(&self, slot: &Slot) -> u64 {
        self.memory.positions_s[slot.0].cast_unsigned()
    }

    /// Bytes that a sequence needs: always the same for SUPRA.
    pub fn state_bytes(&self, slot: &Slot) -> u64 {
        self.memory.bytes(slot.0)
    }

    /// A copy of a sequence in host memory.
    pub fn save(&self, slot: &Slot) -> SavedState {
        let tensors = self.memory.tensors(slot.0).into_iter();
        let host = |tensor: Tensor| tensor.to_device(Device::Cpu).copy();
        SavedState {
            position: self.position(slot),
            tensors: tensors.map(|(name, tensor)| (name, host(tensor))).collect(),
        }
    }

    /// A sequence that goes on from a saved one.
    pub fn load(&mut self, state: &SavedState) -> Result<Slot, EngineError> {
        let slots = self.slots();
        let slot = self.free.pop().ok_or(EngineError::Full { slots })?;
        let find = |name: &str| {
            let mut tensors = state.tensors.iter();
            tensors.find_map(|(other, tensor)| (other == name).then(|| tensor.shallow_clone()))
        };
        let position = state.position.cast_signed();
        tch::no_grad(|| self.memory.restore(slot, position, find)).map_err(|problem| {
            self.free.push(slot);
            EngineError::State(problem)
        })?;
        Ok(Slot(slot))
    }

    /// Reads the next tokens of sequences, each at most once, and tells what is wanted of each, in their order. After an
    /// error the sequences of `pieces` are undefined and can only be closed.
    pub fn advance(&mut self, pieces: &[Piece<'_>]) -> Result<Vec<Output>, EngineError> {
        self.check(pieces)?;
        tch::no_grad(|| {
            let under_way = |piece| UnderWay::new(piece, self.position(piece.slot));
            let mut under_way: Vec<UnderWay<'_>> = pieces.iter().map(under_way).collect();
            while under_way.iter().any(|piece| piece.left() > 0) {
                self.turn(&mut under_way)?;
            }
            Ok(under_way.into_iter().map(|piece| piece.output).collect())
        })
    }

    /// Logits [T, V] of all tokens of a text, at least one, read at once as a prompt is.
    pub fn logits_of(&mut self, tokens: &[u32]) -> Result<Tensor, EngineError> {
        let slots = self.slots();
        let slot = self.open().ok_or(EngineError::Full { slots })?;
        let ids: Vec<i64> = tokens.iter().map(|&token| token.into()).collect();
        let rows: Vec<i64> = (0..ids.len() as i64).collect();
        let spans = [Span {
            slot: slot.0,
            tokens: ids.len() as i64,
        }];
        let parts = tch::no_grad(|| {
            let parts = self.logits(&ids, &spans, &rows)?;
            Ok(parts.map(Rows::all).collect::<Vec<_>>())
        });
        self.close(slot);
        parts.map(|parts| Tensor::cat(&parts, 0))
    }

    fn check(&self, pieces: &[Piece<'_>]) -> Result<(), EngineError> {
        let config = self.model.transformer.config();
        for piece in pieces {
            let next = match piece.want {
                Want::Scores { next, .. } => next,
                _ => &[],
            };
            let mut tokens = piece.tokens.iter().chain(next).copied();
            if let Some(token) = tokens.find(|&token| token >= self.vocabulary) {
                let vocabulary = self.vocabulary;
                return Err(EngineError::Vocabulary { token, vocabulary });
            }
            let length = self.position(piece.slot) + piece.tokens.len() as u64;
            config.check_sequence_length(length.cast_signed())?;
        }
        Ok(())
    }

    /// Puts at most [`TURN`] tokens through the model.
    fn turn(&mut self, pieces: &mut [UnderWay<'_>]) -> Result<(), EngineError> {
        let parts = self.parts(pieces);
        let (mut spans, mut ids, mut wanted, mut rows) = (vec![], vec![], vec![], vec![]);
        for &(at, tokens) in &parts {
            let slot = pieces[at].piece.slot.0;
            spans.push(Span { slot, tokens });
            let first = ids.len() as i64;
            let some = pieces[at].take(tokens, &mut ids);
            wanted.extend(some.clone().map(|_| at));
            rows.extend(some.map(|row| first + row));
        }
        for (rows, wanted) in self.logits(&ids, &spans, &rows)?.zip(wanted.chunks(ROWS)) {
            let mut first = 0;
            for same in wanted.chunk_by(|a, b| a == b) {
                let position = pieces[same[0]].position;
                pieces[same[0]]
                    .tell(&rows, first, same.len())
                    .ok_or(EngineError::NotNumbers { position })?;
                first += same.len();
            }
        }
        Ok(())
    }

    /// The pieces of which tokens are read now, and how many of each; single tokens first.
    fn parts(&self, pieces: &[UnderWay<'_>]) -> Vec<(usize, i64)> {
        let mut room = TURN.max(pieces.len() as i64);
        let mut parts = Vec::with_capacity(pieces.len());
        for (at, piece) in pieces.iter().enumerate() {
            let most = match self.form {
                EngineForm::Chunkwise => room,
                EngineForm::Recurrent => room.min(1),
            };
            let tokens = piece.left().min(most);
            if tokens > 0 {
                parts.push((at, tokens));
                room -= tokens;
            }
        }
        parts.sort_by_key(|&(_, tokens)| tokens > 1);
        parts
    }

    /// Reads tokens, and gives the logits of those that `rows` names, [`ROWS`] at a time.
    fn logits<'a>(
        &'a mut self,
        ids: &[i64],
        spans: &[Span],
        rows: &'a [i64],
    ) -> Result<Box<dyn Iterator<Item = Rows> + 'a>, EngineError> {
        let LoadedModel {
            transformer,
            params,
            ..
        } = &self.model;
        if let Some(decoder) = &mut self.decoder
            && spans.len() == ids.len()
            && ids.len() <= ROWS
        {
            let row = |(span, &token): (&Span, &i64)| Row {
                token: token as i32,
                slot: span.slot as i32,
            };
            let steps: Vec<Row> = spans.iter().zip(ids).map(row).collect();
            let likeliest = decoder.step(&steps, &mut self.memory)?;
            let all = Rows::new(decoder.logits(ids.len())).with_likeliest(likeliest);
            return Ok(Box::new(all.of(rows).into_iter()));
        }
        let device = params.device();
        let ids_n = Tensor::from_slice(ids).to_device(device);
        let x_nd = match &self.reader {
            Some(reader) => {
                let config = transformer.config();
                reader.advance(config, params, &mut self.memory, &ids_n, spans)?
            }
            None => transformer.advance(params, &mut self.memory, &ids_n, spans),
        };
        Ok(Box::new(rows.chunks(ROWS).map(move |rows| {
            let rows_r = Tensor::from_slice(rows).to_device(device);
            Rows::new(transformer.head(params, &x_nd.index_select(0, &rows_r)))
        })))
    }
}
