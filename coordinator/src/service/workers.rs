//! The workers' service: one stream each.

use std::time::Duration;

use supra_proto::v1::workers_server::Workers;
use supra_proto::v1::{
    CoordinatorMessage, LedgerPart, LedgerRequest, WorkerMessage, worker_message::Body as Up,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::handle::Handle;
use super::owner::{Downstream, Owner};
use super::streams::{self, Stream};
use crate::journal::Reader;
use crate::ledger::Hash;
use crate::machine::Event;

/// Messages that may wait to be sent to a worker.
const QUEUE: usize = 64;

/// How long a new stream may take to say hello.
const HELLO: Duration = Duration::from_secs(10);

pub(super) struct WorkersService {
    owner: Handle,
}

impl WorkersService {
    pub fn new(owner: Handle) -> Self {
        WorkersService { owner }
    }
}

#[tonic::async_trait]
impl Workers for WorkersService {
    type AttachStream = ReceiverStream<Result<CoordinatorMessage, Status>>;
    type LedgerStream = Stream<LedgerPart>;

    async fn ledger(
        &self,
        request: Request<LedgerRequest>,
    ) -> Result<Response<Self::LedgerStream>, Status> {
        let LedgerRequest { run, head } = request.into_inner();
        let head = Hash::try_from(head.as_slice()).map_err(|_| {
            let bytes = head.len();
            Status::invalid_argument(format!("the head of a ledger has 32 bytes, not {bytes}"))
        })?;
        let look = move |owner: &Owner| (owner.find(&run), owner.journal_written());
        let (run, written) = self.owner.look(look).await?;
        let run = run.map_err(|error| Status::not_found(error.to_string()))?;
        written.await;
        let reader = Reader::open(self.owner.state())
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(streams::ledger_file(reader, run, head)))
    }

    async fn attach(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let peer = request.remote_addr().map_or_else(
            || "an unknown address".to_owned(),
            |address| address.to_string(),
        );
        let (down, outgoing) = mpsc::channel(QUEUE);
        tokio::spawn(listen(self.owner.clone(), peer, request.into_inner(), down));
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// Carries what a worker says to the owner, until one of the two is gone.
async fn listen(
    owner: Handle,
    peer: String,
    mut incoming: Streaming<WorkerMessage>,
    down: Downstream,
) {
    let hello = match tokio::time::timeout(HELLO, incoming.message()).await {
        Ok(Ok(Some(WorkerMessage {
            body: Some(Up::Hello(hello)),
            ..
        }))) => hello,
        Ok(Ok(Some(_))) => return refuse(&down, "the first message has to be a hello").await,
        Ok(Ok(None)) | Ok(Err(_)) => return,
        Err(_) => return refuse(&down, "no hello within 10 s").await,
    };
    // The owner closes a stream by dropping its end of the queue; this end must not hold it open.
    let closed = down.downgrade();
    let Ok(conn) = owner.attach(peer, hello, down).await else {
        return;
    };
    let cause = loop {
        match incoming.message().await {
            Ok(Some(message)) => {
                if owner.event(Event::Message { conn, message }).await.is_err()
                    || closed.upgrade().is_none()
                {
                    return;
                }
            }
            Ok(None) => break "it closed the stream".to_owned(),
            Err(status) => break format!("the stream broke: {}", status.message()),
        }
    };
    let _ = owner.event(Event::Lost { conn, cause }).await;
}

async fn refuse(down: &Downstream, message: &str) {
    let _ = down.send(Err(Status::invalid_argument(message))).await;
}
