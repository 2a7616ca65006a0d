//! Which models the kernels take: rows are whole vectors, and no wider than what holds them.

use super::{attention, head_norm, heads, norm, tensors::VECTOR};
use crate::model::ModelConfig;

/// Why the kernels do not take a model: the first number that does not fit. None: they take it.
pub fn misfit(config: &ModelConfig) -> Option<String> {
    let ModelConfig {
        dim, head_dim, ffn, ..
    } = *config;
    // The model is as wide as all its heads, so a multiple of what they are multiples of.
    let problem = if head_dim % heads::MULTIPLE != 0 {
        let multiple = heads::MULTIPLE;
        format!("its heads have {head_dim} channels, no multiple of {multiple}")
    } else if head_dim > head_norm::MAX_WIDTH {
        let most = head_norm::MAX_WIDTH;
        format!("its heads have {head_dim} channels, more than {most}")
    } else if dim > norm::MAX_WIDTH {
        format!("its width is {dim}, more than {}", norm::MAX_WIDTH)
    } else if ffn % VECTOR != 0 {
        format!("its feed-forward width is {ffn}, no multiple of {VECTOR}")
    } else {
        return None;
    };
    Some(format!(
        "the CUDA kernels do not take this model: {problem}"
    ))
}

/// What the kernels do not compute of a model that they take, and why. None: they compute all of it.
pub fn left_to_libtorch(config: &ModelConfig) -> Option<String> {
    let d = config.supra().map(|_| config.head_dim)?;
    let problem = || {
        format!(
            "the CUDA kernels have no linear attention for heads of {d} channels, only of 64 and 128"
        )
    };
    (!attention::takes_heads_of(d)).then(problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AttentionKind, SupraConfig, config::tests::small};

    /// A SUPRA model of these widths.
    fn model(heads: i64, head_dim: i64, ffn: i64) -> ModelConfig {
        ModelConfig {
            dim: heads * head_dim,
            heads,
            head_dim,
            ffn,
            ..small(AttentionKind::Supra(SupraConfig::default()))
        }
    }

    #[test]
    fn models_of_whole_vectors_are_taken() {
        for (heads, head_dim, ffn) in [
            (1, 16, 8),
            (3, 48, 96),
            (64, 256, 65_536),
            (32, 128, 14_336),
        ] {
            assert_eq!(misfit(&model(heads, head_dim, ffn)), None);
        }
    }

    #[test]
    fn the_number_that_does_not_fit_is_named() {
        for (heads, head_dim, ffn, words) in [
            (4, 8, 96, "heads have 8 channels, no multiple of 16"),
            (2, 272, 96, "heads have 272 channels, more than 256"),
            (65, 256, 96, "width is 16640, more than 16384"),
            (4, 16, 100, "feed-forward width is 100, no multiple of 8"),
        ] {
            let problem = misfit(&model(heads, head_dim, ffn)).unwrap();
            assert!(problem.contains(words), "{problem}");
        }
    }

    #[test]
    fn linear_attention_without_kernels_is_told() {
        assert_eq!(left_to_libtorch(&model(2, 64, 96)), None);
        assert_eq!(left_to_libtorch(&model(2, 128, 96)), None);
        let softmax = model(2, 32, 96).with_attention(AttentionKind::Softmax);
        assert_eq!(left_to_libtorch(&softmax), None);
        let told = left_to_libtorch(&model(2, 32, 96)).unwrap();
        assert!(told.contains("heads of 32 channels"), "{told}");
    }
}
