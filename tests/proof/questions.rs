//! Ten thousand generated questions: the registry's own answer is the kernel's.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Instant,
};

use anyhow::{Context as _, Result};
use remit::{
    kernel::boot_nanos,
    policy::{self, Clock, Outcome, Question, Source, SourceKind},
};
use serde_json::Value;

use crate::{
    harness::Case,
    support::{
        Agent, Ctx, Dice, Family, Fixture, Way, api, claim, eventually, expect,
        network::{OUT_V4, OUT_V6},
        scale,
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("proof::ten_thousand_answers_are_the_kernels", answers),
        Case::new("proof::explain_tells_the_whole_way", whole_way),
    ]
}

/// Cgroup, entries, both of the kernel's answers; the last refusal; and the agent's own view.
fn whole_way(ctx: &mut Ctx) -> Result<()> {
    let fx = Fixture::start(ctx, &[Agent::standard("alpha").deny("198.51.100.64/26")])?;
    let mut actor = fx.actor("alpha")?;
    for (to, code) in [
        ("198.51.100.10:443", 0),
        ("198.51.100.10:443/udp", 0),
        ("198.51.100.10:444", 1),
        ("198.51.100.70:443", 1),
        ("203.0.113.10:53/udp", 1),
        ("[2001:db8:1::10]:443", 0),
        ("[2001:db8:2::10]:443/udp", 1),
        ("[::ffff:203.0.113.10]:443", 1),
        ("169.254.169.254:80", 1),
        ("198.51.100.10/icmp", 0),
        ("203.0.113.10/icmp", 1),
    ] {
        let said = fx
            .place()
            .remit(&["explain", "alpha", to, "--attached", "--json"])?;
        expect(to, said.code, code).with_context(|| format!("{}{}", said.stdout, said.stderr))?;
        let told: Value = serde_json::from_str(&said.stdout)?;
        expect(to, told["agree"].as_bool(), Some(true)).with_context(|| said.stdout.clone())?;
        let row = &told["answers"][0];
        let passes = row["attached"]["passes"].as_bool();
        expect(to, passes, Some(code == 0)).with_context(|| said.stdout.clone())?;
        claim(
            row["kernel"]["cgroups"][0]
                .as_str()
                .is_some_and(|path| path.ends_with("alpha.service")),
            || said.stdout.clone(),
        )?;
    }
    let said = fx
        .place()
        .remit(&["explain", "alpha", "198.51.100.70:443"])?;
    for part in [
        "looked at 198.51.100.64/26: deny any by scope.deny[0]",
        "198.51.100.0/24: not asked, there is a longer one",
        "cgroup ",
        "change ",
    ] {
        claim(said.stdout.contains(part), || said.stdout.clone())?;
    }
    // What a probe or a test-run provoked is not what the agent was refused last.
    let none = fx.place().remit(&["explain", "--last", "alpha"])?;
    expect("nothing was refused yet", none.code, 1)?;
    let to = Family::V6.pick(OUT_V4, OUT_V6, 8443)?;
    let tried = Way::Tcp.perform(&mut actor, Family::V6, to)?;
    expect("errno", tried.errno, libc::EPERM)?;
    eventually(5, || {
        let said = fx.place().remit(&["explain", "--last", "alpha"])?;
        claim(
            said.stdout.contains("2001:db8:2::10") && said.stdout.contains("8443"),
            || format!("{}{}", said.stdout, said.stderr),
        )
    })
}

fn answers(ctx: &mut Ctx) -> Result<()> {
    let ids = ["alpha", "beta", "gamma", "delta"];
    let agents = [
        Agent::standard("alpha")
            .deny("198.51.100.64/26")
            .allow("127.0.0.1", "5432"),
        Agent::new("beta").monitor().allow("10.0.0.0/8", "\"any\""),
        Agent::new("gamma")
            .allow("2001:db8::/32", "443, \"8000-8100\", \"53/udp\"")
            .deny("2001:db8:2::/48")
            .allow("64:ff9b::/96", "443"),
        Agent::standard("delta").state("draft"),
    ];
    let fx = Fixture::start_with_cgroups(ctx, &agents, &[])?;
    let mut sources = vec![Source {
        path: fx.place().at("floor.toml"),
        text: fs::read_to_string(fx.place().at("floor.toml"))?,
        kind: SourceKind::Floor,
    }];
    for id in ids {
        let path = fx.place().at("agents.d").join(format!("{id}.toml"));
        sources.push(Source {
            text: fs::read_to_string(&path)?,
            path,
            kind: SourceKind::Agent,
        });
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let now = i64::try_from(now.as_millis())?;
    let compiled = policy::compile(&sources, now);
    claim(!compiled.has_errors(), || {
        format!("{:?}", compiled.findings)
    })?;
    let clock = Clock::at(boot_nanos(), now);
    let (mut dice, seed) = Dice::new("REMIT_SEED")?;
    println!("seed {seed}");
    let count = if scale::emulated() { 1_000 } else { 10_000 };
    let began = Instant::now();
    let mut passed = 0;
    for number in 0..count {
        let id = ids[dice.below(ids.len())];
        let addr = address(&mut dice);
        let protocol = [6, 17, 1, 58, 132][dice.below(5)];
        let port = [443, 80, 53, 5432, 8050, 1, 65_535, 0][dice.below(8)];
        let path = format!("/explain?agent={id}&addr={addr}&port={port}&protocol={protocol}");
        let answer = api::ask(fx.place(), "GET", &path, None)?;
        expect("HTTP status", answer.status, 200).with_context(|| path.clone())?;
        let tables = compiled.agent(id).context("no such agent")?;
        let offline = policy::explain(tables, &Question::to(addr, port, protocol), &clock);
        let kernel = (
            answer.body["verdict"].as_str().unwrap_or("").to_owned(),
            answer.body["reason"].as_str().map(str::to_owned),
            answer.body["entry"]["line"].as_u64(),
        );
        let memory = (
            match offline.outcome {
                Outcome::Allowed => "allowed",
                Outcome::Monitored => "monitored",
                Outcome::Denied => "denied",
            }
            .to_owned(),
            offline.reason.map(str::to_owned),
            offline.entry.as_ref().map(|entry| u64::from(entry.line)),
        );
        expect(&format!("{number}: {path}"), &kernel, &memory)?;
        passed += usize::from(kernel.0 == "allowed");
    }
    println!(
        "{count} questions agree, {passed} of them allowed, in {} ms",
        began.elapsed().as_millis()
    );
    claim(passed > 0 && passed < count, || "no mixture".to_owned())
}

fn address(dice: &mut Dice) -> IpAddr {
    let byte = |dice: &mut Dice| dice.below(256) as u8;
    let word = |dice: &mut Dice| dice.below(65_536) as u16;
    match dice.below(9) {
        0 => Ipv4Addr::new(198, 51, 100, byte(dice)).into(),
        1 => Ipv4Addr::new(10, byte(dice), byte(dice), byte(dice)).into(),
        2 => Ipv4Addr::new(127, 0, 0, 1 + (byte(dice) & 1)).into(),
        3 => Ipv4Addr::new(169, 254, byte(dice), 254).into(),
        4 => Ipv6Addr::new(0x2001, 0xdb8, word(dice) % 4, 0, 0, 0, 0, word(dice)).into(),
        5 => Ipv4Addr::new(198, 51, 100, byte(dice))
            .to_ipv6_mapped()
            .into(),
        6 => Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0xa9fe, word(dice)).into(),
        7 => Ipv4Addr::new(byte(dice), byte(dice), byte(dice), byte(dice)).into(),
        _ => [Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED][dice.below(2)].into(),
    }
}
