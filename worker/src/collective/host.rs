//! Ranks on CPUs: tensors go through the agent's collective.

use std::{
    mem,
    time::{Duration, Instant},
};

use bytemuck::Pod;
use half::bf16;
use supra_agent::{Collective, CollectiveError};
use tch::{Device, Kind, Tensor};

use super::{DeviceCollective, DeviceCollectiveError, Operation, Pending, check};

/// A rank on a CPU, or one without peers on any device: then nothing moves.
pub struct Host {
    collective: Box<dyn Collective>,
    stalled: Duration,
}

impl Host {
    /// The ranks that `collective` connects.
    pub fn new(collective: Box<dyn Collective>) -> Host {
        Host {
            collective,
            stalled: Duration::ZERO,
        }
    }

    fn sum(&mut self, flat: &Tensor, kind: Kind) -> Result<(), CollectiveError> {
        if kind == Kind::Float {
            let mut values = values::<f32>(flat);
            self.collective.all_reduce_f32(&mut values)?;
            replace(flat, &values);
        } else {
            let mut values = values::<bf16>(flat);
            self.collective.all_reduce_bf16(&mut values)?;
            replace(flat, &values);
        }
        Ok(())
    }

    fn broadcast(&mut self, flat: &Tensor, root: u32) -> Result<(), CollectiveError> {
        let mine = self.collective.rank() == root;
        let due = flat.numel() * flat.kind().elt_size_in_bytes();
        let mut bytes = if mine { bytes(flat) } else { Vec::new() };
        self.collective.broadcast(root, &mut bytes)?;
        if bytes.len() != due {
            return Err(CollectiveError::Peer {
                rank: root,
                address: "in this generation".to_owned(),
                cause: format!("sent {} bytes where {due} were due", bytes.len()),
            });
        }
        if !mine {
            replace(flat, &bytes);
        }
        Ok(())
    }

    fn gather(&mut self, flat: &Tensor) -> Result<(), CollectiveError> {
        let (world, rank) = (self.collective.world(), self.collective.rank());
        let parts = flat.view([-1]).chunk(i64::from(world), 0);
        let mine = bytes(&parts[rank as usize]);
        let all = self.collective.all_gather(&mine)?;
        for ((part, theirs), rank) in parts.iter().zip(all).zip(0..) {
            if theirs.len() != mine.len() {
                return Err(CollectiveError::Peer {
                    rank,
                    address: "in this generation".to_owned(),
                    cause: format!(
                        "sent a part of {} bytes where {} were due",
                        theirs.len(),
                        mine.len()
                    ),
                });
            }
            replace(part, &theirs);
        }
        Ok(())
    }
}

impl DeviceCollective for Host {
    fn host(&mut self) -> &mut dyn Collective {
        self.collective.as_mut()
    }

    fn start(
        &mut self,
        operation: Operation,
        flat: &Tensor,
    ) -> Result<Pending, DeviceCollectiveError> {
        let world = self.collective.world();
        if world > 1 {
            let clock = Instant::now();
            let kind = check(flat, Device::Cpu, operation.parts(world))?;
            match operation {
                // The other parts cost time, and are not worth an operation of their own between CPUs.
                Operation::AllReduce | Operation::ReduceScatter => self.sum(flat, kind)?,
                Operation::AllGather => self.gather(flat)?,
                Operation::Broadcast { root } => self.broadcast(flat, root)?,
            }
            self.stalled += clock.elapsed();
        }
        Ok(Pending::new(0))
    }

    fn wait(&mut self, _: Pending) -> Result<(), DeviceCollectiveError> {
        // Every operation was done when it returned.
        Ok(())
    }

    fn stalled(&mut self) -> Result<Duration, DeviceCollectiveError> {
        Ok(mem::take(&mut self.stalled))
    }

    fn forget_waits(&mut self) {
        self.stalled = Duration::ZERO;
    }

    fn finish(self: Box<Self>) -> Result<(), DeviceCollectiveError> {
        Ok(())
    }
}

/// A copy of the elements, which are of type `T`.
fn values<T: Pod>(flat: &Tensor) -> Vec<T> {
    let mut values = vec![T::zeroed(); flat.numel()];
    // By bytes: tch takes its own bf16 for half precision.
    flat.copy_data_u8(bytemuck::cast_slice_mut(&mut values), flat.numel());
    values
}

/// A copy of the elements' bytes.
fn bytes(flat: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0; flat.numel() * flat.kind().elt_size_in_bytes()];
    flat.copy_data_u8(&mut bytes, flat.numel());
    bytes
}

fn replace<T: Pod>(flat: &Tensor, values: &[T]) {
    let bytes = bytemuck::cast_slice(values);
    let values = Tensor::from_data_size(bytes, &flat.size(), flat.kind());
    flat.shallow_clone().copy_(&values);
}

#[cfg(test)]
mod tests {
    use std::thread;

    use supra_agent::collective::{InProcess, Solo};

    use super::*;

    /// What `work` makes of each rank.
    fn ranks<T: Send>(world: u32, work: impl Fn(u32, &mut Host) -> T + Sync) -> Vec<T> {
        let work = &work;
        thread::scope(|scope| {
            let threads: Vec<_> = InProcess::group(world)
                .into_iter()
                .zip(0..)
                .map(|(collective, rank)| {
                    scope.spawn(move || work(rank, &mut Host::new(Box::new(collective))))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        })
    }

    fn floats(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.to_kind(Kind::Float)).unwrap()
    }

    fn done(host: &mut Host, operation: Operation, flat: &Tensor) {
        let pending = host.start(operation, flat).unwrap();
        host.wait(pending).unwrap();
    }

    fn count(kind: Kind, rank: u32) -> Tensor {
        (Tensor::arange(6, (Kind::Float, Device::Cpu)) + f64::from(rank)).to_kind(kind)
    }

    #[test]
    fn every_rank_gets_the_same_sum_and_knows_how_long_it_took() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let sums = ranks(3, |rank, host| {
                let flat = count(kind, rank);
                done(host, Operation::AllReduce, &flat);
                assert_eq!(flat.kind(), kind);
                assert!(host.stalled().unwrap() > Duration::ZERO);
                assert_eq!(
                    host.stalled().unwrap(),
                    Duration::ZERO,
                    "since the last call"
                );
                floats(&flat)
            });
            for sum in sums {
                assert_eq!(sum, [3.0, 6.0, 9.0, 12.0, 15.0, 18.0], "{kind:?}");
            }
        }
    }

    #[test]
    fn a_scattered_sum_gathered_again_is_the_whole_sum() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let gathered = ranks(3, |rank, host| {
                let flat = count(kind, rank);
                done(host, Operation::ReduceScatter, &flat);
                let mine = flat.narrow(0, i64::from(rank) * 2, 2).copy();
                let _ = flat.shallow_clone().fill_(-1.0);
                flat.narrow(0, i64::from(rank) * 2, 2).copy_(&mine);
                done(host, Operation::AllGather, &flat);
                floats(&flat)
            });
            for whole in gathered {
                assert_eq!(whole, [3.0, 6.0, 9.0, 12.0, 15.0, 18.0], "{kind:?}");
            }
        }
    }

    #[test]
    fn what_one_rank_has_comes_to_all_whatever_its_bits_and_number() {
        let found = ranks(3, |rank, host| {
            // Among them bits that are no number.
            let bits = Tensor::from_slice(&[-1i16, 0x7fa1, i16::from(rank == 1), i16::MIN]);
            let flat = bits.view_dtype(Kind::BFloat16);
            done(host, Operation::Broadcast { root: 1 }, &flat);
            Vec::<i16>::try_from(&bits).unwrap()
        });
        for bits in found {
            assert_eq!(bits, [-1, 0x7fa1, 1, i16::MIN]);
        }
    }

    #[test]
    fn a_matrix_is_reduced_in_its_place() {
        let sums = ranks(2, |_, host| {
            let matrix = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
            let view = matrix.view([6]);
            done(host, Operation::AllReduce, &matrix);
            (matrix.size(), floats(&view))
        });
        assert_eq!(sums[1], (vec![2, 3], vec![2.0; 6]));
    }

    #[test]
    fn what_cannot_be_exchanged_is_refused_with_the_reason() {
        let refused = ranks(2, |_, host| {
            let cpu = Device::Cpu;
            let double = Tensor::ones([2], (Kind::Double, cpu));
            let turned = Tensor::ones([2, 3], (Kind::Float, cpu)).tr();
            let odd = Tensor::ones([3], (Kind::Float, cpu));
            [double, turned, odd].map(|flat| {
                host.start(Operation::AllGather, &flat)
                    .unwrap_err()
                    .to_string()
            })
        });
        for [double, turned, odd] in refused {
            assert!(double.contains("2 x Double"), "{double}");
            assert!(double.contains("only fp32 and bf16"), "{double}");
            assert!(turned.contains("not contiguous"), "{turned}");
            assert!(odd.contains("no equal parts"), "{odd}");
        }
    }

    #[test]
    fn alone_everything_stays_as_it_is() {
        let mut host: Box<dyn DeviceCollective> = Box::new(Host::new(Box::new(Solo)));
        let flat = Tensor::arange(3, (Kind::Float, Device::Cpu));
        for operation in [
            Operation::AllReduce,
            Operation::ReduceScatter,
            Operation::AllGather,
            Operation::Broadcast { root: 0 },
        ] {
            let pending = host.start(operation, &flat).unwrap();
            host.wait(pending).unwrap();
        }
        assert_eq!(floats(&flat), [0.0, 1.0, 2.0]);
        assert_eq!(host.stalled().unwrap(), Duration::ZERO);
        host.finish().unwrap();
    }
}
