//! `remit top`: the host at a glance, in the terminal. What is asked of the daemon is asked by a
//! thread of its own, so that keys are answered whatever the daemon does.

mod draw;
mod feed;
mod view;

use std::time::Duration;

use anyhow::Context as _;
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use self::{
    feed::{Feed, Said},
    view::{Effect, View},
};
use super::{
    Global,
    outcome::{Failure, Outcome, Result},
    output::Output,
};

/// How soon news, signals and resizes are seen.
const TICK: Duration = Duration::from_millis(100);

/// Arguments of `remit top`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Seconds between two looks at the daemon.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = clap::value_parser!(u64).range(1..=3600))]
    every: u64,
    /// Violations of probes too, which are none of an agent's own.
    #[arg(long)]
    probes: bool,
}

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    if output.wants_json() || !Output::is_terminal() {
        return Err(Failure::usage("`remit top` needs a terminal")
            .help("`remit status --json` and `remit tail --json` are for programs"));
    }
    // Before any thread, so that all have them blocked: the terminal is put back in any case.
    let signals = signals().context("cannot take signals")?;
    let feed = Feed::start(
        global.client()?,
        &global.settings()?.paths.log,
        Duration::from_secs(arguments.every),
        arguments.probes,
    );
    let mut view = View::default();
    let mut terminal = ratatui::try_init().context("cannot set up the terminal")?;
    let ended = loop {
        for said in feed.news() {
            match said {
                Said::Status(status) => view.take(*status),
                Said::Violation(event) => view.saw(event),
                Said::Explained(text) => view.explained(text),
                Said::Trouble(why) => view.trouble(why),
            }
        }
        if let Err(error) = terminal.draw(|frame| draw::all(frame, &view)) {
            break Err(error);
        }
        match pressed() {
            Err(error) => break Err(error),
            Ok(None) => {}
            Ok(Some(key)) => match view.key(key) {
                Effect::None => {}
                Effect::Quit => break Ok(()),
                Effect::Explain(question) => feed.explain(question),
            },
        }
        if !matches!(signals.read_signal(), Ok(None)) {
            break Ok(());
        }
    };
    let restored = ratatui::try_restore();
    ended
        .and(restored)
        .context("the terminal does not do its part")?;
    Ok(Outcome::Yes)
}

fn signals() -> nix::Result<SignalFd> {
    let set = SigSet::from_iter([Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT]);
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

/// The next key; none within a tick.
fn pressed() -> std::io::Result<Option<event::KeyEvent>> {
    if !event::poll(TICK)? {
        return Ok(None);
    }
    Ok(match event::read()? {
        Event::Key(key) if key.kind == KeyEventKind::Press => Some(key),
        _ => None,
    })
}
