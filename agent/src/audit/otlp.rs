//! Events to an OpenTelemetry collector: OTLP over HTTP in its JSON form, to a collector on this
//! host or one that is reached without TLS, which then speaks TLS to wherever the logs go.
//!
//! The body of a log record is the OCSF event, structured; what dashboards filter by is in the
//! attributes, by the semantic conventions where those have a name.
//!
//! A collector that is slow or away costs nobody anything but its own events: they wait in a queue of
//! [`QUEUE`], are tried again for [`PATIENCE`], and what is given up is counted. The log has them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Request, StatusCode, Uri, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    net::TcpStream,
    sync::mpsc::{Receiver, Sender, channel, error::TrySendError},
    time::{sleep, timeout},
};

use super::{line::human, query::agent};

/// Events that wait for the collector.
pub const QUEUE: usize = 8192;
/// Events in one request.
const BATCH: usize = 256;
/// How long an event waits for others.
const GATHER: Duration = Duration::from_millis(500);
/// How long a collector that cannot take events is asked again.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long one request may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How long the end of the daemon waits for what is in the queue.
const LAST: Duration = Duration::from_secs(2);
/// The longest answer that is read.
const MAX_ANSWER: usize = 64 << 10;
/// The longest pause between two tries.
const PAUSE: Duration = Duration::from_secs(5);

/// Sends events from a thread of its own.
#[derive(Debug)]
pub struct Otlp {
    queue: Option<Sender<Value>>,
    lost: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// Where a collector is: `http://HOST:PORT` with or without a path; without one it is `/v1/logs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collector {
    host: String,
    port: u16,
    path: String,
}

/// What a try came to.
enum Tried {
    /// Taken, but for so many.
    Done(u64),
    /// It may take them later.
    Later,
    /// It never will.
    Never,
}

// === impl Collector ===

impl std::str::FromStr for Collector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || format!("`{text}` must be an address such as \"http://127.0.0.1:4318\"");
        let uri: Uri = text.parse().map_err(|_| form())?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(format!(
                    "`{text}`: TLS is left to a collector on this host, which this speaks to in the \
                     clear: \"http://127.0.0.1:4318\""
                ));
            }
            _ => return Err(form()),
        }
        Ok(Self {
            host: uri.host().ok_or_else(form)?.to_owned(),
            port: uri.port_u16().unwrap_or(4318),
            path: match uri.path() {
                "" | "/" => "/v1/logs".to_owned(),
                path => path.to_owned(),
            },
        })
    }
}

// === impl Otlp ===

impl Otlp {
    /// Starts the thread. Nothing is connected before there is an event.
    pub fn start(collector: Collector) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let (queue, events) = channel(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        let thread = thread::Builder::new()
            .name("otlp".to_owned())
            .spawn(move || runtime.block_on(serve(&collector, events, &counted)))?;
        Ok(Self {
            queue: Some(queue),
            lost,
            thread: Some(thread),
        })
    }

    /// Sends an event, sooner or later. Never waits.
    pub fn send(&self, event: &Value) {
        let Some(queue) = &self.queue else { return };
        match queue.try_send(event.clone()) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Closed(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Events that were given up, since the last call.
    pub fn take_lost(&self) -> u64 {
        self.lost.swap(0, Ordering::Relaxed)
    }
}

impl Drop for Otlp {
    fn drop(&mut self) {
        // The thread sends what is left, for `LAST` at most, and ends.
        drop(self.queue.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join().is_err();
        }
    }
}

async fn serve(collector: &Collector, mut events: Receiver<Value>, lost: &AtomicU64) {
    loop {
        let mut batch = Vec::new();
        if events.recv_many(&mut batch, BATCH).await == 0 {
            return;
        }
        let gathered =
            async { while batch.len() < BATCH && events.recv_many(&mut batch, BATCH).await > 0 {} };
        // What came until then is sent, full or not.
        let _gathered = timeout(GATHER, gathered).await.is_ok();
        let given_up = deliver(collector, &batch, &events).await;
        lost.fetch_add(given_up, Ordering::Relaxed);
    }
}

/// How many of these were given up.
async fn deliver(collector: &Collector, batch: &[Value], events: &Receiver<Value>) -> u64 {
    let all = batch.len() as u64;
    let body = Bytes::from(request(batch).to_string());
    let began = Instant::now();
    let mut pause = Duration::from_millis(100);
    loop {
        let tried = timeout(ANSWER, attempt(collector, body.clone())).await;
        match tried.unwrap_or(Tried::Later) {
            Tried::Done(rejected) => return rejected.min(all),
            Tried::Never => return all,
            Tried::Later => {}
        }
        // At the end of the daemon nobody waits for a collector that is away.
        let patience = if events.is_closed() { LAST } else { PATIENCE };
        if began.elapsed() + pause > patience {
            return all;
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE);
    }
}

async fn attempt(collector: &Collector, body: Bytes) -> Tried {
    match exchange(collector, body).await {
        Ok((status, answer)) if status.is_success() => Tried::Done(rejected(&answer)),
        // The four that the specification calls worth another try.
        Ok((status, _)) if [429, 502, 503, 504].contains(&status.as_u16()) => Tried::Later,
        Ok(_) => Tried::Never,
        Err(_) => Tried::Later,
    }
}

async fn exchange(
    collector: &Collector,
    body: Bytes,
) -> Result<(StatusCode, Bytes), Box<dyn std::error::Error + Send + Sync>> {
    let host = collector.host.trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, collector.port)).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::post(&collector.path)
        .header(
            header::HOST,
            format!("{}:{}", collector.host, collector.port),
        )
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONNECTION, "close")
        .body(Full::new(body))?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let bytes = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await?
            .to_bytes();
        Ok((status, bytes))
    };
    let (answered, _connection) = tokio::join!(answer, connection);
    answered
}

/// How many records a collector says that it has not taken.
fn rejected(answer: &[u8]) -> u64 {
    let answer: Value = serde_json::from_slice(answer).unwrap_or_default();
    match &answer["partialSuccess"]["rejectedLogRecords"] {
        Value::String(number) => number.parse().unwrap_or(0),
        number => number.as_u64().unwrap_or(0),
    }
}

// === the form ===

/// An `ExportLogsServiceRequest`.
fn request(events: &[Value]) -> Value {
    let first = events.first().unwrap_or(&Value::Null);
    let resource = [
        ("service.name", json!("remit")),
        ("service.version", json!(env!("CARGO_PKG_VERSION"))),
        ("host.name", first["device"]["hostname"].clone()),
        ("host.id", first["device"]["uid"].clone()),
    ];
    let records: Vec<_> = events.iter().map(record).collect();
    json!({ "resourceLogs": [{
        "resource": { "attributes": attributes(resource) },
        "scopeLogs": [{
            "scope": { "name": "remit", "version": env!("CARGO_PKG_VERSION") },
            "logRecords": records,
        }],
    }]})
}

fn record(event: &Value) -> Value {
    let nanos = event["time"]
        .as_u64()
        .unwrap_or(0)
        .saturating_mul(1_000_000);
    let (number, text) = severity(event["severity_id"].as_u64());
    let process = &event["actor"]["process"];
    let told = [
        ("event.name", event["metadata"]["event_code"].clone()),
        ("remit.line", json!(human(event, false))),
        ("remit.agent", json!(agent(event))),
        ("remit.verdict", event["unmapped"]["verdict"].clone()),
        ("remit.reason", event["unmapped"]["reason"].clone()),
        ("remit.count", event["count"].clone()),
        ("destination.address", event["dst_endpoint"]["ip"].clone()),
        ("destination.port", event["dst_endpoint"]["port"].clone()),
        (
            "network.transport",
            event["connection_info"]["protocol_name"].clone(),
        ),
        ("process.pid", process["pid"].clone()),
        ("process.executable.name", process["name"].clone()),
        ("process.executable.path", process["file"]["path"].clone()),
    ];
    json!({
        "timeUnixNano": nanos.to_string(),
        "observedTimeUnixNano": nanos.to_string(),
        "severityNumber": number,
        "severityText": text,
        "eventName": event["metadata"]["event_code"],
        "attributes": attributes(told),
        "body": any(event),
    })
}

fn severity(ocsf: Option<u64>) -> (u8, &'static str) {
    match ocsf {
        Some(2) => (10, "Low"),
        Some(3) => (13, "Medium"),
        Some(4) => (17, "High"),
        Some(5) => (18, "Critical"),
        Some(6) => (21, "Fatal"),
        _ => (9, "Informational"),
    }
}

/// Those that there are.
fn attributes<const N: usize>(told: [(&str, Value); N]) -> Vec<Value> {
    told.into_iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(key, value)| json!({ "key": key, "value": any(&value) }))
        .collect()
}

/// An `AnyValue`. Whole numbers are texts, as everywhere in Protobuf's JSON.
fn any(value: &Value) -> Value {
    match value {
        Value::Null => json!({}),
        Value::Bool(flag) => json!({ "boolValue": flag }),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => json!({ "intValue": whole.to_string() }),
            None => json!({ "doubleValue": number }),
        },
        Value::String(text) => json!({ "stringValue": text }),
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(any).collect();
            json!({ "arrayValue": { "values": items } })
        }
        Value::Object(members) => {
            let members: Vec<_> = members
                .iter()
                .map(|(key, value)| json!({ "key": key, "value": any(value) }))
                .collect();
            json!({ "kvlistValue": { "values": members } })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
    };

    use super::*;
    use crate::audit::record::tests::{host, violation};

    fn event() -> Value {
        violation().to_ocsf(&host(), 1)
    }

    /// Answers as many requests with these statuses and bodies; returns what was asked.
    fn collector(answers: Vec<(u16, &'static str)>) -> (Collector, JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let thread = thread::spawn(move || {
            let mut asked = Vec::new();
            for (status, body) in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut text = Vec::new();
                let mut piece = [0; 4096];
                loop {
                    let read = stream.read(&mut piece).unwrap();
                    text.extend_from_slice(&piece[..read]);
                    let request = String::from_utf8_lossy(&text);
                    let Some((head, rest)) = request.split_once("\r\n\r\n") else {
                        continue;
                    };
                    let length = head
                        .lines()
                        .find_map(|line| line.strip_prefix("content-length: "))
                        .unwrap();
                    if rest.len() >= length.parse().unwrap() {
                        break;
                    }
                }
                asked.push(String::from_utf8(text).unwrap());
                let length = body.len();
                write!(
                    stream,
                    "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
                )
                .unwrap();
            }
            asked
        });
        (format!("http://{address}").parse().unwrap(), thread)
    }

    #[test]
    fn events_arrive_in_the_form_of_the_specification() {
        let (at, asked) = collector(vec![(200, "{}")]);
        let otlp = Otlp::start(at).unwrap();
        otlp.send(&event());
        otlp.send(&event());
        let asked = asked.join().unwrap();
        assert_eq!(otlp.take_lost(), 0);
        let (head, body) = asked[0].split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("POST /v1/logs HTTP/1.1\r\n"), "{head}");
        assert!(head.contains("content-type: application/json"), "{head}");
        let body: Value = serde_json::from_str(body).unwrap();
        let of = &body["resourceLogs"][0];
        let service = &of["resource"]["attributes"][0];
        assert_eq!(
            *service,
            json!({ "key": "service.name", "value": { "stringValue": "remit" } })
        );
        let records = of["scopeLogs"][0]["logRecords"].as_array().unwrap();
        assert_eq!(records.len(), 2);
        let record = &records[0];
        let event = event();
        let nanos = event["time"].as_u64().unwrap() * 1_000_000;
        assert_eq!(record["timeUnixNano"], nanos.to_string());
        assert_eq!(record["eventName"], "RM1001");
        let told = record["attributes"].as_array().unwrap();
        let port = told
            .iter()
            .find(|told| told["key"] == "destination.port")
            .unwrap();
        assert_eq!(port["value"], json!({ "intValue": "443" }));
        // The body is the event, whole.
        assert_eq!(plain(&record["body"]), event);
    }

    /// An `AnyValue` read back.
    fn plain(any: &Value) -> Value {
        let (kind, value) = match any.as_object().unwrap().iter().next() {
            None => return Value::Null,
            Some(member) => member,
        };
        match kind.as_str() {
            "intValue" => json!(value.as_str().unwrap().parse::<i64>().unwrap()),
            "arrayValue" => {
                let values = value["values"].as_array().unwrap();
                values.iter().map(plain).collect()
            }
            "kvlistValue" => {
                let values = value["values"].as_array().unwrap();
                let member = |pair: &Value| {
                    let key = pair["key"].as_str().unwrap().to_owned();
                    (key, plain(&pair["value"]))
                };
                Value::Object(values.iter().map(member).collect())
            }
            _ => value.clone(),
        }
    }

    #[test]
    fn a_collector_that_cannot_now_is_asked_again() {
        let (at, asked) = collector(vec![(503, ""), (429, ""), (200, "")]);
        let otlp = Otlp::start(at).unwrap();
        otlp.send(&event());
        let asked = asked.join().unwrap();
        assert!(asked[0] == asked[1] && asked[1] == asked[2]);
        assert_eq!(otlp.take_lost(), 0);
    }

    #[test]
    fn what_is_not_taken_is_counted() {
        for (answers, lost) in [
            (vec![(400, "")], 3),
            (
                vec![(200, r#"{"partialSuccess":{"rejectedLogRecords":"2"}}"#)],
                2,
            ),
        ] {
            let (at, asked) = collector(answers);
            let mut otlp = Otlp::start(at).unwrap();
            for _ in 0..3 {
                otlp.send(&event());
            }
            asked.join().unwrap();
            drop(otlp.queue.take());
            otlp.thread.take().unwrap().join().unwrap();
            assert_eq!(otlp.take_lost(), lost);
        }
    }

    #[test]
    fn a_collector_that_is_away_holds_up_nobody() {
        // Nobody listens there any more.
        let gone = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let mut otlp = Otlp::start(format!("http://{gone}").parse().unwrap()).unwrap();
        let began = Instant::now();
        let more = QUEUE as u64 + 3 * BATCH as u64;
        for _ in 0..more {
            otlp.send(&json!({}));
        }
        assert!(began.elapsed() < Duration::from_secs(5));
        drop(otlp.queue.take());
        let lost = Arc::clone(&otlp.lost);
        let began = Instant::now();
        drop(otlp.thread.take());
        while lost.load(Ordering::Relaxed) == 0 && began.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(20));
        }
        assert!(lost.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn addresses_are_plain_http() {
        let at: Collector = "http://127.0.0.1:4318".parse().unwrap();
        assert_eq!((at.port, at.path.as_str()), (4318, "/v1/logs"));
        let at: Collector = "http://[::1]/otlp/v1/logs".parse().unwrap();
        assert_eq!((at.port, at.path.as_str()), (4318, "/otlp/v1/logs"));
        for wrong in ["127.0.0.1:4318", "https://c:4318", "ftp://c", "http://", ""] {
            wrong.parse::<Collector>().unwrap_err();
        }
    }
}
