//! All collectives against a scalar reference, and the ring against what can go wrong.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use half::bf16;
use proptest::prelude::*;
use supra_agent::collective::{AbortHandle, InProcess, RingPlan, Solo, TcpRing, chunk};
use supra_agent::{Collective, CollectiveError};

const KEY: [u8; 32] = [7; 32];

/// One rank's listener and what it knows of the ring.
struct Seat {
    listener: TcpListener,
    plan: RingPlan,
    abort: AbortHandle,
}

impl Seat {
    fn sit(&self) -> Result<TcpRing, CollectiveError> {
        TcpRing::connect(&self.listener, &self.plan, self.abort.clone())
    }
}

fn seats(world: u32) -> Vec<Seat> {
    let listeners: Vec<_> = (0..world)
        .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    let addresses: Vec<_> = listeners
        .iter()
        .map(|listener| listener.local_addr().unwrap().to_string())
        .collect();
    let seat = |(rank, listener)| {
        let next_address = addresses[(rank as usize + 1) % world as usize].clone();
        let patience = Duration::from_secs(20);
        let plan = RingPlan {
            generation: 1,
            rank,
            world,
            next_address,
            key: KEY,
            patience,
        };
        Seat {
            listener,
            plan,
            abort: AbortHandle::default(),
        }
    };
    (0..world).zip(listeners).map(seat).collect()
}

fn ring(world: u32) -> Vec<Box<dyn Collective>> {
    let seats = seats(world);
    each(seats, |seat| {
        Box::new(seat.sit().unwrap()) as Box<dyn Collective>
    })
}

/// Runs `body` for every rank in a thread of its own; results in rank order.
fn each<I: Send, T: Send>(ranks: Vec<I>, body: impl Fn(&mut I) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|mut rank| scope.spawn(move || body(&mut rank)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// Every implementation for this world.
fn implementations(world: u32) -> Vec<Vec<Box<dyn Collective>>> {
    let in_process = InProcess::group(world)
        .into_iter()
        .map(|rank| Box::new(rank) as Box<dyn Collective>)
        .collect();
    match world {
        1 => vec![in_process, vec![Box::new(Solo)]],
        _ => vec![in_process, ring(world)],
    }
}

/// Values of very different size, so that the order of additions shows; the same for the same seed.
fn values(seed: u64, rank: u32, len: usize) -> Vec<f32> {
    let mut state = seed ^ (u64::from(rank) << 32) ^ 0x9e37_79b9_7f4a_7c15;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len)
        .map(|_| (next() as i32 as f32) * 2f32.powi((next() % 40) as i32 - 50))
        .collect()
}

/// The sum as it is promised: part c adds ranks c, c + 1, … in f32.
fn reference(inputs: &[Vec<f32>]) -> Vec<f32> {
    let (world, len) = (inputs.len(), inputs[0].len());
    let mut sums = vec![0.0; len];
    for part in 0..world {
        for i in chunk(len, world as u32, part as u32) {
            sums[i] = (1..world).fold(inputs[part][i], |sum, step| {
                inputs[(part + step) % world][i] + sum
            });
        }
    }
    sums
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn lengths() -> impl Strategy<Value = (u32, usize)> {
    (1..=5u32).prop_flat_map(|world| {
        let len = prop_oneof![
            Just(0),
            Just(1),
            Just(world as usize - 1),
            Just(world as usize),
            2..3000usize
        ];
        (Just(world), len)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn parts_cover_a_buffer_once(len in 0..10_000usize, world in 1..70u32) {
        let mut end = 0;
        for index in 0..world {
            let part = chunk(len, world, index);
            prop_assert_eq!(part.start, end);
            prop_assert!(part.len() - len / world as usize <= 1);
            end = part.end;
        }
        prop_assert_eq!(end, len);
    }

    #[test]
    fn all_reduce_has_the_bits_of_the_reference((world, len) in lengths(), seed: u64) {
        let inputs: Vec<_> = (0..world).map(|rank| values(seed, rank, len)).collect();
        let narrow: Vec<Vec<bf16>> =
            inputs.iter().map(|input| input.iter().map(|&value| bf16::from_f32(value)).collect()).collect();
        let widened: Vec<Vec<f32>> =
            narrow.iter().map(|input| input.iter().map(|value| value.to_f32()).collect()).collect();
        let expected = bits(&reference(&inputs));
        let expected_narrow: Vec<u16> =
            reference(&widened).iter().map(|&sum| bf16::from_f32(sum).to_bits()).collect();
        for ranks in implementations(world) {
            let results = each(ranks, |rank| {
                let me = rank.rank() as usize;
                // Twice: a repeat has the same bits.
                let wide = [(); 2].map(|()| {
                    let mut buffer = inputs[me].clone();
                    rank.all_reduce_f32(&mut buffer).unwrap();
                    bits(&buffer)
                });
                let mut buffer = narrow[me].clone();
                rank.all_reduce_bf16(&mut buffer).unwrap();
                (wide, buffer.iter().map(|value| value.to_bits()).collect::<Vec<_>>())
            });
            for (wide, narrow) in results {
                prop_assert_eq!(&wide[0], &expected);
                prop_assert_eq!(&wide[1], &expected);
                prop_assert_eq!(&narrow, &expected_narrow);
            }
        }
    }

    #[test]
    fn bytes_come_in_rank_order((world, len) in lengths(), root in 0..5u32) {
        let root = root % world;
        let bytes = |rank: u32| vec![rank as u8; len * (rank as usize % 3)];
        let expected: Vec<_> = (0..world).map(bytes).collect();
        for ranks in implementations(world) {
            let results = each(ranks, |rank| {
                let gathered = rank.all_gather(&bytes(rank.rank())).unwrap();
                rank.barrier().unwrap();
                // What was there before has no say.
                let mut buffer = vec![0xff; rank.rank() as usize];
                if rank.rank() == root {
                    buffer = vec![9; len];
                }
                rank.broadcast(root, &mut buffer).unwrap();
                let mut before = vec![0; len];
                rank.pass(&vec![rank.rank() as u8; len], &mut before).unwrap();
                (gathered, buffer, before)
            });
            for ((gathered, buffer, before), rank) in results.into_iter().zip(0..) {
                prop_assert_eq!(before, vec![((rank + world - 1) % world) as u8; len]);
                prop_assert_eq!(&gathered, &expected);
                prop_assert_eq!(&buffer, &vec![9; len]);
            }
        }
    }
}

#[test]
fn buffers_larger_than_the_sockets_pass() {
    let len = 3_000_001;
    let results = each(ring(3), |rank| {
        let mut buffer = vec![rank.rank() as f32 + 1.0; len];
        rank.all_reduce_f32(&mut buffer).unwrap();
        let mut narrow = vec![bf16::from_f32(rank.rank() as f32); len];
        rank.all_reduce_bf16(&mut narrow).unwrap();
        let gathered = rank
            .all_gather(&vec![rank.rank() as u8; 5_000_000])
            .unwrap();
        let mut bytes = vec![rank.rank() as u8; 5_000_000];
        rank.broadcast(1, &mut bytes).unwrap();
        (buffer, narrow, gathered, bytes)
    });
    for (buffer, narrow, gathered, bytes) in results {
        assert!(buffer.len() == len && buffer.iter().all(|&value| value == 6.0));
        assert!(narrow.iter().all(|&value| value == bf16::from_f32(3.0)));
        assert!((0..3).all(|rank| gathered[rank].iter().all(|&byte| byte == rank as u8)));
        assert!(bytes.len() == 5_000_000 && bytes.iter().all(|&byte| byte == 1));
    }
}

#[test]
fn a_barrier_waits_for_the_last() {
    let start = Instant::now();
    let waits = each(ring(4), |rank| {
        if rank.rank() == 2 {
            std::thread::sleep(Duration::from_millis(300));
        }
        rank.barrier().unwrap();
        start.elapsed()
    });
    assert!(
        waits.iter().all(|wait| *wait >= Duration::from_millis(300)),
        "{waits:?}"
    );
}

#[test]
fn an_abort_frees_a_blocked_call_at_once() {
    let seats = seats(2);
    let abort = seats[0].abort.clone();
    let mut rings = each(seats, |seat| seat.sit().unwrap());
    let waiting = std::thread::spawn({
        let mut ring = rings.remove(0);
        move || {
            // Too much for the sockets: the writing thread is blocked too.
            let mut buffer = vec![0.0; 10_000_000];
            let first = ring.all_reduce_f32(&mut buffer);
            (first, ring.barrier())
        }
    });
    std::thread::sleep(Duration::from_millis(200));
    let aborted = Instant::now();
    abort.abort();
    let (first, later) = waiting.join().unwrap();
    assert!(aborted.elapsed() < Duration::from_secs(1));
    assert!(matches!(first, Err(CollectiveError::Aborted)), "{first:?}");
    assert!(matches!(later, Err(CollectiveError::Aborted)), "{later:?}");
}

#[test]
fn an_abort_frees_a_rank_that_still_looks_for_its_peers() {
    let mut seats = seats(2);
    let seat = seats.remove(0);
    let abort = seat.abort.clone();
    let looking = std::thread::spawn(move || seat.sit().map(drop));
    std::thread::sleep(Duration::from_millis(200));
    let aborted = Instant::now();
    abort.abort();
    assert!(matches!(
        looking.join().unwrap(),
        Err(CollectiveError::Aborted)
    ));
    assert!(aborted.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_dead_peer_is_named() {
    let mut rings = ring(3);
    rings.remove(1);
    let errors = each(rings, |ring| {
        loop {
            if let Err(error) = ring.barrier() {
                return error;
            }
        }
    });
    // Each hears it from the dead rank, or from the other one, which has left because of it.
    for (error, lost) in errors.iter().zip([[1, 2], [1, 0]]) {
        let CollectiveError::Peer { rank, .. } = error else {
            panic!("{error}")
        };
        assert!(lost.contains(rank), "{error}");
    }
}

#[test]
fn peers_may_come_late() {
    let results = each(seats(3), |seat| {
        std::thread::sleep(Duration::from_millis(200 * u64::from(seat.plan.rank)));
        seat.sit().map(drop)
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn a_wrong_address_names_rank_address_and_remedy() {
    let mut seats = seats(2);
    let gone = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let mut seat = seats.remove(0);
    seat.plan.next_address = gone.clone();
    seat.plan.patience = Duration::from_millis(300);
    let message = seat.sit().unwrap_err().to_string();
    for part in ["rank 1", &gone, "--advertise", "refused"] {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

#[test]
fn a_peer_without_the_key_is_refused() {
    let mut seats = seats(2);
    seats[1].plan.key = [8; 32];
    for seat in &mut seats {
        seat.plan.patience = Duration::from_millis(500);
    }
    for result in each(seats, |seat| seat.sit().map(drop)) {
        let error = result.unwrap_err();
        assert!(
            matches!(
                error,
                CollectiveError::Handshake { .. } | CollectiveError::Timeout { .. }
            ),
            "{error}"
        );
    }
}

#[test]
fn strangers_and_older_generations_do_not_get_in() {
    let seats = seats(2);
    // In the queue of the listener before anybody answers: garbage, silence, and a stale rank.
    let mut garbage = TcpStream::connect(seats[0].listener.local_addr().unwrap()).unwrap();
    garbage.write_all(&[b'x'; 100]).unwrap();
    let _silent = TcpStream::connect(seats[1].listener.local_addr().unwrap()).unwrap();
    let stale = Seat {
        listener: TcpListener::bind("127.0.0.1:0").unwrap(),
        plan: RingPlan {
            generation: 0,
            patience: Duration::from_secs(1),
            ..seats[1].plan.clone()
        },
        abort: AbortHandle::default(),
    };
    let stale = std::thread::spawn(move || stale.sit().map(drop));
    std::thread::sleep(Duration::from_millis(200));
    let results = each(seats, |seat| seat.sit().and_then(|mut ring| ring.barrier()));
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert!(stale.join().unwrap().is_err());
}

#[test]
fn listeners_serve_one_generation_after_the_other() {
    let mut seats = seats(3);
    for generation in 1..4 {
        for seat in &mut seats {
            seat.plan.generation = generation;
            seat.plan.key = [generation as u8; 32];
        }
        std::thread::scope(|scope| {
            let ranks = seats
                .iter()
                .map(|seat| scope.spawn(|| seat.sit()?.barrier()));
            for rank in ranks.collect::<Vec<_>>() {
                rank.join().unwrap().unwrap();
            }
        });
    }
}

#[test]
fn ranks_that_do_different_things_are_told() {
    let results = each(ring(2), |rank| match rank.rank() {
        0 => rank.all_reduce_f32(&mut [0.0; 8]),
        _ => rank.barrier(),
    });
    let message = results[0].as_ref().unwrap_err().to_string();
    assert!(message.contains("while this rank is at"), "{message}");
}

#[test]
fn a_thread_that_leaves_is_missed() {
    let mut group = InProcess::group(2);
    drop(group.remove(0));
    let error = group[0].barrier().unwrap_err();
    assert!(
        matches!(error, CollectiveError::Peer { rank: 0, .. }),
        "{error}"
    );
}
