//! A coordinator on a free port, and workers that speak the real protocol without a model.

use std::path::Path;
use std::time::Duration;

use supra_coordinator::machine::Limits;
use supra_coordinator::service::{Options, Service};
use supra_proto::v1::coordinator_message::Body as Down;
use supra_proto::v1::worker_message::Body as Up;
use supra_proto::v1::{self, LeftReason, RunState, RunStatus};
use supra_proto::{BUILD, Client, attach};
use supra_recipes::plan::{self, Digest, Plan};
use supra_recipes::schema::Recipe;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// 8 samples of 10 tokens per step, 10 steps and a smaller last one; a checkpoint every 3 steps.
pub fn recipe(min: u32, max: u32) -> String {
    format!(
        "name: server\nbase: {{ path: base }}\ndata: {{ train: data }}\nbudget: {{ tokens: 835 }}\n\
         batch: {{ tokens: 80, micro_batch: 1, sequence_length: 10 }}\noptimizer: {{ warmup: 2 steps }}\n\
         checkpoint: {{ every_tokens: 240, keep: 2 }}\nworkers: {{ min: {min}, max: {max}, grace: 100 ms }}\n"
    )
}

const WINDOWS: u64 = 500;
const MANIFEST: [u8; 32] = [2; 32];

/// Time that a worker takes for a step: long enough for a test to act in the middle of a run on a busy machine.
const STEP: Duration = Duration::from_millis(150);

/// Long enough for anything here, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// Options with waiting times for tests.
pub fn quick(state: &Path) -> Options {
    let limits = Limits {
        rejoin: Duration::from_millis(500),
        leave: Duration::from_secs(2),
        farewell: Duration::from_secs(2),
        ..Limits::default()
    };
    Options {
        limits,
        ..Options::local(state)
    }
}

pub async fn coordinator(state: &Path) -> (Service, String, Client) {
    let service = Service::start(quick(state)).await.expect("starts");
    let url = format!("http://{}", service.address());
    let client = Client::connect(&url, None).await.expect("connects");
    (service, url, client)
}

pub async fn submit(client: &mut Client, recipe: String) -> String {
    let request = v1::SubmitRequest {
        recipe,
        file_name: "server.yaml".into(),
        base_directory: "/nowhere".into(),
        strict: false,
    };
    client.submit(request).await.expect("is accepted")
}

/// Waits until the newest run's status is as wished.
pub async fn wait_for(
    client: &mut Client,
    what: &str,
    wish: impl Fn(&RunStatus) -> bool,
) -> RunStatus {
    let mut last = None;
    let waiting = async {
        loop {
            let status = client.status("").await.expect("a status");
            if wish(&status) {
                return status;
            }
            last = Some(status);
            sleep(Duration::from_millis(10)).await;
        }
    };
    match timeout(PATIENCE, waiting).await {
        Ok(status) => status,
        Err(_) => panic!("{what} does not come: {last:?}"),
    }
}

pub async fn wait_for_state(client: &mut Client, state: RunState) -> RunStatus {
    wait_for(client, state.as_str_name(), |status| {
        status.state() == state
    })
    .await
}

/// A worker without a model. Dropping it kills it.
pub struct Worker {
    task: JoinHandle<Result<(), String>>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Worker {
    pub fn start(url: &str, name: &str) -> Worker {
        let (url, name) = (url.to_owned(), name.to_owned());
        Worker {
            task: tokio::spawn(
                async move { Session::open(&url, hello(&name)).await?.work().await },
            ),
        }
    }

    /// Waits until it ends by itself: on a goodbye, or with what it was refused for.
    pub async fn end(mut self) -> Result<(), String> {
        timeout(PATIENCE, &mut self.task)
            .await
            .expect("ends in time")
            .expect("does not panic")
    }
}

pub fn hello(name: &str) -> v1::Hello {
    v1::Hello {
        instance: format!("{name}-{:?}", std::time::Instant::now()),
        name: name.to_owned(),
        build: BUILD.into(),
        plan_version: plan::VERSION,
        plan_probe: plan::probe().to_vec(),
        device: "cpu".into(),
        data_address: "127.0.0.1:1".into(),
        pid: 1,
        previous_exit: String::new(),
        held: None,
        place: None,
    }
}

/// The stream of one worker.
pub struct Session {
    up: mpsc::Sender<v1::WorkerMessage>,
    pub down: Streaming<v1::CoordinatorMessage>,
    run: String,
    generation: u64,
    sequence: u64,
}

/// What ended the work on an assignment.
enum Turn {
    Done(LeftReason),
    Goodbye,
}

impl Session {
    pub async fn open(url: &str, hello: v1::Hello) -> Result<Session, String> {
        let (up, outgoing) = mpsc::channel(64);
        let first = v1::WorkerMessage {
            sequence: 1,
            body: Some(Up::Hello(hello)),
            ..Default::default()
        };
        up.send(first).await.expect("has room");
        let down = attach(url, None, ReceiverStream::new(outgoing))
            .await
            .map_err(|error| error.to_string())?;
        Ok(Session {
            up,
            down,
            run: String::new(),
            generation: 0,
            sequence: 1,
        })
    }

    pub async fn say(&mut self, body: Up) -> Result<(), String> {
        self.sequence += 1;
        let message = v1::WorkerMessage {
            run: self.run.clone(),
            generation: self.generation,
            sequence: self.sequence,
            body: Some(body),
        };
        self.up
            .send(message)
            .await
            .map_err(|_| "the stream is closed".to_owned())
    }

    pub async fn hear(&mut self) -> Result<Down, String> {
        let message = self
            .down
            .message()
            .await
            .map_err(|status| status.to_string())?
            .ok_or("the stream has ended")?;
        if message.generation > 0 {
            (self.run, self.generation) = (message.run, message.generation);
        }
        message
            .body
            .ok_or_else(|| "a message without body".to_owned())
    }

    async fn work(mut self) -> Result<(), String> {
        loop {
            let turn = match self.hear().await? {
                Down::Assignment(place) => self.train(place).await?,
                Down::Refusal(refusal) => return Err(refusal.message),
                Down::Goodbye(_) => Turn::Goodbye,
                _ => continue,
            };
            match turn {
                Turn::Done(reason) => {
                    self.say(Up::Left(v1::Left {
                        reason: reason.into(),
                        held: None,
                    }))
                    .await?
                }
                Turn::Goodbye => return Ok(()),
            }
        }
    }

    /// Says that it holds the state of step 0.
    pub async fn form(&mut self) -> Result<(), String> {
        self.formed(0).await
    }

    async fn formed(&mut self, step: u64) -> Result<(), String> {
        self.say(Up::Formed(v1::Formed {
            step,
            replica_hash: vec![step as u8; 32],
            windows: WINDOWS,
            manifest_hash: MANIFEST.into(),
        }))
        .await
    }

    /// As the only rank: trains step 1 and writes a checkpoint of it.
    pub async fn step_with_checkpoint(&mut self) -> Result<v1::CheckpointWritten, String> {
        let recipe = Recipe::parse(&recipe(1, 1), "recipe").map_err(|error| error.to_string())?;
        let plan = Plan::new(&recipe, WINDOWS, MANIFEST).map_err(|error| error.to_string())?;
        self.say(Up::Step(report(&plan, 1, 0, 1))).await?;
        let written = self.written(1);
        self.say(Up::CheckpointWritten(written.clone())).await?;
        Ok(written)
    }

    fn written(&self, step: u64) -> v1::CheckpointWritten {
        v1::CheckpointWritten {
            step,
            path: format!("step-{step:08}-gen-{}", self.generation),
            bytes: 7,
            manifest_hash: vec![step as u8; 32],
            seconds: 0.0,
        }
    }

    /// Trains honestly; only the model is missing.
    async fn train(&mut self, place: v1::Assignment) -> Result<Turn, String> {
        let recipe =
            Recipe::parse(&place.recipe, "assignment").map_err(|error| error.to_string())?;
        let plan = Plan::new(&recipe, WINDOWS, MANIFEST).map_err(|error| error.to_string())?;
        let mut step = place.restore.map_or(0, |restore| restore.step);
        self.formed(step).await?;
        let mut stop = false;
        loop {
            if step == plan.steps {
                return Ok(Turn::Done(LeftReason::Finished));
            }
            tokio::select! {
                message = self.hear() => match message? {
                    Down::Void(_) => return Ok(Turn::Done(LeftReason::Void)),
                    Down::Stop(_) => stop = true,
                    Down::Regroup(_) => return Ok(Turn::Done(LeftReason::Regrouped)),
                    Down::Goodbye(_) => return Ok(Turn::Goodbye),
                    _ => {}
                },
                () = sleep(STEP) => {
                    step += 1;
                    self.say(Up::Step(report(&plan, step, place.rank, place.world))).await?;
                    if (stop || plan.checkpoint_due(step)) && place.rank == 0 && !self.checkpoint(step).await? {
                        return Ok(Turn::Done(LeftReason::Void));
                    }
                    if stop && step < plan.steps {
                        return Ok(Turn::Done(LeftReason::Stopped));
                    }
                }
            }
        }
    }

    /// Writes a checkpoint that is only a name; false when the generation is void before it is published.
    async fn checkpoint(&mut self, step: u64) -> Result<bool, String> {
        let written = self.written(step);
        let manifest_hash = written.manifest_hash.clone();
        self.say(Up::CheckpointWritten(written)).await?;
        loop {
            match self.hear().await? {
                Down::Publish(publish) if publish.step == step => break,
                Down::Void(_) => return Ok(false),
                _ => {}
            }
        }
        self.say(Up::CheckpointPublished(v1::CheckpointPublished {
            step,
            manifest_hash,
        }))
        .await?;
        Ok(true)
    }
}

fn report(plan: &Plan, step: u64, rank: u32, world: u32) -> v1::StepReport {
    let (all, mine) = (
        plan.step_samples(step),
        plan.rank_samples(step, rank, world),
    );
    let digest: Digest = mine
        .clone()
        .map(|sample| Digest::of_sample(sample, &[7]))
        .sum();
    v1::StepReport {
        step,
        first_sample: all.start,
        samples: all.end - all.start,
        fed_samples: mine.end - mine.start,
        fed_digest: digest.as_bytes().to_vec(),
        loss_sum: 160.0,
        targets: 80,
        grad_norm: 1.0,
        learning_rate: plan.learning_rate(step),
        skipped: false,
        replica_hash: if plan.replica_check_due(step) {
            vec![step as u8; 32]
        } else {
            Vec::new()
        },
        seconds: 0.02,
        data_seconds: 0.0,
        exposed_comm_ms: 0.0,
        step_digest: Vec::new(),
        bucket_hashes: Vec::new(),
    }
}
