//! Requests that no client should send: malformed, oversized, truncated, slow, and clients that leave in the middle. The seed
//! decides.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use rand::seq::IndexedRandom;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::failure::{Failure, Result};
use crate::http::{connect, get, request};
use crate::server::{COMPLETIONS, Server};

/// A crowd of bad clients.
#[derive(Clone, Copy, Debug)]
pub struct Abuse {
    /// Requests of all of them.
    pub requests: u64,
    /// Clients side by side.
    pub clients: u64,
    /// Decides what they send.
    pub seed: u64,
}

/// How requests ended: a status, `closed` by the server, or `left` by the client.
pub type Tally = BTreeMap<String, u64>;

impl Abuse {
    /// Sends them all.
    ///
    /// # Errors
    /// The server answers with what is no HTTP or with an error of its own, or does not answer.
    pub fn run(&self, server: &Server) -> Result<Tally> {
        let mut tally = Tally::new();
        thread::scope(|scope| {
            let crowd: Vec<_> = (0..self.clients)
                .map(|client| scope.spawn(move || self.client(client, server)))
                .collect();
            for client in crowd {
                let ended = client
                    .join()
                    .map_err(|_| Failure::new("a client broke"))??;
                for (outcome, count) in ended {
                    *tally.entry(outcome).or_default() += count;
                }
            }
            Ok(tally)
        })
    }

    fn client(&self, client: u64, server: &Server) -> Result<Tally> {
        let mut tally = Tally::new();
        for number in (client..self.requests).step_by(self.clients as usize) {
            let mut random = ChaCha8Rng::seed_from_u64(self.seed);
            random.set_stream(number);
            let outcome = harass(server, &mut random).map_err(|failure| {
                Failure::new(format!("seed {}, request {number}: {failure}", self.seed))
            })?;
            *tally.entry(outcome).or_default() += 1;
        }
        Ok(tally)
    }
}

/// Fails unless the server gives a completion to whoever asks for one as one should.
pub fn expect_answers(server: &Server) -> Result<()> {
    let health = get(server.address, "/health")?.status;
    let answer = server.complete(&json!({ "prompt": [5, 6, 7], "max_tokens": 3 }))?;
    match health == 200 && answer["usage"]["prompt_tokens"] == 3 {
        true => Ok(()),
        false => Err(Failure::new(format!("health {health}, {answer}"))),
    }
}

/// One request, and how it ended.
fn harass(server: &Server, random: &mut ChaCha8Rng) -> Result<String> {
    let mut bytes = match random.random_range(0..10) {
        0 => noise(random),
        1 => head(random),
        _ => request(server.address, COMPLETIONS, &body(random)),
    };
    match random.random_range(0..12) {
        // Truncated: the rest never comes, and the client waits or says that it has no more.
        0 | 1 => {
            bytes.truncate(random.random_range(0..=bytes.len()));
            let mut stream = connect(server.address)?;
            let _ = stream.write_all(&bytes);
            if random.random() {
                let _ = stream.shutdown(Shutdown::Write);
                return hear(&mut stream);
            }
            Ok("left".to_owned())
        }
        // Slow: a few bytes at a time.
        2 => {
            let mut stream = connect(server.address)?;
            let pieces = random.random_range(2..6);
            for piece in bytes.chunks(bytes.len() / pieces + 1) {
                if stream.write_all(piece).is_err() {
                    break;
                }
                thread::sleep(Duration::from_millis(random.random_range(0..30)));
            }
            hear(&mut stream)
        }
        // Gone: before the answer, or after its first bytes.
        3 | 4 => {
            let mut stream = connect(server.address)?;
            let _ = stream.write_all(&bytes);
            if random.random() {
                let _ = stream.read(&mut [0; 16]);
            }
            Ok("left".to_owned())
        }
        // Reads in sips, and has enough before the end.
        5 => {
            let mut stream = connect(server.address)?;
            let _ = stream.write_all(&bytes);
            for _ in 0..random.random_range(1..8) {
                let _ = stream.read(&mut [0; 8]);
                thread::sleep(Duration::from_millis(random.random_range(0..20)));
            }
            Ok("left".to_owned())
        }
        _ => {
            let mut stream = connect(server.address)?;
            let _ = stream.write_all(&bytes);
            hear(&mut stream)
        }
    }
}

/// The status of the answer. An error of the server's own is a failure.
fn hear(stream: &mut TcpStream) -> Result<String> {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            return Err(Failure::new("no answer"));
        }
        // A server that refuses a request while it is being sent may reset the connection.
        _ if answer.is_empty() => return Ok("closed".to_owned()),
        _ => {}
    }
    let answer = String::from_utf8_lossy(&answer);
    let status = answer
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.get(2..5));
    let Some(status) = status else {
        return Err(Failure::new(format!("no HTTP: {answer:?}")));
    };
    let server_error = status.starts_with('5') && status != "503" && status != "504";
    match server_error {
        true => Err(Failure::new(format!(
            "an error of the server's own: {answer}"
        ))),
        false => Ok(status.to_owned()),
    }
}

fn noise(random: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = vec![0; random.random_range(1..2000)];
    random.fill_bytes(&mut bytes);
    bytes
}

/// Heads that are not quite right.
fn head(random: &mut ChaCha8Rng) -> Vec<u8> {
    let heads: [&[u8]; 10] = [
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        b"GET /v1/models/%ff%00 HTTP/1.1\r\nconnection: close\r\n\r\n",
        b"DELETE /v1/completions HTTP/1.1\r\nconnection: close\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.0\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\n\r\n",
    ];
    if random.random_range(0..4) == 0 {
        // More header than anybody needs.
        let name = "x".repeat(random.random_range(1..200_000));
        return format!("GET /health HTTP/1.1\r\nconnection: close\r\n{name}: 1\r\n\r\n")
            .into_bytes();
    }
    heads
        .choose(random)
        .map_or_else(Vec::new, |head| head.to_vec())
}

/// JSON that is wrong in one place or right, or no JSON.
fn body(random: &mut ChaCha8Rng) -> String {
    match random.random_range(0..10) {
        // Too deep, too large, or cut.
        0 => "[".repeat(random.random_range(1..50_000)),
        1 => format!(
            r#"{{"prompt": "{}"}}"#,
            "a".repeat(random.random_range(0..200_000))
        ),
        2 => {
            let text = object(random).to_string();
            let end = text.floor_char_boundary(random.random_range(0..text.len()));
            text[..end].to_owned()
        }
        3 => {
            // One byte is another one.
            let mut bytes = object(random).to_string().into_bytes();
            let at = random.random_range(0..bytes.len());
            bytes[at] = random.random_range(0..128);
            String::from_utf8_lossy(&bytes).into_owned()
        }
        _ => object(random).to_string(),
    }
}

/// A request for a few tokens, with some fields that are anything.
fn object(random: &mut ChaCha8Rng) -> Value {
    let prompts = [
        json!("the quick brown fox"),
        json!(["one", "two", "three"]),
        json!([5, 6, 7, 8]),
        json!([[5, 6, 7], [8, 9]]),
        json!("\u{0}\u{7f}\u{fffd}é漢🦀"),
        json!(vec![5; 300]),
    ];
    let mut object = json!({
        "prompt": prompts.choose(random),
        "max_tokens": random.random_range(0..6),
        "stream": random.random::<bool>(),
        "echo": random.random::<bool>(),
        "logprobs": random.random_range(0..3),
        "n": random.random_range(1..3),
        "temperature": random.random_range(0.0..2.0),
    });
    let fields = [
        "prompt",
        "max_tokens",
        "stream",
        "echo",
        "logprobs",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "seed",
        "model",
        "best_of",
        "suffix",
        "stream_options",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "user",
        "return_token_ids",
    ];
    for _ in 0..random.random_range(0..3) {
        if let Some(field) = fields.choose(random) {
            object[*field] = anything(random, 3);
        }
    }
    object
}

fn anything(random: &mut ChaCha8Rng, depth: u32) -> Value {
    match random.random_range(0..if depth == 0 { 8 } else { 10 }) {
        0 => Value::Null,
        1 => random.random::<bool>().into(),
        2 => random.random_range(-3..10).into(),
        3 => random.random::<i64>().into(),
        4 => u64::MAX.into(),
        5 => json!(random.random_range(-1e3..1e3)),
        6 => json!(f64::MAX),
        7 => "x".repeat(random.random_range(0..40)).into(),
        8 => (0..random.random_range(0..4))
            .map(|_| anything(random, depth - 1))
            .collect(),
        _ => json!({ "include_usage": anything(random, depth - 1) }),
    }
}
