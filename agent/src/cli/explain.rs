//! `remit explain`: what the registry on disk says, and beside it what the kernel says where there
//! is a daemon. Both come from the same verdict, so where they differ the files are not what is in
//! force; then the answer is no until somebody has looked.

use serde::Serialize;

use super::{
    Global, client,
    compiled::{Compiled, clock, compile},
    destination::Target,
    explain_ask::{Asked, ask, offline},
    explain_last, explain_way, format,
    outcome::{Failure, Outcome, Result},
    output::{self, Output, Tone, plain, plain_lines},
};
use crate::{
    control::{
        client::{Client, ClientError},
        protocol::{Answer, Attached, Code, Explain, Question},
    },
    policy::{self, AgentTables, Clock, Looked},
};

/// Arguments of `remit explain`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The agent.
    #[arg(value_name = "ID")]
    agent: String,
    /// ADDRESS or NAME, alone or with :PORT, :PORT/PROTO or /icmp; IPv6 in brackets before a port.
    /// PROTO is tcp (the default), udp or any. Without a port: all that the scope says about the
    /// address, or whether the name may be resolved.
    #[arg(value_name = "DEST[:PORT[/PROTO]]", required_unless_present = "last")]
    destination: Option<Target>,
    /// Explain what the agent was refused last, by the violation log.
    #[arg(long, conflicts_with = "destination")]
    last: bool,
    /// Run the attached egress program on such a packet as well, from inside the agent's cgroup;
    /// the kernel counts that as an attempt of the agent, and the log marks it.
    #[arg(long)]
    attached: bool,
}

/// The whole answer.
#[derive(Debug, Serialize)]
struct Told {
    agent: String,
    destination: String,
    /// Whether all, some or none of it is let through.
    verdict: &'static str,
    /// Whether registry and kernel agree; null without a kernel's answer.
    agree: Option<bool>,
    /// Why there is no kernel's answer.
    kernel_missing: Option<String>,
    answers: Vec<Row>,
}

/// The answers to one question.
#[derive(Debug, Serialize)]
struct Row {
    destination: String,
    registry: Option<Explain>,
    /// Why, in a sentence.
    because: Option<String>,
    /// What would make it otherwise, in a sentence.
    would_change: Option<String>,
    kernel: Option<Explain>,
    /// What the attached egress program did with such a packet.
    attached: Option<Attached>,
    /// What the registry's answer looked at; null where it has none.
    looked_at: Option<Vec<Looked>>,
    agree: Option<bool>,
}

/// What can be said without the kernel.
struct Kernel {
    client: Option<Client>,
    missing: Option<String>,
    /// The daemon answered, and has no such agent.
    unknown_agent: bool,
}

pub(super) fn run(global: &Global, arguments: &Arguments, output: &Output) -> Result {
    let last;
    let target = match &arguments.destination {
        Some(target) => target,
        None => {
            last = explain_last::find(global, &arguments.agent)?;
            output::talk(format_args!("last: {}", plain(&last.text)));
            match &last.destination {
                Some(target) => target,
                // A socket type is granted with the protocol, not with a destination.
                None => return Ok(Outcome::No),
            }
        }
    };
    let destination = match target {
        Target::Address(destination) => destination,
        Target::Name(named) => {
            return super::explain_name::run(global, &arguments.agent, named, output);
        }
    };
    let settings = global.settings()?;
    let compiled = compile(&settings, &[]);
    let tables = compiled.agent(&arguments.agent);
    let clock = clock()?;
    let mut kernel = Kernel {
        client: Some(client(&settings)?),
        missing: None,
        unknown_agent: false,
    };

    let mut answers = Vec::new();
    for asked in ask(destination, tables)? {
        let question = Question {
            agent: arguments.agent.clone(),
            addr: destination.addr,
            port: asked.port,
            protocol: asked.protocol,
        };
        let mut row = row(&question, &asked, tables, &clock, &mut kernel)?;
        if arguments.attached {
            kernel.ask_attached(&question, &mut row)?;
        }
        answers.push(row);
    }
    if answers
        .iter()
        .all(|row| row.registry.is_none() && row.kernel.is_none())
    {
        return Err(unanswered(&arguments.agent, &compiled, &kernel));
    }
    let told = Told {
        agent: arguments.agent.clone(),
        destination: destination.to_string(),
        verdict: verdict(&answers),
        agree: agreement(&answers),
        kernel_missing: kernel.missing,
        answers,
    };
    let outcome = Outcome::of(told.verdict != "denied" && told.agree != Some(false));
    if output.wants_json() {
        output.json(&told)?;
    } else {
        print(&told, output)?;
    }
    warn(&told, &compiled, tables.is_some());
    Ok(outcome)
}

fn row(
    question: &Question,
    asked: &Asked,
    tables: Option<&AgentTables>,
    clock: &Clock,
    kernel: &mut Kernel,
) -> Result<Row> {
    let offline = tables.map(|tables| offline(tables, question, clock));
    let kernel = kernel.ask(question)?;
    let agree = match (&offline, &kernel) {
        // What a lease opens, or opened, only the kernel knows.
        (Some(_), Some(kernel)) if kernel.lease.is_some() => None,
        (Some((registry, _, _)), Some(kernel)) => {
            Some(registry.verdict == kernel.verdict && registry.reason == kernel.reason)
        }
        _ => None,
    };
    let (registry, because, would_change) = match offline {
        // Advice about the one port that was asked would mislead about the others.
        Some((registry, because, change)) => {
            (Some(registry), Some(because), asked.exact.then_some(change))
        }
        None => (None, None, None),
    };
    Ok(Row {
        destination: asked.label.clone(),
        registry,
        because,
        would_change,
        kernel,
        attached: None,
        looked_at: tables.map(|tables| {
            let asked = policy::Question::to(question.addr, question.port, question.protocol);
            policy::looked_at(tables, &asked)
        }),
        agree,
    })
}

// === impl Kernel ===

impl Kernel {
    /// The kernel's answer, if there is a daemon to ask for it. A daemon that is there and fails is
    /// a failure; one that is not, or does not talk to this user, is not.
    fn ask(&mut self, question: &Question) -> Result<Option<Explain>> {
        let Some(client) = &self.client else {
            return Ok(None);
        };
        let path = format!(
            "/explain?agent={}&addr={}&port={}&protocol={}",
            super::agents::segment(&question.agent),
            question.addr,
            question.port,
            question.protocol
        );
        match client.get::<Explain>(&path) {
            Ok(explain) => Ok(Some(explain)),
            Err(error) => {
                match &error {
                    ClientError::NoDaemon(_) | ClientError::NotAllowed(_) => {}
                    ClientError::Refused(refusal) if refusal.code == Code::Forbidden => {}
                    ClientError::Refused(refusal) if refusal.code == Code::NoSuchAgent => {
                        self.unknown_agent = true;
                    }
                    _ => return Err(error.into()),
                }
                self.client = None;
                self.missing = Some(error.to_string());
                Ok(None)
            }
        }
    }
}

impl Kernel {
    /// Has the attached program judge such a packet.
    fn ask_attached(&mut self, question: &Question, row: &mut Row) -> Result<()> {
        let Some(client) = &self.client else {
            return Ok(());
        };
        let attached: Attached = client.post_json("/explain", question)?;
        // On loopback the program looks up who really listens; the others suppose a stranger.
        if !question.addr.is_loopback()
            && let Some(told) = row.kernel.as_ref().or(row.registry.as_ref())
        {
            let same = attached.passes == told.verdict.passes();
            row.agree = Some(same && row.agree != Some(false));
        }
        row.attached = Some(attached);
        Ok(())
    }
}

/// Nobody could say anything.
fn unanswered(agent: &str, compiled: &Compiled, kernel: &Kernel) -> Failure {
    let kernel = kernel
        .missing
        .as_deref()
        .unwrap_or("no answer from the kernel");
    not_told(agent, compiled, kernel)
}

/// The registry on disk says nothing about `agent`, and nobody else does, for the reason `else_why`.
pub(super) fn not_told(agent: &str, compiled: &Compiled, else_why: &str) -> Failure {
    let troubles = compiled.troubles(agent);
    for trouble in &troubles {
        output::talk(format_args!("{}\n", plain_lines(trouble)));
    }
    let agent = plain(agent);
    if troubles.is_empty() {
        return Failure::no(format!("no agent `{agent}` in the registry"))
            .help("`remit check` lists what is wrong with files that were not compiled");
    }
    Failure::unknown(format!(
        "the entry of `{agent}` does not compile, and {else_why}"
    ))
}

/// What counts: the kernel's answer where there is one.
fn answer(row: &Row) -> Option<&Explain> {
    row.kernel.as_ref().or(row.registry.as_ref())
}

fn verdict(answers: &[Row]) -> &'static str {
    let mut passing = answers
        .iter()
        .map(|row| answer(row).is_some_and(|told| told.verdict.passes()));
    if let [row] = answers {
        return answer(row).map_or("denied", |told| told.verdict.name());
    }
    let some = answers
        .iter()
        .any(|row| answer(row).is_some_and(|told| told.verdict.passes()));
    match (passing.all(|passes| passes), some) {
        (true, _) => "allowed",
        (false, true) => "partly",
        (false, false) => "denied",
    }
}

fn agreement(answers: &[Row]) -> Option<bool> {
    let told: Vec<bool> = answers.iter().filter_map(|row| row.agree).collect();
    (!told.is_empty()).then(|| told.iter().all(|agree| *agree))
}

// === for people ===

fn print(told: &Told, output: &Output) -> Result<()> {
    for row in &told.answers {
        let Some(counts) = answer(row) else { continue };
        let (tone, word) = match counts.verdict {
            Answer::Allowed => (Tone::Good, "allowed"),
            Answer::Monitored => (Tone::Doubtful, "allowed and reported"),
            Answer::Denied => (Tone::Bad, "denied"),
            Answer::Fault => (Tone::Bad, "denied by a fault"),
        };
        let reason = counts
            .reason
            .as_deref()
            .map_or_else(String::new, |reason| format!(": {reason}"));
        output.line(format_args!(
            "{} {} to {}{}",
            output.paint(tone, word),
            plain(&told.agent),
            plain(&row.destination),
            plain(&reason)
        ))?;
        if let Some(registry) = &row.registry {
            output.line(format_args!("  registry  {}", sentence(registry)))?;
        }
        if let Some(kernel) = &row.kernel {
            let revision = kernel.revision;
            for cgroup in &kernel.cgroups {
                output.line(format_args!("  cgroup    {}", plain(cgroup)))?;
            }
            output.line(format_args!(
                "  kernel    {}, revision {revision}",
                sentence(kernel)
            ))?;
        }
        if let Some(attached) = &row.attached {
            let word = if attached.passes { "passes" } else { "drops" };
            output.line(format_args!(
                "  attached  program {} {word} it, from {}",
                attached.program,
                plain(&attached.cgroup)
            ))?;
        }
        for line in row.looked_at.iter().flatten().flat_map(explain_way::looked) {
            output.line(format_args!("  looked at {}", plain(&line)))?;
        }
        for (name, text) in [("because", &row.because), ("change", &row.would_change)] {
            if let Some(text) = text {
                output.line(format_args!("  {name:<9} {}", plain(text)))?;
            }
        }
    }
    Ok(())
}

fn sentence(told: &Explain) -> String {
    let by = match &told.entry {
        Some(entry) => format!(
            " by {} ({})",
            entry.name,
            format::place(&entry.file, entry.line)
        ),
        None => told
            .reason
            .as_ref()
            .map_or_else(String::new, |reason| format!(", {reason}")),
    };
    let note = told
        .note
        .as_ref()
        .map_or_else(String::new, |note| format!("; {note}"));
    let lease = told.lease.as_ref().map_or_else(String::new, |lease| {
        let name = lease.name.as_deref().unwrap_or("a name");
        let until = format::time(lease.until_ms);
        let verb = if told.verdict.passes() { "is" } else { "was" };
        format!("; it {verb} leased to {name} until {until}")
    });
    plain(&format!("{}{by}{note}{lease}", told.verdict.name()))
}

/// What must not be missed.
fn warn(told: &Told, compiled: &Compiled, compiles: bool) {
    let agent = plain(&told.agent);
    if !compiles {
        for trouble in compiled.troubles(&told.agent) {
            output::talk(format_args!("{}\n", plain_lines(&trouble)));
        }
        output::talk(format_args!(
            "the registry on disk has no valid entry for `{agent}`: the kernel's answer stands alone"
        ));
    }
    if told.agree == Some(false) {
        output::warning(
            "registry and kernel DISAGREE: what is on disk is not what is in force; try `remit \
             reload`",
        );
    }
    let changed = |row: &Row| match (&row.registry, &row.kernel) {
        (Some(registry), Some(kernel)) => registry.hash != kernel.hash,
        _ => false,
    };
    if told.agree == Some(true) && told.answers.iter().any(changed) {
        output::talk("the entry on disk is not the one in force, though both say the same here");
    }
    if let Some(missing) = &told.kernel_missing {
        output::talk(format_args!(
            "{}: answered from the registry alone",
            plain(missing)
        ));
    }
}
