//! The clients' service.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use supra_proto::v1::runs_server::Runs;
use supra_proto::v1::{
    AdoptRequest, AdoptResponse, CapsulePart, Checkpoint, CheckpointsResponse, DrainRequest,
    DropCheckpointNameRequest, KeepCheckpointRequest, LedgerRecord, ListRequest, ListResponse,
    LogEntry, LogsRequest, PruneCheckpointsRequest, ResumeRequest, RunRequest, RunStatus,
    ShutdownRequest, ShutdownResponse, StepMetrics, SubmitRequest, SubmitResponse, WorkersRequest,
    WorkersResponse,
};
use supra_recipes::schema::Recipe;
use tonic::{Request, Response, Status};

use super::handle::Handle;
use super::owner::Owner;
use super::streams::{self, Stream};
use super::{adoptions, capsules};
use crate::journal::Reader;
use crate::machine::{Event, FindError, Refused, RunNumber, Submission};

pub(super) struct RunsService {
    owner: Handle,
    state: PathBuf,
}

impl RunsService {
    pub fn new(owner: Handle, state: &Path) -> Self {
        RunsService {
            owner,
            state: state.to_owned(),
        }
    }

    /// The run that a client names.
    async fn find(&self, prefix: String) -> Result<RunNumber, Status> {
        self.with(prefix, |_, run| run).await
    }

    /// Looks at the run that a client names.
    async fn with<T: Send + 'static>(
        &self,
        prefix: String,
        look: impl FnOnce(&Owner, RunNumber) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let found = self
            .owner
            .look(move |owner| owner.find(&prefix).map(|run| look(owner, run)))
            .await?;
        found.map_err(|error| match &error {
            FindError::Empty | FindError::None(_) => Status::not_found(error.to_string()),
            FindError::Many { .. } => Status::invalid_argument(error.to_string()),
        })
    }

    /// Lets a client's wish happen and shows what became of its run.
    async fn act(
        &self,
        prefix: String,
        event: impl FnOnce(RunNumber) -> Event,
    ) -> Result<Response<RunStatus>, Status> {
        let run = self.find(prefix).await?;
        self.wish(event(run)).await?;
        Ok(Response::new(
            self.owner.look(move |owner| owner.status(run)).await?,
        ))
    }

    /// Lets a client's wish happen, or says why it cannot.
    async fn wish(&self, event: Event) -> Result<(), Status> {
        self.owner.client(event).await?.map_err(refused)
    }

    async fn list_checkpoints(
        &self,
        run: RunNumber,
    ) -> Result<Response<CheckpointsResponse>, Status> {
        let checkpoints = self.owner.look(move |owner| owner.checkpoints(run)).await?;
        Ok(Response::new(CheckpointsResponse { checkpoints }))
    }
}

#[tonic::async_trait]
impl Runs for RunsService {
    type WatchStream = Stream<RunStatus>;
    type LogsStream = Stream<LogEntry>;
    type LedgerStream = Stream<LedgerRecord>;
    type MetricsStream = Stream<StepMetrics>;
    type CapsuleStream = Stream<CapsulePart>;

    async fn submit(
        &self,
        request: Request<SubmitRequest>,
    ) -> Result<Response<SubmitResponse>, Status> {
        let request = request.into_inner();
        let submission = submission(&request, &self.state).map_err(Status::invalid_argument)?;
        let run = submission.id.clone();
        self.wish(Event::Submit(submission)).await?;
        capsules::keep(&self.state, &run, request.recipe).await;
        Ok(Response::new(SubmitResponse { run }))
    }

    async fn list(&self, _: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let all = |owner: &Owner| {
            owner
                .newest_first()
                .into_iter()
                .map(|run| owner.status(run))
                .collect()
        };
        Ok(Response::new(ListResponse {
            runs: self.owner.look(all).await?,
        }))
    }

    async fn status(&self, request: Request<RunRequest>) -> Result<Response<RunStatus>, Status> {
        let status = self
            .with(request.into_inner().run, |owner, run| owner.status(run))
            .await?;
        Ok(Response::new(status))
    }

    async fn watch(
        &self,
        request: Request<RunRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let run = self.find(request.into_inner().run).await?;
        Ok(Response::new(streams::watch(self.owner.clone(), run)))
    }

    async fn logs(
        &self,
        request: Request<LogsRequest>,
    ) -> Result<Response<Self::LogsStream>, Status> {
        let LogsRequest { run, follow } = request.into_inner();
        let run = self.find(run).await?;
        // Subscribing and asking for the flush happen between two events, so that no line is missed or shown twice.
        let (new, written, reader) = self
            .owner
            .look(|owner| {
                (
                    owner.new_logs(),
                    owner.telemetry_written(),
                    owner.telemetry(),
                )
            })
            .await?;
        written.await;
        let kept = read_blocking(move || reader?.logs(run)).await?;
        Ok(Response::new(streams::logs(
            kept,
            run,
            follow.then_some(new),
        )))
    }

    async fn cancel(&self, request: Request<RunRequest>) -> Result<Response<RunStatus>, Status> {
        self.act(request.into_inner().run, Event::Cancel).await
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Result<Response<RunStatus>, Status> {
        let ResumeRequest { run, strict } = request.into_inner();
        self.act(run, |run| Event::Resume { run, strict }).await
    }

    async fn adopt(
        &self,
        request: Request<AdoptRequest>,
    ) -> Result<Response<AdoptResponse>, Status> {
        let look = |owner: &Owner| owner.run_ids();
        let known = self.owner.look(look).await?;
        let adoption = adoptions::read(request.into_inner(), known).await?;
        let (id, newest) = (adoption.submission.id.clone(), adoption.checkpoint.clone());
        self.wish(Event::Adopt(Box::new(adoption))).await?;
        let answer = move |owner: &Owner, run| {
            let mut all = owner.checkpoints(run);
            let ours = |known: &Checkpoint| known.manifest_hash == newest.manifest_hash;
            let checkpoint = all.iter().find(|known| ours(known)).cloned();
            all.retain(|known| !known.damaged.is_empty());
            AdoptResponse {
                run: Some(owner.status(run)),
                checkpoint,
                passed_over: all,
            }
        };
        Ok(Response::new(self.with(id, answer).await?))
    }

    async fn checkpoints(
        &self,
        request: Request<RunRequest>,
    ) -> Result<Response<CheckpointsResponse>, Status> {
        let run = self.find(request.into_inner().run).await?;
        self.list_checkpoints(run).await
    }

    async fn keep_checkpoint(
        &self,
        request: Request<KeepCheckpointRequest>,
    ) -> Result<Response<CheckpointsResponse>, Status> {
        let KeepCheckpointRequest { run, step, name } = request.into_inner();
        let run = self.find(run).await?;
        self.wish(Event::NameCheckpoint { run, step, name }).await?;
        self.list_checkpoints(run).await
    }

    async fn drop_checkpoint_name(
        &self,
        request: Request<DropCheckpointNameRequest>,
    ) -> Result<Response<CheckpointsResponse>, Status> {
        let DropCheckpointNameRequest { run, name } = request.into_inner();
        let run = self.find(run).await?;
        self.wish(Event::DropName { run, name }).await?;
        self.list_checkpoints(run).await
    }

    async fn prune_checkpoints(
        &self,
        request: Request<PruneCheckpointsRequest>,
    ) -> Result<Response<CheckpointsResponse>, Status> {
        let PruneCheckpointsRequest { run, keep, delete } = request.into_inner();
        let run = self.find(run).await?;
        let look = move |owner: &Owner| owner.prunable(run, keep);
        let checkpoints = self.owner.look(look).await?;
        if delete {
            self.wish(Event::Prune { run, keep }).await?;
        }
        Ok(Response::new(CheckpointsResponse { checkpoints }))
    }

    async fn drain(
        &self,
        request: Request<DrainRequest>,
    ) -> Result<Response<WorkersResponse>, Status> {
        self.wish(Event::Drain(request.into_inner().worker)).await?;
        self.workers(Request::new(WorkersRequest {})).await
    }

    async fn workers(
        &self,
        _: Request<WorkersRequest>,
    ) -> Result<Response<WorkersResponse>, Status> {
        Ok(Response::new(WorkersResponse {
            workers: self.owner.look(Owner::workers).await?,
        }))
    }

    async fn ledger(
        &self,
        request: Request<RunRequest>,
    ) -> Result<Response<Self::LedgerStream>, Status> {
        let (run, written) = self
            .with(request.into_inner().run, |owner, run| {
                (run, owner.journal_written())
            })
            .await?;
        written.await;
        let reader = Reader::open(self.owner.state())
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(streams::ledger(reader, run)))
    }

    async fn metrics(
        &self,
        request: Request<RunRequest>,
    ) -> Result<Response<Self::MetricsStream>, Status> {
        let look = |owner: &Owner, run| (run, owner.telemetry_written(), owner.telemetry());
        let (run, written, reader) = self.with(request.into_inner().run, look).await?;
        written.await;
        let mut rows = read_blocking(move || reader?.metrics(run)).await?;
        let beside = move |owner: &Owner| {
            owner.add_heldout_losses(run, &mut rows);
            rows
        };
        let rows = self.owner.look(beside).await?;
        Ok(Response::new(streams::all(rows)))
    }

    async fn capsule(
        &self,
        request: Request<RunRequest>,
    ) -> Result<Response<Self::CapsuleStream>, Status> {
        let look = |owner: &Owner, run| (run, owner.journal_written(), owner.telemetry_written());
        let (run, journal, telemetry) = self.with(request.into_inner().run, look).await?;
        journal.await;
        telemetry.await;
        let parts = capsules::pack(self.owner.state(), run).await?;
        Ok(Response::new(streams::all(parts)))
    }

    async fn shutdown(
        &self,
        _: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        self.owner.shut_down("a client asked for it".into()).await;
        Ok(Response::new(ShutdownResponse {}))
    }
}

async fn read_blocking<T: Send + 'static>(
    read: impl FnOnce() -> rusqlite::Result<T> + Send + 'static,
) -> Result<T, Status> {
    let broken = |cause: String| Status::internal(format!("telemetry.db: {cause}"));
    let result = tokio::task::spawn_blocking(read)
        .await
        .map_err(|error| broken(error.to_string()))?;
    result.map_err(|error| broken(error.to_string()))
}

fn refused(refused: Refused) -> Status {
    match refused {
        Refused::NoRun(_) | Refused::NoWorker { .. } | Refused::NoCheckpoint { .. } => {
            Status::not_found(refused.to_string())
        }
        Refused::Known(_) => Status::already_exists(refused.to_string()),
        Refused::BadName(_) => Status::invalid_argument(refused.to_string()),
        Refused::ShuttingDown => Status::unavailable(refused.to_string()),
        Refused::Taken(_)
        | Refused::NameTaken { .. }
        | Refused::NotStrict(_)
        | Refused::Over { .. } => Status::failed_precondition(refused.to_string()),
    }
}

/// A recipe as it will be run, or the rendered report of what is wrong with it.
fn submission(request: &SubmitRequest, state: &Path) -> Result<Submission, String> {
    let base = Path::new(&request.base_directory);
    if !base.is_absolute() {
        return Err(format!(
            "the base directory {:?} is not an absolute path",
            request.base_directory
        ));
    }
    let file = if request.file_name.is_empty() {
        "recipe"
    } else {
        &request.file_name
    };
    let recipe = Recipe::parse(&request.recipe, file)
        .map_err(|error| error.to_string())?
        .resolved(base);
    let id = run_id(recipe.name.as_str());
    let checkpoint_root = match &recipe.checkpoint.to {
        // Runs of the same recipe must not overwrite each other's checkpoints.
        Some(to) => to.join(&id),
        None => state.join("runs").join(&id).join("checkpoints"),
    };
    Ok(Submission::new(
        id,
        &recipe,
        checkpoint_root,
        request.strict,
    ))
}

/// NAME-YYYYMMDD-HHMMSS-xxxx: sorts by time, unique by its random end.
fn run_id(name: &str) -> String {
    let time = Timestamp::now().strftime("%Y%m%d-%H%M%S");
    format!("{name}-{time}-{:04x}", rand::random::<u16>())
}
