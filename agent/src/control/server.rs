//! The serving side of the control socket. It accepts, settles who the peer is, checks rights, and
//! hands what is left on as a [`Call`]. One request a connection, and a bound on everything: how
//! long a request may take to arrive, how long it is, how long the answer may take, how many
//! connections there are. Agents and strangers have a share of connections of their own, so that
//! they cannot keep an administrator out.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::{
    Extension, Router,
    body::Body,
    extract::{DefaultBodyLimit, Path as UrlPath, Query, Request as HttpRequest, State, rejection},
    http::{Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::unistd::{Gid, Group};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    Call, Caller, Hold, HoldState, Processes, Reply, Request, Resume, Rights,
    peer::{self, Rules},
    protocol::{Code, ErrorBody, GuardQuestion, HoldRequest, Question, Refusal, ReloadRequest},
};

/// The longest body: requests are a few words.
const MAX_BODY: usize = 16 << 10;
/// How long a request may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(10);
/// How long an answer may take that only needs looking up.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a change may take: a reload compiles and writes everything.
const CHANGE: Duration = Duration::from_secs(60);
/// How long a connection may last in all: the longest of the above, and time to read the answer.
const CONNECTION: Duration = Duration::from_secs(90);
/// Connections at a time of those who may ask.
const ADMINISTRATORS: usize = 64;
/// Connections at a time of governed callers and strangers.
const OTHERS: usize = 16;
/// Pause after an accept that failed for want of something, such as descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody answers there.
    #[error("another daemon answers at `{}`", .0.display())]
    InUse(PathBuf),
    /// Something is there that is no socket, and is not ours to remove.
    #[error("`{}` is there and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The system said no.
    #[error("cannot {doing} `{}`", path.display())]
    Io {
        /// What was attempted.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A bound control socket. Dropping it removes the socket file, unless a later daemon has put its
/// own there.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    identity: (u64, u64),
    readers: Option<u32>,
}

// === impl Listener ===

impl Listener {
    /// Makes the socket file: `0660` and owned by `group` where that exists, `0600` where not. A
    /// file that nobody answers behind is replaced.
    ///
    /// # Errors
    /// When another daemon answers there, or the file can't be made.
    pub fn bind(path: &Path, group: &str) -> Result<Self, BindError> {
        let failed = |doing: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| BindError::Io {
                doing,
                path,
                source,
            }
        };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed("create", folder))?;
        }
        make_room(path)?;

        // Made under another name and renamed when its rights are right: nobody meets it half-made.
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".new");
        let temporary = PathBuf::from(temporary);
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &temporary)(error));
            }
            Ok(()) | Err(_) => {}
        }
        let socket = UnixListener::bind(&temporary).map_err(failed("bind", &temporary))?;
        let readers = Group::from_name(group)
            .ok()
            .flatten()
            .map(|group| group.gid);
        let mode = if readers.is_some() { 0o660 } else { 0o600 };
        if readers.is_some() {
            nix::unistd::chown(&temporary, None, readers)
                .map_err(|error| failed("change the group of", &temporary)(error.into()))?;
        }
        fs::set_permissions(&temporary, fs::Permissions::from_mode(mode))
            .map_err(failed("set the mode of", &temporary))?;
        socket
            .set_nonblocking(true)
            .map_err(failed("listen at", path))?;
        let identity = identity(&temporary).map_err(failed("read", &temporary))?;
        fs::rename(&temporary, path).map_err(failed("create", path))?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            identity,
            readers: readers.map(Gid::as_raw),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            debug!(message = "The socket file stays behind.", path = %self.path.display(), %error);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// Whether `path` is free, or holds a socket that nobody answers behind (rename replaces it).
fn make_room(path: &Path) -> Result<(), BindError> {
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !found.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(BindError::InUse(path.to_owned())),
        Err(_) => Ok(()),
    }
}

// === serving ===

/// Serves for as long as the future is polled; dropping it ends every connection.
///
/// `roots` are the governed cgroups, as `/proc/PID/cgroup` writes them. When the receiving end of `calls` is
/// gone, callers are told that the daemon is stopping.
///
/// # Errors
/// When the socket can't be handed to the runtime. A failed accept is none: it is logged, and
/// accepting goes on.
pub async fn serve(
    listener: Listener,
    roots: Vec<String>,
    calls: mpsc::Sender<Call>,
) -> io::Result<()> {
    let rules = Rules {
        roots,
        readers: listener.readers,
    };
    let socket = tokio::net::UnixListener::from_std(listener.socket.try_clone()?)?;
    let routes = routes(calls);
    let shares = Shares::default();
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            // Also beyond the bound a connection is accepted, if only to be closed: who the peer is
            // must be settled at once, not when the queue gets to it.
            Ok((stream, _)) => admit(stream, &rules, &shares, &routes, &mut connections),
            Err(error) => {
                warn!(message = "Cannot accept a control connection.", %error);
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// How many connections there may be.
struct Shares {
    administrators: Arc<Semaphore>,
    others: Arc<Semaphore>,
}

impl Default for Shares {
    fn default() -> Self {
        Self {
            administrators: Arc::new(Semaphore::new(ADMINISTRATORS)),
            others: Arc::new(Semaphore::new(OTHERS)),
        }
    }
}

fn admit(
    stream: tokio::net::UnixStream,
    rules: &Rules,
    shares: &Shares,
    routes: &Router,
    connections: &mut JoinSet<()>,
) {
    let caller = match peer::settle(&stream, rules) {
        Ok(caller) => caller,
        Err(error) => {
            warn!(message = "Cannot tell who is at the control socket.", %error);
            return;
        }
    };
    let share = match caller.rights {
        Rights::Change | Rights::Read => &shares.administrators,
        Rights::OnlySelf | Rights::Nothing => &shares.others,
    };
    let Ok(place) = Arc::clone(share).try_acquire_owned() else {
        warn!(
            message = "Too many control connections; one was closed.",
            uid = caller.uid
        );
        return;
    };
    let service = TowerToHyperService::new(routes.clone().layer(Extension(caller)));
    connections.spawn(async move {
        let _place = place;
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(ARRIVAL)
            .keep_alive(false)
            .max_buf_size(MAX_BODY)
            .serve_connection(TokioIo::new(stream), service);
        match timeout(CONNECTION, connection).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(message = "A control connection broke.", %error),
            Err(_) => debug!(message = "A control connection took too long."),
        }
    });
}

// === requests ===

pub(super) type Calls = mpsc::Sender<Call>;

fn routes(calls: Calls) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/agents", get(agents))
        .route("/v1/agents/{id}", get(agent))
        .route("/v1/agents/{id}/suspend", post(suspend))
        .route("/v1/agents/{id}/resume", post(resume))
        .route("/v1/agents/{id}/revoke", post(revoke))
        .route("/v1/agents/{id}/probe", post(probe))
        .route("/v1/explain", get(explain).post(attached))
        .route("/v1/guard", get(guard))
        .route("/v1/metrics", get(metrics))
        .route("/v1/reconcile", get(compare).post(repair))
        .route("/v1/reload", post(reload))
        .route("/v1/run", post(run))
        .route("/v1/self", get(myself))
        .route("/v1/traffic", get(traffic))
        .fallback(no_path)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        // Outermost, so that rights come before anything else, also before a 404.
        .layer(middleware::from_fn(check_rights))
        .with_state(calls)
}

async fn check_rights(
    Extension(caller): Extension<Caller>,
    request: HttpRequest,
    next: Next,
) -> Response {
    match may(&caller, request.method(), request.uri().path()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            warn!(
                message = "A control request was refused.",
                method = %request.method(),
                path = request.uri().path(),
                uid = caller.uid,
                pid = caller.pid,
                cgroup = caller.cgroup,
            );
            refuse(refusal)
        }
    }
}

/// Whether the caller may ask this at all.
fn may(caller: &Caller, method: &Method, path: &str) -> Result<(), Refusal> {
    let asks_self = path == "/v1/self" && method == Method::GET;
    match caller.rights {
        Rights::OnlySelf if asks_self => Ok(()),
        Rights::OnlySelf => Err(Refusal::new(
            Code::Forbidden,
            match &caller.cgroup {
                Some(path) => format!("callers in the governed cgroup `{path}` may not ask this"),
                None => "it could not be told in which cgroup the caller runs, so it counts as \
                         governed and may not ask this"
                    .to_owned(),
            },
        )
        .help("`GET /v1/self` says who you are, what you may reach and whom to ask for more")),
        Rights::Nothing => Err(Refusal::new(
            Code::Forbidden,
            format!("user {} may not use the control socket", caller.uid),
        )
        .help("members of the group `remit` may read; root may change")),
        Rights::Change | Rights::Read if asks_self => Err(Refusal::new(
            Code::NotGoverned,
            "the caller runs outside every governed root: nothing restricts it here",
        )),
        Rights::Change => Ok(()),
        Rights::Read if method == Method::GET || method == Method::HEAD => Ok(()),
        Rights::Read => Err(Refusal::new(
            Code::Forbidden,
            format!("user {} may read, not change", caller.uid),
        )
        .help("only root may change: try sudo")),
    }
}

async fn status(state: State<Calls>, caller: Extension<Caller>) -> Response {
    ask(state, caller, ANSWER, Request::Status).await
}

async fn traffic(state: State<Calls>, caller: Extension<Caller>) -> Response {
    ask(state, caller, ANSWER, Request::Traffic).await
}

async fn agents(state: State<Calls>, caller: Extension<Caller>) -> Response {
    ask(state, caller, ANSWER, Request::Agents).await
}

async fn agent(state: State<Calls>, caller: Extension<Caller>, id: PathId) -> Response {
    match path_id(id) {
        Ok(id) => ask(state, caller, ANSWER, |reply| Request::Agent(id, reply)).await,
        Err(refusal) => refuse(refusal),
    }
}

async fn explain(
    state: State<Calls>,
    caller: Extension<Caller>,
    question: Result<Query<Question>, rejection::QueryRejection>,
) -> Response {
    match question {
        Ok(Query(question)) => {
            ask(state, caller, ANSWER, |reply| {
                Request::Explain(question, reply)
            })
            .await
        }
        Err(error) => refuse(
            Refusal::new(Code::BadRequest, error.body_text())
                .help("the form is `?agent=ID&addr=ADDRESS&port=NUMBER&protocol=NUMBER`"),
        ),
    }
}

async fn attached(state: State<Calls>, caller: Extension<Caller>, body: Sent) -> Response {
    match read(
        body,
        r#"the form is `{"agent": "ID", "addr": "ADDRESS", "port": NUMBER}`"#,
    ) {
        Ok(body) => {
            ask(state, caller, CHANGE, |reply| {
                Request::Attached(body, reply)
            })
            .await
        }
        Err(refusal) => refuse(refusal),
    }
}

async fn probe(state: State<Calls>, caller: Extension<Caller>, id: PathId) -> Response {
    match path_id(id) {
        Ok(id) => ask(state, caller, CHANGE, |reply| Request::Probe(id, reply)).await,
        Err(refusal) => refuse(refusal),
    }
}

async fn guard(
    state: State<Calls>,
    caller: Extension<Caller>,
    question: Result<Query<GuardQuestion>, rejection::QueryRejection>,
) -> Response {
    match question {
        Ok(Query(question)) => {
            ask(state, caller, ANSWER, |reply| {
                Request::Guard(question.cgroup, reply)
            })
            .await
        }
        Err(error) => refuse(
            Refusal::new(Code::BadRequest, error.body_text()).help("the form is `?cgroup=PATH`"),
        ),
    }
}

async fn suspend(
    state: State<Calls>,
    caller: Extension<Caller>,
    id: PathId,
    body: Sent,
) -> Response {
    hold(state, caller, HoldState::Suspended, id, body).await
}

async fn revoke(
    state: State<Calls>,
    caller: Extension<Caller>,
    id: PathId,
    body: Sent,
) -> Response {
    hold(state, caller, HoldState::Revoked, id, body).await
}

async fn hold(
    calls: State<Calls>,
    caller: Extension<Caller>,
    state: HoldState,
    id: PathId,
    body: Sent,
) -> Response {
    let read = || {
        let id = path_id(id)?;
        let body: HoldRequest = read(body, HOLD_FORM)?;
        let processes = match (body.kill, body.freeze) {
            (false, false) => Processes::Keep,
            (true, false) => Processes::Kill,
            (false, true) => Processes::Freeze,
            (true, true) => {
                let both = "`kill` and `freeze` exclude each other";
                return Err(Refusal::new(Code::BadRequest, both));
            }
        };
        Ok(Hold {
            id,
            state,
            reason: body.reason,
            processes,
        })
    };
    match read() {
        Ok(hold) => ask(calls, caller, CHANGE, |reply| Request::Hold(hold, reply)).await,
        Err(refusal) => refuse(refusal),
    }
}

async fn resume(
    state: State<Calls>,
    caller: Extension<Caller>,
    id: PathId,
    body: Sent,
) -> Response {
    let read = || {
        let id = path_id(id)?;
        let body: HoldRequest = read(body, HOLD_FORM)?;
        if body.kill || body.freeze {
            let neither = "a resume neither kills nor freezes";
            return Err(Refusal::new(Code::BadRequest, neither));
        }
        Ok(Resume {
            id,
            reason: body.reason,
        })
    };
    match read() {
        Ok(resume) => {
            ask(state, caller, CHANGE, |reply| {
                Request::Resume(resume, reply)
            })
            .await
        }
        Err(refusal) => refuse(refusal),
    }
}

async fn compare(state: State<Calls>, caller: Extension<Caller>) -> Response {
    reconcile(state, caller, false).await
}

async fn repair(state: State<Calls>, caller: Extension<Caller>) -> Response {
    reconcile(state, caller, true).await
}

/// Reading everything back takes as long as a change, also where nothing is mended.
async fn reconcile(state: State<Calls>, caller: Extension<Caller>, repair: bool) -> Response {
    ask(state, caller, CHANGE, |reply| Request::Reconcile {
        repair,
        reply,
    })
    .await
}

async fn reload(state: State<Calls>, caller: Extension<Caller>, body: Sent) -> Response {
    let request = match body {
        Ok(body) if body.is_empty() => Ok(ReloadRequest::default()),
        body => read(body, r#"the form is `{"accept_clock": true}`, or no body"#),
    };
    match request {
        Ok(request) => {
            ask(state, caller, CHANGE, |reply| {
                Request::Reload(request, reply)
            })
            .await
        }
        Err(refusal) => refuse(refusal),
    }
}

async fn run(state: State<Calls>, caller: Extension<Caller>, body: Sent) -> Response {
    match read(body, r#"the form is `{"agent": "ID"}`"#) {
        Ok(body) => ask(state, caller, CHANGE, |reply| Request::Run(body, reply)).await,
        Err(refusal) => refuse(refusal),
    }
}

/// A body as it arrived, or why it did not.
type Sent = Result<Bytes, rejection::BytesRejection>;
/// The id in a path, or why there is none.
type PathId = Result<UrlPath<String>, rejection::PathRejection>;

const HOLD_FORM: &str = r#"the form is `{"reason": "TEXT"}`, and to suspend or revoke also `"kill"` or `"freeze": true`"#;

/// Reads a body as JSON whatever its content type says: `curl -d` calls everything a form.
fn read<T: DeserializeOwned>(body: Sent, form: &str) -> Result<T, Refusal> {
    let body = body.map_err(|error| {
        let code = match error.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Code::TooLarge,
            _ => Code::BadRequest,
        };
        Refusal::new(code, error.body_text())
    })?;
    serde_json::from_slice(&body).map_err(|error| {
        Refusal::new(Code::BadRequest, format!("cannot read the body: {error}")).help(form)
    })
}

fn path_id(id: PathId) -> Result<String, Refusal> {
    id.map(|UrlPath(id)| id)
        .map_err(|error| Refusal::new(Code::BadRequest, error.body_text()))
}

async fn metrics(State(calls): State<Calls>, Extension(caller): Extension<Caller>) -> Response {
    exposition(&calls, caller).await
}

/// Metrics, as text and not as JSON.
pub(super) async fn exposition(calls: &Calls, caller: Caller) -> Response {
    match put(calls, caller, ANSWER, Request::Metrics).await {
        Ok(metrics) => {
            let content = [(header::CONTENT_TYPE, metrics.content_type)];
            (StatusCode::OK, content, Body::from(metrics.text)).into_response()
        }
        Err(refusal) => refuse(refusal),
    }
}

async fn myself(state: State<Calls>, caller: Extension<Caller>) -> Response {
    ask(state, caller, ANSWER, Request::Myself).await
}

async fn no_path(request: HttpRequest) -> Response {
    let path = request.uri().path();
    refuse(Refusal::new(
        Code::NotFound,
        format!("no such path `{path}`"),
    ))
}

async fn no_method(request: HttpRequest) -> Response {
    let (method, path) = (request.method(), request.uri().path());
    refuse(Refusal::new(
        Code::MethodNotAllowed,
        format!("`{path}` does not take {method}"),
    ))
}

/// Hands a request on and waits for the answer.
async fn ask<T: Serialize>(
    State(calls): State<Calls>,
    Extension(caller): Extension<Caller>,
    patience: Duration,
    request: impl FnOnce(Reply<T>) -> Request,
) -> Response {
    match put(&calls, caller, patience, request).await {
        Ok(answer) => json(StatusCode::OK, &answer),
        Err(refusal) => refuse(refusal),
    }
}

async fn put<T>(
    calls: &Calls,
    caller: Caller,
    patience: Duration,
    request: impl FnOnce(Reply<T>) -> Request,
) -> Result<T, Refusal> {
    let (reply, answer) = oneshot::channel();
    let call = Call {
        caller,
        request: request(reply),
    };
    let answered = timeout(patience, async {
        let stopping = || Refusal::new(Code::Unavailable, "the daemon is stopping");
        calls.send(call).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| {
            Refusal::new(
                Code::Internal,
                "the daemon dropped the request without an answer",
            )
        })?
    });
    match answered.await {
        Ok(answered) => answered,
        Err(_) => Err(Refusal::new(
            Code::Timeout,
            format!("no answer from the daemon in {} s", patience.as_secs()),
        )),
    }
}

fn refuse(error: Refusal) -> Response {
    let status = StatusCode::from_u16(error.code.status());
    json(
        status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        &ErrorBody { error },
    )
}

/// One line of JSON, so that `curl` leaves the prompt where it belongs.
fn json(status: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(mut body) => {
            body.push(b'\n');
            let content = [(header::CONTENT_TYPE, "application/json")];
            (status, content, Body::from(body)).into_response()
        }
        Err(error) => {
            warn!(message = "Cannot write an answer as JSON.", %error);
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}
