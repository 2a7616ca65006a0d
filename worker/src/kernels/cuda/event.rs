//! Points in time on a GPU.

use cudarc::driver::{
    result::{self, DriverError},
    sys,
};

use super::{
    error::KernelError,
    launch::{Gpu, Queue, refused},
};

/// An event of the driver: a point on a stream, reached when everything before it is done.
#[derive(Debug)]
pub struct Event(pub(super) sys::CUevent);

impl Event {
    /// An event of the current GPU, which no stream knows yet.
    pub(super) fn new(flags: sys::CUevent_flags) -> Result<Event, DriverError> {
        result::event::create(flags).map(Event)
    }

    /// The point on the legacy default stream, where libtorch works, behind all that `gpu` has been given there so far. It
    /// keeps the time.
    #[allow(unsafe_code)]
    pub fn now(gpu: &Gpu) -> Result<Event, KernelError> {
        gpu.make_current()?;
        let recorded = || {
            let event = Event::new(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
            // SAFETY: the event was made in the context that is current, as was the stream.
            unsafe { result::event::record(event.0, Queue::DEFAULT.0) }?;
            Ok(event)
        };
        recorded().map_err(|error| refused(gpu.index(), "record an event".to_owned(), &error))
    }

    /// Milliseconds on `gpu` from `earlier` to this point, for which it waits. Both are points [`now`](Event::now).
    #[allow(unsafe_code)]
    pub fn since(&self, earlier: &Event, gpu: &Gpu) -> Result<f64, KernelError> {
        // SAFETY: both events live as long as their owners, were recorded on one stream, and keep the time.
        let milliseconds = unsafe {
            result::event::synchronize(self.0)
                .and_then(|()| result::event::elapsed(earlier.0, self.0))
        };
        milliseconds
            .map(f64::from)
            .map_err(|error| refused(gpu.index(), "time an event".to_owned(), &error))
    }
}

impl Drop for Event {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: it is alive, and what streams have been told of it stays true. That it cannot be freed changes nothing.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}
