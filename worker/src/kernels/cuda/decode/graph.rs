//! Launches that were recorded once and are repeated as a whole, for a hundredth of what launching each of them costs.

use cudarc::driver::{
    result::{self, DriverError},
    sys,
};

use crate::kernels::cuda::{
    error::KernelError,
    launch::{Gpu, Queue, refused},
};

/// A recorded sequence of launches. What they read and write has to live as long as it is launched.
#[derive(Debug)]
pub struct Graph(sys::CUgraphExec);

impl Graph {
    /// Records what `enqueue` puts on the stream that it is given, instead of doing it.
    #[allow(unsafe_code)]
    pub fn record(
        gpu: &Gpu,
        enqueue: impl FnOnce(&Queue) -> Result<(), KernelError>,
    ) -> Result<Graph, KernelError> {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let failed = |error: DriverError| refused(gpu.index(), "record a graph".to_owned(), &error);
        gpu.make_current()?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed)?;
        let queue = Queue(stream);
        // SAFETY: the stream is alive.
        unsafe { result::stream::begin_capture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) }
            .map_err(failed)?;
        let enqueued = enqueue(&queue);
        // SAFETY: the stream is alive and records; recording ends even if a launch was refused, and the stream is not used
        // any more.
        let recorded = unsafe {
            let recorded = result::stream::end_capture(stream);
            let _ = result::stream::destroy(stream);
            recorded
        };
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
