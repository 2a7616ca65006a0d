//! Serving a run while it trains: newer checkpoints take the place of the one that is served.

use std::{
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use supra_checkpoint::fetch::ModelDirectory;
use tch::{Device, Kind};

use super::{compute::Command, served::Served, shared::Shared};
use crate::{failure::chain, inference::load::LoadedModel};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(5);

/// Where models come from.
#[derive(Clone, Debug)]
pub struct Source {
    /// Model directory, checkpoint, or folder of a run's checkpoints.
    pub location: String,
    /// Where it is computed.
    pub device: Device,
    /// In which number format.
    pub kind: Kind,
}

/// Looks for newer checkpoints than `serving` until the other end of `over` is gone, and hands them over. Weights are in memory
/// twice while the last completions of the old ones end.
pub fn follow(
    source: &Source,
    id: &str,
    mut serving: String,
    shared: &Arc<Shared>,
    over: &Receiver<()>,
) {
    let mut number = 0;
    while over.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
        if shared.replacing.load(Ordering::Relaxed) {
            continue;
        }
        // A checkpoint may be deleted while it is read: there is a newer one then.
        match newer(source, id, &serving, number + 1) {
            Ok(None) => {}
            Ok(Some((model, served, location))) => {
                number += 1;
                serving = location;
                shared.replacing.store(true, Ordering::Relaxed);
                shared.insist(Command::Replace(Box::new((model, served))));
            }
            Err(problem) => tracing::warn!(%problem, "cannot read the newest checkpoint"),
        }
    }
}

fn newer(
    source: &Source,
    id: &str,
    serving: &str,
    number: u64,
) -> Result<Option<(LoadedModel, Served, String)>, String> {
    let newest = ModelDirectory::newest(&source.location).map_err(|error| chain(&error))?;
    if newest == serving {
        return Ok(None);
    }
    let files = ModelDirectory::open(&newest).map_err(|error| chain(&error))?;
    let model = LoadedModel::open(files.path(), source.device, source.kind);
    let model = model.map_err(|error| chain(&error))?;
    let served = Served::new(&model, id, &newest, number).map_err(|error| chain(&error))?;
    Ok(Some((model, served, newest)))
}
