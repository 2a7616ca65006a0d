//! Writing beside training: a copy of this rank's part in host memory, and a thread that writes it.
//!
//! One checkpoint at a time: the copy has one room. Where the host has none, the state itself is written, and training stands
//! still meanwhile.
//!
//! A generation that becomes void must not wait for a disk, or for memory that is being pinned: its thread is left to itself and
//! ends soon. The next generation's thread takes the room over from it, since pinning that much anew would take a minute.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use supra_agent::Link;
use supra_checkpoint::{Store, manifest::StoredFile};

use super::{
    CheckpointError,
    shard::ShardFile,
    write::{self, Companions},
};
use crate::optim::{HostPart, HostRoom, Numbers, Part, Replica};

/// How often a wait looks whether there is still something to wait for.
const LOOK: Duration = Duration::from_millis(20);

/// Threads of generations that are over in this process, and the rooms that they leave.
static LEFT: Mutex<Vec<Left>> = Mutex::new(Vec::new());

/// A thread that ends by itself, and the room that it had.
struct Left {
    room: Room,
    thread: JoinHandle<()>,
}

/// Room for a copy. It is not there while it is being allocated, or written from.
#[derive(Clone)]
struct Room {
    bytes: u64,
    copy: Arc<Mutex<Option<HostPart>>>,
}

impl Room {
    fn put(&self, copy: HostPart) {
        *self.copy.lock().unwrap_or_else(PoisonError::into_inner) = Some(copy);
    }

    fn take(&self) -> Option<HostPart> {
        let mut copy = self.copy.lock().unwrap_or_else(PoisonError::into_inner);
        copy.take()
    }
}

impl Left {
    /// The room, as soon as it is there; none when nobody wants it any more, or the thread is gone.
    fn room(&self, stop: &dyn Fn() -> bool) -> Option<HostPart> {
        loop {
            let gone = stop() || self.thread.is_finished();
            match self.room.take() {
                None if !gone => thread::sleep(LOOK),
                taken => return taken,
            }
        }
    }
}

/// What one rank is to write.
#[derive(Clone, Debug)]
pub struct Order {
    /// Step whose state it is.
    pub step: u64,
    /// Where checkpoints are kept.
    pub store: Store,
    /// The checkpoint's directory.
    pub dir: String,
    /// The rank's files.
    pub files: Vec<ShardFile>,
    /// What rank 0 writes beside its part.
    pub companions: Option<Companions>,
}

/// What one rank has written.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Written {
    /// What is in the rank's files, in their order.
    pub files: Vec<StoredFile>,
    /// What is in the files beside them, by name.
    pub companions: BTreeMap<String, StoredFile>,
    /// Wall time that it took, seconds.
    pub seconds: f64,
}

/// The writing end of one rank, for one generation.
pub struct Saver {
    part: Part,
    /// None where training stands still.
    beside: Option<Left>,
    /// Step of the checkpoint that is under way.
    under_way: Option<u64>,
    /// What is written and not taken yet.
    written: Option<Written>,
    link: Link,
    over: Arc<AtomicBool>,
    orders: Option<SyncSender<(Order, HostPart)>>,
    done: Receiver<Result<Option<Written>, CheckpointError>>,
}

impl Saver {
    /// That of the rank that writes `part`. Without room for a copy training stands still meanwhile.
    ///
    /// # Errors
    ///
    /// There is no room for a thread.
    pub fn start(copy: Option<HostRoom>, part: Part, link: &Link) -> std::io::Result<Saver> {
        let over = Arc::new(AtomicBool::new(false));
        let (orders, queue) = sync_channel(1);
        let (sender, done) = sync_channel(1);
        let mut saver = Saver {
            part,
            beside: None,
            under_way: None,
            written: None,
            link: link.clone(),
            over,
            orders: None,
            done,
        };
        if let Some(copy) = copy {
            let room = Room {
                bytes: copy.bytes(),
                copy: Arc::default(),
            };
            let (stop, own) = (saver.stop(), room.clone());
            let thread = thread::Builder::new().name("saver".to_owned());
            let thread = thread.spawn(move || work(&copy, &own, &queue, &sender, &stop))?;
            saver.beside = Some(Left { room, thread });
            saver.orders = Some(orders);
        }
        Ok(saver)
    }

    /// The step of the checkpoint that is under way.
    pub fn under_way(&self) -> Option<u64> {
        self.under_way
    }

    /// Begins to write the state of `replica`, on which no update works. None is under way.
    ///
    /// # Errors
    ///
    /// Where training stands still: whatever goes wrong with writing.
    pub fn begin(&mut self, order: Order, replica: &Replica) -> Result<(), CheckpointError> {
        self.under_way = Some(order.step);
        let (Some(beside), Some(orders)) = (&self.beside, &self.orders) else {
            self.written = order.write(&replica.numbers(self.part), &self.stop())?;
            return Ok(());
        };
        // When the generation is void, or the thread gone, that is found out by whoever waits for what it writes.
        if let Some(mut copy) = beside.room(&self.stop()) {
            copy.copy_from(replica, self.part);
            orders.send((order, copy)).ok();
        }
        Ok(())
    }

    /// Whether this rank's part of the one that is under way is written, or none is.
    ///
    /// # Errors
    ///
    /// Writing has failed.
    pub fn settled(&mut self) -> Result<bool, CheckpointError> {
        if self.under_way.is_some() && self.written.is_none() {
            match self.done.try_recv() {
                Ok(written) => self.written = written?,
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => {}
            }
        }
        Ok(self.under_way.is_none() || self.written.is_some())
    }

    /// Waits for what this rank has written of the one that is under way, and takes it. None when the generation became void
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// Writing has failed.
    pub fn take(&mut self) -> Result<Option<Written>, CheckpointError> {
        if self.written.is_none()
            && let Some(written) = receive(&self.done, &self.stop())
        {
            self.written = written?;
        }
        self.under_way = None;
        Ok(self.written.take())
    }

    /// Whether nobody wants the checkpoint any more.
    fn stop(&self) -> impl Fn() -> bool + Send + Sync + use<> {
        let (link, over) = (self.link.clone(), Arc::clone(&self.over));
        move || link.void() || over.load(Ordering::Relaxed)
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.orders = None;
        left().extend(self.beside.take());
    }
}

/// Bytes of host memory that threads of generations that are over hold, or leave.
pub fn left_bytes() -> u64 {
    left().iter().map(|left| left.room.bytes).sum()
}

/// Waits for the threads of generations that are over; gives the rooms that they leave.
pub fn join_left() -> Vec<HostPart> {
    let threads = std::mem::take(&mut *left());
    let rooms = threads.into_iter().map(|Left { room, thread }| {
        thread.join().ok()?;
        room.take()
    });
    rooms.flatten().collect()
}

fn left() -> MutexGuard<'static, Vec<Left>> {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What comes, unless nobody wants it any more, or nothing will come.
fn receive<T>(from: &Receiver<T>, stop: &dyn Fn() -> bool) -> Option<T> {
    loop {
        match from.recv_timeout(LOOK) {
            Ok(received) => return Some(received),
            Err(RecvTimeoutError::Timeout) if !stop() => {}
            Err(_) => return None,
        }
    }
}

/// Writes what is ordered until there is no more of it.
fn work(
    copy: &HostRoom,
    room: &Room,
    orders: &Receiver<(Order, HostPart)>,
    done: &SyncSender<Result<Option<Written>, CheckpointError>>,
    stop: &(dyn Fn() -> bool + Sync),
) {
    let left = join_left().into_iter().find(|left| copy.fits(left));
    room.put(left.unwrap_or_else(|| copy.allocate()));
    while let Ok((order, copy)) = orders.recv() {
        let written = order.write(&copy.numbers(), stop);
        room.put(copy);
        if done.send(written).is_err() {
            return;
        }
    }
}

impl Order {
    fn write(
        &self,
        numbers: &Numbers,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<Written>, CheckpointError> {
        let clock = Instant::now();
        let written = self.write_all(numbers, stop);
        if !matches!(written, Ok(Some(_))) {
            self.clear();
        }
        let seconds = clock.elapsed().as_secs_f64();
        Ok(written?.map(|written| Written { seconds, ..written }))
    }

    fn write_all(
        &self,
        numbers: &Numbers,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<Written>, CheckpointError> {
        let companions = match &self.companions {
            Some(companions) => write::companions(&self.store, &self.dir, companions)?,
            None => BTreeMap::new(),
        };
        let files = write::shard(&self.store, &self.dir, &self.files, numbers, stop)?;
        Ok(files.map(|files| Written {
            files,
            companions,
            seconds: 0.0,
        }))
    }

    /// Half a checkpoint is of no use and takes room: removes what is left of it when no other rank has anything there.
    fn clear(&self) {
        let parts = |name: &String| name.ends_with(".safetensors");
        let of_others = self.store.list(&self.dir);
        if of_others.is_ok_and(|names| !names.iter().any(parts)) {
            let _ = self.store.remove_dir(&self.dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use supra_agent::link::pair;
    use tch::{Device, Kind};

    use super::*;
    use crate::{
        model::ParamSpec,
        optim::{Kinds, Layout},
    };

    fn replica(elements: i64) -> Replica {
        let spec = ParamSpec {
            name: "w".to_owned(),
            shape: vec![elements],
            decayed: true,
            new: false,
        };
        let kinds = Kinds {
            parameters: Kind::Float,
            moments: Kind::Float,
        };
        let layout = Layout::new(&[spec], false, 1);
        let replica = Replica::new(layout, Part::WHOLE, kinds, Device::Cpu);
        for (flat, _) in replica.flats() {
            let _ = flat.shallow_clone().fill_(1.0);
        }
        replica
    }

    #[test]
    fn the_next_generation_takes_over_the_room_of_the_one_before_if_it_is_the_same() {
        let (link, _control, _reports) = pair();
        let room = |elements| HostRoom::of(&replica(elements), Part::WHOLE);
        let start = |elements| Saver::start(Some(room(elements)), Part::WHOLE, &link).unwrap();
        let taken = |saver: &Saver| saver.beside.as_ref().unwrap().room(&|| false).unwrap();
        let leave = |saver: Saver, copy| saver.beside.as_ref().unwrap().room.put(copy);
        let first = start(40);
        let mut copy = taken(&first);
        copy.copy_from(&replica(40), Part::WHOLE);
        let hash = copy.hash();
        assert_ne!(hash, room(40).allocate().hash());
        leave(first, copy);
        assert_eq!(left_bytes(), room(40).bytes());
        let second = start(40);
        let copy = taken(&second);
        assert_eq!(copy.hash(), hash, "the same memory");
        assert_eq!(left_bytes(), 0);
        leave(second, copy);
        assert!(room(41).fits(&taken(&start(41))));
    }

    #[test]
    fn what_is_not_wanted_any_more_is_not_waited_for() {
        let (sender, receiver) = sync_channel::<()>(1);
        assert!(receive(&receiver, &|| true).is_none());
        sender.send(()).unwrap();
        assert!(
            receive(&receiver, &|| true).is_some(),
            "what is there is taken"
        );
    }
}
