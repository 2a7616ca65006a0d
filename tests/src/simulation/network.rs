//! Simulated streams between workers and the coordinator.
//!
//! A stream keeps the order of each direction. A direction can stand still (a partition: what is sent meanwhile arrives
//! later, or never) and a stream can break: what is under way is lost, and each end learns of it in its own time.

use std::collections::VecDeque;

use rand::RngExt;
use supra_coordinator::machine::Conn;
use supra_proto::v1::{CoordinatorMessage, WorkerMessage};

use super::World;
use super::queue::{Event, MS, SECOND, Time};

/// What travels.
#[derive(Clone, Debug)]
pub(super) enum Item {
    Up(Box<WorkerMessage>),
    Down(Box<CoordinatorMessage>),
    /// The sender has ended the stream in order.
    EndOfUp,
    EndOfDown,
}

impl Item {
    fn up(&self) -> bool {
        matches!(self, Item::Up(_) | Item::EndOfUp)
    }
}

/// One direction.
#[derive(Default)]
struct Way {
    /// When the last message arrives: no later one may come before it.
    last: Time,
    stalled: bool,
    held: VecDeque<Item>,
}

/// A stream of a worker's process to a coordinator's.
pub(super) struct Stream {
    pub worker: usize,
    pub epoch: u32,
    pub coordinator_epoch: u32,
    /// As the coordinator calls it, once the Hello has arrived.
    pub conn: Option<Conn>,
    pub broken: bool,
    up: Way,
    down: Way,
    /// Messages that are still to be delivered again and again.
    doubles: u32,
    /// Further delay of every message.
    lag: Time,
    pub sequence_up: u64,
    pub sequence_down: u64,
}

impl Stream {
    fn way(&mut self, up: bool) -> &mut Way {
        if up { &mut self.up } else { &mut self.down }
    }
}

impl World {
    /// A new stream of a worker; its number.
    pub(super) fn connect(&mut self, worker: usize) -> usize {
        self.streams.push(Stream {
            worker,
            epoch: self.workers[worker].epoch,
            coordinator_epoch: self.coordinator.epoch,
            conn: None,
            broken: false,
            up: Way::default(),
            down: Way::default(),
            doubles: 0,
            lag: 0,
            sequence_up: 0,
            sequence_down: 0,
        });
        let stream = self.streams.len() - 1;
        for up in [true, false] {
            let until = self.workers[worker].partition[usize::from(up)];
            if until > self.now {
                self.stall(stream, up, until);
            }
        }
        stream
    }

    pub(super) fn send(&mut self, stream: usize, item: Item) {
        let up = item.up();
        let line = &mut self.streams[stream];
        if line.broken {
            return;
        }
        if line.way(up).stalled {
            line.way(up).held.push_back(item);
            return;
        }
        let doubled = line.doubles > 0 && matches!(item, Item::Up(_) | Item::Down(_));
        if doubled {
            line.doubles -= 1;
        }
        let delay = line.lag + self.random.random_range(MS / 5..20 * MS);
        let at = line.way(up).last.max(self.now + delay);
        line.way(up).last = at;
        if doubled {
            // A repeat changes nothing, whenever it comes.
            for _ in 0..3 {
                let later = self.random.random_range(0..12 * SECOND);
                let item = item.clone();
                self.queue.push(at + later, Event::Deliver { stream, item });
            }
        }
        self.queue.push(at, Event::Deliver { stream, item });
    }

    /// Lets a direction stand still until then. After a while without a sign of life the stream is given up.
    pub(super) fn stall(&mut self, stream: usize, up: bool, until: Time) {
        self.streams[stream].way(up).stalled = true;
        self.queue.push(until, Event::Unstall { stream, up });
        let patience = self.random.random_range(4 * SECOND..25 * SECOND);
        self.queue
            .push(self.now + patience, Event::KeepAlive { stream });
    }

    pub(super) fn unstall(&mut self, stream: usize, up: bool) {
        self.streams[stream].way(up).stalled = false;
        for item in std::mem::take(&mut self.streams[stream].way(up).held) {
            self.send(stream, item);
        }
    }

    pub(super) fn keep_alive(&mut self, stream: usize) {
        if self.streams[stream].up.stalled || self.streams[stream].down.stalled {
            self.cut(stream, true);
        }
    }

    /// Breaks a stream. `reset`: both ends learn of it soon; else the worker's end learns late, and the coordinator's from
    /// the silence.
    pub(super) fn cut(&mut self, stream: usize, reset: bool) {
        if std::mem::replace(&mut self.streams[stream].broken, true) {
            return;
        }
        for by_worker in [true, false] {
            let longest = if reset { 500 * MS } else { 15 * SECOND };
            let after = self.random.random_range(MS..longest);
            self.queue
                .push(self.now + after, Event::Noticed { stream, by_worker });
        }
    }

    /// Streams of the process that a worker is now that still carry something.
    pub(super) fn streams_of(&self, worker: usize) -> Vec<usize> {
        let epoch = self.workers[worker].epoch;
        self.streams
            .iter()
            .enumerate()
            .filter(|(_, line)| line.worker == worker && line.epoch == epoch && !line.broken)
            .map(|(stream, _)| stream)
            .collect()
    }

    pub(super) fn double(&mut self, worker: usize, messages: u32) {
        for stream in self.streams_of(worker) {
            self.streams[stream].doubles = messages;
        }
    }

    pub(super) fn slow_down(&mut self, worker: usize, lag: Time) {
        for stream in self.streams_of(worker) {
            self.streams[stream].lag = lag;
        }
    }

    pub(super) fn deliver(&mut self, stream: usize, item: Item) {
        let line = &self.streams[stream];
        if line.broken {
            return;
        }
        match item {
            Item::Up(message) => self.coordinator_hears(stream, *message),
            Item::Down(message) => self.worker_hears(stream, *message),
            Item::EndOfUp => {
                self.streams[stream].broken = true;
                self.coordinator_loses(stream, "it closed the stream");
            }
            Item::EndOfDown => {
                self.streams[stream].broken = true;
                self.worker_loses(stream);
            }
        }
    }

    pub(super) fn noticed(&mut self, stream: usize, by_worker: bool) {
        if by_worker {
            self.worker_loses(stream);
        } else {
            self.coordinator_loses(stream, "the connection broke");
        }
    }
}
