//! Whoever waits for completions, as the compute thread sees them: a bounded channel that nobody waits for.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::mpsc::{Sender, error::TrySendError};

use super::{
    fault::Fault,
    schedule::{Event, Order},
};

/// Events of a request's completions, by the number of the completion.
pub type Batch = Vec<(usize, Event)>;

/// Batches that wait for their reader; what comes after them is kept together, up to the end of the completions.
pub const BATCHES: usize = 8;

/// Marks of the completions that their reader needs no more of.
pub type Enough = Arc<[AtomicBool]>;

/// A request for completions.
pub struct Job {
    /// Its number.
    pub request: u64,
    /// Which weights it was made for.
    pub served: u64,
    /// One per completion.
    pub orders: Vec<Order>,
    /// Which of them need not go on.
    pub enough: Enough,
    /// Where events go.
    pub events: Sender<Batch>,
    /// When it came.
    pub arrived: Instant,
}

/// A request that is under way.
pub struct Client {
    /// Its number.
    pub request: u64,
    events: Sender<Batch>,
    enough: Enough,
    arrived: Instant,
    /// What the channel had no room for.
    pending: Batch,
    /// Since when it has none.
    blocked: Option<Instant>,
    /// Which completions have ended.
    over: Vec<bool>,
    /// When each completion's last token came.
    last: Vec<Option<Instant>>,
    /// Whether completions ended other than by themselves.
    news: bool,
}

impl Client {
    /// A client, and what it wants.
    pub fn new(job: Job) -> (Client, Vec<Order>) {
        let choices = job.orders.len();
        let client = Client {
            request: job.request,
            events: job.events,
            enough: job.enough,
            arrived: job.arrived,
            pending: Batch::new(),
            blocked: None,
            over: vec![false; choices],
            last: vec![None; choices],
            news: false,
        };
        (client, job.orders)
    }

    /// Ends what is not wanted any more: the reader has gone or does not read, it has enough, or it is too late.
    pub fn check(&mut self, now: Instant, limit: Duration, stall: Duration) {
        let stalled = self
            .blocked
            .is_some_and(|since| now.duration_since(since) > stall);
        if self.events.is_closed() || stalled {
            self.pending.clear();
            self.over.fill(true);
            self.news = true;
        }
        for (over, enough) in self.over.iter_mut().zip(self.enough.iter()) {
            if !*over && enough.load(Ordering::Relaxed) {
                *over = true;
                self.news = true;
            }
        }
        if now.duration_since(self.arrived) > limit {
            self.fail(&Fault::late(limit));
        }
    }

    /// Ends all completions that have not ended.
    pub fn fail(&mut self, fault: &Fault) {
        for choice in 0..self.over.len() {
            if !self.over[choice] {
                self.hear(choice, Event::Failed(fault.clone()));
                self.news = true;
            }
        }
    }

    /// Whether completions ended that the schedule does not know of.
    pub fn has_news(&self) -> bool {
        self.news
    }

    /// Whether a completion has ended.
    pub fn is_over(&self, choice: usize) -> bool {
        self.over[choice]
    }

    /// Notes that the schedule knows; whether the client has got all that it is to get.
    pub fn settle(&mut self) -> bool {
        self.news = false;
        self.pending.is_empty() && self.over.iter().all(|&over| over)
    }

    /// Takes what became of a completion.
    pub fn hear(&mut self, choice: usize, event: Event) {
        if self.over[choice] {
            return;
        }
        self.over[choice] = matches!(event, Event::Finished(_) | Event::Failed(_));
        self.pending.push((choice, event));
    }

    /// Notes a token: whether it is the completion's first, and how long it took.
    pub fn token_at(&mut self, choice: usize, now: Instant) -> (bool, Duration) {
        let last = self.last[choice].replace(now);
        let since = last.unwrap_or(self.arrived);
        (last.is_none(), now.duration_since(since))
    }

    /// Hands over what is pending if there is room.
    pub fn deliver(&mut self, now: Instant) {
        if self.pending.is_empty() {
            return;
        }
        match self.events.try_send(std::mem::take(&mut self.pending)) {
            Ok(()) => self.blocked = None,
            Err(TrySendError::Full(batch)) => {
                self.pending = batch;
                self.blocked.get_or_insert(now);
            }
            Err(TrySendError::Closed(_)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::inference::{completion::Finish, serve::schedule::Drawn};

    const STALL: Duration = Duration::from_secs(5);
    const LIMIT: Duration = Duration::from_secs(50);

    fn client(choices: usize, arrived: Instant) -> (Client, mpsc::Receiver<Batch>, Enough) {
        let (events, reader) = mpsc::channel(1);
        let enough: Enough = (0..choices).map(|_| false.into()).collect();
        let (mut client, _) = Client::new(Job {
            request: 1,
            served: 0,
            orders: Vec::new(),
            enough: Arc::clone(&enough),
            events,
            arrived,
        });
        client.over = vec![false; choices];
        client.last = vec![None; choices];
        (client, reader, enough)
    }

    fn token(token: u32) -> Event {
        Event::Token(Drawn {
            token,
            logprob: None,
            top: Vec::new(),
        })
    }

    #[test]
    fn a_slow_reader_gets_everything_in_order() {
        let start = Instant::now();
        let (mut client, mut reader, _) = client(1, start);
        for number in 0..10 {
            client.hear(0, token(number));
            client.deliver(start);
        }
        client.hear(0, Event::Finished(Finish::Length));
        let mut heard = Vec::new();
        while !client.settle() {
            client.check(start + STALL, LIMIT, STALL);
            client.deliver(start);
            heard.extend(reader.try_recv().unwrap_or_default());
        }
        heard.extend(reader.try_recv().unwrap_or_default());
        let tokens: Vec<_> = (0..10).map(|number| (0, token(number))).collect();
        assert_eq!(heard[..10], tokens);
        assert_eq!(heard[10..], [(0, Event::Finished(Finish::Length))]);
    }

    #[test]
    fn a_reader_that_stands_still_is_given_up_and_one_that_is_late_is_told() {
        let start = Instant::now();
        let (mut still, _reader, _) = client(2, start);
        for number in 0..2 {
            still.hear(0, token(number));
            still.deliver(start);
        }
        still.check(start + STALL, LIMIT, STALL);
        assert!(!still.is_over(0));
        still.check(start + STALL * 2, LIMIT, STALL);
        assert!(still.is_over(0) && still.is_over(1) && still.has_news() && still.settle());

        let (mut late, mut reader, enough) = client(2, start);
        enough[1].store(true, Ordering::Relaxed);
        late.check(start + LIMIT * 2, LIMIT, STALL);
        late.deliver(start);
        let told = reader.try_recv().unwrap_or_default();
        assert_eq!(told, [(0, Event::Failed(Fault::late(LIMIT)))]);
        assert!(late.is_over(1) && late.settle());
    }
}
