//! Hostile bytes at both ends of the DNS guard: what an agent sends, and what an upstream answers.
//! Whatever they are, the guard ends, stays inside its bounds, asks for nothing out of scope, and
//! tells and leases no address that the scope does not open.
//!
//! `dns_corpus/` keeps messages that are worth trying each time: one of each kind, and whatever
//! broke something once.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has failed"
)]

use std::{fs, net::IpAddr, path::Path, sync::LazyLock};

use hickory_proto::{
    op::Message,
    rr::{Name, RData, RecordType},
};
use remit::{
    dns::{
        budget::Limit,
        guard::{Action, Forward, Guard, KINDS, Limits, Outcome},
        lease::Bounds,
        message, name,
        resolv::Resolv,
    },
    policy::{self, AgentTables, Clock, Resolution, Source, SourceKind},
};

/// 2026-10-01T00:00:00Z
const NOW: i64 = 1_790_812_800_000;
const CLOCK: Clock = Clock::at(1 << 50, NOW);
const PER_NAME: usize = 8;

static AGENT: LazyLock<AgentTables> = LazyLock::new(|| {
    let text = "schema = 1\n[agent]\nid = \"a\"\nowner = \"o\"\n[lifecycle]\nstate = \"active\"\n\
                approved_by = \"p\"\nexpires = 2027-12-31T00:00:00Z\n[selector]\ncgroup = \
                [\"/r/a\"]\n[[scope.allow]]\nto = \"api.example.com\"\nports = [443]\n\
                [[scope.allow]]\nto = \"**.example.com\"\nports = [80]\n[[scope.allow]]\nto = \
                \"192.0.2.0/24\"\nports = [443]\n[[scope.deny]]\nto = \"bad.example.com\"\n";
    let source = Source {
        path: "a.toml".into(),
        text: text.into(),
        kind: SourceKind::Agent,
    };
    let compilation = policy::compile(&[source], NOW);
    assert!(!compilation.has_errors(), "{:?}", compilation.findings);
    (*compilation.agents[0]).clone()
});

fn guard() -> Guard {
    Guard::new(Limits {
        min_lease: 60_000_000_000,
        max_lease: 3_600_000_000_000,
        budget: Limit { names: 100 },
        bounds: Bounds {
            per_name: PER_NAME,
            per_agent: 64,
        },
    })
}

/// What an agent sends.
fn question(bytes: &[u8]) {
    let asked = match message::read(bytes) {
        Ok(asked) => asked,
        Err(message::Unreadable::Silent(_)) => return,
        Err(message::Unreadable::Reply { reply, .. }) => {
            assert_eq!(reply[..2], bytes[..2], "another id");
            assert!(reply.len() <= 512);
            Message::from_vec(&reply).unwrap();
            return;
        }
    };
    match guard().ask(&AGENT, &["corp.example".into()], asked.clone(), &CLOCK) {
        Action::Reply(reply, report) => {
            let report = report.expect("a refusal without a word");
            assert!(
                report.name.len() <= 255
                    && report
                        .name
                        .bytes()
                        .all(|b| b.is_ascii_graphic() || b == b' ')
            );
            for limit in [512, message::udp_limit(&asked), u16::MAX] {
                let bytes = reply.bytes(limit);
                assert!(bytes.len() <= usize::from(limit) && !bytes.is_empty());
                let told = Message::from_vec(&bytes).unwrap();
                assert_eq!(told.metadata.id, asked.id);
                assert!(told.answers.is_empty());
            }
        }
        Action::Forward(forward, _) => {
            let host = name::canonical(&forward.name).unwrap();
            let reverse = name::reversed(&forward.name);
            let granted = matches!(
                policy::resolve(&AGENT, &host, &CLOCK),
                Resolution::Granted(_)
            );
            let known = reverse.is_some_and(|addr| policy::reaches(&AGENT, addr, &CLOCK));
            assert!(granted || known, "{host} is asked for");
            assert!(KINDS.contains(&asked.kind) || asked.kind == RecordType::PTR);
            // The whole of what leaves: header, name, type, class, and an OPT without options.
            let sent = message::question(1, &forward.name, asked.kind).unwrap();
            assert_eq!(sent.len(), 12 + host.len() + 2 + 4 + 11);
            assert!(!host.bytes().any(|byte| byte.is_ascii_uppercase()));
        }
    }
}

fn forward(kind: RecordType) -> Forward {
    let name = Name::from_ascii("api.example.com.").unwrap();
    let bytes = message::question(1, &name, kind).unwrap();
    let asked = message::read(&bytes).unwrap();
    match guard().ask(&AGENT, &[], asked, &CLOCK) {
        Action::Forward(forward, _) => forward,
        Action::Reply(_, report) => panic!("{report:?}"),
    }
}

/// What an upstream answers, to whatever kind it says that it was asked for.
fn answer(bytes: &[u8]) {
    let id = bytes.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
    for kind in KINDS {
        let forward = forward(kind);
        let Ok(message) = message::answer(bytes, id, &forward.name, kind, false) else {
            continue;
        };
        let mut guard = guard();
        let outcome = Outcome::Answered(Box::new(message));
        let release = guard.judge(&AGENT, &forward, outcome, &CLOCK);
        assert!(release.leases.len() <= PER_NAME);
        let leased: Vec<IpAddr> = release.leases.iter().map(|lease| lease.addr).collect();
        for addr in &leased {
            assert!(!policy::is_inside(*addr), "{addr} is leased");
        }
        for limit in [512, 1232, u16::MAX] {
            let bytes = release.reply.bytes(limit);
            assert!(bytes.len() <= usize::from(limit) && !bytes.is_empty());
            let told = Message::from_vec(&bytes).unwrap();
            for record in &told.answers {
                let addr: IpAddr = match &record.data {
                    RData::A(a) => a.0.into(),
                    RData::AAAA(aaaa) => aaaa.0.into(),
                    _ => continue,
                };
                let open = leased.contains(&addr) || policy::reaches(&AGENT, addr, &CLOCK);
                assert!(open, "{addr} is told and not open");
            }
        }
    }
}

fn corpus(folder: &str) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dns_corpus");
    let files = fs::read_dir(root.join(folder)).unwrap();
    let corpus: Vec<Vec<u8>> = files
        .map(|file| fs::read(file.unwrap().path()).unwrap())
        .collect();
    assert!(corpus.len() >= 10, "{} messages in {folder}", corpus.len());
    corpus
}

/// Edits of a kept message: where, what, and what it ends with.
type Edits = (u8, Vec<(u16, u8)>, Vec<u8>, u16);

fn edited(corpus: &[Vec<u8>], (which, edits, tail, keep): &Edits) -> Vec<u8> {
    let mut bytes = corpus[usize::from(*which) % corpus.len()].clone();
    for (at, value) in edits {
        let at = usize::from(*at) % bytes.len().max(1);
        if let Some(byte) = bytes.get_mut(at) {
            *byte = *value;
        }
    }
    if *keep % 4 == 0 {
        bytes.truncate(usize::from(*keep) % (bytes.len() + 1));
    }
    bytes.extend_from_slice(tail);
    bytes
}

#[test]
fn kept_messages_break_nothing() {
    for bytes in corpus("questions").iter().chain(&corpus("answers")) {
        question(bytes);
        answer(bytes);
        // Cut anywhere in what is parsed first.
        for end in 0..bytes.len().min(300) {
            question(&bytes[..end]);
            answer(&bytes[..end]);
        }
    }
}

#[test]
fn no_bytes_are_too_hostile_for_a_question() {
    bolero::check!().for_each(|bytes: &[u8]| question(bytes));
}

#[test]
fn no_bytes_are_too_hostile_for_an_answer() {
    bolero::check!().for_each(|bytes: &[u8]| answer(bytes));
}

#[test]
fn no_edit_of_a_question_gets_through() {
    let corpus = corpus("questions");
    bolero::check!()
        .with_type::<Edits>()
        .for_each(|edits| question(&edited(&corpus, edits)));
}

#[test]
fn no_edit_of_an_answer_gets_through() {
    let corpus = corpus("answers");
    bolero::check!()
        .with_type::<Edits>()
        .for_each(|edits| answer(&edited(&corpus, edits)));
}

/// A process's own `resolv.conf` says which names are refused as nonexistent, and nothing else.
#[test]
fn no_resolv_conf_is_too_hostile() {
    let bounded = |text: &str| {
        let read = Resolv::parse(text);
        assert!(read.search.len() <= 32 && read.servers.len() <= 8);
        for domain in &read.search {
            let lower = domain.to_ascii_lowercase();
            assert!(domain.len() <= 253 && *domain == lower && !domain.ends_with('.'));
        }
    };
    bolero::check!().for_each(|bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        bounded(&text);
        bounded(&format!("search {text}"));
        bounded(&format!("nameserver {text}\nsearch a.example {text}"));
    });
}
