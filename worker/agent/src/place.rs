//! An assignment, checked.

use std::path::Path;

use supra_checkpoint::{Store, store};
use supra_proto::v1::{self, Assignment, RestoreFrom, StartFromHeld};
use supra_recipes::schema::Recipe;

use crate::job::{Donation, PartHolder, Restore};

/// A place in a generation, as the coordinator assigned it.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Id of the run.
    pub run: String,
    /// Number of the generation.
    pub generation: u64,
    /// The resolved recipe.
    pub recipe: Recipe,
    /// Its text, as the run has it.
    pub recipe_text: String,
    /// This rank.
    pub rank: u32,
    /// Number of ranks.
    pub world: u32,
    /// Data-plane address of the next rank.
    pub next_address: String,
    /// Key of the generation.
    pub key: [u8; 32],
    /// State in memory to start from.
    pub donation: Option<Donation>,
    /// Newest checkpoint, to start from unless there is a donation.
    pub restore: Option<Restore>,
    /// Where the run's checkpoints are.
    pub checkpoint_root: Store,
    /// A stop was asked for before it began.
    pub stop: bool,
    /// So was a regrouping.
    pub regroup: bool,
}

impl Place {
    /// Checks an assignment; the error is for people.
    pub(crate) fn parse(
        run: &str,
        generation: u64,
        assignment: Assignment,
    ) -> Result<Place, String> {
        let Assignment {
            recipe: recipe_text,
            rank,
            world,
            next_address,
            data_key,
            restore,
            checkpoint_root,
            held,
        } = assignment;
        let recipe = Recipe::parse(&recipe_text, "the assigned recipe")
            .map_err(|error| error.to_string())?;
        if rank >= world {
            return Err(format!("assigned rank {rank} of {world} ranks"));
        }
        let key = bytes32(&data_key, "data_key")?;
        let checkpoint_root = Store::open(&checkpoint_root).map_err(|error| error.to_string())?;
        if checkpoint_root.is_local() && !Path::new(checkpoint_root.url()).is_absolute() {
            return Err(format!(
                "the checkpoint root {} is not absolute",
                checkpoint_root.url()
            ));
        }
        let restore = restore
            .map(|restore| parse_restore(restore, &checkpoint_root))
            .transpose()?;
        let donation = held
            .map(|held| parse_donation(held, run, world))
            .transpose()?;
        Ok(Place {
            run: run.to_owned(),
            generation,
            recipe,
            recipe_text,
            rank,
            world,
            next_address,
            key,
            donation,
            restore,
            checkpoint_root,
            stop: false,
            regroup: false,
        })
    }
}

fn parse_restore(restore: RestoreFrom, root: &Store) -> Result<Restore, String> {
    if !store::is_plain(&restore.path) {
        return Err(format!(
            "the checkpoint path {:?} is not a plain relative path",
            restore.path
        ));
    }
    let manifest_hash = bytes32(&restore.manifest_hash, "manifest_hash")?;
    Ok(Restore {
        step: restore.step,
        store: root.clone(),
        path: restore.path,
        manifest_hash,
    })
}

fn parse_donation(held: StartFromHeld, run: &str, world: u32) -> Result<Donation, String> {
    let StartFromHeld {
        state,
        holders,
        parts,
    } = held;
    let state = state.ok_or("the assignment names ranks that hold a state, but no state")?;
    if state.run != run {
        let other = &state.run;
        return Err(format!(
            "assigned a state of the run {other}, which is another one"
        ));
    }
    if !parts.is_empty() {
        let parts = parse_parts(parts, world)?;
        return Ok(Donation {
            state,
            holders: Vec::new(),
            parts,
        });
    }
    bytes32(&state.replica_hash, "replica_hash")?;
    let ascending = holders.is_sorted_by(|a, b| a < b);
    if !ascending || holders.last().is_none_or(|last| *last >= world) {
        return Err(format!(
            "the ranks {holders:?} that hold the state are not some of {world} ranks in order"
        ));
    }
    Ok(Donation {
        state,
        holders,
        parts: Vec::new(),
    })
}

fn parse_parts(parts: Vec<v1::PartHolder>, world: u32) -> Result<Vec<PartHolder>, String> {
    let parse = |v1::PartHolder { rank, hash }| {
        if rank >= world {
            return Err(format!(
                "rank {rank} is to hand over a part of the state, but there are {world} ranks"
            ));
        }
        let hash = bytes32(&hash, "part's hash")?;
        Ok(PartHolder { rank, hash })
    };
    parts.into_iter().map(parse).collect()
}

fn bytes32(bytes: &[u8], field: &str) -> Result<[u8; 32], String> {
    bytes
        .try_into()
        .map_err(|_| format!("the assignment's {field} has {} bytes, not 32", bytes.len()))
}
