//! Every sample in `policies/` compiles, and none gives anybody anything to complain about.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot read its input has failed"
)]

use std::{fs, net::IpAddr, path::Path};

use remit::policy::{
    AgentTables, Clock, Compilation, Outcome, Question, Source, SourceKind, compile, explain,
};

/// 2026-10-01T00:00:00Z: the samples are valid then, whenever the test runs.
const NOW: i64 = 1_790_812_800_000;

fn samples() -> Compilation {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies");
    let mut sources = vec![source(&root.join("floor.toml"), SourceKind::Floor)];
    for (folder, kind) in [("agents", SourceKind::Agent), ("sets", SourceKind::Set)] {
        let mut paths: Vec<_> = fs::read_dir(root.join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        paths.sort();
        sources.extend(paths.iter().map(|path| source(path, kind)));
    }
    compile(&sources, NOW)
}

fn source(path: &Path, kind: SourceKind) -> Source {
    Source {
        path: path.to_owned(),
        text: fs::read_to_string(path).unwrap(),
        kind,
    }
}

fn ask(agent: &AgentTables, to: &str, port: u16, protocol: u8) -> (Outcome, String) {
    let clock = Clock::at(1_000_000_000_000, NOW);
    let question = Question::to(to.parse::<IpAddr>().unwrap(), port, protocol);
    let answer = explain(agent, &question, &clock);
    let entry = answer.entry.map(|entry| entry.name);
    (
        answer.outcome,
        entry.or(answer.reason.map(Into::into)).unwrap_or_default(),
    )
}

#[test]
fn every_sample_compiles_without_a_finding() {
    let samples = samples();
    let findings: Vec<String> = samples.findings.iter().map(ToString::to_string).collect();
    assert!(findings.is_empty(), "{}", findings.join("\n\n"));
    let ids: Vec<&str> = samples
        .agents
        .iter()
        .map(|agent| agent.id.as_str())
        .collect();
    assert_eq!(ids, ["billing-recon", "coding-agent", "research-agent"]);
    assert!(samples.sets.len() >= 6);
}

#[test]
fn the_samples_do_what_their_comments_say() {
    use Outcome::{Allowed, Denied};
    let samples = samples();
    let cases = [
        (
            "coding-agent",
            "160.79.104.10",
            443,
            6,
            Allowed,
            "set:anthropic.allow[0]",
        ),
        (
            "coding-agent",
            "160.79.104.10",
            80,
            6,
            Denied,
            "out_of_scope",
        ),
        (
            "coding-agent",
            "140.82.121.4",
            22,
            6,
            Allowed,
            "set:github.allow[0]",
        ),
        (
            "coding-agent",
            "185.199.108.1",
            22,
            6,
            Denied,
            "out_of_scope",
        ),
        (
            "coding-agent",
            "192.168.1.1",
            443,
            6,
            Denied,
            "scope.deny[0]",
        ),
        (
            "coding-agent",
            "169.254.169.254",
            80,
            6,
            Denied,
            "floor.builtin[2]",
        ),
        (
            "coding-agent",
            "100.100.100.200",
            80,
            6,
            Denied,
            "floor.deny[0]",
        ),
        (
            "coding-agent",
            "1.1.1.1",
            53,
            17,
            Allowed,
            "set:cloudflare-dns.allow[0]",
        ),
        (
            "coding-agent",
            "127.0.0.1",
            80,
            6,
            Denied,
            "loopback_foreign",
        ),
        (
            "research-agent",
            "93.184.216.34",
            443,
            6,
            Allowed,
            "scope.allow[0]",
        ),
        (
            "research-agent",
            "2001:db8::1",
            443,
            17,
            Allowed,
            "scope.allow[1]",
        ),
        (
            "research-agent",
            "10.1.2.3",
            443,
            6,
            Denied,
            "scope.deny[0]",
        ),
        (
            "research-agent",
            "93.184.216.34",
            25,
            6,
            Denied,
            "floor.deny[3]",
        ),
        (
            "research-agent",
            "64:ff9b::169.254.169.254",
            80,
            6,
            Denied,
            "floor.builtin[2]",
        ),
        (
            "research-agent",
            "127.0.0.1",
            443,
            6,
            Denied,
            "loopback_foreign",
        ),
        (
            "research-agent",
            "224.0.0.251",
            443,
            17,
            Denied,
            "floor.builtin[5]",
        ),
        (
            "billing-recon",
            "10.20.4.11",
            5432,
            6,
            Allowed,
            "scope.allow[0]",
        ),
        (
            "billing-recon",
            "::ffff:10.20.4.11",
            5432,
            6,
            Allowed,
            "scope.allow[0]",
        ),
        (
            "billing-recon",
            "10.20.4.10",
            5432,
            6,
            Denied,
            "scope.deny[0]",
        ),
        (
            "billing-recon",
            "10.20.0.123",
            0,
            1,
            Allowed,
            "scope.allow[4]",
        ),
        ("billing-recon", "10.20.0.1", 0, 1, Denied, "out_of_scope"),
    ];
    for (id, to, port, protocol, outcome, entry) in cases {
        let agent = samples.agent(id).unwrap();
        assert_eq!(
            ask(agent, to, port, protocol),
            (outcome, entry.into()),
            "{id} {to}:{port}"
        );
    }
}
