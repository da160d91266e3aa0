//! The asking side, for the command line: one request a connection, on a runtime of its own, so
//! that callers need none.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, runtime, time::timeout};

use super::protocol::{ErrorBody, PREFIX, Refusal};

/// Longer than the server takes for anything, so that its own words arrive.
const PATIENCE: Duration = Duration::from_secs(95);
/// The longest answer that is read: the status of ten thousand agents is a tenth of it.
const MAX_ANSWER: usize = 64 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("no daemon at `{}`", .0.display())]
    NoDaemon(PathBuf),
    /// The socket's mode keeps the caller out.
    #[error("this user may not use the control socket `{}`", .0.display())]
    NotAllowed(PathBuf),
    /// The daemon said no, and why.
    #[error(transparent)]
    Refused(Refusal),
    /// The connection failed.
    #[error("cannot {doing} the daemon at `{}`", socket.display())]
    Transport {
        /// What was attempted.
        doing: &'static str,
        /// The socket.
        socket: PathBuf,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An answer that makes no sense: the other side speaks something else.
    #[error("cannot read the daemon's answer to `{path}` (HTTP {status})")]
    Answer {
        /// The path that was asked.
        path: String,
        /// HTTP status of the answer.
        status: u16,
        /// Why it can't be read.
        source: serde_json::Error,
    },
}

/// A daemon, by its socket.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    runtime: runtime::Runtime,
    patience: Duration,
}

// === impl ClientError ===

impl ClientError {
    /// What to do about it, where that is known.
    pub fn help(&self) -> Option<&str> {
        match self {
            Self::NoDaemon(_) => Some("start it with `remit daemon`, or by its systemd unit"),
            Self::NotAllowed(_) => Some("members of the group `remit` may read; root may change"),
            Self::Refused(refusal) => refusal.help.as_deref(),
            Self::Transport { .. } => None,
            Self::Answer { .. } => Some("the daemon may be of another version"),
        }
    }
}

// === impl Client ===

impl Client {
    /// A client for the daemon at `socket`. Nothing is connected yet.
    ///
    /// # Errors
    /// When the system gives no descriptors for a runtime.
    pub fn new(socket: &Path) -> io::Result<Self> {
        let runtime = runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        Ok(Self {
            socket: socket.to_owned(),
            runtime,
            patience: PATIENCE,
        })
    }

    /// The same for somebody who wants to know soon, or that nobody answers.
    #[must_use]
    pub fn patient_for(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// `GET /v1PATH`; a query belongs to the path.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.ask(Method::GET, path, Bytes::new())
    }

    /// `POST /v1PATH` without a body.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.ask(Method::POST, path, Bytes::new())
    }

    /// `POST /v1PATH` with a JSON body.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn post_json<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.failed("ask", error))?;
        self.ask(Method::POST, path, body.into())
    }

    fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let (status, answer) = self.runtime.block_on(async {
            timeout(self.patience, self.exchange(method, path, body))
                .await
                .map_err(|error| self.failed("wait for", error))?
        })?;
        let unreadable = |source| ClientError::Answer {
            path: format!("{PREFIX}{path}"),
            status: status.as_u16(),
            source,
        };
        if status.is_success() {
            return serde_json::from_slice(&answer).map_err(unreadable);
        }
        let body: ErrorBody = serde_json::from_slice(&answer).map_err(unreadable)?;
        Err(ClientError::Refused(body.error))
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| self.unreachable(error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.failed("speak with", error))?;
        // On this runtime, which lives as long as the client; it ends with the connection.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(format!("{PREFIX}{path}"))
            .header(header::HOST, "remit")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| self.failed("ask", error))?;
        let answer = sender
            .send_request(request)
            .await
            .map_err(|error| self.failed("ask", error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| self.failed("hear", error))?;
        Ok((status, body.to_bytes()))
    }

    fn unreachable(&self, error: io::Error) -> ClientError {
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NoDaemon(self.socket.clone())
            }
            io::ErrorKind::PermissionDenied => ClientError::NotAllowed(self.socket.clone()),
            _ => self.failed("connect to", error),
        }
    }

    fn failed(
        &self,
        doing: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> ClientError {
        ClientError::Transport {
            doing,
            socket: self.socket.clone(),
            source: source.into(),
        }
    }
}
