//! Bytes of what forward and backward allocate on a rank.

use super::memory::{LOGITS, rows};
use super::{ModelShape, Policy};
use crate::schema::{Attention, Precision, Recipe};

/// Bytes of a number.
pub const FP32: u128 = 4;
/// Likewise.
pub const BF16: u128 = 2;
const INT64: u128 = 8;

/// Bytes of a number of this form.
pub fn element(precision: Precision) -> u128 {
    match precision {
        Precision::Bf16 => BF16,
        Precision::Fp32 => FP32,
    }
}

/// Tokens of a chunk in the worker's attention kernels, which keep one state at each boundary inside a row.
const KERNEL_CHUNK: u128 = 128;

/// Channels of a head that the attention kernels are made for.
const KERNEL_HEADS: [u128; 2] = [64, 128];

/// The lengths behind all sizes, wide enough for any recipe's products.
pub struct Sizes {
    vocab: u128,
    dim: u128,
    layers: u128,
    heads: u128,
    head_dim: u128,
    ffn: u128,
    /// Channels of all key heads as they are projected.
    projected_keys: u128,
    /// Channels of all key heads as attention sees them: with query and key norms every query head has its own.
    keys: u128,
    attention: Attention,
    qk_norm: bool,
    documents: bool,
    /// Tokens per chunk of libtorch's way.
    chunk: u128,
    precision: Precision,
    rows: u128,
    length: u128,
}

impl Sizes {
    /// For each of `world` workers.
    pub fn new(recipe: &Recipe, shape: &ModelShape, world: u32) -> Sizes {
        let projected_keys = u128::from(shape.kv_heads * shape.head_dim());
        let qk_norm = recipe.attention == Attention::Supra && recipe.model.qk_norm;
        let length = u128::from(recipe.batch.sequence_length);
        Sizes {
            vocab: shape.vocab.into(),
            dim: shape.dim.into(),
            layers: shape.layers.into(),
            heads: shape.heads.into(),
            head_dim: shape.head_dim().into(),
            ffn: shape.ffn.into(),
            projected_keys,
            keys: if qk_norm {
                shape.dim.into()
            } else {
                projected_keys
            },
            attention: recipe.attention,
            qk_norm,
            documents: recipe.data.reset_at_document,
            chunk: u128::from(recipe.model.chunk).min(length),
            precision: recipe.model.precision,
            rows: rows(recipe, world).into(),
            length,
        }
    }

    fn tokens(&self) -> u128 {
        self.rows * self.length
    }

    /// Bytes of an activation.
    fn element(&self) -> u128 {
        element(self.precision)
    }

    /// Queries, keys and values as matrix products give them: channels of a token.
    fn projected(&self) -> u128 {
        let feature_maps = match self.attention {
            Attention::Supra => self.dim + self.projected_keys,
            Attention::Softmax => 0,
        };
        self.dim + 2 * self.projected_keys + feature_maps
    }

    /// What query and key norms add for a token, in bytes: five rows of channels and two statistics.
    fn norms(&self) -> u128 {
        u128::from(self.qk_norm) * (5 * self.dim * self.element() + 2 * FP32)
    }

    /// Bytes of what one block makes of a token that is kept from this policy on, and not from a leaner one.
    fn kept_from(&self, policy: Policy) -> u128 {
        match policy {
            // Stream on entry, its statistic.
            Policy::Recompute => self.dim * self.element() + FP32,
            // Projections, mixed values, stream in the middle and its statistic, gate and up.
            Policy::Lean => {
                (self.projected() + 2 * self.dim + 2 * self.ffn) * self.element() + FP32
            }
            // Both normed streams, queries, keys and values by heads, mixed values by tokens, gated values.
            Policy::Save => {
                (4 * self.dim + 2 * self.keys + self.ffn) * self.element() + self.norms()
            }
        }
    }

    /// What every block has its own of.
    pub fn per_block(&self, policy: Policy) -> u128 {
        let kept = Policy::ALL.into_iter().filter(|from| *from <= policy);
        let bytes: u128 = kept.map(|from| self.kept_from(from)).sum();
        self.layers * self.tokens() * bytes
    }

    /// What one block leaves to the next to overwrite.
    pub fn shared(&self, policy: Policy) -> u128 {
        let dropped = Policy::ALL.into_iter().filter(|from| *from > policy);
        let bytes: u128 = dropped.map(|from| self.kept_from(from)).sum();
        self.tokens() * bytes
    }

    /// Gradients of what one block makes, and of the stream.
    pub fn gradients(&self) -> u128 {
        let channels = 4 * self.dim + self.ffn + 2 * self.keys + self.projected();
        self.tokens() * (channels * self.element() + self.norms())
    }

    /// After the last block: stream, its statistic and its norm; logits, which their gradients overwrite.
    pub fn head(&self) -> u128 {
        let at_a_time = (u128::from(LOGITS) / self.vocab).clamp(1, self.tokens());
        let norm = self.tokens() * (2 * self.dim * self.element() + FP32);
        norm + at_a_time * self.vocab * self.element()
    }

    /// Tokens, targets and mask; rotary cosines and sines; what documents need besides.
    pub fn batch(&self) -> u128 {
        // One cosine and one sine for two channels.
        let angles = self.head_dim * FP32;
        let of_documents = self.tokens() * (2 * INT64 + angles) + self.sight();
        self.tokens() * (2 * INT64 + 1)
            + self.length * angles
            + u128::from(self.documents) * of_documents
    }

    /// Who sees whom in rows of documents, where attention reads it from a table: one byte for a pair of tokens.
    fn sight(&self) -> u128 {
        match self.attention {
            Attention::Softmax => self.tokens() * self.length,
            Attention::Supra => 0,
        }
    }

    /// Whether the worker's own attention kernels serve.
    fn by_kernels(&self) -> bool {
        self.attention == Attention::Supra
            && self.precision == Precision::Bf16
            && KERNEL_HEADS.contains(&self.head_dim)
    }

    /// States at the inner boundaries of rows, bf16: of one block at a time.
    pub fn states(&self) -> u128 {
        let inner = self.length.div_ceil(KERNEL_CHUNK).saturating_sub(1);
        u128::from(self.by_kernels()) * self.rows * inner * self.dim * self.head_dim * BF16
    }

    /// The most that libtorch allocates at once where it works in place of our kernels.
    pub fn temporaries(&self) -> u128 {
        let channels = self.tokens() * self.dim;
        let attention = match self.attention {
            _ if self.by_kernels() => 0,
            Attention::Supra => self.chunkwise(),
            // Repeated keys and values, leaves of autograd, their gradients; and the mask in the kind of scores.
            Attention::Softmax => (10 * channels + self.sight()) * self.element(),
        };
        // Keys and values summed over the query heads that share them.
        let norms = u128::from(self.qk_norm) * 2 * self.tokens() * self.projected_keys;
        let twins = match self.precision {
            Precision::Bf16 => 0,
            // Beside the gate's two factors, one at a time: the gradient of the whole embedding.
            Precision::Fp32 => (2 * self.tokens() * self.ffn).max(self.vocab * self.dim) * FP32,
        };
        attention.max(norms * self.element()).max(twins)
    }

    /// Chunkwise attention by libtorch, forward and backward in fp32: ten tensors of queries' size, the weights inside
    /// chunks and their gradients, four times the states; and its tables, the weights' decay the largest of them.
    fn chunkwise(&self) -> u128 {
        let chunks = self.length.div_ceil(self.chunk.max(1));
        let pairs = self.tokens() * self.heads * self.chunk;
        let states = self.rows * chunks * self.dim * self.head_dim;
        (10 * self.tokens() * self.dim + 3 * pairs + 4 * states) * FP32
    }
}
