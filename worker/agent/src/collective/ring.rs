//! The ring over TCP: each rank sends to the next and receives from the one before.
//!
//! All-reduce is a reduce-scatter followed by an all-gather. In the first, part `c` starts at rank
//! `c` and every rank on its way adds its own values, so the order of the additions depends only on
//! `c` and the world ([`chunk`]); in the second, the finished parts go around unchanged. Hence the
//! same bits on every rank, and again in a repeat.
//!
//! Sockets are blocking. A thread of its own writes, the caller reads, so both directions flow at
//! once and no rank waits for room in a full socket while its neighbour does the same. An abort
//! shuts the sockets down ([`AbortHandle`]).

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::connect::{self, Neighbours};
use super::{AbortHandle, Collective, CollectiveError, chunk};

pub use super::connect::RingPlan;

const _: () = assert!(
    cfg!(target_endian = "little"),
    "numbers travel as they lie in memory"
);

/// Bytes that are handed to the writing thread at a time.
const SEGMENT: usize = 1 << 18;

/// Segments that may wait for the writing thread. One more than one, so that it always has work.
const WAITING: usize = 2;

/// A rank of a ring of TCP connections.
#[derive(Debug)]
pub struct TcpRing {
    rank: u32,
    world: u32,
    incoming: Incoming,
    outgoing: Outgoing,
    abort: AbortHandle,
    /// A connection failed: the ring is of no more use.
    broken: bool,
    /// Operations begun: neighbours compare theirs.
    operations: u64,
    /// Received elements on their way into a sum; kept for the next time.
    scratch: Vec<f32>,
}

/// The neighbour before, who sends.
#[derive(Debug)]
struct Incoming {
    stream: Arc<TcpStream>,
    peer: Peer,
}

/// The neighbour after, to whom a thread writes.
#[derive(Debug)]
struct Outgoing {
    stream: Arc<TcpStream>,
    peer: Peer,
    /// None once the ring is dropped.
    segments: Option<SyncSender<Vec<u8>>>,
    /// Written segments come back to be filled again.
    spent: Receiver<Vec<u8>>,
    writer: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Clone, Debug)]
struct Peer {
    rank: u32,
    address: String,
}

/// What a rank is about to do; neighbours have to agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Operation {
    count: u64,
    kind: u64,
    /// Elements, bytes or root; 0 where ranks may differ.
    size: u64,
}

const ALL_REDUCE_F32: u64 = 1;
const ALL_REDUCE_BF16: u64 = 2;
const ALL_GATHER: u64 = 3;
const BROADCAST: u64 = 4;
const BARRIER: u64 = 5;
const PASS: u64 = 6;

impl TcpRing {
    /// Connects the ranks of a generation. Returns when the whole ring stands.
    ///
    /// # Errors
    ///
    /// `Timeout` or `Handshake` after `plan.patience`, naming the neighbour; `Aborted`.
    pub fn connect(
        listener: &std::net::TcpListener,
        plan: &RingPlan,
        abort: AbortHandle,
    ) -> Result<TcpRing, CollectiveError> {
        let Neighbours {
            next,
            previous,
            previous_address,
        } = connect::neighbours(listener, plan, &abort)?;
        let next_peer = Peer {
            rank: plan.next(),
            address: plan.next_address.clone(),
        };
        let mut ring = TcpRing {
            rank: plan.rank,
            world: plan.world,
            incoming: Incoming {
                stream: previous,
                peer: Peer {
                    rank: plan.previous(),
                    address: previous_address,
                },
            },
            outgoing: Outgoing::start(next, next_peer)?,
            abort,
            broken: false,
            operations: 0,
            scratch: Vec::new(),
        };
        ring.barrier()?;
        Ok(ring)
    }

    /// Compares the operation with that of the neighbour before.
    fn begin(&mut self, kind: u64, size: u64) -> Result<(), CollectiveError> {
        self.abort.check()?;
        self.operations += 1;
        let mine = Operation {
            count: self.operations,
            kind,
            size,
        };
        let mut theirs = Operation {
            count: 0,
            kind: 0,
            size: 0,
        };
        self.exchange(
            bytemuck::bytes_of(&mine),
            bytemuck::bytes_of_mut(&mut theirs),
        )?;
        if mine == theirs {
            return Ok(());
        }
        // The connection is sound: the next rank still gets to read what this one is about to do.
        let Peer { rank, address } = self.incoming.peer.clone();
        Err(CollectiveError::Peer {
            rank,
            address,
            cause: format!("it is at {theirs:?} while this rank is at {mine:?}"),
        })
    }

    /// The rank `steps` before this one.
    fn before(&self, steps: u32) -> u32 {
        (self.rank + self.world - steps % self.world) % self.world
    }

    /// Sends to the next rank while receiving from the one before.
    fn exchange(&mut self, send: &[u8], receive: &mut [u8]) -> Result<(), CollectiveError> {
        let mut incoming = receive.chunks_mut(SEGMENT);
        let mut outgoing = send.chunks(SEGMENT);
        loop {
            let (out, into) = (outgoing.next(), incoming.next());
            if out.is_none() && into.is_none() {
                return Ok(());
            }
            if let Some(bytes) = out {
                self.send(bytes)?;
            }
            if let Some(bytes) = into {
                self.receive(bytes)?;
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), CollectiveError> {
        match self.outgoing.send(bytes) {
            Ok(()) => Ok(()),
            Err(cause) => Err(self.lost(self.outgoing.peer.clone(), cause)),
        }
    }

    fn receive(&mut self, bytes: &mut [u8]) -> Result<(), CollectiveError> {
        let Err(error) = (&*self.incoming.stream).read_exact(bytes) else {
            return Ok(());
        };
        let cause = match error.kind() {
            io::ErrorKind::UnexpectedEof => "it closed the connection".to_owned(),
            _ => error.to_string(),
        };
        Err(self.lost(self.incoming.peer.clone(), cause))
    }

    /// A broken connection is the doing of an abort, if there was one.
    fn lost(&mut self, peer: Peer, cause: String) -> CollectiveError {
        self.broken = true;
        if self.abort.aborted() {
            return CollectiveError::Aborted;
        }
        CollectiveError::Peer {
            rank: peer.rank,
            address: peer.address,
            cause,
        }
    }

    /// After this, part `rank + 1` of `buffer` is the sum over all ranks.
    fn reduce_scatter(&mut self, buffer: &mut [f32]) -> Result<(), CollectiveError> {
        let (len, world) = (buffer.len(), self.world);
        let mut scratch = std::mem::take(&mut self.scratch);
        for step in 0..world - 1 {
            let out = chunk(len, world, self.before(step));
            let into = chunk(len, world, self.before(step + 1));
            scratch.resize(into.len(), 0.0);
            self.exchange(
                bytemuck::cast_slice(&buffer[out]),
                bytemuck::cast_slice_mut(&mut scratch),
            )?;
            for (mine, sum) in buffer[into].iter_mut().zip(&scratch) {
                *mine += *sum;
            }
        }
        self.scratch = scratch;
        Ok(())
    }

    /// Spreads part `rank + 1` of every rank's `buffer`.
    fn gather_parts<T: bytemuck::Pod>(&mut self, buffer: &mut [T]) -> Result<(), CollectiveError> {
        let (len, world) = (buffer.len(), self.world);
        for step in 0..world - 1 {
            // `before(world - 1)` is the next rank.
            let out = chunk(len, world, self.before(step + world - 1));
            let into = chunk(len, world, self.before(step));
            let (out, into) = disjoint(buffer, out, into);
            self.exchange(bytemuck::cast_slice(out), bytemuck::cast_slice_mut(into))?;
        }
        Ok(())
    }
}

/// Two different parts of a buffer, the second one to be written.
fn disjoint<T>(
    buffer: &mut [T],
    read: std::ops::Range<usize>,
    write: std::ops::Range<usize>,
) -> (&[T], &mut [T]) {
    if read.end <= write.start {
        let (low, high) = buffer.split_at_mut(write.start);
        (&low[read], &mut high[..write.end - write.start])
    } else {
        let (low, high) = buffer.split_at_mut(read.start);
        (&high[..read.end - read.start], &mut low[write])
    }
}

impl Collective for TcpRing {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world(&self) -> u32 {
        self.world
    }

    fn all_reduce_f32(&mut self, buffer: &mut [f32]) -> Result<(), CollectiveError> {
        self.begin(ALL_REDUCE_F32, buffer.len() as u64)?;
        self.reduce_scatter(buffer)?;
        self.gather_parts(buffer)
    }

    fn all_reduce_bf16(&mut self, buffer: &mut [bf16]) -> Result<(), CollectiveError> {
        self.begin(ALL_REDUCE_BF16, buffer.len() as u64)?;
        let mut wide = vec![0.0; buffer.len()];
        buffer.convert_to_f32_slice(&mut wide);
        self.reduce_scatter(&mut wide)?;
        // Only this part is complete; the others arrive already rounded.
        let part = chunk(buffer.len(), self.world, self.before(self.world - 1));
        buffer[part.clone()].convert_from_f32_slice(&wide[part]);
        self.gather_parts(buffer)
    }

    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.begin(ALL_GATHER, 0)?;
        let mut all = vec![Vec::new(); self.world as usize];
        all[self.rank as usize] = mine.to_vec();
        for step in 0..self.world - 1 {
            let (out, into) = (self.before(step), self.before(step + 1));
            let out = std::mem::take(&mut all[out as usize]);
            let mut length = [0; 8];
            self.exchange(&(out.len() as u64).to_le_bytes(), &mut length)?;
            let mut received = vec![0; u64::from_le_bytes(length) as usize];
            self.exchange(&out, &mut received)?;
            all[self.before(step) as usize] = out;
            all[into as usize] = received;
        }
        Ok(all)
    }

    fn broadcast(&mut self, root: u32, buffer: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.begin(BROADCAST, u64::from(root))?;
        let first = self.rank == root;
        let last = self.before(self.world - 1) == root;
        let mut length = (buffer.len() as u64).to_le_bytes();
        if !first {
            self.receive(&mut length)?;
            buffer.resize(u64::from_le_bytes(length) as usize, 0);
        }
        if !last {
            self.send(&length)?;
        }
        for segment in buffer.chunks_mut(SEGMENT) {
            if !first {
                self.receive(segment)?;
            }
            if !last {
                self.send(segment)?;
            }
        }
        Ok(())
    }

    fn pass(&mut self, mine: &[u8], theirs: &mut [u8]) -> Result<(), CollectiveError> {
        self.begin(PASS, mine.len() as u64)?;
        self.exchange(mine, theirs)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.begin(BARRIER, 0)?;
        // What arrives in step s left a rank s + 1 places before this one after it began.
        for _ in 0..self.world - 1 {
            self.exchange(&[0], &mut [0])?;
        }
        Ok(())
    }
}

impl Drop for TcpRing {
    fn drop(&mut self) {
        if self.broken {
            self.outgoing.stream.shutdown(Shutdown::Both).ok();
        }
        // A ring that stands lets its writer finish: the neighbour needs what is on its way.
        self.outgoing.finish().ok();
    }
}

impl Outgoing {
    fn start(stream: Arc<TcpStream>, peer: Peer) -> Result<Outgoing, CollectiveError> {
        let (segments, queue) = sync_channel::<Vec<u8>>(WAITING);
        let (give_back, spent) = sync_channel(WAITING + 1);
        let sink = Arc::clone(&stream);
        let writer = std::thread::Builder::new()
            .name("ring writer".to_owned())
            .spawn(move || {
                for segment in queue {
                    (&*sink).write_all(&segment)?;
                    give_back.try_send(segment).ok();
                }
                Ok(())
            });
        let writer = writer.map_err(|error| CollectiveError::Peer {
            rank: peer.rank,
            address: peer.address.clone(),
            cause: format!("cannot start the thread that writes to it: {error}"),
        })?;
        Ok(Outgoing {
            stream,
            peer,
            segments: Some(segments),
            spent,
            writer: Some(writer),
        })
    }

    /// Hands a copy of `bytes` to the writer; waits while it has enough to do.
    fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut segment = self.spent.try_recv().unwrap_or_default();
        segment.clear();
        segment.extend_from_slice(bytes);
        match &self.segments {
            Some(segments) if segments.send(segment).is_ok() => Ok(()),
            // The writer ends early only by an error, which it left as its result.
            _ => Err(self
                .finish()
                .err()
                .unwrap_or_else(|| "the connection is closed".to_owned())),
        }
    }

    fn finish(&mut self) -> Result<(), String> {
        self.segments = None;
        match self.writer.take().map(JoinHandle::join) {
            Some(Ok(Err(error))) => Err(error.to_string()),
            Some(Err(_)) => Err("the writing thread panicked".to_owned()),
            Some(Ok(Ok(()))) | None => Ok(()),
        }
    }
}
