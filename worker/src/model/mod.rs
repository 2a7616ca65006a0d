//! The model: a pre-norm transformer in the Llama shape whose attention is either softmax (the base) or SUPRA's linear
//! attention (arXiv 2405.06640), on libtorch.
//!
//! | where | what |
//! |---|---|
//! | [`config`], [`params`], [`init`] | shapes, names and first values of the weights |
//! | [`files`] | directories on disk: Hugging Face and published layouts, reading and writing |
//! | [`attention`] | the feature map, rotary embedding, decay, and the forms of the attention itself |
//! | [`block`], [`transformer`], [`loss`], [`slots`] | the rest of the network, training loss and what inference remembers |
//!
//! Tensor names end in their shape. The letters: B rows, T tokens, D model width, F feed-forward width, V vocabulary,
//! H query heads, K key/value heads, d key channels and e value channels of a head, N chunks of C tokens, p = d/2
//! channel pairs. So `q_bhtd` is [B, H, T, d].
//!
//! Everything is generic over device and kind. In bf16, rotation, attention, decay, recurrent state, norm statistics and
//! loss are computed in fp32; in fp32 and fp64 everything is computed in that kind.

pub mod attention;
pub mod block;
pub mod config;
pub mod documents;
pub mod error;
pub mod files;
pub mod init;
pub mod loss;
pub mod norm;
pub mod params;
pub mod slots;
pub mod transformer;

pub use config::{AttentionKind, Decay, ModelConfig, RopeFrequencies, SupraConfig};
pub use documents::Documents;
pub use error::ModelError;
pub use files::inventory::SaveReport;
pub use files::load::{LoadReport, NewWeights, load_each, load_params};
pub use files::save::{SaveFormat, save_model, save_model_with};
pub use init::{init_all, init_new, init_one};
pub use loss::{LossInput, LossSum};
pub use params::{ParamSpec, Params};
pub use slots::Slots;
pub use transformer::{Form, Transformer};

use tch::Kind;

/// The kind in which a model of `kind` computes what must not be rounded to bf16: attention, recurrent state, norm
/// statistics, loss.
pub fn accumulate_kind(kind: Kind) -> Kind {
    match kind {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    }
}
