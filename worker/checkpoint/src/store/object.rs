//! Checkpoints in a bucket: S3, what speaks like it, and Google Cloud Storage.
//!
//! Callers block. What waits for the network runs on two threads of a runtime that the process has for it, and every request
//! has an end.

use std::{
    collections::VecDeque,
    ffi::OsString,
    future::Future,
    io,
    path::PathBuf,
    str::FromStr,
    sync::{Arc, LazyLock, mpsc},
    time::Duration,
};

use futures::{StreamExt, TryStreamExt};
use object_store::{
    ClientConfigKey, Error, MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, Result, RetryConfig, aws::AmazonS3Builder, aws::AmazonS3ConfigKey,
    gcp::GoogleCloudStorageBuilder, gcp::GoogleConfigKey, path::Path,
};
use tokio::{runtime::Runtime, task::AbortHandle};

use super::refusal::Refusal;
use crate::StoredError;

/// Bytes of a part of an upload and of a piece that is read. S3 takes 10,000 parts, so a file may have 156 GiB; ours are cut at 4.
pub const PART: usize = 16 << 20;

/// Parts of one file on their way at once: what hides the latency of a store, in 64 MiB of memory.
const IN_FLIGHT: usize = 4;

/// How long a request may take with all of its repeats. A store that restarts is back by then; a generation that is void
/// waits for no longer than that.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Time for a connection.
const CONNECT: &str = "5 seconds";

/// Where requests are made. A runtime of its own, so that it does not matter which thread asks.
static RUNTIME: LazyLock<io::Result<Runtime>> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("store")
        .enable_all()
        .build()
});

/// A prefix in a bucket.
#[derive(Clone)]
pub(super) struct Bucket {
    /// URL of the prefix.
    url: Arc<str>,
    prefix: Path,
    store: Arc<dyn ObjectStore>,
    runtime: &'static Runtime,
    patience: Duration,
}

/// What is on its way.
struct Pending<T> {
    answer: mpsc::Receiver<Result<T, Refusal>>,
    task: AbortHandle,
}

impl<T> Pending<T> {
    fn wait(self) -> Result<T, Refusal> {
        let gone = || Refusal::other("the request was dropped".to_owned());
        self.answer.recv().unwrap_or_else(|_| Err(gone()))
    }
}

/// How object stores are reached.
#[derive(Clone, Debug)]
pub struct Access {
    /// Variables that say with which credentials and at which endpoint: those of the environment.
    pub variables: Vec<(String, String)>,
    /// How long a request may take with all of its repeats: [`PATIENCE`].
    pub patience: Duration,
}

impl Default for Access {
    fn default() -> Access {
        let variables = std::env::vars_os();
        let text = |(name, value): (OsString, OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Access {
            variables: variables.filter_map(text).collect(),
            patience: PATIENCE,
        }
    }
}

impl Access {
    /// What variables with a prefix say, and limits, as the library's keys; of a variable that it does not know, nothing.
    fn settings<K: FromStr>(
        &self,
        prefix: &str,
        client: impl Fn(ClientConfigKey) -> K,
    ) -> Vec<(K, String)> {
        let named = |(name, value): &(String, String)| {
            let ours = name.starts_with(prefix);
            let key = ours.then(|| name.to_ascii_lowercase().parse().ok())?;
            Some((key?, value.clone()))
        };
        // So that a try that hangs leaves time for others.
        let timeout = format!("{} ms", self.patience.as_millis() / 3);
        let limits = [
            (client(ClientConfigKey::Timeout), timeout),
            (client(ClientConfigKey::ConnectTimeout), CONNECT.to_owned()),
        ];
        self.variables
            .iter()
            .filter_map(named)
            .chain(limits)
            .collect()
    }

    fn retries(&self) -> RetryConfig {
        RetryConfig {
            retry_timeout: self.patience,
            ..RetryConfig::default()
        }
    }

    fn s3(&self, bucket: &str) -> Result<Arc<dyn ObjectStore>> {
        let builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_retry(self.retries());
        let settings = self.settings("AWS_", AmazonS3ConfigKey::Client);
        let set = |builder: AmazonS3Builder, (key, value)| builder.with_config(key, value);
        Ok(Arc::new(settings.into_iter().fold(builder, set).build()?))
    }

    fn google(&self, bucket: &str) -> Result<Arc<dyn ObjectStore>> {
        let builder = GoogleCloudStorageBuilder::new()
            .with_bucket_name(bucket)
            .with_retry(self.retries());
        let settings = self.settings("GOOGLE_", GoogleConfigKey::Client);
        let set =
            |builder: GoogleCloudStorageBuilder, (key, value)| builder.with_config(key, value);
        Ok(Arc::new(settings.into_iter().fold(builder, set).build()?))
    }
}

impl Bucket {
    /// The bucket and prefix of `url`, which is `scheme://rest`.
    pub(super) fn open(
        url: &str,
        (scheme, rest): (&str, &str),
        access: &Access,
    ) -> Result<Bucket, StoredError> {
        let not_a_store = || StoredError::NotAStore {
            location: url.to_owned(),
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = Path::parse(prefix).map_err(|_| not_a_store())?;
        if bucket.is_empty() || !matches!(scheme, "s3" | "gs") {
            return Err(not_a_store());
        }
        let runtime = runtime()?;
        // Clients look for a runtime, and for what TLS computes with, when they are built. That there is one already is an
        // error of installing it, and no harm.
        let _inside = runtime.enter();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = match scheme {
            "s3" => access.s3(bucket),
            _ => access.google(bucket),
        };
        let patience = access.patience;
        let store = store.map_err(|error| StoredError::Remote {
            action: "open",
            path: PathBuf::from(url),
            refusal: Refusal::of(error, patience),
        })?;
        Ok(Bucket {
            url: url.into(),
            prefix,
            store,
            runtime,
            patience,
        })
    }

    /// One that is in memory, for tests.
    #[cfg(test)]
    pub(super) fn in_memory(url: &str) -> Bucket {
        Bucket {
            url: url.into(),
            prefix: Path::from("prefix"),
            store: Arc::new(object_store::memory::InMemory::new()),
            runtime: runtime().unwrap(),
            patience: PATIENCE,
        }
    }

    fn key(&self, relative: &str) -> Path {
        let parts = relative.split('/').filter(|part| !part.is_empty());
        parts.fold(self.prefix.clone(), Path::join)
    }

    fn failed(&self, action: &'static str, relative: &str, refusal: Refusal) -> StoredError {
        let path = match relative {
            "" => PathBuf::from(&*self.url),
            _ => PathBuf::from(format!("{}/{relative}", self.url)),
        };
        StoredError::remote(action, path, refusal)
    }

    /// Begins a request.
    fn begin<T, F>(&self, request: F) -> Pending<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let (done, answer) = mpsc::sync_channel(1);
        let patience = self.patience;
        let task = self.runtime.spawn(async move {
            // Repeats end with the patience; the last of them, half begun, a little later.
            let ended = tokio::time::timeout(patience + patience / 3, request).await;
            let answer = match ended {
                Ok(answer) => answer.map_err(|error| Refusal::of(error, patience)),
                Err(_) => Err(Refusal::silent(patience)),
            };
            // Nobody waits for it when the file was dropped.
            let _ = done.send(answer);
        });
        Pending {
            answer,
            task: task.abort_handle(),
        }
    }

    fn ask<T, F>(&self, request: F) -> Result<T, Refusal>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.begin(request).wait()
    }

    pub(super) fn create(&self, relative: &str) -> Result<ObjectFile, StoredError> {
        if self.size(relative)?.is_some() {
            let refusal = Refusal::other("it is there already and is never overwritten".to_owned());
            return Err(self.failed("write", relative, refusal));
        }
        Ok(ObjectFile {
            bucket: self.clone(),
            key: self.key(relative),
            buffer: Vec::new(),
            upload: None,
            flying: VecDeque::new(),
        })
    }

    pub(super) fn replace(&self, relative: &str, bytes: &[u8]) -> Result<(), StoredError> {
        self.put(self.key(relative), bytes.to_vec(), PutMode::Overwrite)
            .map_err(|refusal| self.failed("write", relative, refusal))
    }

    /// Writes a file unless there is one; false if there is.
    pub(super) fn put_new(&self, relative: &str, bytes: &[u8]) -> Result<bool, StoredError> {
        match self.put(self.key(relative), bytes.to_vec(), PutMode::Create) {
            Ok(()) => Ok(true),
            Err(refusal) if refusal.is_conflict() => Ok(false),
            Err(refusal) => Err(self.failed("write", relative, refusal)),
        }
    }

    fn put(&self, key: Path, bytes: Vec<u8>, mode: PutMode) -> Result<(), Refusal> {
        let store = self.store.clone();
        self.ask(async move {
            let options = PutOptions::from(mode);
            store.put_opts(&key, bytes.into(), options).await.map(drop)
        })
    }

    pub(super) fn read_into(
        &self,
        relative: &str,
        start: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoredError> {
        let key = self.key(relative);
        let end = start + buffer.len() as u64;
        let short = || StoredError::Damaged {
            path: PathBuf::from(format!("{}/{relative}", self.url)),
            problem: format!("it ends before byte {end}"),
        };
        let request = |from: u64| {
            let range = from..end.min(from + PART as u64);
            let (store, key) = (self.store.clone(), key.clone());
            self.begin(async move { store.get_range(&key, range).await })
        };
        let mut next = start..end;
        let mut requests = next.by_ref().step_by(PART).map(request);
        let mut flying: VecDeque<_> = requests.by_ref().take(IN_FLIGHT).collect();
        for piece in buffer.chunks_mut(PART) {
            let pending = flying
                .pop_front()
                .expect("invariant: there is a request for every piece");
            flying.extend(requests.next());
            let bytes = match pending.wait() {
                Ok(bytes) => bytes,
                Err(refusal) if refusal.is_beyond_end() => return Err(short()),
                Err(refusal) => return Err(self.failed("read", relative, refusal)),
            };
            if bytes.len() != piece.len() {
                return Err(short());
            }
            piece.copy_from_slice(&bytes);
        }
        Ok(())
    }

    pub(super) fn read_all(&self, relative: &str) -> Result<Option<Vec<u8>>, StoredError> {
        let (store, key) = (self.store.clone(), self.key(relative));
        match self.ask(async move { store.get(&key).await?.bytes().await }) {
            Ok(bytes) => Ok(Some(Vec::from(bytes))),
            Err(refusal) if refusal.is_missing() => Ok(None),
            Err(refusal) => Err(self.failed("read", relative, refusal)),
        }
    }

    pub(super) fn size(&self, relative: &str) -> Result<Option<u64>, StoredError> {
        let (store, key) = (self.store.clone(), self.key(relative));
        match self.ask(async move { store.head(&key).await }) {
            Ok(found) => Ok(Some(found.size)),
            Err(refusal) if refusal.is_missing() => Ok(None),
            Err(refusal) => Err(self.failed("read", relative, refusal)),
        }
    }

    pub(super) fn list(&self, relative: &str) -> Result<Vec<String>, StoredError> {
        let (store, key) = (self.store.clone(), self.key(relative));
        let found = self.ask(async move { store.list_with_delimiter(Some(&key)).await });
        let found = found.map_err(|refusal| self.failed("list", relative, refusal))?;
        let objects = found.objects.iter().map(|object| &object.location);
        let paths = objects.chain(&found.common_prefixes);
        let mut names: Vec<String> = paths
            .filter_map(|path| path.filename().map(str::to_owned))
            .collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    pub(super) fn remove(&self, relative: &str) -> Result<(), StoredError> {
        let (store, key) = (self.store.clone(), self.key(relative));
        match self.ask(async move { store.delete(&key).await }) {
            Err(refusal) if !refusal.is_missing() => Err(self.failed("remove", relative, refusal)),
            _ => Ok(()),
        }
    }

    pub(super) fn remove_dir(&self, relative: &str) -> Result<(), StoredError> {
        let (store, key) = (self.store.clone(), self.key(relative));
        let removed = self.ask(async move {
            let found = store.list(Some(&key)).map_ok(|object| object.location);
            // Many by one request, where the store takes that.
            let mut gone = store.delete_stream(found.boxed());
            while let Some(one) = gone.next().await {
                match one {
                    Err(error) if !matches!(error, Error::NotFound { .. }) => return Err(error),
                    _ => {}
                }
            }
            Ok(())
        });
        removed.map_err(|refusal| self.failed("remove", relative, refusal))
    }
}

/// A new object. Small ones are put at once; larger ones in parts, of which nothing is seen before the last step.
pub(super) struct ObjectFile {
    bucket: Bucket,
    key: Path,
    /// Bytes that are not on their way yet, less than a part.
    buffer: Vec<u8>,
    upload: Option<Box<dyn MultipartUpload>>,
    flying: VecDeque<Pending<()>>,
}

impl ObjectFile {
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(PART - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == PART {
            self.send()?;
        }
        Ok(taken)
    }

    /// Sends what is in the buffer on its way; waits when enough is.
    fn send(&mut self) -> Result<(), Refusal> {
        if self.flying.len() == IN_FLIGHT
            && let Some(oldest) = self.flying.pop_front()
        {
            oldest.wait()?;
        }
        let upload = match &mut self.upload {
            Some(upload) => upload,
            none => {
                let (store, key) = (self.bucket.store.clone(), self.key.clone());
                let begun = self
                    .bucket
                    .ask(async move { store.put_multipart(&key).await })?;
                none.insert(begun)
            }
        };
        let part = upload.put_part(PutPayload::from(std::mem::take(&mut self.buffer)));
        self.flying.push_back(self.bucket.begin(part));
        Ok(())
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        if self.upload.is_none() {
            let bytes = std::mem::take(&mut self.buffer);
            self.bucket
                .put(self.key.clone(), bytes, PutMode::Overwrite)?;
            return Ok(());
        }
        if !self.buffer.is_empty() {
            self.send()?;
        }
        while let Some(part) = self.flying.pop_front() {
            part.wait()?;
        }
        if let Some(mut upload) = self.upload.take() {
            self.bucket.ask(async move {
                let completed = upload.complete().await.map(drop);
                if completed.is_err() {
                    let _ = upload.abort().await;
                }
                completed
            })?;
        }
        Ok(())
    }
}

impl Drop for ObjectFile {
    fn drop(&mut self) {
        for part in self.flying.drain(..) {
            part.task.abort();
        }
        if let Some(mut upload) = self.upload.take() {
            // Nobody waits: what cannot be aborted, the bucket's own rule for unfinished uploads removes.
            drop(self.bucket.begin(async move { upload.abort().await }));
        }
    }
}

fn runtime() -> Result<&'static Runtime, StoredError> {
    RUNTIME.as_ref().map_err(|error| StoredError::Io {
        action: "start the threads for",
        path: PathBuf::from("object stores"),
        source: io::Error::new(error.kind(), error.to_string()),
    })
}
