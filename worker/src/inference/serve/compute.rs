//! The thread that computes: it owns engines and schedules, and speaks to the runtime only through bounded queues.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};

use super::{
    client::{Client, Job},
    fault::Fault,
    schedule::{Event, Key, Machine, Schedule, Told, Turn},
    served::Served,
    shared::Shared,
};
use crate::inference::{
    engine::{Engine, EngineError, Output, Piece, Slot},
    load::LoadedModel,
};

/// How often readers are looked at that did not take their answer, when there is nothing to compute.
const LOOK: Duration = Duration::from_millis(5);

/// What the compute thread is asked to do.
pub enum Command {
    /// Make completions.
    Submit(Job),
    /// Use other weights for all requests from now on.
    Replace(Box<(LoadedModel, Served)>),
    /// Give up everything that is under way.
    Abandon,
    /// End.
    Stop,
}

impl Machine for Engine {
    type Slot = Slot;
    type Error = EngineError;

    fn free(&self) -> usize {
        self.free()
    }

    fn open(&mut self) -> Option<Slot> {
        self.open()
    }

    fn fork(&mut self, from: &Slot) -> Option<Slot> {
        self.fork(from)
    }

    fn close(&mut self, slot: Slot) {
        self.close(slot);
    }

    fn advance(&mut self, turns: &[Turn<'_, Slot>]) -> Result<Vec<Output>, EngineError> {
        let pieces: Vec<Piece<'_>> = turns
            .iter()
            .map(|turn| Piece {
                slot: turn.slot,
                tokens: turn.tokens,
                want: turn.want,
            })
            .collect();
        self.advance(&pieces)
    }
}

/// Weights and the sequences that run on them.
struct Running {
    number: u64,
    engine: Engine,
    schedule: Schedule<Engine>,
}

/// Everything that the thread owns.
pub struct Compute {
    shared: Arc<Shared>,
    /// The newest weights first; older ones until their last completion ends.
    models: Vec<Running>,
    clients: HashMap<u64, Client>,
}

impl Compute {
    /// Nothing under way.
    pub fn new(shared: Arc<Shared>) -> Compute {
        Compute {
            shared,
            models: Vec::new(),
            clients: HashMap::new(),
        }
    }

    /// Makes the completions of a model the answer to all later requests.
    ///
    /// # Errors
    ///
    /// There is no memory for it.
    pub fn replace(&mut self, model: LoadedModel, served: Served) -> Result<(), EngineError> {
        let engine = Engine::new(model, self.shared.options.slots)?;
        // Nobody's later prompt finds what older weights made of its beginning.
        for old in &mut self.models {
            old.schedule.forget_prefixes(&mut old.engine);
        }
        let running = Running {
            number: served.number,
            engine,
            schedule: Schedule::new(self.shared.options.share_prefixes),
        };
        self.models.insert(0, running);
        self.shared.serve(served);
        Ok(())
    }

    /// Computes until somebody says stop.
    pub fn run(&mut self, commands: &Receiver<Command>) {
        self.measure();
        while self.receive(commands) {
            self.sweep();
            for at in 0..self.models.len() {
                let Running {
                    engine, schedule, ..
                } = &mut self.models[at];
                let told = schedule.turn(engine);
                self.hear(told);
            }
            self.deliver();
            self.retire();
            self.measure();
        }
    }

    /// Takes all commands that are there, and waits for one if there is nothing else to do; false at the end.
    fn receive(&mut self, commands: &Receiver<Command>) -> bool {
        let busy = self.models.iter().any(|model| !model.schedule.is_idle());
        if !busy {
            let command = match self.clients.is_empty() {
                true => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
                false => commands.recv_timeout(LOOK),
            };
            match command {
                Ok(command) => {
                    if !self.obey(command) {
                        return false;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return false,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        loop {
            match commands.try_recv() {
                Ok(command) => {
                    if !self.obey(command) {
                        return false;
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Submit(job) => self.submit(job),
            Command::Replace(newer) => {
                let (model, served) = *newer;
                let fingerprint = served.fingerprint.clone();
                match self.replace(model, served) {
                    Ok(()) => tracing::info!(checkpoint = %fingerprint, "serving newer weights"),
                    Err(error) => {
                        tracing::warn!(checkpoint = %fingerprint, %error, "newer weights are not served");
                    }
                }
            }
            Command::Abandon => {
                for client in self.clients.values_mut() {
                    client.fail(&Fault::draining());
                }
            }
            Command::Stop => return false,
        }
        true
    }

    fn submit(&mut self, job: Job) {
        // Newer weights may have come between the reading of a request and this.
        let asked = self
            .models
            .iter()
            .position(|model| model.number == job.served);
        let Some(model) = self.models.get_mut(asked.unwrap_or(0)) else {
            return;
        };
        let (client, orders) = Client::new(job);
        for (choice, order) in orders.into_iter().enumerate() {
            let request = client.request;
            model.schedule.submit(Key { request, choice }, order);
        }
        self.clients.insert(client.request, client);
    }

    /// Frees the slots of whoever is gone, late, or does not read.
    fn sweep(&mut self) {
        let now = Instant::now();
        let options = &self.shared.options;
        for client in self.clients.values_mut() {
            client.check(now, options.request_timeout, options.stall_timeout);
        }
        let clients = &self.clients;
        if clients.values().any(Client::has_news) {
            for model in &mut self.models {
                model.schedule.cancel(&mut model.engine, |key| {
                    clients
                        .get(&key.request)
                        .is_none_or(|client| client.is_over(key.choice))
                });
            }
        }
        self.clients.retain(|_, client| !client.settle());
    }

    fn hear(&mut self, told: Told) {
        let metrics = &self.shared.metrics;
        metrics.prompt_tokens.inc_by(told.read as u64);
        let now = Instant::now();
        for (key, event) in told.events {
            let Some(client) = self.clients.get_mut(&key.request) else {
                continue;
            };
            if let Event::Token(_) = event {
                metrics.completion_tokens.inc();
                match client.token_at(key.choice, now) {
                    (true, waited) => metrics.first_token.observe(waited.as_secs_f64()),
                    (false, waited) => metrics.next_token.observe(waited.as_secs_f64()),
                }
            }
            client.hear(key.choice, event);
        }
    }

    fn deliver(&mut self) {
        let now = Instant::now();
        for client in self.clients.values_mut() {
            client.deliver(now);
        }
    }

    /// Drops older weights on which nothing runs any more.
    fn retire(&mut self) {
        let mut first = true;
        self.models
            .retain(|model| std::mem::take(&mut first) || !model.schedule.is_idle());
        self.shared
            .replacing
            .store(self.models.len() > 1, Ordering::Relaxed);
    }

    fn measure(&self) {
        let sum = |of: fn(&Running) -> usize| self.models.iter().map(of).sum::<usize>();
        let metrics = &self.shared.metrics;
        metrics.slots(
            sum(|model| model.schedule.running()),
            sum(|model| model.schedule.kept()),
            sum(|model| model.engine.free()),
        );
        metrics
            .waiting
            .set(sum(|model| model.schedule.waiting()) as i64);
    }
}
