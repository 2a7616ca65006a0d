//! The typed client of the Runs service, for the command line and for tests.

use tonic::{Response, Status, Streaming};

use crate::channel::{Authorized, connect};
use crate::v1::runs_client::RunsClient;
use crate::v1::{
    AdoptRequest, AdoptResponse, CapsulePart, Checkpoint, DrainRequest, DropCheckpointNameRequest,
    KeepCheckpointRequest, LedgerRecord, ListRequest, LogEntry, LogsRequest,
    PruneCheckpointsRequest, ResumeRequest, RunRequest, RunStatus, ShutdownRequest, StepMetrics,
    SubmitRequest, WorkerStatus, WorkersRequest,
};
use crate::{ClientError, Token};

/// A connection to a coordinator. Where a method takes a run, it takes an id or a unique prefix of
/// one; empty = the newest run.
#[derive(Clone, Debug)]
pub struct Client {
    url: String,
    runs: RunsClient<Authorized>,
}

impl Client {
    /// Connects to the coordinator at `url`, `http://host:port`.
    ///
    /// # Errors
    ///
    /// `BadUrl` and `Unreachable`; a wrong token shows only at the first call.
    pub async fn connect(url: &str, token: Option<Token>) -> Result<Client, ClientError> {
        let runs = RunsClient::new(connect(url, token).await?);
        Ok(Client {
            url: url.to_owned(),
            runs,
        })
    }

    /// Address of the coordinator.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Queues a recipe; returns the id of its run.
    pub async fn submit(&mut self, request: SubmitRequest) -> Result<String, ClientError> {
        let response = self.runs.submit(request).await;
        Ok(self.answer(response)?.run)
    }

    /// All runs, newest first.
    pub async fn list(&mut self) -> Result<Vec<RunStatus>, ClientError> {
        let response = self.runs.list(ListRequest {}).await;
        Ok(self.answer(response)?.runs)
    }

    /// One run.
    pub async fn status(&mut self, run: &str) -> Result<RunStatus, ClientError> {
        let response = self.runs.status(request(run)).await;
        self.answer(response)
    }

    /// The status now and at every change, until the run has ended.
    pub async fn watch(&mut self, run: &str) -> Result<Incoming<RunStatus>, ClientError> {
        let response = self.runs.watch(request(run)).await;
        self.stream(response)
    }

    /// The kept log lines, oldest first; then new ones, if `follow`.
    pub async fn logs(
        &mut self,
        run: &str,
        follow: bool,
    ) -> Result<Incoming<LogEntry>, ClientError> {
        let response = self
            .runs
            .logs(LogsRequest {
                run: run.to_owned(),
                follow,
            })
            .await;
        self.stream(response)
    }

    /// Asks for a checkpoint and a stop.
    pub async fn cancel(&mut self, run: &str) -> Result<RunStatus, ClientError> {
        let response = self.runs.cancel(request(run)).await;
        self.answer(response)
    }

    /// Queues a stopped run again, from its last checkpoint; with `strict`, from no older one should that be damaged.
    pub async fn resume(&mut self, run: &str, strict: bool) -> Result<RunStatus, ClientError> {
        let run = run.to_owned();
        let response = self.runs.resume(ResumeRequest { run, strict }).await;
        self.answer(response)
    }

    /// Rebuilds a run from one of its checkpoints and queues it.
    pub async fn adopt(&mut self, request: AdoptRequest) -> Result<AdoptResponse, ClientError> {
        let response = self.runs.adopt(request).await;
        self.answer(response)
    }

    /// Gives the checkpoint of a step a name, by which it is kept; all checkpoints then.
    pub async fn keep_checkpoint(
        &mut self,
        request: KeepCheckpointRequest,
    ) -> Result<Vec<Checkpoint>, ClientError> {
        let response = self.runs.keep_checkpoint(request).await;
        Ok(self.answer(response)?.checkpoints)
    }

    /// Drops the name of a checkpoint; all checkpoints then.
    pub async fn drop_checkpoint_name(
        &mut self,
        run: &str,
        name: &str,
    ) -> Result<Vec<Checkpoint>, ClientError> {
        let (run, name) = (run.to_owned(), name.to_owned());
        let request = DropCheckpointNameRequest { run, name };
        let response = self.runs.drop_checkpoint_name(request).await;
        Ok(self.answer(response)?.checkpoints)
    }

    /// Checkpoints that may be deleted, or are being deleted from here on.
    pub async fn prune_checkpoints(
        &mut self,
        request: PruneCheckpointsRequest,
    ) -> Result<Vec<Checkpoint>, ClientError> {
        let response = self.runs.prune_checkpoints(request).await;
        Ok(self.answer(response)?.checkpoints)
    }

    /// Journalled checkpoints, damaged ones too, oldest first.
    pub async fn checkpoints(&mut self, run: &str) -> Result<Vec<Checkpoint>, ClientError> {
        let response = self.runs.checkpoints(request(run)).await;
        Ok(self.answer(response)?.checkpoints)
    }

    /// Attached workers and those that left.
    pub async fn workers(&mut self) -> Result<Vec<WorkerStatus>, ClientError> {
        let response = self.runs.workers(WorkersRequest {}).await;
        Ok(self.answer(response)?.workers)
    }

    /// Has a worker leave its generation and train no more; the workers then.
    pub async fn drain(&mut self, worker: &str) -> Result<Vec<WorkerStatus>, ClientError> {
        let worker = worker.to_owned();
        let response = self.runs.drain(DrainRequest { worker }).await;
        Ok(self.answer(response)?.workers)
    }

    /// The ledger in order.
    pub async fn ledger(&mut self, run: &str) -> Result<Incoming<LedgerRecord>, ClientError> {
        let response = self.runs.ledger(request(run)).await;
        self.stream(response)
    }

    /// Per-step metrics in order.
    pub async fn metrics(&mut self, run: &str) -> Result<Incoming<StepMetrics>, ClientError> {
        let response = self.runs.metrics(request(run)).await;
        self.stream(response)
    }

    /// The bytes of a run's capsule file, in order.
    pub async fn capsule(&mut self, run: &str) -> Result<Incoming<CapsulePart>, ClientError> {
        let response = self.runs.capsule(request(run)).await;
        self.stream(response)
    }

    /// Ends the coordinator; runs are stopped with a checkpoint first.
    pub async fn shutdown(&mut self) -> Result<(), ClientError> {
        let response = self.runs.shutdown(ShutdownRequest {}).await;
        self.answer(response).map(drop)
    }

    fn answer<T>(&self, response: Result<Response<T>, Status>) -> Result<T, ClientError> {
        response
            .map(Response::into_inner)
            .map_err(|status| ClientError::from_status(&self.url, &status))
    }

    fn stream<T>(
        &self,
        response: Result<Response<Streaming<T>>, Status>,
    ) -> Result<Incoming<T>, ClientError> {
        Ok(Incoming {
            url: self.url.clone(),
            stream: self.answer(response)?,
        })
    }
}

/// Messages that the coordinator sends one after the other.
#[derive(Debug)]
pub struct Incoming<T> {
    url: String,
    stream: Streaming<T>,
}

impl<T> Incoming<T> {
    /// The next message; none after the last.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        self.stream
            .message()
            .await
            .map_err(|status| ClientError::from_status(&self.url, &status))
    }

    /// Everything up to the end.
    pub async fn all(mut self) -> Result<Vec<T>, ClientError> {
        let mut messages = Vec::new();
        while let Some(message) = self.next().await? {
            messages.push(message);
        }
        Ok(messages)
    }
}

fn request(run: &str) -> RunRequest {
    RunRequest {
        run: run.to_owned(),
    }
}
