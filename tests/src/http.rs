//! A small HTTP client that also sends what no client should: bytes as they are, slowly, or only a part of them.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use crate::failure::{Failure, Result, While};

/// How long a server may say nothing.
const PATIENCE: Duration = Duration::from_secs(60);

/// An answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// Its status.
    pub status: u16,
    headers: Vec<(String, String)>,
    /// What follows the headers.
    pub body: String,
}

impl Response {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers
            .find_map(|(other, value)| other.eq_ignore_ascii_case(name).then_some(value.as_str()))
    }

    /// The body as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).while_doing(format_args!("reading {:?}", self.body))
    }

    /// The body as JSON, if all went well.
    pub fn ok(&self) -> Result<Value> {
        match self.status {
            200 => self.json(),
            status => Err(Failure::new(format!("status {status}: {}", self.body))),
        }
    }
}

/// Gets a page.
pub fn get(server: SocketAddr, path: &str) -> Result<Response> {
    let head = format!("GET {path} HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\n\r\n");
    raw(server, head.as_bytes())
}

/// Posts JSON.
pub fn post(server: SocketAddr, path: &str, json: &Value) -> Result<Response> {
    raw(server, &request(server, path, &json.to_string()))
}

/// The bytes of a POST request.
pub fn request(server: SocketAddr, path: &str, body: &str) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body.as_bytes()].concat()
}

/// Sends bytes and reads the whole answer.
pub fn raw(server: SocketAddr, bytes: &[u8]) -> Result<Response> {
    let mut stream = connect(server)?;
    // A server that refuses a request need not read all of it.
    let _ = stream.write_all(bytes);
    let mut answer = Answer::read(stream)?;
    let mut body = Vec::new();
    answer.body.read_to_end(&mut body)?;
    Ok(Response {
        body: String::from_utf8(body)?,
        ..answer.response
    })
}

/// A connection whose reads end.
pub fn connect(server: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// An answer that comes in pieces, as server-sent events.
pub struct Events {
    body: BufReader<Body>,
    /// The answer without its body.
    pub response: Response,
}

impl Events {
    /// Posts JSON, and reads up to the body.
    pub fn post(server: SocketAddr, path: &str, json: &Value) -> Result<Events> {
        let mut stream = connect(server)?;
        stream.write_all(&request(server, path, &json.to_string()))?;
        let answer = Answer::read(stream)?;
        Ok(Events {
            body: BufReader::new(answer.body),
            response: answer.response,
        })
    }

    /// The data of the next event; none at the end of the answer.
    pub fn data(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        while self.body.read_line(&mut line)? > 0 {
            if let Some(data) = line.trim_end().strip_prefix("data: ") {
                return Ok(Some(data.to_owned()));
            }
            line.clear();
        }
        Ok(None)
    }

    /// All further events up to `[DONE]`.
    pub fn rest(&mut self) -> Result<Vec<Value>> {
        let mut events = Vec::new();
        while let Some(data) = self.data()? {
            if data == "[DONE]" {
                return Ok(events);
            }
            events.push(serde_json::from_str(&data)?);
        }
        Err(Failure::new(format!("no [DONE] after {events:?}")))
    }
}

struct Answer {
    response: Response,
    body: Body,
}

impl Answer {
    fn read(stream: TcpStream) -> Result<Answer> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let status = line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| Failure::new(format!("no HTTP answer: {line:?}")))?;
        let mut headers = Vec::new();
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            match line.trim_end().split_once(':') {
                Some((name, value)) => headers.push((name.to_owned(), value.trim().to_owned())),
                None => break,
            }
        }
        let response = Response {
            status,
            headers,
            body: String::new(),
        };
        let chunked = response.header("transfer-encoding") == Some("chunked");
        let left = response
            .header("content-length")
            .and_then(|length| length.parse().ok());
        let left = if chunked {
            0
        } else {
            left.unwrap_or(usize::MAX)
        };
        let body = Body {
            reader,
            chunked,
            left,
            over: false,
        };
        Ok(Answer { response, body })
    }
}

/// A body, of one piece or of chunks.
struct Body {
    reader: BufReader<TcpStream>,
    chunked: bool,
    /// Bytes left of the piece or chunk.
    left: usize,
    over: bool,
}

impl Body {
    /// Reads the size of the next chunk.
    fn begin_chunk(&mut self) -> io::Result<()> {
        let mut line = String::new();
        // The line end of the chunk before.
        while line.trim_end().is_empty() {
            line.clear();
            if self.reader.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        self.left = usize::from_str_radix(line.trim_end(), 16).map_err(io::Error::other)?;
        self.over = self.left == 0;
        Ok(())
    }
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.chunked && self.left == 0 && !self.over {
            self.begin_chunk()?;
        }
        let most = buffer.len().min(self.left);
        let read = self.reader.read(&mut buffer[..most])?;
        self.left -= read;
        Ok(read)
    }
}
