//! What a rank does beside a micro-batch.

use supra_agent::Link;

use crate::{
    optim::Exchange,
    step::{Meanwhile, StepError},
};

/// Exchanges what is ready, and looks whether the generation is void.
pub struct Beside<'a> {
    /// Says whether it is.
    pub link: &'a Link,
    /// Of the replica.
    pub exchange: &'a mut Exchange,
    /// Whether the micro-batch is the step's last one, behind which gradients are final.
    pub last: bool,
}

impl Meanwhile for Beside<'_> {
    fn stop(&self) -> bool {
        self.link.void()
    }

    fn needed(&mut self, bucket: usize) -> Result<(), StepError> {
        Ok(self.exchange.gathered(bucket)?)
    }

    fn complete(&mut self, bucket: usize) -> Result<(), StepError> {
        if self.last {
            self.exchange.reduce(bucket)?;
        }
        Ok(())
    }
}
