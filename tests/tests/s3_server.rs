//! An S3 server in this process: that of `s3s-fs`, which keeps objects in files.

use std::fs;
use std::net::SocketAddr;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use supra_tests::{Failure, Result};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// Who may use it, and with which secret.
const KEY: [&str; 2] = ["supra", "not-very-secret"];

/// Its only bucket.
pub const BUCKET: &str = "checkpoints";

/// A server on a free port of the loopback, which ends when it is dropped.
pub struct S3Server {
    address: SocketAddr,
    folder: TempDir,
    _runtime: Runtime,
}

impl S3Server {
    pub fn start() -> Result<S3Server> {
        let folder = tempfile::tempdir()?;
        fs::create_dir(folder.path().join(BUCKET))?;
        let files =
            FileSystem::new(folder.path()).map_err(|error| Failure::new(format!("{error:?}")))?;
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(KEY[0], KEY[1]));
        let service = service.build();
        let runtime = Runtime::new()?;
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        runtime.spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let http = auto::Builder::new(TokioExecutor::new());
                    // A client that is gone is no error of the server.
                    let _ = http
                        .serve_connection(TokioIo::new(connection), service)
                        .await;
                });
            }
        });
        Ok(S3Server {
            address,
            folder,
            _runtime: runtime,
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The environment of those that reach it at `address`, which may be that of a proxy.
    pub fn variables(&self, address: SocketAddr) -> Vec<(String, String)> {
        [
            ("AWS_ACCESS_KEY_ID", KEY[0].to_owned()),
            ("AWS_SECRET_ACCESS_KEY", KEY[1].to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ENDPOINT_URL", format!("http://{address}")),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// Names of all objects of the bucket, in order.
    pub fn objects(&self) -> Result<Vec<String>> {
        let root = self.folder.path().join(BUCKET);
        let mut found = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder)? {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if let Ok(name) = path.strip_prefix(&root) {
                    found.push(name.display().to_string());
                }
            }
        }
        found.sort();
        Ok(found)
    }
}
