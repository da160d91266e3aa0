//! The control API as `curl --unix-socket` would ask it: without a process for each request, where
//! time is what is measured.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::daemon::Place;

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Body.
    pub body: Value,
}

/// A request that was sent and not answered yet.
pub struct Pending(UnixStream);

/// Sends a request and takes the answer.
pub fn ask(place: &Place, method: &str, path: &str, body: Option<&Value>) -> Result<Answer> {
    send(&place.at("run/remit.sock"), method, path, body)?.answer()
}

/// Sends a request.
pub fn send(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Result<Pending> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("no daemon at {}", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let body = body.map_or_else(String::new, Value::to_string);
    let kind = if body.is_empty() {
        ""
    } else {
        "Content-Type: application/json\r\n"
    };
    write!(
        stream,
        "{method} /v1{path} HTTP/1.1\r\nHost: remit\r\nConnection: close\r\n{kind}\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    Ok(Pending(stream))
}

impl Pending {
    /// Takes the answer.
    pub fn answer(mut self) -> Result<Answer> {
        let mut text = String::new();
        self.0.read_to_string(&mut text)?;
        let (head, body) = text
            .split_once("\r\n\r\n")
            .with_context(|| format!("no HTTP answer: {text:?}"))?;
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .with_context(|| format!("no status in {head:?}"))?;
        let body = serde_json::from_str(body).with_context(|| format!("not JSON: {body:?}"))?;
        Ok(Answer { status, body })
    }
}
