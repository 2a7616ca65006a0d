//! Launches that were recorded once and are repeated as a whole, for a hundredth of what launching each of them costs.

use cudarc::driver::{
    result::{self, DriverError},
    sys,
};
use sys::{
    CUevent_flags::CU_EVENT_DISABLE_TIMING, CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT,
    CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
};

use crate::kernels::cuda::{
    error::KernelError,
    event::Event,
    launch::{Gpu, Queue, refused},
};

/// A recorded sequence of launches. What they read and write has to live as long as it is launched.
#[derive(Debug)]
pub struct Graph(sys::CUgraphExec);

/// What launches are recorded on: two streams, the second of which only helps out.
pub struct Tape<'a> {
    gpu: &'a Gpu,
    main: Queue,
    beside: Queue,
}

impl<'a> Tape<'a> {
    fn new(gpu: &'a Gpu) -> Result<Tape<'a>, DriverError> {
        let stream = || result::stream::create(result::stream::StreamKind::NonBlocking).map(Queue);
        Ok(Tape {
            gpu,
            main: stream()?,
            beside: stream()?,
        })
    }

    /// The stream whose launches come one after the other.
    pub fn main(&self) -> &Queue {
        &self.main
    }

    /// Two pieces of work that do not depend on each other. What follows comes after both.
    #[allow(unsafe_code)]
    pub fn both(
        &self,
        main: impl FnOnce(&Queue) -> Result<(), KernelError>,
        beside: impl FnOnce(&Queue) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let order = |first: &Queue, second: &Queue| {
            let event = Event::new(CU_EVENT_DISABLE_TIMING)?;
            // SAFETY: streams and event are alive; what was recorded keeps the order when the event is gone.
            unsafe {
                result::event::record(event.0, first.0)?;
                result::stream::wait_event(second.0, event.0, CU_EVENT_WAIT_DEFAULT)
            }
        };
        let failed =
            |error: DriverError| refused(self.gpu.index(), "record a graph".to_owned(), &error);
        order(&self.main, &self.beside).map_err(failed)?;
        main(&self.main)?;
        beside(&self.beside)?;
        order(&self.beside, &self.main).map_err(failed)
    }
}

impl Drop for Tape<'_> {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: both are alive, and this is their last use. That they cannot be freed changes nothing.
        unsafe {
            let _ = result::stream::destroy(self.main.0);
            let _ = result::stream::destroy(self.beside.0);
        }
    }
}

impl Graph {
    /// Records what `enqueue` puts on the tape that it is given, instead of doing it.
    #[allow(unsafe_code)]
    pub fn record(
        gpu: &Gpu,
        enqueue: impl FnOnce(&Tape<'_>) -> Result<(), KernelError>,
    ) -> Result<Graph, KernelError> {
        let failed = |error: DriverError| refused(gpu.index(), "record a graph".to_owned(), &error);
        gpu.make_current()?;
        let tape = Tape::new(gpu).map_err(failed)?;
        let stream = tape.main.0;
        // SAFETY: the stream is alive.
        unsafe { result::stream::begin_capture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) }
            .map_err(failed)?;
        let enqueued = enqueue(&tape);
        // SAFETY: the stream is alive and records; recording ends even if a launch was refused.
        let recorded = unsafe { result::stream::end_capture(stream) };
        enqueued?;
        let graph = recorded.map_err(failed)?;
        // SAFETY: the graph is alive, and the executable one does not need it any more.
        let executable = unsafe {
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            executable
        };
        executable.map(Graph).map_err(failed)
    }

    /// Puts all of it on the legacy default stream, behind what libtorch was asked for before.
    #[allow(unsafe_code)]
    pub fn launch(&self, gpu: &Gpu) -> Result<(), KernelError> {
        gpu.make_current()?;
        // SAFETY: the graph is alive; its owner keeps what it reads and writes.
        unsafe { result::graph::launch(self.0, Queue::DEFAULT.0) }
            .map_err(|error| refused(gpu.index(), "launch a graph".to_owned(), &error))
    }
}

impl Drop for Graph {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: it is alive, and the driver lets launches under way end. That it cannot be freed changes nothing.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}
