use std::net::Ipv4Addr;

use hickory_proto::{
    op::{Edns, MessageType, OpCode, Query},
    rr::{
        RData,
        rdata::{
            A, AAAA, CNAME, HTTPS, PTR, SOA, TXT,
            opt::EdnsOption,
            svcb::{Alpn, IpHint, Mandatory, SVCB, SvcParamKey, SvcParamValue},
        },
    },
};

use super::*;
use crate::{
    dns::message,
    policy::{Source, SourceKind, compile},
};

const NOW: i64 = 1_790_812_800_000;
const BOOT: u64 = 1 << 50;
const LIMITS: Limits = Limits {
    min_lease: 60 * SECOND,
    max_lease: 3_600_000_000_000,
    budget: Limit { names: 5 },
    bounds: Bounds {
        per_name: 4,
        per_agent: 8,
    },
};

fn at(seconds: u64) -> Clock {
    Clock::at(
        BOOT + seconds * SECOND,
        NOW + i64::try_from(seconds).unwrap() * 1_000,
    )
}

fn agent(scope: &str) -> AgentTables {
    let text = format!(
        "schema = 1\n[agent]\nid = \"a\"\nowner = \"alice@example.com\"\n[lifecycle]\nstate = \
         \"active\"\napproved_by = \"p\"\nexpires = 2027-12-31T00:00:00Z\n[selector]\ncgroup = \
         [\"/r/a\"]\n[scope]\n{scope}"
    );
    let source = Source {
        path: "a.toml".into(),
        text,
        kind: SourceKind::Agent,
    };
    let compilation = compile(&[source], NOW);
    assert!(!compilation.has_errors(), "{:?}", compilation.findings);
    (*compilation.agents[0]).clone()
}

fn allow(to: &str) -> String {
    format!("[[scope.allow]]\nto = \"{to}\"\nports = [443]\n")
}

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn asked(text: &str, kind: RecordType) -> Asked {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(name(text), kind));
    message.set_edns(Edns::new());
    message::read(&message.to_vec().unwrap()).unwrap()
}

fn record(owner: &str, ttl: u32, data: RData) -> Record {
    Record::from_rdata(name(owner), ttl, data)
}

fn a(owner: &str, ttl: u32, addr: [u8; 4]) -> Record {
    record(owner, ttl, RData::A(A(Ipv4Addr::from(addr))))
}

fn alias(owner: &str, target: &str) -> Record {
    record(owner, 300, RData::CNAME(CNAME(name(target))))
}

/// An answer with these records.
fn upstream(records: Vec<Record>) -> Outcome {
    let mut message = Message::response(1, OpCode::Query);
    message.add_answers(records);
    Outcome::Answered(Box::new(message))
}

/// A guard and the one agent that asks it.
struct Scene {
    guard: Guard,
    agent: AgentTables,
    search: Vec<String>,
}

impl Scene {
    fn new(scope: &str) -> Self {
        Self {
            guard: Guard::new(LIMITS),
            agent: agent(scope),
            search: Vec::new(),
        }
    }

    fn ask(&mut self, text: &str, kind: RecordType) -> Action {
        let asked = asked(text, kind);
        self.guard.ask(&self.agent, &self.search, asked, &at(0))
    }

    fn forward(&mut self, text: &str, kind: RecordType) -> Forward {
        match self.ask(text, kind) {
            Action::Forward(forward, _) => forward,
            Action::Reply(_, report) => panic!("{report:?}"),
        }
    }

    /// What the agent was told instead of an answer: code, why, text.
    fn refused(&mut self, text: &str, kind: RecordType) -> (ResponseCode, Why, String) {
        match self.ask(text, kind) {
            Action::Reply(reply, Some(report)) => {
                let message = Message::from_vec(&reply.bytes(4096)).unwrap();
                assert_eq!(
                    extended(&message).map(|(_, text)| text),
                    Some(report.text.clone())
                );
                (message.metadata.response_code, report.why, report.text)
            }
            other => panic!("{other:?}"),
        }
    }

    fn answer(&mut self, text: &str, kind: RecordType, records: Vec<Record>) -> Told {
        self.answer_at(text, kind, records, 0)
    }

    fn answer_at(&mut self, text: &str, kind: RecordType, records: Vec<Record>, s: u64) -> Told {
        let forward = self.forward(text, kind);
        let release = self
            .guard
            .judge(&self.agent, &forward, upstream(records), &at(s));
        Told::of(release)
    }
}

/// A release in words.
struct Told {
    message: Message,
    code: ResponseCode,
    answers: Vec<String>,
    /// Address, port and seconds of each leased rule.
    leases: Vec<String>,
    report: Option<Report>,
}

impl Told {
    fn of(release: Release) -> Self {
        let message = Message::from_vec(&release.reply.bytes(u16::MAX)).unwrap();
        let leases = release.leases.iter().flat_map(|lease| {
            lease.rules.iter().filter(|rule| rule.leased).map(|rule| {
                let seconds = (rule.deadline - BOOT) / SECOND;
                format!("{} {}-{} {seconds}", lease.addr, rule.low, rule.high)
            })
        });
        Self {
            code: message.metadata.response_code,
            answers: message
                .answers
                .iter()
                .map(|record| format!("{} {}", record.name, record.data))
                .collect(),
            leases: leases.collect(),
            report: release.report,
            message,
        }
    }
}

fn extended(message: &Message) -> Option<(u16, String)> {
    match message.edns.as_ref()?.option(15.into())? {
        EdnsOption::Unknown(_, data) => {
            let code = u16::from_be_bytes([data[0], data[1]]);
            Some((code, String::from_utf8(data[2..].to_vec()).unwrap()))
        }
        _ => None,
    }
}

#[test]
fn a_name_out_of_scope_is_refused_and_says_whom_to_ask() {
    let mut scene = Scene::new(&allow("api.example"));
    let (code, why, text) = scene.refused("Evil.Example.", RecordType::A);
    assert_eq!((code, why), (ResponseCode::Refused, Why::Name));
    assert_eq!(
        text,
        "agent a may not resolve evil.example; ask alice@example.com"
    );
}

#[test]
fn a_name_in_scope_is_asked_in_the_guards_own_words() {
    let mut scene = Scene::new(&allow("api.example"));
    let forward = scene.forward("aPi.ExAmple.", RecordType::A);
    assert_eq!(forward.name.to_string(), "api.example.");
}

#[test]
fn types_that_lead_to_no_address_are_not_asked_for() {
    let mut scene = Scene::new(&allow("api.example"));
    for kind in [
        RecordType::TXT,
        RecordType::MX,
        RecordType::NS,
        RecordType::ANY,
        RecordType::NULL,
        RecordType::PTR,
        RecordType::Unknown(65_280),
    ] {
        let (code, why, text) = scene.refused("api.example.", kind);
        assert_eq!((code, why), (ResponseCode::Refused, Why::Kind), "{kind}");
        assert!(text.contains("records, here of api.example; ask"), "{text}");
    }
    for kind in KINDS {
        scene.forward("api.example.", kind);
    }
}

#[test]
fn another_class_and_names_that_are_none_are_refused() {
    let mut scene = Scene::new(&allow("**.example.com"));
    let mut chaos = asked("version.bind.", RecordType::A);
    chaos.class = DNSClass::CH;
    let action = scene.guard.ask(&scene.agent, &[], chaos, &at(0));
    assert!(matches!(action, Action::Reply(_, Some(report)) if report.why == Why::Kind));
    // One label that looks like three.
    let mut odd = asked("x.example.com.", RecordType::A);
    odd.name = Name::from_labels([&b"a.example"[..], b"com"]).unwrap();
    odd.host = crate::dns::name::canonical(&odd.name);
    let action = scene.guard.ask(&scene.agent, &[], odd, &at(0));
    assert!(matches!(action, Action::Reply(_, Some(report)) if report.why == Why::Name));
    let (_, why, _) = scene.refused(".", RecordType::A);
    assert_eq!(why, Why::Name);
}

#[test]
fn below_a_search_domain_the_search_goes_on() {
    let mut scene = Scene::new(&(allow("api.example") + &allow("db.corp.example.net")));
    scene.search = vec!["corp.example.net".into()];
    let (code, why, _) = scene.refused("api.example.corp.example.net.", RecordType::A);
    assert_eq!((code, why), (ResponseCode::NXDomain, Why::Search));
    scene.forward("db.corp.example.net.", RecordType::A);
    // The domain itself, and names that only end alike, are no searches.
    for other in ["corp.example.net.", "x.badcorp.example.net."] {
        assert_eq!(scene.refused(other, RecordType::A).0, ResponseCode::Refused);
    }
}

#[test]
fn an_address_is_leased_for_the_ttl_but_no_shorter_than_the_floor() {
    let mut scene = Scene::new(&allow("api.example"));
    let told = scene.answer(
        "aPi.example.",
        RecordType::A,
        vec![a("api.example.", 300, [203, 0, 113, 1])],
    );
    assert_eq!(told.leases, ["203.0.113.1 443-443 301"]);
    // The reply keeps the case of the question: 0x20.
    assert_eq!(told.answers, ["aPi.example. 203.0.113.1"]);
    let told = scene.answer(
        "api.example.",
        RecordType::A,
        vec![a("api.example.", 0, [203, 0, 113, 2])],
    );
    assert_eq!(told.leases, ["203.0.113.2 443-443 61"]);
    assert_eq!(told.message.answers[0].ttl, 0);
    // No TTL makes a lease of weeks, and the agent is not told to keep it for longer.
    let told = scene.answer(
        "api.example.",
        RecordType::A,
        vec![a("api.example.", u32::MAX, [203, 0, 113, 3])],
    );
    assert_eq!(told.leases, ["203.0.113.3 443-443 86401"]);
    assert_eq!(told.message.answers[0].ttl, MAX_TTL);
}

#[test]
fn a_lease_ends_with_its_grant() {
    let scope = allow("api.example") + "expires = 2026-10-01T00:00:30Z\n";
    let mut scene = Scene::new(&scope);
    let told = scene.answer(
        "api.example.",
        RecordType::A,
        vec![a("api.example.", 300, [203, 0, 113, 1])],
    );
    assert_eq!(told.leases, ["203.0.113.1 443-443 30"]);
}

#[test]
fn the_queried_name_decides_over_a_chain_of_aliases() {
    let mut scene = Scene::new(&allow("api.example"));
    let records = vec![
        alias("cdn.elsewhere.net.", "edge.elsewhere.net."),
        a("edge.elsewhere.net.", 30, [203, 0, 113, 1]),
        alias("api.example.", "CDN.elsewhere.net."),
        // Not on the chain: neither told nor leased.
        a("other.elsewhere.net.", 30, [203, 0, 113, 66]),
        a("api.example.", 30, [203, 0, 113, 67]),
    ];
    let told = scene.answer("api.example.", RecordType::A, records);
    assert_eq!(
        told.answers,
        [
            "api.example. CDN.elsewhere.net.",
            "cdn.elsewhere.net. edge.elsewhere.net.",
            "edge.elsewhere.net. 203.0.113.1",
        ]
    );
    assert_eq!(told.leases, ["203.0.113.1 443-443 61"]);
    // The names in between are not in scope by that.
    assert_eq!(
        scene.refused("cdn.elsewhere.net.", RecordType::A).0,
        ResponseCode::Refused
    );
}

#[test]
fn long_and_circular_chains_end_in_an_error() {
    let mut scene = Scene::new(&allow("n0.example"));
    let long = (0..200).map(|n| alias(&format!("n{n}.example."), &format!("n{}.example.", n + 1)));
    let circle = vec![
        alias("n0.example.", "n1.example."),
        alias("n1.example.", "n0.example."),
    ];
    for records in [long.collect(), circle] {
        let told = scene.answer("n0.example.", RecordType::A, records);
        assert_eq!(told.code, ResponseCode::ServFail);
        assert!(told.answers.is_empty() && told.leases.is_empty());
        assert_eq!(extended(&told.message).unwrap().0, 24);
    }
}

#[test]
fn addresses_inside_lead_nowhere_without_within() {
    let inside = vec![
        a("api.example.", 60, [10, 1, 2, 3]),
        a("api.example.", 60, [127, 0, 0, 1]),
    ];
    let mut scene = Scene::new(&allow("api.example"));
    let told = scene.answer("api.example.", RecordType::A, inside.clone());
    assert_eq!(told.code, ResponseCode::Refused);
    assert!(told.answers.is_empty() && told.leases.is_empty());
    let report = told.report.unwrap();
    assert_eq!(report.why, Why::Address([10, 1, 2, 3].into()));
    assert_eq!(report.reason, Reason::OutOfScope);
    assert_eq!(
        extended(&told.message),
        Some((
            15,
            "api.example leads agent a to 10.1.2.3, which no `within` of the name allows; ask \
             alice@example.com"
                .into()
        ))
    );
    let scope = allow("api.example") + "within = [\"10.0.0.0/8\"]\n";
    let told = Scene::new(&scope).answer("api.example.", RecordType::A, inside);
    assert_eq!(told.answers, ["api.example. 10.1.2.3"]);
    assert_eq!(told.leases, ["10.1.2.3 443-443 61"]);
    assert_eq!(
        told.report.unwrap().why,
        Why::Address([127, 0, 0, 1].into())
    );
}

#[test]
fn no_name_leads_into_the_floor_or_a_denial() {
    let scope = allow("api.example") + "[[scope.deny]]\nto = \"203.0.113.0/28\"\n";
    let mut scene = Scene::new(&scope);
    for (addr, reason) in [
        ([169, 254, 169, 254], Reason::Floor),
        ([203, 0, 113, 1], Reason::Denied),
        ([224, 0, 0, 251], Reason::Floor),
    ] {
        let told = scene.answer(
            "api.example.",
            RecordType::A,
            vec![a("api.example.", 60, addr)],
        );
        assert_eq!(told.code, ResponseCode::Refused, "{addr:?}");
        assert!(told.leases.is_empty());
        assert_eq!(told.report.unwrap().reason, reason, "{addr:?}");
    }
    let nat64 = record(
        "api.example.",
        60,
        RData::AAAA(AAAA("64:ff9b::a9fe:a9fe".parse().unwrap())),
    );
    let told = scene.answer("api.example.", RecordType::AAAA, vec![nat64]);
    assert_eq!(told.report.unwrap().reason, Reason::Floor);
}

#[test]
fn an_address_in_scope_by_itself_is_told_without_a_lease() {
    let scope = allow("api.example") + &allow("10.1.2.0/24");
    let told = Scene::new(&scope).answer(
        "api.example.",
        RecordType::A,
        vec![a("api.example.", 60, [10, 1, 2, 3])],
    );
    assert_eq!(told.answers, ["api.example. 10.1.2.3"]);
    assert!(told.leases.is_empty() && told.report.is_none());
}

#[test]
fn a_thousand_addresses_lease_as_many_as_the_bound() {
    let mut scene = Scene::new(&allow("api.example"));
    let many = (0..1_000_u16)
        .map(|n| {
            a(
                "api.example.",
                60,
                [203, 0, (n >> 8) as u8, (n & 0xff) as u8],
            )
        })
        .collect();
    let told = scene.answer("api.example.", RecordType::A, many);
    assert_eq!((told.answers.len(), told.leases.len()), (4, 4));
    let report = told.report.unwrap();
    assert_eq!(report.why, Why::Full);
    assert!(
        report
            .text
            .contains("holds 4 addresses of api.example already"),
        "{}",
        report.text
    );
    assert!(
        report.text.ends_with("the first ends in 62 s"),
        "{}",
        report.text
    );
    // Full is refused, until there is room again.
    let other = vec![a("api.example.", 60, [198, 51, 100, 1])];
    let told = scene.answer("api.example.", RecordType::A, other.clone());
    assert_eq!(told.code, ResponseCode::Refused);
    let told = scene.answer_at("api.example.", RecordType::A, other, 62);
    assert_eq!(told.leases, ["198.51.100.1 443-443 123"]);
}

#[test]
fn an_agent_holds_no_more_than_its_bound() {
    let mut scene = Scene::new(
        &(0..9)
            .map(|n| allow(&format!("n{n}.example")))
            .collect::<String>(),
    );
    for n in 0..8 {
        let owner = format!("n{n}.example.");
        let told = scene.answer(&owner, RecordType::A, vec![a(&owner, 60, [203, 0, 113, n])]);
        assert_eq!(told.leases.len(), 1);
    }
    let told = scene.answer(
        "n8.example.",
        RecordType::A,
        vec![a("n8.example.", 60, [203, 0, 113, 99])],
    );
    assert_eq!(told.code, ResponseCode::Refused);
    assert_eq!(told.report.unwrap().why, Why::Full);
}

#[test]
fn a_wildcard_has_a_budget_and_exact_names_have_none() {
    let exact: String = (0..20)
        .map(|n| allow(&format!("n{n}.example.com")))
        .collect();
    let mut scene = Scene::new(&(exact + &allow("*.example.com")));
    for n in 0..20 {
        scene.forward(&format!("n{n}.example.com."), RecordType::A);
    }
    for n in 0..5 {
        scene.forward(&format!("x{n}.example.com."), RecordType::A);
    }
    let (code, why, text) = scene.refused("x5.example.com.", RecordType::A);
    assert_eq!((code, why), (ResponseCode::Refused, Why::Budget));
    assert!(
        text.contains("5 names of one wildcard within an hour"),
        "{text}"
    );
    // What was asked for before costs nothing, in any type.
    scene.forward("x0.example.com.", RecordType::AAAA);
    scene.forward("n0.example.com.", RecordType::A);
}

#[test]
fn a_tunnel_in_the_labels_runs_dry() {
    let mut scene = Scene::new(&allow("**.example.com"));
    let left: usize = (0..100)
        .map(|n| {
            let label = format!("{n:x>60}");
            let data = format!("{label}.{label}.{label}");
            match scene.ask(&format!("{data}.example.com."), RecordType::A) {
                Action::Forward(..) => data.len(),
                Action::Reply(..) => 0,
            }
        })
        .sum();
    assert!(left <= 5 * 40, "{left} octets left");
}

#[test]
fn reverse_lookups_are_for_addresses_in_reach() {
    let mut scene = Scene::new(&(allow("198.51.100.0/24") + &allow("api.example")));
    let forward = scene.forward("7.100.51.198.IN-addr.arpa.", RecordType::PTR);
    assert_eq!(forward.name.to_string(), "7.100.51.198.in-addr.arpa.");
    let pointer = record(
        "7.100.51.198.in-addr.arpa.",
        60,
        RData::PTR(PTR(name("host.example."))),
    );
    let release = scene
        .guard
        .judge(&scene.agent, &forward, upstream(vec![pointer]), &at(0));
    let told = Told::of(release);
    assert_eq!(told.answers, ["7.100.51.198.IN-addr.arpa. host.example."]);
    for other in [
        "1.113.0.203.in-addr.arpa.",
        "100.51.198.in-addr.arpa.",
        "data.in-addr.arpa.",
    ] {
        assert_eq!(
            scene.refused(other, RecordType::PTR).0,
            ResponseCode::Refused,
            "{other}"
        );
    }
    // What a name led to may be asked about while it is leased.
    scene.answer(
        "api.example.",
        RecordType::A,
        vec![a("api.example.", 60, [203, 0, 113, 1])],
    );
    scene.forward("1.113.0.203.in-addr.arpa.", RecordType::PTR);
    // A name grant that covers reverse names is no grant of data in them.
    let mut scene = Scene::new(&allow("**.113.0.203.in-addr.arpa"));
    assert_eq!(
        scene
            .refused("1.113.0.203.in-addr.arpa.", RecordType::PTR)
            .0,
        ResponseCode::Refused
    );
}

fn service(params: Vec<(SvcParamKey, SvcParamValue)>) -> Record {
    let svcb = SVCB::new(1, Name::root(), params);
    record("api.example.", 60, RData::HTTPS(HTTPS(svcb)))
}

fn hints(addrs: &[[u8; 4]]) -> (SvcParamKey, SvcParamValue) {
    let addrs = addrs.iter().map(|addr| A(Ipv4Addr::from(*addr))).collect();
    (
        SvcParamKey::Ipv4Hint,
        SvcParamValue::Ipv4Hint(IpHint(addrs)),
    )
}

#[test]
fn address_hints_are_leased_and_those_that_may_not_are_left_out() {
    let mut scene = Scene::new(&allow("api.example"));
    let alpn = (
        SvcParamKey::Alpn,
        SvcParamValue::Alpn(Alpn(vec!["h2".into()])),
    );
    let told = scene.answer(
        "api.example.",
        RecordType::HTTPS,
        vec![service(vec![
            alpn.clone(),
            hints(&[[203, 0, 113, 1], [10, 0, 0, 1]]),
        ])],
    );
    assert_eq!(told.leases, ["203.0.113.1 443-443 61"]);
    let RData::HTTPS(https) = &told.message.answers[0].data else {
        panic!("{:?}", told.answers);
    };
    assert_eq!(https.svc_params, [alpn.clone(), hints(&[[203, 0, 113, 1]])]);
    // Nothing is left of the hints: the parameter goes, and what cannot do without it.
    let told = scene.answer(
        "api.example.",
        RecordType::HTTPS,
        vec![service(vec![alpn.clone(), hints(&[[10, 0, 0, 1]])])],
    );
    let RData::HTTPS(https) = &told.message.answers[0].data else {
        panic!("{:?}", told.answers);
    };
    assert_eq!(https.svc_params, [alpn]);
    let mandatory = (
        SvcParamKey::Mandatory,
        SvcParamValue::Mandatory(Mandatory(vec![SvcParamKey::Ipv4Hint])),
    );
    let told = scene.answer(
        "api.example.",
        RecordType::HTTPS,
        vec![service(vec![mandatory, hints(&[[10, 0, 0, 1]])])],
    );
    assert_eq!(told.code, ResponseCode::Refused);
    assert!(told.leases.is_empty());
}

#[test]
fn nothing_is_there_is_told_with_how_long_that_holds() {
    let mut scene = Scene::new(&allow("api.example"));
    let soa = |owner: &str| {
        let data = SOA::new(name("ns.example."), name("root.example."), 1, 2, 3, 4, 90);
        record(owner, 300, RData::SOA(data))
    };
    let forward = scene.forward("api.example.", RecordType::AAAA);
    let mut message = Message::response(1, OpCode::Query);
    message.metadata.response_code = ResponseCode::NXDomain;
    message.authorities = vec![soa("elsewhere.net."), soa("example.")];
    message.additionals = vec![record(
        "example.",
        60,
        RData::TXT(TXT::new(vec!["x".into()])),
    )];
    let outcome = Outcome::Answered(Box::new(message));
    let told = Told::of(scene.guard.judge(&scene.agent, &forward, outcome, &at(0)));
    assert_eq!(told.code, ResponseCode::NXDomain);
    assert_eq!(told.message.authorities, [soa("example.")]);
    assert!(told.message.additionals.is_empty() && told.report.is_none());
}

#[test]
fn an_upstream_that_fails_is_a_failure_and_no_refusal() {
    let mut scene = Scene::new(&allow("api.example"));
    let forward = scene.forward("api.example.", RecordType::A);
    let mut message = Message::response(1, OpCode::Query);
    message.metadata.response_code = ResponseCode::Refused;
    for outcome in [
        Outcome::Failed("no answer in 4 s".into()),
        Outcome::Answered(Box::new(message)),
    ] {
        let told = Told::of(scene.guard.judge(&scene.agent, &forward, outcome, &at(0)));
        assert_eq!(told.code, ResponseCode::ServFail);
        assert_eq!(extended(&told.message).unwrap().0, 22);
        assert!(told.report.is_none());
    }
}

#[test]
fn a_scope_that_changed_while_upstream_was_asked_counts() {
    let mut scene = Scene::new(&allow("api.example"));
    let forward = scene.forward("api.example.", RecordType::A);
    let changed = agent(&allow("other.example"));
    let records = vec![a("api.example.", 60, [203, 0, 113, 1])];
    let release = scene
        .guard
        .judge(&changed, &forward, upstream(records), &at(0));
    let told = Told::of(release);
    assert_eq!(told.code, ResponseCode::Refused);
    assert!(told.leases.is_empty() && told.answers.is_empty());
}

#[test]
fn leases_are_made_anew_under_a_changed_scope() {
    let mut scene = Scene::new(&(allow("a.example") + &allow("b.example")));
    for owner in ["a.example.", "b.example."] {
        let records = vec![a(owner, 60, [203, 0, 113, 1])];
        scene.answer(owner, RecordType::A, records);
    }
    let ports = |leases: Vec<AddressLease>| -> Vec<(IpAddr, Vec<u16>)> {
        let leased = |lease: &AddressLease| {
            let rules = lease.rules.iter().filter(|rule| rule.leased);
            rules.map(|rule| rule.low).collect()
        };
        leases
            .iter()
            .map(|lease| (lease.addr, leased(lease)))
            .collect()
    };
    let addr: IpAddr = [203, 0, 113, 1].into();
    let narrowed = agent("[[scope.allow]]\nto = \"b.example\"\nports = [8443]\n");
    assert_eq!(
        ports(scene.guard.renew(&narrowed, &at(1))),
        [(addr, vec![8443])]
    );
    assert_eq!(
        ports(scene.guard.renew(&agent(""), &at(1))),
        [(addr, vec![])]
    );
    assert_eq!(scene.guard.leases("a", BOOT).len(), 2);
    assert!(scene.guard.renew(&narrowed, &at(100)).is_empty());
}

#[test]
fn monitor_mode_resolves_reports_and_leases_nothing() {
    let mut scene = Scene::new(&("mode = \"monitor\"\n".to_owned() + &allow("api.example")));
    let Action::Forward(forward, Some(report)) = scene.ask("evil.example.", RecordType::A) else {
        panic!("not forwarded with a report");
    };
    assert!(report.monitored);
    assert_eq!(report.reason, Reason::NameNotInScope);
    let records = vec![a("evil.example.", 60, [203, 0, 113, 1])];
    let release = scene
        .guard
        .judge(&scene.agent, &forward, upstream(records), &at(0));
    assert_eq!(release.addresses, [IpAddr::from([203, 0, 113, 1])]);
    let told = Told::of(release);
    assert_eq!(told.answers, ["evil.example. 203.0.113.1"]);
    assert!(told.leases.is_empty());
}

#[test]
fn a_suspended_agent_resolves_nothing() {
    let mut scene = Scene::new(&(allow("api.example") + &allow("198.51.100.0/24")));
    scene.agent.state = agent_ebpf::abi::State::Suspended;
    let (code, _, text) = scene.refused("api.example.", RecordType::A);
    assert_eq!(code, ResponseCode::Refused);
    assert!(text.contains("(suspended)"), "{text}");
    let (code, ..) = scene.refused("7.100.51.198.in-addr.arpa.", RecordType::PTR);
    assert_eq!(code, ResponseCode::Refused);
}
