//! The stream beside the one that computes: what is in order, what overlaps, and what a wait costs. In place of NCCL works a
//! kernel that takes a given time.

use std::{
    ffi::CString,
    time::{Duration, Instant},
};

use cudarc::driver::{result, sys};
use supra_worker::kernels::cuda::{KernelError, Queue, RankSum, SideStream};
use tch::{Cuda, Device, Kind, Tensor};

use super::{bench::GPU, gpu};

/// Spins until so many nanoseconds have passed.
const SPIN: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry spin(.param .u64 nanoseconds)
{
    .reg .pred %again;
    .reg .u64 %limit, %begun, %now, %passed;
    ld.param.u64 %limit, [nanoseconds];
    mov.u64 %begun, %globaltimer;
AGAIN:
    mov.u64 %now, %globaltimer;
    sub.u64 %passed, %now, %begun;
    setp.lt.u64 %again, %passed, %limit;
    @%again bra AGAIN;
    ret;
}
";

/// The kernel that takes a given time.
struct Spin(sys::CUfunction);

impl Spin {
    fn load() -> Spin {
        let text = CString::new(SPIN).unwrap();
        // SAFETY: the text ends in NUL and the driver copies it; libtorch's context is current, and the module stays.
        unsafe {
            let module = result::module::load_data(text.as_ptr().cast()).unwrap();
            Spin(result::module::get_function(module, CString::new("spin").unwrap()).unwrap())
        }
    }

    fn launch(&self, queue: &Queue, time: Duration) -> Result<(), KernelError> {
        let mut nanoseconds = time.as_nanos() as u64;
        let mut arguments = [(&raw mut nanoseconds).cast()];
        // SAFETY: the kernel takes one number of 64 bits, which the driver copies, and touches no memory.
        let launched = unsafe {
            result::launch_kernel(
                self.0,
                (1, 1, 1),
                (1, 1, 1),
                0,
                queue.raw().cast(),
                &mut arguments,
            )
        };
        launched.unwrap();
        Ok(())
    }
}

/// Returns when the stream that computes has come to here.
fn computed(x: &Tensor) -> f64 {
    x.double_value(&[0])
}

fn assert_near(found: Duration, expected: Duration, what: &str) {
    let (found, expected) = (found.as_secs_f64() * 1e3, expected.as_secs_f64() * 1e3);
    assert!(
        (found - expected).abs() < 2.0 + 0.05 * expected,
        "{what}: {found:.2} ms, not {expected:.2} ms"
    );
}

#[test]
fn gpu_computing_goes_on_beside_an_operation_and_stands_still_only_in_the_wait() {
    const TIME: Duration = Duration::from_millis(100);
    let Some(_kernels) = gpu("overlap") else {
        return;
    };
    let mut side = SideStream::open(0).unwrap();
    let spin = Spin::load();
    let x = Tensor::zeros([1], (Kind::Float, GPU));
    let a = Tensor::randn([2048, 2048], (Kind::BFloat16, GPU));
    let product = a.mm(&a);
    let compute = || (0..20).for_each(|_| drop(a.mm_out(&product, &a)));
    compute();
    Cuda::synchronize(0);

    let clock = Instant::now();
    let operation = side.start(&x, |queue| spin.launch(queue, TIME)).unwrap();
    compute();
    computed(&product.flatten(0, 1));
    let beside = clock.elapsed();
    assert!(
        beside < TIME / 2,
        "{beside:?}: computing has waited for what it does not need"
    );
    assert_eq!(side.stalled().unwrap(), Duration::ZERO);
    side.wait(operation).unwrap();
    computed(&x);
    assert_near(clock.elapsed(), TIME, "the wait ends with the operation");
    assert_near(side.stalled().unwrap(), TIME - beside, "stood still");
    assert_eq!(side.stalled().unwrap(), Duration::ZERO, "told once");

    let operation = side.start(&x, |queue| spin.launch(queue, TIME)).unwrap();
    side.wait(operation).unwrap();
    side.forget_waits();
    computed(&x);
    assert_eq!(side.stalled().unwrap(), Duration::ZERO, "forgotten");

    // What is done by the time that it is waited for costs nothing.
    let operation = side
        .start(&x, |queue| spin.launch(queue, TIME / 10))
        .unwrap();
    std::thread::sleep(TIME);
    side.wait(operation).unwrap();
    computed(&x);
    assert_near(
        side.stalled().unwrap(),
        Duration::ZERO,
        "nothing to wait for",
    );
}

#[test]
fn gpu_who_waits_for_an_operation_has_waited_for_all_before_it() {
    const TIME: Duration = Duration::from_millis(50);
    let Some(_kernels) = gpu("order of operations") else {
        return;
    };
    let mut side = SideStream::open(0).unwrap();
    let spin = Spin::load();
    let x = Tensor::zeros([1], (Kind::Float, GPU));
    computed(&x);
    let clock = Instant::now();
    let [first, second] =
        [(); 2].map(|()| side.start(&x, |queue| spin.launch(queue, TIME)).unwrap());
    side.wait(second).unwrap();
    side.wait(first).unwrap();
    computed(&x);
    assert_near(clock.elapsed(), TIME * 2, "one behind the other");
    assert_near(side.stalled().unwrap(), TIME * 2, "counted once");

    let clock = Instant::now();
    let _never_waited_for = side.start(&x, |queue| spin.launch(queue, TIME)).unwrap();
    drop(side);
    assert_near(
        clock.elapsed(),
        TIME,
        "memory stays until the stream is empty",
    );
}

#[test]
fn gpu_ranks_are_added_in_their_order_behind_what_made_the_numbers() {
    let Some(_kernels) = gpu("rank_sum") else {
        return;
    };
    let sum = RankSum::new(0).unwrap();
    let mut side = SideStream::open(0).unwrap();
    let spin = Spin::load();
    for (world, count) in [(2i64, 1i64), (3, 1000), (4, 1 << 20)] {
        let ranks = Tensor::randn([world, count], (Kind::Float, GPU)) * 1e3;
        let mut expected = ranks.get(0).copy();
        for rank in 1..world {
            let _ = expected.g_add_(&ranks.get(rank));
        }
        for rank in 0..world {
            let mine = Tensor::full([count], f64::NAN, (Kind::Float, GPU));
            let others = [
                ranks.narrow(0, 0, rank),
                ranks.narrow(0, rank + 1, world - rank - 1),
            ];
            let theirs = Tensor::cat(&others, 0).flatten(0, 1);
            computed(&theirs);
            // The numbers come late, and so does their sum.
            let _ = (0..50).map(|_| expected.square()).collect::<Vec<_>>();
            mine.shallow_clone().copy_(&ranks.get(rank));
            let operation = side
                .start(&mine, |queue| {
                    spin.launch(queue, Duration::from_millis(1))?;
                    sum.add(queue, &mine, &theirs, rank as u32)
                })
                .unwrap();
            side.wait(operation).unwrap();
            let found = mine.copy();
            assert!(
                found == expected,
                "{world} ranks, rank {rank}, {count} numbers"
            );
        }
    }
    let elsewhere = Tensor::zeros([4], (Kind::Float, Device::Cpu));
    let error = side
        .start(&elsewhere, |queue| {
            sum.add(queue, &elsewhere, &elsewhere, 0)
        })
        .unwrap_err();
    assert!(error.to_string().contains("mine_m"), "{error}");
}
