//! The stream to the coordinator: made, used, and made again.

use std::time::Duration;

use supra_proto::v1::worker_message::Body as Up;
use supra_proto::v1::{CoordinatorMessage, Held, Hello, WorkerMessage};
use supra_proto::{ClientError, attach};
use supra_recipes::plan;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::worker::WorkerOptions;

/// Messages that may wait for the network. A full queue is a broken line.
const QUEUE: usize = 1024;

/// Time for the coordinator to answer Hello.
const ANSWER: Duration = Duration::from_secs(10);

/// Time for the last messages to get through.
const FAREWELL: Duration = Duration::from_secs(1);

/// An open stream.
pub(crate) struct Line {
    outgoing: mpsc::Sender<WorkerMessage>,
    incoming: Streaming<CoordinatorMessage>,
    sequence: u64,
}

impl Line {
    /// Attaches and says Hello; returns with the coordinator's answer. `backlog`: so many messages may follow at once.
    pub async fn open(
        options: &WorkerOptions,
        hello: Hello,
        backlog: usize,
    ) -> Result<(Line, CoordinatorMessage), ClientError> {
        let url = &options.coordinator;
        let unanswered = |cause: &str| ClientError::Unreachable {
            url: url.clone(),
            cause: cause.to_owned(),
            remedy: "check that this is the address of a supra-coordinator, and look at its log",
        };
        let (outgoing, queue) = mpsc::channel(QUEUE + backlog);
        let first = WorkerMessage {
            run: String::new(),
            generation: 0,
            sequence: 1,
            body: Some(Up::Hello(hello)),
        };
        // The queue is new and has room.
        outgoing
            .try_send(first)
            .map_err(|_| unanswered("the stream closed at once"))?;
        let opening = async {
            let mut incoming =
                attach(url, options.token.clone(), ReceiverStream::new(queue)).await?;
            let answer = incoming
                .message()
                .await
                .map_err(|status| ClientError::from_status(url, &status))?;
            let answer =
                answer.ok_or_else(|| unanswered("it closed the stream without an answer"))?;
            Ok((
                Line {
                    outgoing,
                    incoming,
                    sequence: 1,
                },
                answer,
            ))
        };
        timeout(ANSWER, opening)
            .await
            .unwrap_or_else(|_| Err(unanswered("no answer within 10 s")))
    }

    /// The next message; none when the stream has ended.
    pub async fn receive(&mut self) -> Result<Option<CoordinatorMessage>, Status> {
        self.incoming.message().await
    }

    /// Queues a message. False when the queue is full or the stream has ended.
    pub fn send(&mut self, run: String, generation: u64, body: Up) -> bool {
        self.sequence += 1;
        let message = WorkerMessage {
            run,
            generation,
            sequence: self.sequence,
            body: Some(body),
        };
        self.outgoing.try_send(message).is_ok()
    }

    /// Ends the stream after what is queued.
    pub async fn close(self) {
        let Line {
            outgoing,
            mut incoming,
            ..
        } = self;
        drop(outgoing);
        let drained = async { while let Ok(Some(_)) = incoming.message().await {} };
        timeout(FAREWELL, drained).await.ok();
    }
}

/// What this worker says of itself.
pub(crate) fn hello(options: &WorkerOptions, data_address: String, held: Option<Held>) -> Hello {
    Hello {
        instance: options.birth.instance.clone(),
        name: options
            .name
            .clone()
            .unwrap_or_else(|| default_name(&options.device)),
        build: options.build.clone(),
        plan_version: plan::VERSION,
        plan_probe: plan::probe().to_vec(),
        device: options.device.clone(),
        data_address,
        pid: std::process::id(),
        previous_exit: options.birth.previous_exit.clone(),
        held,
        place: None,
    }
}

fn default_name(device: &str) -> String {
    let host = nix::unistd::gethostname()
        .ok()
        .and_then(|host| host.into_string().ok());
    format!("{}/{device}", host.as_deref().unwrap_or("worker"))
}

/// Pauses between attempts to attach: doubling, bounded, jittered so that a herd of workers does
/// not come back in step.
#[derive(Debug)]
pub(crate) struct Pauses {
    next: Duration,
}

impl Pauses {
    const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(10);

    pub fn new() -> Pauses {
        Pauses { next: Self::FIRST }
    }

    /// The next pause: between half of the bound and the bound.
    pub fn next(&mut self) -> Duration {
        let bound = self.next;
        self.next = (bound * 2).min(Self::LONGEST);
        bound.mul_f64(rand::random_range(0.5..1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound() {
        let mut pauses = Pauses::new();
        let first = pauses.next();
        assert!(
            first >= Pauses::FIRST / 2 && first <= Pauses::FIRST,
            "{first:?}"
        );
        let last = (0..20).map(|_| pauses.next()).last().unwrap();
        assert!(
            last >= Pauses::LONGEST / 2 && last <= Pauses::LONGEST,
            "{last:?}"
        );
    }
}
