//! `remit guard` and `remit status --require`: what unit files and scripts go by.

use std::{ffi::CString, io, os::unix::ffi::OsStrExt as _, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    harness::{Case, Outcome},
    support::{
        Agent, Cgroup, Ctx, Fixture, claim,
        daemon::Settings,
        expect,
        remit::{self, Output},
        tamper::{Pins, detach},
    },
};

/// What joins a cgroup and then executes, as systemd does for a unit.
const SHELL: &str = "/bin/sh";

/// All cases here.
pub fn cases() -> Vec<Case> {
    let name = "proof::guard_lets_nothing_start_unfenced";
    vec![Case::with_outcome(name, |ctx| {
        if !Path::new(SHELL).exists() {
            return Ok(Outcome::NotTested(format!("no {SHELL} here")));
        }
        guard(ctx).map(|()| Outcome::Passed)
    })]
}

/// `remit ARGS` by a process inside `cgroup`, as systemd starts an ExecStartPre.
fn inside(fx: &Fixture, cgroup: &Cgroup, args: &[&str]) -> Result<Output> {
    let script = "echo 0 > \"$0/cgroup.procs\" && exec \"$@\"";
    let mut command = Command::new(SHELL);
    command
        .env("REMIT_CONFIG", fx.place().config())
        .args(["-c", script])
        .arg(cgroup.path())
        .arg(remit::binary()?)
        .args(args);
    remit::output(&mut command)
}

/// Writes a start of a unit on its cgroup, as systemd does.
fn mark(cgroup: &Path, invocation: &str) -> Result<()> {
    let path = CString::new(cgroup.as_os_str().as_bytes())?;
    // SAFETY: two C strings and a buffer of that length, all alive.
    let done = unsafe {
        libc::setxattr(
            path.as_ptr(),
            c"trusted.invocation_id".as_ptr(),
            invocation.as_ptr().cast(),
            invocation.len(),
            0,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error()).context("cannot mark the cgroup");
    }
    Ok(())
}

fn guard(ctx: &mut Ctx) -> Result<()> {
    let settings = Settings {
        more: "[reconcile]\nevery = \"1h\"\n".to_owned(),
        ..Settings::default()
    };
    let agents = [
        Agent::standard("alpha"),
        Agent::standard("draft").state("draft"),
    ];
    let mut fx = Fixture::start_with(ctx, &agents, &settings)?;
    let path = |id: &str| format!("{}/{id}.service", ctx.root());
    let outside = |fx: &Fixture, id: &str| fx.place().remit(&["guard", "--cgroup", &path(id)]);
    let said = outside(&fx, "alpha")?;
    expect("active and fenced", said.code, 0).with_context(|| said.stderr)?;
    let said = outside(&fx, "draft")?;
    expect("a draft", said.code, 1)?;
    claim(said.stderr.contains("the agent is draft"), || said.stderr)?;
    let said = fx.place().remit(&["guard", "--cgroup", "/"])?;
    expect("outside every root", said.code, 1)?;
    claim(said.stderr.contains("below no root"), || said.stderr)?;

    let alpha = fx.cgroup("alpha")?;
    let unit = ["guard", "--unit", "alpha.service"];
    let said = inside(&fx, alpha, &unit)?;
    expect("from inside, by the unit's name", said.code, 0).with_context(|| said.stderr)?;
    let draft = path("draft");
    let said = inside(&fx, alpha, &["guard", "--cgroup", &draft])?;
    expect("of somebody else, from inside", said.code, 3)?;
    let said = fx.place().remit(&["guard", "--unit", "no-such.service"])?;
    expect("no such unit", said.code, 1)?;

    // Two of that name: the one that systemd has started so is meant.
    let elsewhere = Cgroup::create(&format!("/{}.outside", ctx.unique()))?;
    let other = elsewhere.child("alpha.service")?;
    let by_name = |invocation: Option<&str>| -> Result<Output> {
        // As systemd's commands have it, `.service` need not be written.
        let mut command = fx.place().command(&["guard", "--unit", "alpha"])?;
        command.env_remove("INVOCATION_ID");
        command.envs(invocation.map(|id| ("INVOCATION_ID", id)));
        remit::output(&mut command)
    };
    expect("two of that name", by_name(None)?.code, 3)?;
    const START: &str = "0123456789abcdef0123456789abcdef";
    mark(fx.cgroup("alpha")?.path(), START)?;
    let said = by_name(Some(START))?;
    expect("by its invocation", said.code, 0).with_context(|| said.stderr)?;
    drop((other, elsewhere));

    expect(
        "all is well",
        fx.place()
            .remit(&["status", "--require", "enforcing"])?
            .code,
        0,
    )?;
    let pins = Pins::below(&fx.place().at("bpf"));
    detach(&pins.link("remit_connect6")?)?;
    let said = inside(&fx, fx.cgroup("alpha")?, &unit)?;
    expect("a hook is gone", said.code, 1)?;
    claim(said.stderr.contains("cgroup/connect6"), || said.stderr)?;
    let said = fx.place().remit(&["status", "--require", "degraded"])?;
    expect("not even degraded", said.code, 1)?;
    claim(said.stderr.contains("not_enforcing"), || said.stderr)?;

    fx.daemon.kill()?;
    let said = fx.place().remit(&["status", "--require", "enforcing"])?;
    expect("without a daemon it cannot be told", said.code, 3)?;
    // It waits for one that restarts.
    let said = inside(&fx, fx.cgroup("alpha")?, &unit)?;
    expect("and nothing starts", said.code, 3)?;
    Ok(())
}
