//! The collective of a world of one.

use super::{Collective, CollectiveError};

/// A rank without peers: every operation is done as soon as it is called.
#[derive(Debug, Default)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> u32 {
        0
    }

    fn world(&self) -> u32 {
        1
    }

    fn all_reduce_f32(&mut self, _buffer: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_reduce_bf16(&mut self, _buffer: &mut [half::bf16]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        Ok(vec![mine.to_vec()])
    }

    fn broadcast(&mut self, _root: u32, _buffer: &mut Vec<u8>) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn pass(&mut self, mine: &[u8], theirs: &mut [u8]) -> Result<(), CollectiveError> {
        theirs.copy_from_slice(mine);
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }
}
