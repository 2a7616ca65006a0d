//! Lengths of the flat buffers: parameters, gradients and what the optimizer keeps, as a rank lays them out.

use super::ModelShape;
use crate::schema::{Recipe, Sharding};

/// Numbers that every rank's part of a bucket is a multiple of.
const ALIGNMENT: u128 = 64;

/// Numbers in the flat buffers of a rank. A *bucket* is what becomes final together in the backward pass: the embedding, a
/// block, the last norm and the output; with zeros at its end it has equal parts for all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flat {
    /// All of them.
    pub whole: u128,
    /// Those whose moments and remainders the rank keeps.
    pub own: u128,
    /// The other ranks' shares of one part of the largest bucket.
    pub others: u128,
}

impl Flat {
    /// On each of `world` workers.
    pub fn new(recipe: &Recipe, shape: &ModelShape, world: u32) -> Flat {
        let world = u128::from(world.max(1));
        let [embedding, block, output] = shape
            .buckets(recipe.attention, recipe.model.qk_norm)
            .map(|numbers| u128::from(numbers).next_multiple_of(world * ALIGNMENT));
        let whole = embedding + u128::from(shape.layers) * block + output;
        Flat {
            whole,
            own: match recipe.optimizer.sharding {
                Sharding::None => whole,
                Sharding::Zero1 => whole / world,
            },
            others: embedding.max(block).max(output) / world * (world - 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::Attention;

    fn flat(sharding: &str, shape: &ModelShape, world: u32) -> Flat {
        let text = format!(
            "name: t\nbase: {{ path: b }}\ndata: {{ train: d }}\nbudget: {{ tokens: 20B }}\n\
             optimizer: {{ sharding: {sharding} }}"
        );
        Flat::new(&Recipe::parse(&text, "t.yaml").unwrap(), shape, world)
    }

    #[test]
    fn nothing_is_padded_where_buckets_have_equal_parts() {
        for world in [1, 2, 4, 8] {
            let parameters = 7_812_321_280;
            let none = flat("none", &ModelShape::MISTRAL_7B, world);
            assert_eq!((none.whole, none.own), (parameters, parameters));
            let zero1 = flat("zero1", &ModelShape::MISTRAL_7B, world);
            assert_eq!(zero1.own, parameters / u128::from(world));
            assert_eq!(zero1.whole, none.whole);
        }
    }

    #[test]
    fn buckets_without_equal_parts_get_some() {
        let small = ModelShape {
            vocab: 11,
            dim: 6,
            layers: 3,
            heads: 2,
            kv_heads: 1,
            ffn: 10,
            tied: true,
        };
        let flat = flat("zero1", &small, 3);
        assert_eq!(small.buckets(Attention::Supra, false), [66, 354, 6]);
        assert_eq!(flat.whole, 192 + 3 * 384 + 192);
        assert_eq!((flat.own, flat.others), (flat.whole / 3, 256));
    }
}
