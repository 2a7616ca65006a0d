//! First values of weights.
//!
//! Each weight has random streams of its own, keyed by the seed and its published name: its values depend neither on
//! the order nor on the presence of other weights. Each block of a weight has one of them, so that the blocks are drawn
//! by as many threads as there are, with the same values.

use std::thread;

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::Tensor;

use super::{ModelConfig, ParamSpec, Params};

/// A truncated normal is cut at so many standard deviations.
const CUT: f64 = 3.0;
/// Values of a block.
const BLOCK: usize = 1 << 16;

/// First value of a weight that conversion adds, fp32 on the CPU: uniform in +-1/sqrt(fan-in) for the feature maps and
/// their biases, 1 for the gains of the query and key norms (method: the framework's default for a dense layer).
pub fn init_new(config: &ModelConfig, seed: u64, spec: &ParamSpec) -> Tensor {
    if spec.name.ends_with("_norm.weight") {
        return Tensor::ones(spec.shape.as_slice(), (tch::Kind::Float, tch::Device::Cpu));
    }
    let keys_only = spec.name.contains("_totrain_embed_kv");
    let fan_in = config.head_dim
        * if keys_only {
            config.kv_heads
        } else {
            config.heads
        };
    let bound = (fan_in as f64).sqrt().recip();
    fill(spec, seed, |stream| bound * (2.0 * stream.uniform() - 1.0))
}

/// First value of any weight, for training from nothing, fp32 on the CPU: truncated normal, standard deviation
/// 1/sqrt(fan-in), and for the two matrices that write to the residual stream divided by sqrt(2 (layer + 1)), layers from
/// 0; gains 1; SUPRA's own as [`init_new`].
pub fn init_one(config: &ModelConfig, seed: u64, spec: &ParamSpec) -> Tensor {
    match spec.shape.len() {
        _ if spec.new => init_new(config, seed, spec),
        1 => Tensor::ones(spec.shape.as_slice(), (tch::Kind::Float, tch::Device::Cpu)),
        _ => {
            let deviation = deviation(spec);
            fill(spec, seed, |stream| deviation * stream.truncated_normal())
        }
    }
}

/// [`init_one`] of all weights.
pub fn init_all(config: &ModelConfig, seed: u64) -> Params {
    let value = |spec: ParamSpec| {
        let tensor = init_one(config, seed, &spec);
        (spec.name, tensor)
    };
    Params::new(config.params().into_iter().map(value).collect())
}

/// Standard deviation of a matrix [out, in] of the base. Embedding and output matrix have D columns as well.
fn deviation(spec: &ParamSpec) -> f64 {
    let plain = (spec.shape[1] as f64).sqrt().recip();
    let writes = ["attention.out_proj.weight", "feed_forward.w3.weight"];
    let layer = spec
        .name
        .strip_prefix("layers.")
        .and_then(|rest| rest.split_once('.'));
    match layer.and_then(|(layer, name)| Some((layer.parse::<f64>().ok()?, name))) {
        Some((layer, name)) if writes.contains(&name) => plain / (2.0 * (layer + 1.0)).sqrt(),
        _ => plain,
    }
}

/// Draws a weight's values, on as many threads as libtorch may use.
fn fill(spec: &ParamSpec, seed: u64, value: impl Fn(&mut Stream) -> f64 + Sync) -> Tensor {
    let mut values = vec![0f32; spec.elements() as usize];
    let threads = usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1);
    let blocks_each = values.len().div_ceil(BLOCK).div_ceil(threads).max(1);
    let draw = |first: usize, values: &mut [f32]| {
        for (block, values) in values.chunks_mut(BLOCK).enumerate() {
            let mut stream = Stream::new(seed, &spec.name, (first + block) as u64);
            values.fill_with(|| value(&mut stream) as f32);
        }
    };
    thread::scope(|scope| {
        let mut shares = values.chunks_mut(blocks_each * BLOCK).enumerate();
        let mine = shares.next();
        for (share, values) in shares {
            scope.spawn(move || draw(share * blocks_each, values));
        }
        mine.into_iter().for_each(|(_, values)| draw(0, values));
    });
    Tensor::from_slice(&values).view(spec.shape.as_slice())
}

/// The random numbers of a block of one weight.
struct Stream(ChaCha12Rng);

impl Stream {
    fn new(seed: u64, name: &str, block: u64) -> Stream {
        let key = blake3::Hasher::new()
            .update(&seed.to_le_bytes())
            .update(name.as_bytes())
            .finalize();
        let mut random = ChaCha12Rng::from_seed(*key.as_bytes());
        random.set_stream(block);
        Stream(random)
    }

    /// In (0, 1), 32 bits deep.
    fn uniform(&mut self) -> f64 {
        (f64::from(self.0.next_u32()) + 0.5) / 2f64.powi(32)
    }

    /// Standard normal, cut at +-3 (Box and Muller, rejecting the tails). Logarithm and cosine are our own build's: those
    /// of the C library differ between machines in the last bit.
    fn truncated_normal(&mut self) -> f64 {
        loop {
            let (radius, angle) = (
                (-2.0 * libm::log(self.uniform())).sqrt(),
                std::f64::consts::TAU * self.uniform(),
            );
            let value = radius * libm::cos(angle);
            if value.abs() <= CUT {
                return value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::tests::small;
    use crate::model::{AttentionKind, SupraConfig};

    fn config(kv_heads: i64) -> ModelConfig {
        let supra = SupraConfig {
            qk_norm: true,
            ..SupraConfig::default()
        };
        ModelConfig {
            kv_heads,
            ..small(AttentionKind::Supra(supra))
        }
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.flatten(0, -1)).unwrap()
    }

    #[test]
    fn feature_maps_are_uniform_in_the_papers_bounds() {
        let config = config(1);
        for spec in config
            .params()
            .iter()
            .filter(|spec| spec.name.contains("_totrain_embed"))
        {
            let fan_in: f32 = if spec.name.contains("_kv") {
                16.0
            } else {
                64.0
            };
            let bound = fan_in.sqrt().recip();
            let values = values(&init_new(&config, 17, spec));
            assert!(
                values.iter().all(|value| value.abs() <= bound),
                "{}",
                spec.name
            );
            assert!(
                values.iter().any(|value| value.abs() > 0.8 * bound),
                "{}",
                spec.name
            );
            let mean_square =
                values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32;
            if values.len() > 1000 {
                assert!(
                    (mean_square * 3.0 / (bound * bound) - 1.0).abs() < 0.1,
                    "{}",
                    spec.name
                );
            }
        }
    }

    #[test]
    fn a_weight_depends_on_seed_and_name_alone() {
        let [alone, shared] = [config(1), config(4)];
        let find = |config: &ModelConfig, name: &str| {
            config
                .params()
                .into_iter()
                .find(|spec| spec.name == name)
                .unwrap()
        };
        let name = "layers.1.attention._totrain_embed.weight";
        let first = values(&init_new(&alone, 17, &find(&alone, name)));
        assert_eq!(first, values(&init_new(&shared, 17, &find(&shared, name))));
        assert_ne!(first, values(&init_new(&alone, 18, &find(&alone, name))));
        let other = "layers.0.attention._totrain_embed.weight";
        assert_ne!(first, values(&init_new(&alone, 17, &find(&alone, other))));
        assert_eq!(first, values(init_all(&alone, 17).get(name)));
    }

    #[test]
    fn values_depend_on_no_number_of_threads() {
        let spec = ParamSpec {
            name: "output.weight".to_owned(),
            shape: vec![5, BLOCK as i64 - 7],
            decayed: true,
            new: false,
        };
        let before = tch::get_num_threads();
        let [one, three] = [1, 3].map(|threads| {
            tch::set_num_threads(threads);
            values(&init_one(&config(1), 5, &spec))
        });
        tch::set_num_threads(before);
        assert_eq!(one, three);
        assert_ne!(one[..BLOCK / 2], one[BLOCK..BLOCK + BLOCK / 2]);
    }

    #[test]
    fn a_model_from_nothing_has_the_papers_spread() {
        let config = config(4);
        let params = init_all(&config, 3);
        let deviation = |name: &str| params.get(name).std(true).double_value(&[]);
        assert!((deviation("tok_embeddings.weight") * 8.0 - 0.987).abs() < 0.05);
        assert!((deviation("layers.1.attention.out_proj.weight") * 8.0 * 2.0 - 0.987).abs() < 0.05);
        assert!(
            (deviation("layers.0.feed_forward.w3.weight") * 96f64.sqrt() * 2f64.sqrt() - 0.987)
                .abs()
                < 0.05
        );
        assert_eq!(
            params.get("norm.weight"),
            &Tensor::ones([64], (tch::Kind::Float, tch::Device::Cpu))
        );
        assert_eq!(
            params
                .get("layers.0.attention._totrain_q_norm.weight")
                .double_value(&[7]),
            1.0
        );
    }
}
