//! Metrics on a loopback address, for scrapers that cannot use a unix socket. It answers
//! `GET /metrics` and nothing else.
//!
//! TCP tells nothing of who asks, so whoever on this host may connect may read: the names of agents,
//! how much each is refused and for which reason. An agent with loopback `own` or `none` may not
//! connect: the listener is nobody's of its own.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, extract::State, response::Response, routing::get};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    Caller,
    server::{Calls, exposition},
};

/// How long a request may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(5);
/// How long a connection may last in all.
const CONNECTION: Duration = Duration::from_secs(20);
/// Connections at a time: what is more waits in the listener's queue.
const SCRAPERS: usize = 8;
/// The longest request.
const REQUEST: usize = 16 << 10;
/// Pause after an accept that failed for want of something, such as descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens there. The settings let through loopback addresses alone.
///
/// # Errors
/// When the address cannot be had.
pub fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves for as long as the future is polled.
///
/// # Errors
/// When the socket can't be handed to the runtime.
pub async fn serve(listener: std::net::TcpListener, calls: Calls) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .with_state(calls);
    let places = Arc::new(Semaphore::new(SCRAPERS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return Ok(());
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(message = "Cannot accept a scraper.", %error);
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(routes.clone());
        tokio::spawn(async move {
            let _place = place;
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(ARRIVAL)
                .keep_alive(false)
                .max_buf_size(REQUEST)
                .serve_connection(TokioIo::new(stream), service);
            match timeout(CONNECTION, connection).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(message = "A scraper's connection broke.", %error),
                Err(_) => debug!(message = "A scraper took too long."),
            }
        });
    }
}

async fn metrics(State(calls): State<Calls>) -> Response {
    exposition(&calls, Caller::unknown()).await
}
