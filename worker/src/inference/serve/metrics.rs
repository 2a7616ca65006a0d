//! What the server counts and measures, in Prometheus' text format.

use std::fmt;

use prometheus_client::{
    encoding::text::encode,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use super::fault::Fault;

/// The media type of [`Metrics::text`].
pub const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Label = [(&'static str, &'static str); 1];

/// Everything that is counted.
pub struct Metrics {
    registry: Registry,
    requests: Family<Label, Counter>,
    slots: Family<Label, Gauge>,
    /// Completions that wait for a slot.
    pub waiting: Gauge,
    /// Requests between their arrival and the end of their answer.
    pub under_way: Gauge,
    /// Open connections.
    pub connections: Gauge,
    /// Tokens of prompts that were read.
    pub prompt_tokens: Counter,
    /// Tokens that were drawn.
    pub completion_tokens: Counter,
    /// From the arrival of a request to the first token of a completion.
    pub first_token: Histogram,
    /// From one token of a completion to the next one.
    pub next_token: Histogram,
    /// From the arrival of a request to the end of its answer.
    pub request: Histogram,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        // 1 ms to 66 s, and 0.1 ms to 3.4 s.
        let seconds = || Histogram::new(exponential_buckets(1e-3, 1.4, 34));
        let short = Histogram::new(exponential_buckets(1e-4, 1.4, 32));
        let mut metrics = Metrics {
            registry: Registry::with_prefix("supra"),
            requests: Family::default(),
            slots: Family::default(),
            waiting: Gauge::default(),
            under_way: Gauge::default(),
            connections: Gauge::default(),
            prompt_tokens: Counter::default(),
            completion_tokens: Counter::default(),
            first_token: seconds(),
            next_token: short,
            request: seconds(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "requests",
            "Requests for completions by how they ended",
            self.requests.clone(),
        );
        registry.register(
            "slots",
            "Slots by what is in them: a completion, the beginning of later prompts, nothing",
            self.slots.clone(),
        );
        registry.register(
            "completions_waiting",
            "Completions that wait for a slot",
            self.waiting.clone(),
        );
        registry.register(
            "requests_under_way",
            "Requests for completions whose answer is not complete",
            self.under_way.clone(),
        );
        registry.register("connections", "Open connections", self.connections.clone());
        registry.register(
            "prompt_tokens",
            "Tokens of prompts that went through the model",
            self.prompt_tokens.clone(),
        );
        registry.register(
            "completion_tokens",
            "Tokens that were drawn",
            self.completion_tokens.clone(),
        );
        registry.register(
            "time_to_first_token_seconds",
            "From the arrival of a request to the first token of a completion",
            self.first_token.clone(),
        );
        registry.register(
            "time_per_token_seconds",
            "From one token of a completion to the next one",
            self.next_token.clone(),
        );
        registry.register(
            "request_seconds",
            "From the arrival of a request to the end of its answer",
            self.request.clone(),
        );
    }

    /// Counts a request that ended so.
    pub fn count(&self, outcome: &'static str) {
        self.requests.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// Tells what is in the slots.
    pub fn slots(&self, busy: usize, prefixes: usize, free: usize) {
        for (state, count) in [("busy", busy), ("prefix", prefixes), ("free", free)] {
            let gauge = self.slots.get_or_create(&[("state", state)]);
            gauge.set(count as i64);
        }
    }

    /// All of it.
    pub fn text(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("invariant: a string takes everything");
        text
    }
}

/// How a request ended that a fault ended.
pub fn outcome(fault: &Fault) -> &'static str {
    match (fault.status.as_u16(), fault.code) {
        (_, Some("stalled")) => "stalled",
        (408 | 504, _) => "timed_out",
        (429, _) => "busy",
        (503, _) => "unavailable",
        (400..500, _) => "refused",
        _ => "failed",
    }
}
