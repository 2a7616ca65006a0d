//! Where each parameter lies in the flat buffers, and which part of them is a rank's own.
//!
//! A flat buffer is a list of [`Bucket`]s in the model's order: the embedding, each block, the last norm with the output
//! layer. The gradients of a bucket become final together, so a bucket is what ranks exchange. Behind its numbers a bucket
//! is padded with zeros, so that it falls into equal parts, one per rank, that begin where wide loads may.

use std::ops::Range;

use tch::Tensor;

use crate::model::{ParamSpec, Params};

/// Every rank's part of a bucket is a multiple of so many elements.
const ALIGNMENT: i64 = 64;

/// One parameter's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Published name.
    pub name: String,
    /// Shape of the parameter.
    pub shape: Vec<i64>,
    /// First element in the flat buffer.
    pub offset: i64,
    /// Number of elements.
    pub elements: i64,
}

impl Slot {
    /// The parameter's part of a flat buffer, in its own shape, sharing storage.
    pub fn view(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.offset, self.elements)
            .view(self.shape.as_slice())
    }
}

/// Parameters whose gradients become final together: those that weight decay shrinks, then the others, then zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// First element in the flat buffer.
    pub start: i64,
    /// Elements, with the zeros at the end.
    pub elements: i64,
    /// Elements that are numbers of parameters.
    pub numbers: i64,
    /// How many of them, from the first one on, weight decay shrinks.
    pub decayed: i64,
    /// Index of the first: its place among the numbers of all buckets, whatever the padding.
    pub index: i64,
}

impl Bucket {
    /// The bucket's part of a flat buffer, sharing storage.
    pub fn view(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.start, self.elements)
    }
}

/// Which of so many equal parts of every bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// From 0.
    pub index: i64,
    /// Number of parts.
    pub of: i64,
}

/// The numbers of one bucket that are in a [`Part`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First of them in a flat buffer of everything.
    pub start: i64,
    /// First of them in a flat buffer of the part alone.
    pub own: i64,
    /// How many; at the end of a bucket possibly none.
    pub length: i64,
    /// How many of them, from the first one on, weight decay shrinks.
    pub decayed: i64,
    /// Index of the first.
    pub index: i64,
}

impl Piece {
    /// Its view of a flat buffer of everything.
    pub fn of_all(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.start, self.length)
    }

    /// Its view of a flat buffer of the part alone.
    pub fn of_part(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.own, self.length)
    }
}

impl Part {
    /// Everything.
    pub const WHOLE: Part = Part { index: 0, of: 1 };

    /// What belongs to one of `world` ranks.
    pub fn of_rank(rank: u32, world: u32) -> Part {
        Part {
            index: rank.into(),
            of: world.into(),
        }
    }

    /// Elements of a flat buffer that holds the part alone.
    pub fn elements(self, layout: &Layout) -> i64 {
        layout.elements / self.of
    }

    /// What the part has of a bucket.
    pub fn piece(self, bucket: &Bucket) -> Piece {
        let share = bucket.elements / self.of;
        let before = self.index * share;
        Piece {
            start: bucket.start + before,
            own: bucket.start / self.of,
            length: (bucket.numbers - before).clamp(0, share),
            decayed: (bucket.decayed - before).clamp(0, share),
            index: bucket.index + before,
        }
    }

    /// What the part has of every bucket, in their order.
    pub fn pieces(self, layout: &Layout) -> impl Iterator<Item = Piece> {
        layout.buckets.iter().map(move |bucket| self.piece(bucket))
    }
}

/// The order of all parameters in the flat buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    slots: Vec<Slot>,
    buckets: Vec<Bucket>,
    elements: i64,
}

impl Layout {
    /// Lays parameters, in the model's order, out for `world` ranks. With `decay_all`, norms and biases decay like
    /// matrices.
    pub fn new(params: &[ParamSpec], decay_all: bool, world: u32) -> Layout {
        let mut layout = Layout {
            slots: Vec::with_capacity(params.len()),
            buckets: Vec::new(),
            elements: 0,
        };
        for bucket in params.chunk_by(|a, b| block(&a.name) == block(&b.name)) {
            layout.push(bucket, decay_all, i64::from(world) * ALIGNMENT);
        }
        layout
    }

    fn push(&mut self, params: &[ParamSpec], decay_all: bool, multiple: i64) {
        let decays = |spec: &&ParamSpec| decay_all || spec.decayed;
        let count =
            |specs: &mut dyn Iterator<Item = &ParamSpec>| specs.map(ParamSpec::elements).sum();
        let numbers = count(&mut params.iter());
        let bucket = Bucket {
            start: self.elements,
            elements: (numbers + multiple - 1) / multiple * multiple,
            numbers,
            decayed: count(&mut params.iter().filter(decays)),
            index: self.numbers(),
        };
        let mut offset = bucket.start;
        let plain = params.iter().filter(|spec| !decays(spec));
        for spec in params.iter().filter(decays).chain(plain) {
            self.slots.push(Slot {
                name: spec.name.clone(),
                shape: spec.shape.clone(),
                offset,
                elements: spec.elements(),
            });
            offset += spec.elements();
        }
        self.elements += bucket.elements;
        self.buckets.push(bucket);
    }

    /// All parameters in flat order.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The place of a parameter.
    pub fn slot(&self, name: &str) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.name == name)
    }

    /// All buckets in flat order: the embedding's, each block's, the last one's.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// The parameters as parts of a flat buffer, by name, sharing its storage.
    pub fn views(&self, flat: &Tensor) -> Params {
        let view = |slot: &Slot| (slot.name.clone(), slot.view(flat));
        Params::new(self.slots.iter().map(view).collect())
    }

    /// Elements of a flat buffer, with the zeros that pad buckets.
    pub fn elements(&self) -> i64 {
        self.elements
    }

    /// Numbers of all parameters.
    pub fn numbers(&self) -> i64 {
        self.buckets
            .last()
            .map_or(0, |bucket| bucket.index + bucket.numbers)
    }

    /// What `part` has of a range of numbers of one parameter: the range of elements of a flat buffer of everything, and
    /// where it begins in one of the part alone.
    pub fn overlap(&self, part: Part, range: Range<i64>) -> (Range<i64>, i64) {
        let at = self
            .buckets
            .partition_point(|bucket| bucket.start <= range.start)
            .saturating_sub(1);
        let piece = part.piece(&self.buckets[at]);
        let start = range.start.max(piece.start);
        let end = range.end.min(piece.start + piece.length);
        (start..end.max(start), piece.own + start - piece.start)
    }
}

/// The block that a parameter belongs to, as its name says.
fn block(name: &str) -> Option<&str> {
    Some(name.strip_prefix("layers.")?.split_once('.')?.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use supra_recipes::{
        Recipe,
        plan::{Memory, Policy},
    };

    use super::*;
    use crate::model::{AttentionKind, SupraConfig, config::tests::small};

    fn spec(name: &str, shape: &[i64], decayed: bool) -> ParamSpec {
        ParamSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            decayed,
            new: false,
        }
    }

    #[test]
    fn decayed_parameters_come_first_in_their_bucket_and_ranges_touch() {
        let params = [
            spec("embedding", &[5, 2], true),
            spec("layers.0.norm", &[3], false),
            spec("layers.0.w", &[2, 3], true),
            spec("layers.0.bias", &[2], false),
            spec("norm", &[3], false),
        ];
        let layout = Layout::new(&params, false, 2);
        let places: Vec<_> = layout
            .slots()
            .iter()
            .map(|slot| (slot.name.as_str(), slot.offset))
            .collect();
        let expected = [
            ("embedding", 0),
            ("layers.0.w", 128),
            ("layers.0.norm", 134),
            ("layers.0.bias", 137),
            ("norm", 256),
        ];
        assert_eq!(places, expected);
        assert_eq!((layout.elements(), layout.numbers()), (384, 24));
        let decayed: Vec<_> = layout
            .buckets()
            .iter()
            .map(|bucket| bucket.decayed)
            .collect();
        assert_eq!(decayed, [10, 6, 0]);
    }

    #[test]
    fn everything_decays_when_asked() {
        let params = [spec("norm", &[3], false), spec("w", &[2, 3], true)];
        let layout = Layout::new(&params, true, 1);
        assert_eq!(layout.buckets()[0].decayed, 9);
        assert_eq!(layout.slots()[0].name, "norm");
    }

    #[test]
    fn a_model_has_a_bucket_for_its_embedding_for_each_block_and_for_its_end() {
        for attention in [
            AttentionKind::Softmax,
            AttentionKind::Supra(SupraConfig::default()),
        ] {
            let config = small(attention);
            let layout = Layout::new(&config.params(), false, 3);
            assert_eq!(layout.buckets().len() as i64, config.layers + 2);
            assert_eq!(
                layout.buckets()[0].numbers,
                config.vocab * config.dim,
                "the embedding alone"
            );
        }
    }

    #[test]
    fn buffers_are_as_long_as_the_plan_of_memory_says() {
        let text = "name: t\nbase: { path: b }\ndata: { train: d }\nbudget: { tokens: 20B }\n\
                    optimizer: { sharding: zero1 }\nmodel: { qk_norm: true }\n";
        let recipe = Recipe::parse(text, "t.yaml").unwrap();
        let config = small(AttentionKind::Supra(SupraConfig {
            qk_norm: true,
            ..SupraConfig::default()
        }));
        for world in 1..5 {
            let layout = Layout::new(&config.params(), false, world);
            let own = Part::of_rank(0, world).elements(&layout);
            let memory = Memory::new(&recipe, &config.shape(), world, Policy::Save);
            let planned = |name: &str| {
                let mut parts = memory.components.iter();
                parts.find(|part| part.name == name).unwrap().bytes
            };
            assert_eq!(planned("fp32 gradients"), 4 * layout.elements() as u64);
            assert_eq!(planned("fp32 first moments"), 4 * own as u64);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn parts_hold_every_number_once_and_start_aligned(
            sizes in prop::collection::vec((0..4u32, 1..300i64, any::<bool>()), 1..12),
            world in 1..6u32,
        ) {
            let mut sizes = sizes;
            sizes.sort_unstable_by_key(|size| size.0);
            let params: Vec<ParamSpec> = sizes
                .iter()
                .enumerate()
                .map(|(at, &(block, size, decayed))| spec(&format!("layers.{block}.{at}"), &[size], decayed))
                .collect();
            let layout = Layout::new(&params, false, world);
            let alone = Layout::new(&params, false, 1);
            let mut seen = vec![0; layout.numbers() as usize];
            for index in 0..i64::from(world) {
                let part = Part { index, of: world.into() };
                for (piece, bucket) in part.pieces(&layout).zip(layout.buckets()) {
                    prop_assert_eq!(piece.start % ALIGNMENT, 0);
                    prop_assert_eq!(piece.own % ALIGNMENT, 0);
                    prop_assert!(piece.own + piece.length <= part.elements(&layout));
                    for number in 0..piece.length {
                        seen[(piece.index + number) as usize] += 1;
                        let decays = piece.index + number - bucket.index < bucket.decayed;
                        prop_assert_eq!(number < piece.decayed, decays);
                    }
                }
            }
            prop_assert!(seen.iter().all(|&times| times == 1));
            for (mine, theirs) in layout.buckets().iter().zip(alone.buckets()) {
                prop_assert_eq!(mine.index, theirs.index, "indices do not depend on the world");
            }
        }
    }
}
