//! A model out of a checkpoint, as files of this machine.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use crate::{Manifest, PUBLISHED, Store, StoredError, verify};

/// A model's directory on this machine. Copies go with it.
#[derive(Debug)]
pub struct ModelDirectory {
    path: PathBuf,
    _copies: Option<TempDir>,
}

impl ModelDirectory {
    /// The model at a path, as it is; or the one of the checkpoint at a URL: its files but the optimizer's are copied to the
    /// folder for temporary files and proved.
    ///
    /// # Errors
    ///
    /// As [`of_checkpoint`](Self::of_checkpoint).
    pub fn open(location: &str) -> Result<ModelDirectory, StoredError> {
        let store = Store::open(location)?;
        if let Some(path) = store.local_path("") {
            return Ok(ModelDirectory {
                path,
                _copies: None,
            });
        }
        let manifest = verify::manifest(&store, "", None)?;
        ModelDirectory::of_checkpoint(&store, &manifest)
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
            path,
            _copies: Some(copies),
        })
    }

    /// Where its files are.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
