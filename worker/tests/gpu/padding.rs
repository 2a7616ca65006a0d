//! Rows that fill a micro-batch up add nothing on a GPU, either.

use std::rc::Rc;

use supra_worker::model::{AttentionKind, ModelConfig, SupraConfig, init_all};
use tch::Kind;

use super::{bench::GPU, gpu};
use crate::{
    network::config,
    padding::{assert_nothing, input, run},
};

#[test]
fn gpu_rows_whose_targets_do_not_count_have_exactly_no_gradient() {
    let Some(kernels) = gpu("rows that do not count") else {
        return;
    };
    let kernels = Rc::new(kernels);
    let supra = AttentionKind::Supra(SupraConfig::default());
    for attention in [supra, AttentionKind::Softmax] {
        let config = ModelConfig {
            dim: 4 * 64,
            head_dim: 64,
            ..config(4, 2, attention)
        };
        let weights = init_all(&config, 5).to(GPU, Kind::BFloat16);
        assert_nothing(&run(
            &config,
            &weights,
            kernels.clone(),
            &input(2, 0, 150, GPU),
        ));
        let (loss, _) = run(&config, &weights, kernels.clone(), &input(2, 1, 150, GPU));
        assert!(loss.cross_entropy > 0.0, "{loss:?}");
    }
}
