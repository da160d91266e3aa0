//! From a question to its reply: who asked, what the guard says, what upstream says, and leases in
//! force before anything is told.

use std::{
    net::SocketAddr,
    sync::{Arc, MutexGuard, PoisonError, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use hickory_proto::op::ResponseCode;
use tokio::{sync::oneshot, time::timeout};
use tracing::warn;

use super::{
    super::{
        endpoint::is_status,
        guard::{Action, AddressLease, Guard, Outcome, Report},
        message::{self, Asked, ErrorCode, Reply, Unreadable, udp_limit},
        resolv::{self, Resolv},
        tally::{Came, Tally},
        upstream,
    },
    Client, Identity, LeaseError, Places, Request, SearchIn, Shared, Source, Transport,
};
use crate::policy::{AgentTables, Clock};

/// How long the daemon may take to say whose a question is, or that leases are in force.
const DAEMON: Duration = Duration::from_secs(3);
/// How long the search domains of who asked are looked for, in files that may be the agent's own.
const SEARCH: Duration = Duration::from_millis(250);
/// How often an answer is judged again because the scope changed under it.
const RETRIES: usize = 3;

/// A reply on its way, and what there is to count.
struct Answered {
    reply: Reply,
    came: Came,
    /// How long upstream took.
    upstream: Option<Duration>,
}

// === impl Answered ===

impl Answered {
    const fn of(reply: Reply, came: Came, upstream: Option<Duration>) -> Self {
        Self {
            reply,
            came,
            upstream,
        }
    }
}

// === impl Shared ===

impl Shared {
    pub(super) fn guard(&self) -> MutexGuard<'_, Guard> {
        // Whoever panicked with it has left leases at worst that are not in the kernel.
        self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn now(&self) -> Clock {
        (self.clock)()
    }

    /// The reply to a message; none when it gets none.
    pub(super) async fn handle(
        &self,
        places: &Places,
        client: Client,
        bytes: &[u8],
    ) -> Option<Vec<u8>> {
        let began = Instant::now();
        let asked = match message::read(bytes) {
            Ok(asked) => asked,
            Err(unreadable) => {
                // Whoever asks whether somebody is here is told so, and has done nothing wrong.
                if !is_status(bytes) {
                    self.dropped.malformed.fetch_add(1, Ordering::Relaxed);
                }
                return match unreadable {
                    Unreadable::Silent(_) => None,
                    Unreadable::Reply { reply, .. } => Some(reply),
                };
            }
        };
        let limit = match client.transport {
            Transport::Udp => udp_limit(&asked),
            Transport::Tcp => u16::MAX,
        };
        let Some(identity) = self.identify(client).await else {
            self.dropped.nobodys.fetch_add(1, Ordering::Relaxed);
            // The same to everybody who comes here by himself: nothing about any agent.
            let reply = Reply::to(&asked, ResponseCode::Refused).because(
                ErrorCode::Prohibited,
                "nobody's question: the DNS guard did not see it sent",
            );
            return Some(reply.bytes(limit));
        };
        let agent = Arc::clone(&identity.tables);
        let answered = self.answer(places, client, identity, asked).await;
        self.tally()
            .add(&agent.id, answered.came, began.elapsed(), answered.upstream);
        Some(answered.reply.bytes(limit))
    }

    /// The reply to what an agent asked, with all done that has to be done before.
    async fn answer(
        &self,
        places: &Places,
        client: Client,
        identity: Identity,
        asked: Asked,
    ) -> Answered {
        let action = self.judge_question(places, &identity, asked).await;
        let forward = match action {
            Action::Reply(reply, report) => {
                let why = report.as_ref().map_or("", |report| report.why.word());
                self.report(report, client).await;
                return Answered::of(reply, Came::Refused(why), None);
            }
            Action::Forward(forward, report) => {
                self.report(report, client).await;
                forward
            }
        };
        let began = Instant::now();
        let outcome = match self.upstream.acquire().await {
            Ok(_place) => {
                match upstream::ask(&self.servers(), &forward.name, forward.asked.kind).await {
                    Ok(message) => Outcome::Answered(Box::new(message)),
                    Err(why) => Outcome::Failed(why),
                }
            }
            Err(_closed) => Outcome::Failed("the guard is stopping".into()),
        };
        let upstream = Some(began.elapsed());
        let unleased = |text: &str| {
            let reply = Reply::to(&forward.asked, ResponseCode::ServFail)
                .because(ErrorCode::NotReady, text);
            Answered::of(reply, Came::Unleased, upstream)
        };
        let mut tables = identity.tables;
        for _ in 0..RETRIES {
            let release = {
                let now = self.now();
                self.guard().judge(&tables, &forward, outcome.clone(), &now)
            };
            if !release.addresses.is_empty() {
                let leased = self
                    .lease(&tables, release.leases, release.host, release.addresses)
                    .await;
                match leased {
                    Ok(()) => {}
                    Err(LeaseError::Changed(others)) => {
                        tables = others;
                        continue;
                    }
                    Err(LeaseError::Failed(why)) => {
                        return unleased(&format!("the leases are not in force: {why}"));
                    }
                }
            }
            let came = match (release.reply.code(), &release.report) {
                (ResponseCode::ServFail, _) => Came::Failed,
                (ResponseCode::Refused, Some(report)) => Came::Refused(report.why.word()),
                _ => Came::Answered,
            };
            self.report(release.report, client).await;
            return Answered::of(release.reply, came, upstream);
        }
        unleased("the scope changes faster than names resolve")
    }

    /// What becomes of a question. Search domains count only where a name is refused, so they are
    /// looked for only then.
    async fn judge_question(&self, places: &Places, identity: &Identity, asked: Asked) -> Action {
        let ask = |asked, search: &[String]| {
            let now = self.now();
            self.guard().ask(&identity.tables, search, asked, &now)
        };
        let action = ask(asked.clone(), &[]);
        if !action.is_about_the_name() {
            return action;
        }
        let search = self.search(places, &identity.search).await;
        if search.is_empty() {
            return action;
        }
        ask(asked, &search)
    }

    /// The search domains of who asked. Those of the host where its own can't be had in time.
    async fn search(&self, places: &Places, of: &SearchIn) -> Arc<[String]> {
        let own = || {
            let mut file = self.own.lock().unwrap_or_else(PoisonError::into_inner);
            // What can't be read says what it said last, and is told with the upstreams.
            let (read, _told) = file.read();
            Arc::from(read.search)
        };
        let process = match of {
            SearchIn::Known(domains) => return Arc::clone(domains),
            SearchIn::Process(process) if resolv::shares_files(*process) => return own(),
            SearchIn::Process(process) => *process,
        };
        let read = async {
            // One at a time: a reader that an agent's own file system holds up holds up nobody else.
            let place = Arc::clone(&places.reader).acquire_owned().await.ok()?;
            let (send, read) = oneshot::channel();
            thread::Builder::new()
                .name("remit-search".into())
                .spawn(move || {
                    let _place = place;
                    // Who asked may have given up.
                    drop(send.send(resolv::search_of(process)));
                })
                .ok()?;
            read.await.ok()?.ok()
        };
        match timeout(SEARCH, read).await {
            Ok(Some(domains)) => domains.into(),
            Ok(None) | Err(_) => own(),
        }
    }

    async fn identify(&self, client: Client) -> Option<Identity> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Identify { client, reply };
        timeout(DAEMON, async {
            self.requests.send(request).await.ok()?;
            answer.await.ok()?
        })
        .await
        .ok()
        .flatten()
    }

    async fn lease(
        &self,
        tables: &Arc<AgentTables>,
        leases: Vec<AddressLease>,
        host: String,
        addresses: Vec<std::net::IpAddr>,
    ) -> Result<(), LeaseError> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Lease {
            tables: Arc::clone(tables),
            leases,
            host,
            addresses,
            reply,
        };
        let told = timeout(DAEMON, async {
            self.requests.send(request).await.ok()?;
            answer.await.ok()
        });
        match told.await {
            Ok(Some(told)) => told,
            Ok(None) => Err(LeaseError::Failed("the daemon is stopping".into())),
            Err(_elapsed) => Err(LeaseError::Failed("the daemon did not answer".into())),
        }
    }

    async fn report(&self, report: Option<Report>, client: Client) {
        let Some(report) = report else { return };
        // Waits when the channel is full: no refusal goes untold, and only this agent waits.
        if let Err(error) = self.requests.send(Request::Report { report, client }).await {
            warn!(message = "The daemon takes no reports any more.", %error);
        }
    }

    fn servers(&self) -> Vec<SocketAddr> {
        let mut files = self.read_files().into_iter();
        let each = self.sources.iter().flat_map(|source| match source {
            Source::At(server) => vec![*server],
            Source::File(_) => files.next().map_or_else(Vec::new, |file| file.servers),
        });
        each.collect()
    }

    fn read_files(&self) -> Vec<Resolv> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let each = files.iter_mut().map(|file| {
            let (read, told) = file.read();
            if let Err(error) = told {
                warn!(message = "The host's resolv.conf can't be read; what it said last counts.", %error);
            }
            read
        });
        each.collect()
    }
}
