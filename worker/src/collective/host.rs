//! Ranks on CPUs: tensors go through the agent's collective.

use bytemuck::Pod;
use half::bf16;
use supra_agent::Collective;
use tch::{Device, Kind, Tensor};

use super::{DeviceCollective, DeviceCollectiveError, check};

/// A rank on a CPU, or one without peers on any device: then nothing moves.
pub struct Host {
    collective: Box<dyn Collective>,
}

impl Host {
    /// The ranks that `collective` connects.
    pub fn new(collective: Box<dyn Collective>) -> Host {
        Host { collective }
    }
}

impl DeviceCollective for Host {
    fn host(&mut self) -> &mut dyn Collective {
        self.collective.as_mut()
    }

    fn all_reduce(&mut self, flat: &mut Tensor) -> Result<(), DeviceCollectiveError> {
        let world = self.collective.world();
        if world == 1 {
            return Ok(());
        }
        if check(flat, Device::Cpu, world)? == Kind::Float {
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

    fn finish(self: Box<Self>) -> Result<(), DeviceCollectiveError> {
        // Every operation was done when it returned.
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

fn replace<T: Pod>(flat: &mut Tensor, values: &[T]) {
    let bytes = bytemuck::cast_slice(values);
    flat.copy_(&Tensor::from_data_size(bytes, &flat.size(), flat.kind()));
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

    #[test]
    fn every_rank_gets_the_same_sum() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let sums = ranks(3, |rank, host| {
                let mut flat =
                    (Tensor::arange(7, (Kind::Float, Device::Cpu)) + f64::from(rank)).to_kind(kind);
                host.all_reduce(&mut flat).unwrap();
                assert_eq!(flat.kind(), kind);
                floats(&flat)
            });
            for sum in sums {
                assert_eq!(sum, [3.0, 6.0, 9.0, 12.0, 15.0, 18.0, 21.0], "{kind:?}");
            }
        }
    }

    #[test]
    fn a_matrix_is_reduced_in_its_place() {
        let sums = ranks(2, |_, host| {
            let mut matrix = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
            let view = matrix.view([6]);
            host.all_reduce(&mut matrix).unwrap();
            (matrix.size(), floats(&view))
        });
        assert_eq!(sums[1], (vec![2, 3], vec![2.0; 6]));
    }

    #[test]
    fn what_cannot_be_exchanged_is_refused_with_the_reason() {
        let refused = ranks(2, |_, host| {
            let cpu = Device::Cpu;
            let mut double = Tensor::ones([2], (Kind::Double, cpu));
            let mut turned = Tensor::ones([2, 3], (Kind::Float, cpu)).tr();
            [host.all_reduce(&mut double), host.all_reduce(&mut turned)]
                .map(|result| result.unwrap_err().to_string())
        });
        for ([double, turned], _) in refused.into_iter().zip(0..) {
            assert!(double.contains("2 x Double"), "{double}");
            assert!(double.contains("only fp32 and bf16"), "{double}");
            assert!(turned.contains("not contiguous"), "{turned}");
        }
    }

    #[test]
    fn alone_everything_stays_as_it_is() {
        let mut host: Box<dyn DeviceCollective> = Box::new(Host::new(Box::new(Solo)));
        let mut flat = Tensor::arange(3, (Kind::Float, Device::Cpu));
        host.all_reduce(&mut flat).unwrap();
        assert_eq!(floats(&flat), [0.0, 1.0, 2.0]);
        host.finish().unwrap();
    }
}
