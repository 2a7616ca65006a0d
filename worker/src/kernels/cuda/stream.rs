//! A stream of our own beside the legacy default one that libtorch computes on, and the events that order the two.
//!
//! An operation on it comes behind everything that the default stream was asked for before the operation was started, and
//! goes on beside what follows there, until the default stream is made to wait. How long it then stands still is measured
//! by a timed event on either side of the wait. The host waits for nothing, unless it is asked to settle.

use std::{collections::VecDeque, time::Duration};

use cudarc::driver::{
    result::{self, DriverError},
    sys,
};
use sys::{
    CUevent_flags::{CU_EVENT_DEFAULT, CU_EVENT_DISABLE_TIMING},
    CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT,
};
use tch::Tensor;

use super::{
    error::KernelError,
    event::Event,
    launch::{self, Queue},
};

/// The stream that libtorch computes on.
const COMPUTE: sys::CUstream = Queue::DEFAULT.0;

/// The stream, the operations under way on it, and the waits for them.
#[derive(Debug)]
pub struct SideStream {
    index: usize,
    context: sys::CUcontext,
    stream: Queue,
    /// Operations started so far.
    started: u64,
    /// Those that the default stream has not waited for, the oldest first.
    under_way: VecDeque<Operation>,
    /// Events before and behind waits whose length is not known yet, the oldest first.
    waits: VecDeque<[Event; 2]>,
    spare: Vec<Event>,
    spare_timed: Vec<Event>,
}

/// An operation under way.
#[derive(Debug)]
struct Operation {
    number: u64,
    done: Event,
    /// What it works on: libtorch may not give this memory to anybody else before it is done.
    _tensor: Tensor,
}

impl SideStream {
    /// A stream of the GPU with this index, whose small kernels go before what else waits for room on the GPU.
    #[allow(unsafe_code)]
    pub fn open(index: usize) -> Result<SideStream, KernelError> {
        let context = launch::primary_context(index)?;
        let opened = || -> Result<sys::CUstream, DriverError> {
            // SAFETY: the context is retained for ever.
            unsafe { result::ctx::set_current(context) }?;
            let (_, first) = result::stream::get_priority_range()?;
            result::stream::create_with_priority(result::stream::StreamKind::NonBlocking, first)
        };
        let stream =
            opened().map_err(|error| launch::refused(index, "open a stream".to_owned(), &error))?;
        Ok(SideStream {
            index,
            context,
            stream: Queue(stream),
            started: 0,
            under_way: VecDeque::new(),
            waits: VecDeque::new(),
            spare: Vec::new(),
            spare_timed: Vec::new(),
        })
    }

    /// Starts an operation on `tensor`, which `enqueue` puts on the stream. Gives it a number.
    #[allow(unsafe_code)]
    pub fn start<E: From<KernelError>>(
        &mut self,
        tensor: &Tensor,
        enqueue: impl FnOnce(&Queue) -> Result<(), E>,
    ) -> Result<u64, E> {
        self.make_current()?;
        let done = self.event()?;
        let ordered = || -> Result<(), DriverError> {
            // SAFETY: stream and event are alive. The event serves twice: the wait keeps what it was recorded for.
            unsafe {
                result::event::record(done.0, COMPUTE)?;
                result::stream::wait_event(self.stream.0, done.0, CU_EVENT_WAIT_DEFAULT)
            }
        };
        ordered().map_err(|error| self.refused("order its streams", &error))?;
        self.started += 1;
        // First of all, so that an operation which fails half way has its memory, too.
        self.under_way.push_back(Operation {
            number: self.started,
            done,
            _tensor: tensor.shallow_clone(),
        });
        enqueue(&self.stream)?;
        if let Some(Operation { done, .. }) = self.under_way.back() {
            // SAFETY: stream and event are alive.
            unsafe { result::event::record(done.0, self.stream.0) }
                .map_err(|error| self.refused("mark the end of an operation", &error))?;
        }
        Ok(self.started)
    }

    /// Makes the default stream wait for the operation of this number, and thereby for all before it.
    #[allow(unsafe_code)]
    pub fn wait(&mut self, number: u64) -> Result<(), KernelError> {
        self.make_current()?;
        let mut last = None;
        while let Some(operation) = self.under_way.pop_front_if(|first| first.number <= number) {
            self.spare.extend(last.replace(operation.done));
        }
        let Some(done) = last else {
            // Somebody has waited for a later one.
            return Ok(());
        };
        let pair = [self.timed_event()?, self.timed_event()?];
        let waited = || -> Result<(), DriverError> {
            // SAFETY: streams and events are alive.
            unsafe {
                result::event::record(pair[0].0, COMPUTE)?;
                result::stream::wait_event(COMPUTE, done.0, CU_EVENT_WAIT_DEFAULT)?;
                result::event::record(pair[1].0, COMPUTE)
            }
        };
        waited().map_err(|error| self.refused("let its streams wait", &error))?;
        self.waits.push_back(pair);
        self.spare.push(done);
        Ok(())
    }

    /// As [`wait`](SideStream::wait), and the host waits, too: first until the default stream has come to the wait, then
    /// until it is through. What `others` gives lives for the second part only, in which this GPU stands still for others.
    #[allow(unsafe_code)]
    pub fn settle<W>(
        &mut self,
        number: u64,
        others: impl FnOnce() -> W,
    ) -> Result<(), KernelError> {
        let known = self.waits.len();
        self.wait(number)?;
        let Some([before, behind]) = self.waits.get(known) else {
            return Ok(());
        };
        let settled = || -> Result<(), DriverError> {
            // SAFETY: both events are alive and were recorded.
            unsafe {
                result::event::synchronize(before.0)?;
                let _others = others();
                result::event::synchronize(behind.0)
            }
        };
        settled().map_err(|error| self.refused("wait for its streams", &error))
    }

    /// How long the default stream has stood still in the waits that it has come through since the last call.
    #[allow(unsafe_code)]
    pub fn stalled(&mut self) -> Result<Duration, KernelError> {
        self.make_current()?;
        let mut milliseconds = 0.0;
        while let Some([before, behind]) = self.waits.front() {
            // SAFETY: both events are alive, were recorded on one stream, and take the time.
            let passed = unsafe { result::event::elapsed(before.0, behind.0) };
            match passed {
                Ok(passed) => milliseconds += f64::from(passed),
                Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => break,
                Err(error) => return Err(self.refused("measure a wait", &error)),
            }
            self.spare_timed
                .extend(self.waits.pop_front().into_iter().flatten());
        }
        Ok(Duration::from_secs_f64(milliseconds.max(0.0) / 1e3))
    }

    /// Leaves the waits so far out of what [`stalled`](SideStream::stalled) tells.
    pub fn forget_waits(&mut self) {
        self.spare_timed.extend(self.waits.drain(..).flatten());
    }

    /// Waits, on the host, until all that was started is done.
    #[allow(unsafe_code)]
    pub fn synchronize(&self) -> Result<(), KernelError> {
        self.make_current()?;
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(self.stream.0) }
            .map_err(|error| self.refused("finish a stream", &error))
    }

    fn event(&mut self) -> Result<Event, KernelError> {
        match self.spare.pop() {
            Some(event) => Ok(event),
            None => self.new_event(CU_EVENT_DISABLE_TIMING),
        }
    }

    fn timed_event(&mut self) -> Result<Event, KernelError> {
        match self.spare_timed.pop() {
            Some(event) => Ok(event),
            None => self.new_event(CU_EVENT_DEFAULT),
        }
    }

    fn new_event(&self, flags: sys::CUevent_flags) -> Result<Event, KernelError> {
        Event::new(flags).map_err(|error| self.refused("make an event", &error))
    }

    #[allow(unsafe_code)]
    fn make_current(&self) -> Result<(), KernelError> {
        // SAFETY: the context is retained for ever.
        unsafe { result::ctx::set_current(self.context) }
            .map_err(|error| self.refused("be made the current GPU", &error))
    }

    fn refused(&self, what: &str, error: &DriverError) -> KernelError {
        launch::refused(self.index, what.to_owned(), error)
    }
}

impl Drop for SideStream {
    /// Returns when the stream is empty, so that nothing works on memory that is free. Who has operations on it that need
    /// others to end has aborted them.
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.synchronize().is_ok() {
            // SAFETY: the stream is alive, and this is the last use of it. That it cannot be freed changes nothing.
            let _ = unsafe { result::stream::destroy(self.stream.0) };
        }
    }
}
