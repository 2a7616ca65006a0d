//! Writing beside training: a copy of this rank's part in host memory, and a thread that writes it.
//!
//! One checkpoint at a time: the copy has one room. Where the host has none, the state itself is written, and training stands
//! still meanwhile.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use supra_agent::Link;
use supra_checkpoint::{Store, manifest::StoredFile};

use super::{
    CheckpointError,
    shard::ShardFile,
    write::{self, Companions},
};
use crate::optim::{HostPart, HostRoom, Numbers, Part, Replica};

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
    /// Rooms for the copy come back here; none where training stands still.
    rooms: Option<Receiver<HostPart>>,
    /// Step of the checkpoint that is under way.
    under_way: Option<u64>,
    /// What is written and not taken yet.
    written: Option<Written>,
    link: Link,
    over: Arc<AtomicBool>,
    orders: Option<SyncSender<(Order, HostPart)>>,
    done: Receiver<Result<Option<Written>, CheckpointError>>,
    thread: Option<JoinHandle<()>>,
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
        let (back, rooms) = sync_channel(1);
        let (sender, done) = sync_channel(1);
        let mut saver = Saver {
            part,
            rooms: None,
            under_way: None,
            written: None,
            link: link.clone(),
            over,
            orders: None,
            done,
            thread: None,
        };
        if let Some(room) = copy {
            let stop = saver.stop();
            let thread = thread::Builder::new().name("saver".to_owned());
            let work = move || work(&room, &queue, &back, &sender, &stop);
            saver.thread = Some(thread.spawn(work)?);
            (saver.rooms, saver.orders) = (Some(rooms), Some(orders));
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
        let (Some(rooms), Some(orders)) = (&self.rooms, &self.orders) else {
            self.written = order.write(&replica.numbers(self.part), &self.stop())?;
            return Ok(());
        };
        // A thread that is gone is found out by whoever waits for it.
        if let Ok(mut copy) = rooms.recv() {
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
            && let Ok(written) = self.done.recv()
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
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Writes what is ordered until there is no more of it.
fn work(
    room: &HostRoom,
    orders: &Receiver<(Order, HostPart)>,
    rooms: &SyncSender<HostPart>,
    done: &SyncSender<Result<Option<Written>, CheckpointError>>,
    stop: &(dyn Fn() -> bool + Sync),
) {
    rooms.send(room.allocate()).ok();
    while let Ok((order, copy)) = orders.recv() {
        let written = order.write(&copy.numbers(), stop);
        if rooms.send(copy).is_err() || done.send(written).is_err() {
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
