//! Keys and values of one sequence of a softmax model.

use tch::{Device, Kind, Tensor};

use crate::model::ModelConfig;

/// Tokens for which a cache makes room at first.
const FIRST_ROOM: i64 = 64;

/// Rotated keys and values of all tokens so far, once per key/value head. Room grows by doubling, so that a token costs the
/// same on average whenever it comes.
#[derive(Debug)]
pub struct Cache {
    tokens: i64,
    /// [1, K, room, d].
    k_1krd: Tensor,
    /// [1, K, room, e].
    v_1kre: Tensor,
}

impl Cache {
    /// An empty one.
    pub fn new(config: &ModelConfig, options: (Kind, Device)) -> Cache {
        let empty = || Tensor::empty([1, config.kv_heads, 0, config.head_dim], options);
        Cache {
            tokens: 0,
            k_1krd: empty(),
            v_1kre: empty(),
        }
    }

    /// Tokens in it.
    pub fn tokens(&self) -> i64 {
        self.tokens
    }

    /// Forgets all tokens; the room stays.
    pub fn clear(&mut self) {
        self.tokens = 0;
    }

    /// Another one with the same tokens.
    pub fn copy(&self) -> Cache {
        Cache {
            tokens: self.tokens,
            k_1krd: self.k_1krd.copy(),
            v_1kre: self.v_1kre.copy(),
        }
    }

    /// Adds the keys [1, K, t, d] and values [1, K, t, e] of t more tokens.
    pub fn append(&mut self, k_1ktd: &Tensor, v_1kte: &Tensor) {
        let (new, used) = (k_1ktd.size()[2], self.tokens);
        self.reserve(new);
        for (buffer, tokens) in [(&self.k_1krd, k_1ktd), (&self.v_1kre, v_1kte)] {
            buffer.narrow(2, used, new).copy_(tokens);
        }
        self.tokens += new;
    }

    /// Makes room for so many more tokens.
    pub fn reserve(&mut self, tokens: i64) {
        for buffer in [&mut self.k_1krd, &mut self.v_1kre] {
            grow(buffer, self.tokens, self.tokens + tokens);
        }
    }

    /// Counts one more token, which somebody has written behind the others, where room was reserved.
    pub fn count(&mut self) {
        self.tokens += 1;
    }

    /// The buffers [1, K, room, d] and [1, K, room, e] behind it, of which the first tokens are its own.
    pub fn buffers(&self) -> [&Tensor; 2] {
        [&self.k_1krd, &self.v_1kre]
    }

    /// Keys [1, K, S, d] and values [1, K, S, e] of all S tokens.
    pub fn all(&self) -> [Tensor; 2] {
        [&self.k_1krd, &self.v_1kre].map(|buffer| buffer.narrow(2, 0, self.tokens))
    }

    /// Likewise without the first dimension.
    pub fn tensors(&self) -> [Tensor; 2] {
        self.all().map(|tensor| tensor.squeeze_dim(0))
    }

    /// The shape of either tensor when there are so many tokens.
    pub fn shape(&self, tokens: i64) -> [i64; 3] {
        let size = self.k_1krd.size();
        [size[1], tokens, size[3]]
    }
}

/// Makes room for `needed` tokens, and keeps the first `used`.
fn grow(buffer: &mut Tensor, used: i64, needed: i64) {
    let mut size = buffer.size();
    if size[2] >= needed {
        return;
    }
    size[2] = needed.max(2 * size[2]).max(FIRST_ROOM);
    let larger = Tensor::empty(size.as_slice(), (buffer.kind(), buffer.device()));
    larger.narrow(2, 0, used).copy_(&buffer.narrow(2, 0, used));
    *buffer = larger;
}
