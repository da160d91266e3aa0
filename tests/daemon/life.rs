//! The daemon's own life: what is in force while it is dead, restarts, ends, or can't start.

use anyhow::Result;

use crate::{
    actor::Op,
    harness::Case,
    support::{
        Actor, Agent, Cgroup, Daemon, Family, Fixture, Refusal, Way, claim,
        daemon::{Place, Settings},
        eventually, expect,
        network::{IN_V4, IN_V6, OUT_V4, OUT_V6},
        way::PAYLOAD,
    },
};

/// All cases here.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("daemon::killed_it_leaves_the_fence", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            fx.daemon.kill()?;
            fenced(&mut fx, &mut actor)?;
            // A cgroup born meanwhile is nobody's: denied.
            let born = fx.cgroup("alpha")?.path().with_file_name("born.service");
            std::fs::create_dir(&born)?;
            let born = Cgroup::create(&format!("{}/born.service", ctx.root()))?;
            let mut stranger = Actor::spawn(Some(&born))?;
            let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
            let tried = Way::Tcp.perform(&mut stranger, Family::V4, to)?;
            expect("errno of the newborn", tried.errno, libc::EPERM)?;
            drop(stranger);
            drop(born);

            fx.daemon.restart()?;
            fenced(&mut fx, &mut actor)?;
            // All that was refused so far is told before the next attempt is to leave one line.
            fx.reconcile("alpha")?;
            let how = Refusal::of("alpha", "out_of_scope");
            let to = Family::V4.pick(OUT_V4, OUT_V6, 444)?;
            fx.refused(&mut actor, Way::Tcp, Family::V4, to, &how)?;
            fx.reconcile("alpha")
        }),
        Case::new("daemon::tells_what_its_programs_say", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            fx.daemon.terminate()?;
            fx.daemon.restart_with(&["--kernel-log", "debug"])?;
            let mut actor = fx.actor("alpha")?;
            let how = Refusal::of("alpha", "out_of_scope");
            let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            fx.refused(&mut actor, Way::Tcp, Family::V4, to, &how)?;
            eventually(3, || {
                let said = std::fs::read_to_string(fx.place().at("daemon.err"))?;
                claim(said.contains("agent_ebpf::kernel::connect"), || said)
            })
        }),
        Case::new("daemon::ended_in_order_it_leaves_the_fence", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            expect("exit code", fx.daemon.terminate()?, 0)?;
            fenced(&mut fx, &mut actor)?;
            fx.daemon.restart()?;
            fenced(&mut fx, &mut actor)
        }),
        Case::new("daemon::no_restart_has_an_open_moment", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            let id = actor.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
            let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            fx.wire.drain()?;
            actor.tell(&Op::Flood {
                id,
                addr: to,
                data: PAYLOAD.to_vec(),
                millis: 4000,
            })?;
            for _ in 0..3 {
                fx.daemon.kill()?;
                fx.daemon.restart()?;
            }
            let flooded = actor.hear()?;
            let passed = flooded.replies.first().map_or(-1, |reply| reply.value);
            expect("let through", passed, 0)?;
            claim(flooded.value > 0, || "the flood did not run".to_owned())?;
            expect("packets", fx.seen_at(to.ip())?, 0)
        }),
        Case::new("daemon::detach_all_lifts_the_fence", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            fenced(&mut fx, &mut actor)?;
            fx.daemon.terminate()?;
            let said = fx.daemon.detach()?;
            expect("exit code", said.code, 0)?;
            let lines = fx.audit()?;
            let lifted: Vec<_> = lines
                .iter()
                .filter(|line| line.text("/metadata/event_code") == "RM9003")
                .collect();
            expect("lines that say so", lifted.len(), 1)?;
            for line in lifted {
                expect("who", line.text("/actor/user/uid"), "0")?;
                let removed = line.text("/unmapped/removed/0");
                claim(removed.contains("/v"), || {
                    format!("it does not say what was removed: `{removed}`")
                })?;
            }
            eventually(3, || {
                let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
                fx.arrives(&mut actor, Way::Tcp, Family::V4, to).map(drop)
            })
        }),
        Case::new("daemon::a_second_one_does_not_start", |ctx| {
            let mut fx = Fixture::start(ctx, &[Agent::standard("alpha")])?;
            let mut actor = fx.actor("alpha")?;
            let second = fx.place().remit(&["daemon"])?;
            claim(second.code != 0, || "it started".to_owned())?;
            fenced(&mut fx, &mut actor)?;
            expect("status", fx.place().remit(&["status"])?.code, 0)
        }),
        Case::new("daemon::unknown_settings_stop_it_before_ready", |ctx| {
            let settings = Settings {
                more: "[enforcment]\nroots = []\n".to_owned(),
                ..Settings::default()
            };
            let place = Place::lay(ctx, &settings)?;
            match Daemon::start(&place) {
                Ok(_) => anyhow::bail!("it started"),
                Err(error) => claim(format!("{error:#}").contains("enforcment"), || {
                    format!("the message does not name the key: {error:#}")
                }),
            }
        }),
        Case::new("daemon::an_agent_that_comes_later_is_served", |ctx| {
            let mut fx = Fixture::start_with_cgroups(ctx, &[], &[])?;
            let cgroup = Cgroup::create(&format!("{}/late.service", ctx.root()))?;
            let mut actor = Actor::spawn(Some(&cgroup))?;
            let to = Family::V4.pick(IN_V4, IN_V6, 443)?;
            let how = Refusal::of("unregistered", "unregistered");
            fx.refused(&mut actor, Way::Tcp, Family::V4, to, &how)?;
            fx.change(&Agent::standard("late"))?;
            eventually(2, || {
                fx.arrives(&mut actor, Way::Tcp, Family::V4, to).map(drop)
            })?;
            let to = Family::V4.pick(OUT_V4, OUT_V6, 443)?;
            let how = Refusal::of("late", "out_of_scope");
            fx.refused(&mut actor, Way::Tcp, Family::V4, to, &how)
        }),
    ]
}

/// In scope arrives, out of scope does not, without asking the daemon.
fn fenced(fx: &mut Fixture, actor: &mut Actor) -> Result<()> {
    for family in Family::ALL {
        for way in Way::MAIN {
            fx.arrives(actor, way, family, family.pick(IN_V4, IN_V6, 443)?)?;
            let out = family.pick(OUT_V4, OUT_V6, 443)?;
            fx.wire.drain()?;
            let tried = way.perform(actor, family, out)?;
            expect("errno out of scope", tried.errno, libc::EPERM)?;
            expect("packets out of scope", fx.seen_at(out.ip())?, 0)?;
        }
    }
    Ok(())
}
