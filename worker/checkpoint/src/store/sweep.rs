//! What crashed writers left.

use super::{Store, join, names::parse_directory_name};
use crate::{PUBLISHED, StoredError};

/// Removes what crashed writers of generations before `generation` left unpublished. `spare`, a name, stays: it is the one
/// that this generation started from. Returns the names of what was removed.
///
/// Only rank 0 may call it. Published checkpoints are the coordinator's: it knows which of them are retired.
///
/// # Errors
///
/// The store refuses.
pub fn sweep(
    store: &Store,
    generation: u64,
    spare: Option<&str>,
) -> Result<Vec<String>, StoredError> {
    let mut leftovers = Vec::new();
    for name in store.list("")? {
        let older = parse_directory_name(&name).is_some_and(|(_, writer)| writer < generation);
        if older && spare != Some(name.as_str()) && !store.exists(&join(&name, PUBLISHED))? {
            leftovers.push(name);
        }
    }
    for name in &leftovers {
        store.remove_dir(name)?;
    }
    Ok(leftovers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PENDING, store::directory_name};

    #[test]
    fn only_what_an_earlier_generation_left_unpublished_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path().to_str().unwrap()).unwrap();
        let checkpoint = |step, generation, manifest: &str| {
            let name = directory_name(step, generation);
            let file = store.create(&join(&name, manifest)).unwrap();
            file.finish().unwrap();
            name
        };
        let published = checkpoint(10, 1, PUBLISHED);
        let spare = checkpoint(20, 1, PENDING);
        let crashed = checkpoint(25, 1, PENDING);
        let in_flight = checkpoint(40, 2, PENDING);
        store.create("notes/a").unwrap().finish().unwrap();
        assert_eq!(sweep(&store, 2, Some(&spare)).unwrap(), [crashed]);
        let kept = ["notes".to_owned(), published, spare, in_flight];
        assert_eq!(store.list("").unwrap(), kept);
    }
}
