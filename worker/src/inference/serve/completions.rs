//! `POST /v1/completions`: from the request to its answer, whole or in pieces.

use std::{
    convert::Infallible,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use axum::{
    body::{Body, to_bytes},
    extract::{Request as HttpRequest, State},
    http::header::{self, HeaderName},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event as Piece, KeepAlive},
    },
};
use bytes::Bytes;
use serde_json::Value;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;

use super::{
    answer::{Answer, Usage},
    choice::{Choice, Part},
    client::{BATCHES, Batch, Enough, Job},
    compute::Command,
    fault::Fault,
    http::json_response,
    metrics::outcome,
    request::Request,
    served::Served,
    shared::Shared,
};

/// How often a stream that has nothing to say shows that it lives.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

/// Answers a request for completions.
pub async fn completions(State(shared): State<Arc<Shared>>, request: HttpRequest) -> Response {
    let mut end = End::of(&shared);
    let (exchange, events) = match accept(&shared, request).await {
        Ok(accepted) => accepted,
        Err(fault) => return end.with(fault).into_response(),
    };
    if exchange.request.stream {
        let (pieces, body) = mpsc::channel(1);
        tokio::spawn(async move {
            let told = stream(exchange, events, &pieces).await;
            let last = match told {
                Ok(()) => {
                    end.well();
                    "[DONE]".to_owned()
                }
                Err(Some(fault)) => end.with(fault).to_json().to_string(),
                Err(None) => return,
            };
            let _ = pieces.send(Ok(Piece::default().data(last))).await;
        });
        let alive = KeepAlive::new().interval(SIGN_OF_LIFE);
        return Sse::new(ReceiverStream::new(body))
            .keep_alive(alive)
            .into_response();
    }
    match collect(exchange, events).await {
        Ok(answer) => {
            end.well();
            json_response(&answer)
        }
        Err(fault) => end.with(fault).into_response(),
    }
}

/// How a request ends that gets its whole answer.
const COMPLETED: &str = "completed";

/// Counts a request when it has ended; one that nobody ended has lost its client.
struct End {
    shared: Arc<Shared>,
    arrived: Instant,
    outcome: &'static str,
}

impl End {
    fn of(shared: &Arc<Shared>) -> End {
        shared.metrics.under_way.inc();
        End {
            shared: Arc::clone(shared),
            arrived: Instant::now(),
            outcome: "disconnected",
        }
    }

    fn well(&mut self) {
        self.outcome = COMPLETED;
    }

    fn with(&mut self, fault: Fault) -> Fault {
        self.outcome = outcome(&fault);
        fault
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let metrics = &self.shared.metrics;
        metrics.under_way.dec();
        metrics.count(self.outcome);
        if self.outcome == COMPLETED {
            metrics
                .request
                .observe(self.arrived.elapsed().as_secs_f64());
        }
    }
}

/// A request that is being computed.
struct Exchange {
    shared: Arc<Shared>,
    served: Arc<Served>,
    request: Request,
    enough: Enough,
    number: u64,
    _permit: OwnedSemaphorePermit,
}

/// Reads a request and hands it to the compute thread.
async fn accept(
    shared: &Arc<Shared>,
    request: HttpRequest,
) -> Result<(Exchange, mpsc::Receiver<Batch>), Fault> {
    let arrived = Instant::now();
    let served = shared.served()?;
    // Better before a large request is read than after.
    shared.has_room()?;
    check_headers(&request, shared.options.max_body)?;
    let body = read(shared, request.into_body()).await?;
    // A long prompt takes the tokenizer long enough to keep others waiting.
    let (limits, model) = (shared.options.limits, Arc::clone(&served));
    let parse = move || Request::parse(&body, &model, limits);
    let request = tokio::task::spawn_blocking(parse).await;
    let request = request.map_err(|_| Fault::internal("the tokenizer broke on this prompt"))??;
    let permit = shared.enter()?;
    let (sender, events) = mpsc::channel(BATCHES);
    let choices = request.choices();
    let enough: Enough = (0..choices).map(|_| false.into()).collect();
    let number = shared.number();
    shared.command(Command::Submit(Job {
        request: number,
        served: served.number,
        orders: (0..choices)
            .map(|choice| request.order(choice, &served))
            .collect(),
        enough: Arc::clone(&enough),
        events: sender,
        arrived,
    }))?;
    let exchange = Exchange {
        shared: Arc::clone(shared),
        served,
        request,
        enough,
        number,
        _permit: permit,
    };
    Ok((exchange, events))
}

fn check_headers(request: &HttpRequest, most: usize) -> Result<(), Fault> {
    let header = |name: HeaderName| {
        request
            .headers()
            .get(name)
            .map(|value| String::from_utf8_lossy(value.as_bytes()))
    };
    if let Some(kind) = header(header::CONTENT_TYPE) {
        let essence = kind.split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            return Err(Fault::not_json(&kind));
        }
    }
    if let Some(encoding) = header(header::CONTENT_ENCODING)
        && !encoding.eq_ignore_ascii_case("identity")
    {
        return Err(Fault::not_json(&format!("compressed with {encoding}")));
    }
    let length = header(header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
    match length.is_some_and(|length| length > most as u64) {
        true => Err(Fault::too_large(most)),
        false => Ok(()),
    }
}

async fn read(shared: &Shared, body: Body) -> Result<Bytes, Fault> {
    let (most, limit) = (shared.options.max_body, shared.options.stall_timeout);
    let body = timeout(limit, to_bytes(body, most)).await;
    let body = body.map_err(|_| Fault::slow_request(limit))?;
    body.map_err(|error| {
        let mut causes =
            std::iter::successors(std::error::Error::source(&error), |&error| error.source());
        match causes.any(|cause| cause.is::<http_body_util::LengthLimitError>()) {
            true => Fault::too_large(most),
            false => Fault::bad(format!("the request broke off: {error}")),
        }
    })
}

impl Exchange {
    fn answer(&self) -> Answer<'_> {
        Answer::new(self.number, &self.served)
    }

    fn begin(&self) -> Result<(Vec<Choice<'_>>, Vec<Part>), Fault> {
        let begin = |choice| {
            Choice::begin(
                &self.served,
                self.request.prompt_of(choice),
                self.request.wishes,
                self.request.max_tokens,
                &self.request.stop,
            )
        };
        let begun: Result<Vec<_>, Fault> = (0..self.request.choices()).map(begin).collect();
        Ok(begun?.into_iter().unzip())
    }

    fn usage(&self, choices: &[Choice<'_>]) -> Usage {
        let prompts = self
            .request
            .prompts
            .iter()
            .map(|prompt| prompt.tokens.len());
        Usage::new(prompts.sum(), choices.iter().map(Choice::tokens).sum())
    }
}

/// What the compute thread told since the last time, put into `parts`.
fn take(
    batch: Batch,
    choices: &mut [Choice<'_>],
    parts: &mut [Part],
    enough: &Enough,
) -> Result<(), Fault> {
    for (number, event) in batch {
        let choice = &mut choices[number];
        parts[number].extend(choice.push(event)?);
        if choice.finished() {
            enough[number].store(true, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Why nothing comes any more before the end.
fn broken_off(shared: &Shared) -> Fault {
    match shared.draining() {
        true => Fault::draining(),
        false => Fault::stalled(shared.options.stall_timeout),
    }
}

async fn collect(exchange: Exchange, mut events: mpsc::Receiver<Batch>) -> Result<Value, Fault> {
    let (mut choices, mut parts) = exchange.begin()?;
    while !choices.iter().all(Choice::finished) {
        let batch = events.recv().await;
        let batch = batch.ok_or_else(|| broken_off(&exchange.shared))?;
        take(batch, &mut choices, &mut parts, &exchange.enough)?;
    }
    let usage = exchange.usage(&choices);
    Ok(exchange.answer().whole(parts, usage))
}

/// Where the pieces of an answer go.
type Pieces = mpsc::Sender<Result<Piece, Infallible>>;

async fn send(pieces: &Pieces, value: &Value) -> Result<(), Option<Fault>> {
    let piece = Piece::default().data(value.to_string());
    pieces.send(Ok(piece)).await.map_err(|_| None)
}

/// Sends an answer in pieces; fails without a fault where nobody reads them.
async fn stream(
    exchange: Exchange,
    mut events: mpsc::Receiver<Batch>,
    pieces: &Pieces,
) -> Result<(), Option<Fault>> {
    let (mut choices, mut parts) = exchange.begin()?;
    let answer = exchange.answer();
    let counted = exchange.request.include_usage;
    loop {
        for (number, part) in parts
            .iter_mut()
            .enumerate()
            .filter(|(_, part)| !part.is_empty())
        {
            send(pieces, &answer.piece(number, std::mem::take(part), counted)).await?;
        }
        if choices.iter().all(Choice::finished) {
            break;
        }
        let batch = tokio::select! {
            batch = events.recv() => batch.ok_or_else(|| broken_off(&exchange.shared))?,
            () = pieces.closed() => return Err(None),
        };
        take(batch, &mut choices, &mut parts, &exchange.enough)?;
    }
    if counted {
        send(pieces, &answer.count(exchange.usage(&choices))).await?;
    }
    Ok(())
}
