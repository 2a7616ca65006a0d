//! A coordinator that does what a test says: the real service, without a mind of its own.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use supra_proto::v1::coordinator_message::Body as Down;
use supra_proto::v1::worker_message::Body as Up;
use supra_proto::v1::workers_server::{Workers, WorkersServer};
use supra_proto::v1::{
    CoordinatorMessage, Hello, LedgerPart, LedgerRequest, Welcome, WorkerMessage,
};
use supra_proto::{Token, TokenCheck};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// A recipe that parses; nothing of it is trained.
pub const RECIPE: &str = "\
name: trivial
base: { path: /base }
data: { train: /data }
budget: { tokens: 1B }
batch: { tokens: 8192, micro_batch: 1, sequence_length: 1024 }
workers: { min: 1, max: 8 }
";

/// Longest wait of a test for a message.
const PATIENCE: Duration = Duration::from_secs(20);

/// The server and what attaches to it.
pub struct Coordinator {
    pub url: String,
    attached: mpsc::Receiver<Attached>,
    runtime: tokio::runtime::Runtime,
}

/// One stream of a worker.
pub struct Attached {
    pub hello: Hello,
    up: mpsc::Receiver<WorkerMessage>,
    down: mpsc::Sender<Result<CoordinatorMessage, Status>>,
    runtime: tokio::runtime::Handle,
    sequence: u64,
}

struct Service {
    attached: mpsc::Sender<Attached>,
    asked: AtomicBool,
}

#[tonic::async_trait]
impl Workers for Service {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<CoordinatorMessage, Status>> + Send>>;
    type LedgerStream = Pin<Box<dyn Stream<Item = Result<LedgerPart, Status>> + Send>>;

    async fn ledger(
        &self,
        request: Request<LedgerRequest>,
    ) -> Result<Response<Self::LedgerStream>, Status> {
        let LedgerRequest { run, head } = request.into_inner();
        // The first question is lost.
        if !self.asked.swap(true, Ordering::Relaxed) {
            return Err(Status::unavailable("not yet"));
        }
        let parts = [format!("{run} up to "), format!("{}\n", head[0])];
        let parts = parts.map(|part| Ok(LedgerPart { data: part.into() }));
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }

    async fn attach(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut stream = request.into_inner();
        let (up_in, up) = mpsc::channel(1000);
        let (down, down_out) = mpsc::channel(1000);
        let Some(Ok(WorkerMessage {
            body: Some(Up::Hello(hello)),
            ..
        })) = stream.next().await
        else {
            return Err(Status::invalid_argument("the first message is Hello"));
        };
        let runtime = tokio::runtime::Handle::current();
        tokio::spawn(async move {
            while let Some(Ok(message)) = stream.next().await {
                if up_in.send(message).await.is_err() {
                    return;
                }
            }
        });
        self.attached
            .send(Attached {
                hello,
                up,
                down,
                runtime,
                sequence: 0,
            })
            .await
            .ok();
        Ok(Response::new(Box::pin(ReceiverStream::new(down_out))))
    }
}

impl Coordinator {
    pub fn start(token: Option<Token>) -> Coordinator {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (attached_in, attached) = mpsc::channel(10);
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let service = WorkersServer::with_interceptor(
            Service {
                attached: attached_in,
                asked: AtomicBool::new(false),
            },
            TokenCheck(token),
        );
        let server = tonic::transport::Server::builder().add_service(service);
        runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Coordinator {
            url: format!("http://{address}"),
            attached,
            runtime,
        }
    }

    /// The next worker that attaches, welcomed.
    pub fn welcome(&mut self) -> Attached {
        let mut attached = self.meet();
        attached.say(
            "",
            0,
            Down::Welcome(Welcome {
                heartbeat_seconds: 0.1,
                known_step: 0,
            }),
        );
        attached
    }

    /// The next worker that attaches; it waits for an answer.
    pub fn meet(&mut self) -> Attached {
        let next = async { tokio::time::timeout(PATIENCE, self.attached.recv()).await };
        self.runtime
            .block_on(next)
            .expect("nobody attached in time")
            .unwrap()
    }
}

impl Attached {
    pub fn say(&mut self, run: &str, generation: u64, body: Down) {
        self.sequence += 1;
        let message = CoordinatorMessage {
            run: run.to_owned(),
            generation,
            sequence: self.sequence,
            body: Some(body),
        };
        self.down
            .blocking_send(Ok(message))
            .expect("the worker has gone");
    }

    /// The next message for which `pick` gives something; others are dropped.
    pub fn hear<T>(&mut self, mut pick: impl FnMut(&WorkerMessage) -> Option<T>) -> T {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let runtime = self.runtime.clone();
        runtime.block_on(async {
            loop {
                let message = tokio::time::timeout_at(deadline, self.up.recv()).await;
                let message = message
                    .expect("not heard in time")
                    .expect("the stream ended");
                if let Some(value) = pick(&message) {
                    return value;
                }
            }
        })
    }
}
