//! What the ranks exchange during a step, bucket by bucket, and what of it is under way.
//!
//! In the backward pass of a step's last micro-batch the reduction of a bucket begins as soon as its gradients are final;
//! where ranks keep parts, the parameters of a bucket are gathered as soon as they are updated, and the next forward pass
//! waits for them block by block. Every rank starts the same operations in the same order, whatever it was fed.

use std::time::Duration;

use supra_agent::Collective;
use tch::Tensor;

use super::{Part, Replica};
use crate::collective::{DeviceCollective, DeviceCollectiveError, Operation, Pending};

/// The exchanges of a rank's gradients and parameters.
pub struct Exchange {
    collective: Box<dyn DeviceCollective>,
    buckets: Vec<Bucket>,
    reduction: Operation,
    /// Whether updated parameters are those of a part.
    parts: bool,
    /// Buckets whose reduction has not begun in this step: all before this one.
    unreduced: usize,
    /// The reduction that was begun last.
    reducing: Option<Pending>,
}

/// A bucket's views of the flat buffers.
struct Bucket {
    gradient: Tensor,
    parameters: Tensor,
    gathering: Option<Pending>,
}

impl Exchange {
    /// Of `replica`, whose ranks `collective` connects.
    pub fn new(collective: Box<dyn DeviceCollective>, replica: &Replica) -> Exchange {
        let buckets: Vec<Bucket> = replica
            .layout()
            .buckets()
            .iter()
            .map(|bucket| Bucket {
                gradient: bucket.view(&replica.gradient),
                parameters: bucket.view(&replica.parameters),
                gathering: None,
            })
            .collect();
        let parts = replica.part() != Part::WHOLE;
        Exchange {
            collective,
            reduction: if parts {
                Operation::ReduceScatter
            } else {
                Operation::AllReduce
            },
            parts,
            unreduced: buckets.len(),
            buckets,
            reducing: None,
        }
    }

    /// The ranks, for what is exchanged between steps.
    pub fn collective(&mut self) -> &mut dyn DeviceCollective {
        self.collective.as_mut()
    }

    /// The same for what lies in host memory.
    pub fn host(&mut self) -> &mut dyn Collective {
        self.collective.host()
    }

    /// The gradients of this bucket, and of all behind it, are final: begins their reduction.
    pub fn reduce(&mut self, bucket: usize) -> Result<(), DeviceCollectiveError> {
        while self.unreduced > bucket {
            self.unreduced -= 1;
            let gradient = &self.buckets[self.unreduced].gradient;
            self.reducing = Some(self.collective.start(self.reduction, gradient)?);
        }
        Ok(())
    }

    /// Has all gradients reduced: each rank's part of them, or everything where ranks keep everything.
    pub fn reduced(&mut self) -> Result<(), DeviceCollectiveError> {
        self.reduce(0)?;
        self.unreduced = self.buckets.len();
        // They end in order.
        match self.reducing.take() {
            Some(last) => self.collective.settle(last),
            None => Ok(()),
        }
    }

    /// This rank's part of a bucket's parameters is updated: begins to gather the others'.
    pub fn gather(&mut self, bucket: usize) -> Result<(), DeviceCollectiveError> {
        if self.parts {
            let bucket = &mut self.buckets[bucket];
            let pending = self
                .collective
                .start(Operation::AllGather, &bucket.parameters)?;
            bucket.gathering = Some(pending);
        }
        Ok(())
    }

    /// Has a bucket's parameters from all ranks.
    pub fn gathered(&mut self, bucket: usize) -> Result<(), DeviceCollectiveError> {
        match self.buckets[bucket].gathering.take() {
            Some(pending) => self.collective.wait(pending),
            None => Ok(()),
        }
    }

    /// Has the parameters of all buckets.
    pub fn all_gathered(&mut self) -> Result<(), DeviceCollectiveError> {
        (0..self.buckets.len()).try_for_each(|bucket| self.gathered(bucket))
    }

    /// [`DeviceCollective::stalled`].
    pub fn stalled(&mut self) -> Result<Duration, DeviceCollectiveError> {
        self.collective.stalled()
    }

    /// [`DeviceCollective::forget_waits`].
    pub fn forget_waits(&mut self) {
        self.collective.forget_waits();
    }

    /// [`DeviceCollective::finish`].
    pub fn finish(self) -> Result<(), DeviceCollectiveError> {
        self.collective.finish()
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc, thread};

    use proptest::prelude::*;
    use supra_agent::collective::{InProcess, Solo};
    use supra_recipes::schema;
    use tch::{Device, Kind};

    use super::*;
    use crate::{
        collective::Host,
        kernels::{Kernels, Twin},
        model::ParamSpec,
        optim::{AdamW, Kinds, Layout, Section},
    };

    /// What was asked of it, in order: operations by the first element of their bucket, then waits by number.
    #[derive(Clone, Default)]
    struct Recorder(Rc<RefCell<Vec<String>>>);

    impl DeviceCollective for Recorder {
        fn host(&mut self) -> &mut dyn Collective {
            unreachable!("nothing is exchanged between steps here")
        }

        fn start(
            &mut self,
            operation: Operation,
            flat: &Tensor,
        ) -> Result<Pending, DeviceCollectiveError> {
            let mut asked = self.0.borrow_mut();
            let name = format!("{operation:?} {}", flat.double_value(&[0]));
            asked.push(name);
            Ok(Pending::new(asked.len() as u64))
        }

        fn wait(&mut self, pending: Pending) -> Result<(), DeviceCollectiveError> {
            let mut asked = self.0.borrow_mut();
            let name = asked[pending.number() as usize - 1].clone();
            asked.push(format!("wait for {name}"));
            Ok(())
        }

        fn stalled(&mut self) -> Result<Duration, DeviceCollectiveError> {
            Ok(Duration::ZERO)
        }

        fn forget_waits(&mut self) {}

        fn finish(self: Box<Self>) -> Result<(), DeviceCollectiveError> {
            Ok(())
        }
    }

    /// A bucket for each size.
    fn layout(sizes: &[i64], world: u32) -> Layout {
        let spec = |(block, &size): (usize, &i64)| {
            let named = |name: &str, size, decayed| ParamSpec {
                name: format!("layers.{block}.{name}"),
                shape: vec![size],
                decayed,
                new: false,
            };
            let bias = size / 3;
            [
                named("bias", bias, false),
                named("weight", size - bias, true),
            ]
        };
        let specs: Vec<ParamSpec> = sizes.iter().enumerate().flat_map(spec).collect();
        Layout::new(&specs, false, world)
    }

    fn replica(sizes: &[i64], part: Part, world: u32, kinds: Kinds) -> Replica {
        Replica::new(layout(sizes, world), part, kinds, Device::Cpu)
    }

    const FP32: Kinds = Kinds {
        parameters: Kind::Float,
        moments: Kind::Float,
    };
    const BF16: Kinds = Kinds {
        parameters: Kind::BFloat16,
        moments: Kind::BFloat16,
    };

    #[test]
    fn reductions_begin_from_the_last_bucket_whatever_a_rank_was_fed() {
        let expected = [
            "AllReduce 2",
            "AllReduce 1",
            "AllReduce 0",
            "wait for AllReduce 0",
        ];
        for asked in [&[2, 1, 0][..], &[1, 0], &[2], &[]] {
            let replica = replica(&[3, 4, 5], Part::WHOLE, 1, FP32);
            for (bucket, number) in replica.layout().buckets().iter().zip(0..) {
                let _ = bucket.view(&replica.gradient).fill_(number);
            }
            let recorder = Recorder::default();
            let mut exchange = Exchange::new(Box::new(recorder.clone()), &replica);
            for _step in 0..2 {
                for &bucket in asked {
                    exchange.reduce(bucket).unwrap();
                }
                exchange.reduced().unwrap();
                assert_eq!(recorder.0.take(), expected, "{asked:?}");
            }
        }
    }

    #[test]
    fn parameters_are_waited_for_once_and_bucket_by_bucket() {
        let part = Part { index: 1, of: 2 };
        let replica = replica(&[3, 4], part, 2, FP32);
        for (bucket, number) in replica.layout().buckets().iter().zip(0..) {
            let _ = bucket.view(&replica.parameters).fill_(number);
        }
        let recorder = Recorder::default();
        let mut exchange = Exchange::new(Box::new(recorder.clone()), &replica);
        exchange.all_gathered().unwrap();
        (0..2).for_each(|bucket| exchange.gather(bucket).unwrap());
        exchange.gathered(0).unwrap();
        exchange.all_gathered().unwrap();
        let expected = [
            "AllGather 0",
            "AllGather 1",
            "wait for AllGather 0",
            "wait for AllGather 1",
        ];
        assert_eq!(recorder.0.take(), expected);
    }

    /// Some steps of one rank; what it ends with: the replica's hash, and the squares of its part of the last gradient.
    fn train(mut host: Host, sizes: &[i64], parts: bool, kinds: Kinds) -> ([u8; 32], f64) {
        tch::set_num_threads(1);
        let (rank, world) = (host.host().rank(), host.host().world());
        let mine = Part::of_rank(rank, world);
        let part = if parts { mine } else { Part::WHOLE };
        let mut replica = replica(sizes, part, world, kinds);
        let numbers = |count: i64, seed: f64| {
            ((Tensor::arange(count, (Kind::Float, Device::Cpu)) + seed) * 12.9898).sin()
        };
        for slot in replica.layout().slots().to_vec() {
            let values = numbers(slot.elements, slot.shape[0] as f64);
            replica.load(Section::Masters, slot.offset, &values);
        }
        let adamw = AdamW::new(&schema::Optimizer::default(), 5);
        let squared = replica.gradient_of(mine);
        let mut exchange = Exchange::new(Box::new(host), &replica);
        let mut norm = f64::NAN;
        for step in 1..=3 {
            replica.zero_gradient();
            // Whatever is behind the numbers of a bucket must not matter.
            for bucket in replica.layout().buckets() {
                let padding = bucket.elements - bucket.numbers;
                let start = bucket.start + bucket.numbers;
                let _ = replica.gradient.narrow(0, start, padding).fill_(f64::NAN);
            }
            for (name, gradient) in replica.gradients().iter() {
                let seed = f64::from(step * 31 + rank as i32) + name.len() as f64;
                gradient
                    .shallow_clone()
                    .copy_(&numbers(gradient.size()[0], seed));
            }
            exchange.all_gathered().unwrap();
            exchange.reduce(1).unwrap();
            exchange.reduced().unwrap();
            norm = Twin.squared_norm(&squared);
            let updated = |bucket| exchange.gather(bucket);
            adamw
                .update(&Twin, &mut replica, 1e-2, 0.5, updated)
                .unwrap();
        }
        exchange.all_gathered().unwrap();
        (replica.hash(&Twin, exchange.host()).unwrap(), norm)
    }

    fn ranks(world: u32, sizes: &[i64], parts: bool, kinds: Kinds) -> Vec<([u8; 32], f64)> {
        thread::scope(|scope| {
            let threads: Vec<_> = InProcess::group(world)
                .into_iter()
                .map(|collective| {
                    let host = Host::new(Box::new(collective));
                    scope.spawn(move || train(host, sizes, parts, kinds))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn who_keeps_the_state_changes_no_bit_and_padding_never_leaks(
            sizes in prop::collection::vec(3..700i64, 2..5),
            world in 1..5u32,
        ) {
            for kinds in [FP32, BF16] {
                let whole = ranks(world, &sizes, false, kinds);
                let parts = ranks(world, &sizes, true, kinds);
                for (rank, ((hash, norm), (of_parts, norm_of_parts))) in whole.iter().zip(&parts).enumerate() {
                    prop_assert_eq!(hash, &whole[0].0, "rank {}", rank);
                    prop_assert_eq!(hash, of_parts, "rank {}", rank);
                    prop_assert!(norm.is_finite());
                    prop_assert_eq!(norm, norm_of_parts, "rank {}", rank);
                }
            }
        }
    }

    #[test]
    fn alone_nothing_is_exchanged() {
        let alone = |parts| train(Host::new(Box::new(Solo)), &[5, 6], parts, BF16);
        assert_eq!(alone(true), alone(false));
    }
}
