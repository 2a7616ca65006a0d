//! A model out of a checkpoint, as files of this machine.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use crate::{
    Manifest, PUBLISHED, Store, StoredError,
    store::{join, parse_directory_name},
    verify,
};

/// A model's directory on this machine. Copies go with it.
#[derive(Debug)]
pub struct ModelDirectory {
    location: String,
    path: PathBuf,
    _copies: Option<TempDir>,
}

impl ModelDirectory {
    /// The model at a path, as it is; or the one of the checkpoint at a URL: its files but the optimizer's are copied to the
    /// folder for temporary files and proved. Where a run keeps its checkpoints, which may still be training, it is the newest
    /// complete one: [`location`](Self::location) says which.
    ///
    /// # Errors
    ///
    /// As [`of_checkpoint`](Self::of_checkpoint); or a run's checkpoints are there and none is complete.
    pub fn open(location: &str) -> Result<ModelDirectory, StoredError> {
        let store = resolve(location)?;
        if let Some(path) = store.local_path("") {
            return Ok(ModelDirectory {
                location: store.url().to_owned(),
                path,
                _copies: None,
            });
        }
        let manifest = verify::manifest(&store, "", None)?;
        ModelDirectory::of_checkpoint(&store, &manifest)
    }

    /// The [`location`](Self::location) of what [`open`](Self::open) would open now, which changes while a run trains.
    ///
    /// # Errors
    ///
    /// The store refuses; or a run's checkpoints are there and none is complete.
    pub fn newest(location: &str) -> Result<String, StoredError> {
        Ok(resolve(location)?.url().to_owned())
    }

    /// The model of the checkpoint that `store` is, all of its files proved but the optimizer's, which a model does not need.
    ///
    /// # Errors
    ///
    /// A file is not what the manifest says, the store refuses, or there is no room for copies.
    pub fn of_checkpoint(
        store: &Store,
        manifest: &Manifest,
    ) -> Result<ModelDirectory, StoredError> {
        if let Some(path) = store.local_path("") {
            verify::model(store, "", manifest)?;
            return Ok(ModelDirectory {
                location: store.url().to_owned(),
                path,
                _copies: None,
            });
        }
        let temporary = std::env::temp_dir();
        let copies = TempDir::with_prefix("supra-model-")
            .map_err(|source| StoredError::writing(&temporary, source))?;
        let path = copies.path().to_owned();
        for (name, stored) in verify::model_files(manifest) {
            let target = path.join(name);
            let failed = |source: io::Error| StoredError::writing(&target, source);
            let mut file = File::create_new(&target).map_err(failed)?;
            verify::stream(store, name, stored, |piece| {
                file.write_all(piece).map_err(failed)
            })?;
        }
        let published = path.join(PUBLISHED);
        fs::write(&published, store.read_all(PUBLISHED)?)
            .map_err(|source| StoredError::writing(&published, source))?;
        Ok(ModelDirectory {
            location: store.url().to_owned(),
            path,
            _copies: Some(copies),
        })
    }

    /// Where its files are.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path or URL that it was opened at, for messages.
    pub fn location(&self) -> &str {
        &self.location
    }
}

fn resolve(location: &str) -> Result<Store, StoredError> {
    let store = Store::open(location)?;
    match newest(&store)? {
        Some(newest) => Store::open(&store.at(&newest).display().to_string()),
        None => Ok(store),
    }
}

/// The newest complete checkpoint in a folder of checkpoints; none where it is no such folder.
fn newest(store: &Store) -> Result<Option<String>, StoredError> {
    let is_file = store.local_path("").is_some_and(|path| path.is_file());
    if is_file || store.exists(PUBLISHED)? || store.exists("config.json")? {
        return Ok(None);
    }
    let names = store.list("")?.into_iter();
    let mut checkpoints: Vec<_> = names
        .filter_map(|name| Some((parse_directory_name(&name)?, name)))
        .collect();
    checkpoints.sort();
    let begun = checkpoints.len();
    while let Some((_, name)) = checkpoints.pop() {
        if store.exists(&join(&name, PUBLISHED))? {
            return Ok(Some(name));
        }
    }
    match begun {
        0 => Ok(None),
        _ => Err(StoredError::Incomplete {
            path: store.at(""),
            begun,
        }),
    }
}
