//! What the other tasks hold of the owner.

use std::path::{Path, PathBuf};

use supra_proto::v1;
use tokio::sync::{mpsc, oneshot, watch};

use super::owner::{Downstream, Owner};
use crate::machine::{Conn, Event, Refused};

/// What the owner is asked.
pub(super) enum Ask {
    Attach {
        peer: String,
        hello: Box<v1::Hello>,
        down: Downstream,
        reply: oneshot::Sender<Conn>,
    },
    Event(Event),
    Client {
        event: Event,
        reply: oneshot::Sender<Result<(), Refused>>,
    },
    Look(Box<dyn FnOnce(&Owner) + Send>),
}

/// What the other tasks hold of the owner.
#[derive(Clone, Debug)]
pub(super) struct Handle {
    pub(super) asks: mpsc::Sender<Ask>,
    pub(super) changed: watch::Receiver<u64>,
    pub(super) state: PathBuf,
}

/// The owner is gone: the coordinator has ended.
#[derive(Debug)]
pub(super) struct Ended;

impl From<Ended> for tonic::Status {
    fn from(Ended: Ended) -> Self {
        tonic::Status::unavailable("the coordinator is ending")
    }
}

impl Handle {
    pub async fn attach(
        &self,
        peer: String,
        hello: v1::Hello,
        down: Downstream,
    ) -> Result<Conn, Ended> {
        let (reply, answer) = oneshot::channel();
        self.ask(Ask::Attach {
            peer,
            hello: Box::new(hello),
            down,
            reply,
        })
        .await?;
        answer.await.map_err(|_| Ended)
    }

    pub async fn event(&self, event: Event) -> Result<(), Ended> {
        self.ask(Ask::Event(event)).await
    }

    /// What a client wants; on `Ok` it is on disk.
    pub async fn client(&self, event: Event) -> Result<Result<(), Refused>, Ended> {
        let (reply, answer) = oneshot::channel();
        self.ask(Ask::Client { event, reply }).await?;
        answer.await.map_err(|_| Ended)
    }

    /// Looks at the owner's state between two events.
    pub async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Owner) -> T + Send + 'static,
    ) -> Result<T, Ended> {
        let (reply, answer) = oneshot::channel();
        let look = Box::new(move |owner: &Owner| {
            let _ = reply.send(look(owner));
        });
        self.ask(Ask::Look(look)).await?;
        answer.await.map_err(|_| Ended)
    }

    pub async fn shut_down(&self, reason: String) {
        let _ = self.event(Event::Shutdown(reason)).await;
    }

    /// Returns when the owner has ended.
    pub async fn ended(&self) {
        self.asks.closed().await;
    }

    /// Sees a new value after every change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.clone()
    }

    /// The state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    async fn ask(&self, ask: Ask) -> Result<(), Ended> {
        self.asks.send(ask).await.map_err(|_| Ended)
    }
}
