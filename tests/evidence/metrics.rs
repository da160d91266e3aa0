//! The numbers that are scraped are those that the kernel counts.

use std::{collections::BTreeMap, net::TcpStream, os::unix::net::UnixStream};

use anyhow::{Context as _, Result};

use crate::{
    harness::Case,
    support::{
        Agent, Family, Fixture, Refusal, Way, claim,
        daemon::Settings,
        expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
    },
};

const LISTEN: &str = "127.0.0.1:9464";

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "evidence::metrics_are_what_the_kernel_counts",
        |ctx| {
            let settings = Settings {
                more: format!("[metrics]\nlisten = \"{LISTEN}\"\n"),
                ..Settings::default()
            };
            let agents = [Agent::standard("alpha"), Agent::standard("beta")];
            let mut fx = Fixture::start_with(ctx, &agents, &settings)?;
            let mut alpha = fx.actor("alpha")?;
            let how = Refusal::of("alpha", "out_of_scope").without_control();
            for way in Way::MAIN {
                for family in [Family::V4, Family::V6] {
                    let to = family.pick(OUT_V4, OUT_V6, 443)?;
                    fx.refused(&mut alpha, way, family, to, &how)?;
                }
            }
            let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
            fx.arrives(&mut alpha, Way::Tcp, Family::V4, to)?;

            let by_tcp = scrape(TcpStream::connect(LISTEN)?, "/metrics")?;
            let by_socket = scrape(
                UnixStream::connect(fx.place().at("run/remit.sock"))?,
                "/v1/metrics",
            )?;
            let status = fx.place().status()?;
            for metrics in [&by_tcp, &by_socket] {
                let decided = |rest: &str| metrics.get(&format!("remit_decisions_total{{{rest}}}"));
                let denied = r#"agent="alpha",verdict="denied",reason="out_of_scope""#;
                expect(
                    "denials of alpha",
                    decided(denied).copied(),
                    Some(status.denied("alpha", None)? as f64),
                )?;
                let allowed = decided(r#"agent="alpha",verdict="allowed",reason="""#);
                claim(allowed.is_some_and(|count| *count > 0.0), || {
                    format!("allowed: {allowed:?}")
                })?;
                for (name, wanted) in [
                    ("remit_enforced_roots", 1.0),
                    ("remit_expected_roots", 1.0),
                    (r#"remit_agents{state="active"}"#, 2.0),
                    ("remit_apply_runs_total", 1.0),
                    ("remit_problems", 0.0),
                ] {
                    expect(name, metrics.get(name).copied(), Some(wanted))?;
                }
                let record = metrics.get("remit_audit_record").copied();
                claim(record.is_some_and(|record| record >= 2.0), || {
                    format!("the trail's last record: {record:?}")
                })?;
                for map in ["agents", "rows", "claims", "exacts", "prefixes", "rulesets"] {
                    let of =
                        |what: &str| metrics.get(&format!("remit_map_{what}{{map=\"{map}\"}}"));
                    let (entries, capacity) = (of("entries"), of("capacity"));
                    claim(
                        entries
                            .zip(capacity)
                            .is_some_and(|(entries, capacity)| entries < capacity),
                        || format!("map {map}: {entries:?} of {capacity:?}"),
                    )?;
                }
            }
            // The listener is nobody's of its own: an agent with loopback `own` may not read there.
            let listen = LISTEN.parse()?;
            let errno = alpha_connects(&mut alpha, listen)?;
            expect("errno of an agent that scrapes", errno, libc::EPERM)
        },
    )]
}

fn alpha_connects(alpha: &mut crate::support::Actor, addr: std::net::SocketAddr) -> Result<i32> {
    let id = alpha.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let reply = alpha.ask(&crate::actor::Op::Connect {
        id,
        addr,
        timeout_ms: 1000,
    })?;
    Ok(reply.errno)
}

/// Every sample of an exposition, by name and labels.
pub fn scrape(
    mut stream: impl std::io::Read + std::io::Write,
    path: &str,
) -> Result<BTreeMap<String, f64>> {
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: remit\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
    claim(head.starts_with("HTTP/1.1 200 "), || head.to_owned())?;
    claim(body.ends_with("# EOF\n"), || format!("cut short: {body}"))?;
    body.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').context("no sample")?;
            Ok((name.to_owned(), value.parse()?))
        })
        .collect()
}
