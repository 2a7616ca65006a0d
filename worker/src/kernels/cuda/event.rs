//! Points in time on a GPU.

use std::ptr;

use cudarc::driver::{result, sys};

use super::{
    error::KernelError,
    launch::{Gpu, refused},
};

/// A point on the legacy default stream, where libtorch works: reached when everything before it is done.
pub struct Event {
    event: sys::CUevent,
    device: usize,
}

impl Event {
    /// The point behind all that the stream of `gpu` has been given so far.
    #[allow(unsafe_code)]
    pub fn now(gpu: &Gpu) -> Result<Event, KernelError> {
        let failed = |error| refused(gpu.index(), "record an event".to_owned(), &error);
        gpu.make_current()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed)?;
        let event = Event {
            event,
            device: gpu.index(),
        };
        // SAFETY: the event was made in the context that is current; null is the legacy default stream.
        unsafe { result::event::record(event.event, ptr::null_mut()) }.map_err(failed)?;
        Ok(event)
    }

    /// Milliseconds from `earlier` to this point, for which it waits.
    #[allow(unsafe_code)]
    pub fn since(&self, earlier: &Event) -> Result<f64, KernelError> {
        let failed = |error| refused(self.device, "time an event".to_owned(), &error);
        // SAFETY: both events live as long as their owners, were recorded on one stream, and keep time.
        let milliseconds = unsafe {
            result::event::synchronize(self.event)
                .and_then(|()| result::event::elapsed(earlier.event, self.event))
        };
        Ok(f64::from(milliseconds.map_err(failed)?))
    }
}

impl Drop for Event {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: nobody else has it. The driver frees it when the stream has passed it; that it cannot is of no consequence.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}
