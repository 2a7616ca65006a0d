//! Which tensors on disk make up each weight: one table for reading and for writing.

use super::tensors::TensorFiles;
use crate::model::{ModelConfig, ParamSpec};

/// How the tensors of a directory are named and stacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Llama, Mistral: separate q, k, v and gate, up.
    HuggingFace,
    /// Published names behind a prefix, often none.
    Published {
        /// What stands before each name.
        prefix: String,
    },
    /// Meta's own names: separate q, k, v and gate, up; rows of q and k interleaved. Only read.
    Meta,
}

/// A tensor on disk: some rows of a weight.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its name there.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// So many heads whose rows are in the order of an interleaved rotary embedding, if they are.
    pub interleaved: Option<i64>,
}

impl Layout {
    /// The published names as they are.
    pub const PUBLISHED: Layout = Layout::Published {
        prefix: String::new(),
    };

    /// By the name of the embedding matrix, which every model has.
    pub fn of(files: &TensorFiles) -> Option<Layout> {
        if files.contains("model.embed_tokens.weight") {
            return Some(Layout::HuggingFace);
        }
        if files.contains("layers.0.attention.wq.weight") {
            return Some(Layout::Meta);
        }
        // Training wrappers put their own names in front.
        let embedding = files.names().find(|name| {
            name.strip_suffix("tok_embeddings.weight")
                .is_some_and(|prefix| {
                    prefix
                        .split_terminator('.')
                        .all(|part| ["model", "module", "_orig_mod"].contains(&part))
                })
        })?;
        Some(Layout::Published {
            prefix: embedding
                .trim_end_matches("tok_embeddings.weight")
                .to_owned(),
        })
    }

    /// The tensors that make up a weight, from its first row to its last. None if this layout has no such weight.
    pub fn pieces(&self, config: &ModelConfig, spec: &ParamSpec) -> Option<Vec<Piece>> {
        let named = match self {
            Layout::Published { prefix } => vec![(format!("{prefix}{}", spec.name), spec.shape[0])],
            Layout::HuggingFace => huggingface_names(config, spec)?,
            Layout::Meta => meta_names(config, spec)?,
        };
        let shape = |rows| [&[rows], &spec.shape[1..]].concat();
        let interleaved = |name: &str| match self {
            Layout::Meta if name.ends_with(".wq.weight") => Some(config.heads),
            Layout::Meta if name.ends_with(".wk.weight") => Some(config.kv_heads),
            _ => None,
        };
        Some(
            named
                .into_iter()
                .map(|(name, rows)| Piece {
                    interleaved: interleaved(&name),
                    name,
                    shape: shape(rows),
                })
                .collect(),
        )
    }

    /// Whose layout it is, as people say it.
    pub fn describe(&self) -> String {
        match self {
            Layout::HuggingFace => "Hugging Face".to_owned(),
            Layout::Meta => "Meta".to_owned(),
            Layout::Published { prefix } if prefix.is_empty() => "open_lm".to_owned(),
            Layout::Published { prefix } => format!("open_lm, behind `{prefix}`"),
        }
    }

    /// Whether a tensor that no weight asks for is known to carry no information.
    pub fn ignores(&self, name: &str) -> bool {
        // Tables of rotary frequencies that older libraries stored.
        name.ends_with(".rotary_emb.inv_freq")
            || name.ends_with(".pos_embed.inv_freq")
            || name == "rope.freqs"
    }

    /// The output matrix's name. A tied model may store it a second time.
    pub fn output_name(&self) -> String {
        match self {
            Layout::HuggingFace => "lm_head.weight".to_owned(),
            Layout::Published { prefix } => format!("{prefix}output.weight"),
            Layout::Meta => "output.weight".to_owned(),
        }
    }

    /// The embedding matrix's name.
    pub fn embedding_name(&self) -> String {
        match self {
            Layout::HuggingFace => "model.embed_tokens.weight".to_owned(),
            Layout::Published { prefix } => format!("{prefix}tok_embeddings.weight"),
            Layout::Meta => "tok_embeddings.weight".to_owned(),
        }
    }
}

/// Names and rows of the tensors that Hugging Face's models keep a weight in.
fn huggingface_names(config: &ModelConfig, spec: &ParamSpec) -> Option<Vec<(String, i64)>> {
    let whole = |name: String| Some(vec![(name, spec.shape[0])]);
    let Some((layer, name)) = spec
        .name
        .strip_prefix("layers.")
        .and_then(|rest| rest.split_once('.'))
    else {
        return whole(match spec.name.as_str() {
            "tok_embeddings.weight" => "model.embed_tokens.weight".to_owned(),
            "norm.weight" => "model.norm.weight".to_owned(),
            "output.weight" => "lm_head.weight".to_owned(),
            _ => return None,
        });
    };
    let in_layer = |name: &str| format!("model.layers.{layer}.{name}.weight");
    let (queries, keys) = (
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    );
    match name {
        "attention.in_proj.weight" => Some(vec![
            (in_layer("self_attn.q_proj"), queries),
            (in_layer("self_attn.k_proj"), keys),
            (in_layer("self_attn.v_proj"), keys),
        ]),
        "feed_forward.w12.weight" => Some(vec![
            (in_layer("mlp.gate_proj"), config.ffn),
            (in_layer("mlp.up_proj"), config.ffn),
        ]),
        "attention.out_proj.weight" => whole(in_layer("self_attn.o_proj")),
        "feed_forward.w3.weight" => whole(in_layer("mlp.down_proj")),
        "attention_norm.weight" => whole(in_layer("input_layernorm")),
        "ffn_norm.weight" => whole(in_layer("post_attention_layernorm")),
        _ => None,
    }
}

/// Names and rows of the tensors that Meta's models keep a weight in: those of the published layout, but for the stacked ones.
fn meta_names(config: &ModelConfig, spec: &ParamSpec) -> Option<Vec<(String, i64)>> {
    let (queries, keys) = (
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    );
    let parts = |stacked: &str, parts: &[(&str, i64)]| {
        let block = spec.name.strip_suffix(stacked)?;
        let named = parts.iter();
        Some(
            named
                .map(|(name, rows)| (format!("{block}{name}.weight"), *rows))
                .collect(),
        )
    };
    if spec.new {
        return None;
    }
    parts(
        "in_proj.weight",
        &[("wq", queries), ("wk", keys), ("wv", keys)],
    )
    .or_else(|| parts("w12.weight", &[("w1", config.ffn), ("w3", config.ffn)]))
    .or_else(|| parts("w3.weight", &[("w2", spec.shape[0])]))
    .or_else(|| parts("out_proj.weight", &[("wo", spec.shape[0])]))
    .or_else(|| Some(vec![(spec.name.clone(), spec.shape[0])]))
}
