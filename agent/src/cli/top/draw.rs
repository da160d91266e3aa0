//! The screen. It fits 80×24, and uses what there is more.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Borders, Clear, Paragraph, Row, Table, TableState, Wrap},
};
use serde_json::Value;

use super::{
    super::{format, output::plain},
    view::{Focus, View},
};
use crate::{
    audit::line::target,
    control::protocol::{AgentStatus, Lease, Posture},
};

/// An end nearer than this is worth a look, in milliseconds.
const NEAR: i64 = 7 * 86_400 * 1000;
/// Leases shown.
const LEASES: usize = 4;
/// Characters of `2026-11-24T`, and of the time of day.
const DATE: usize = 11;
const TIME: usize = 8;

/// Everything.
pub fn all(frame: &mut Frame<'_>, view: &View) {
    let [head, body, foot] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Min(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    header(frame, head, view);
    let ending = view.leases();
    let [body, middle] = Layout::vertical([
        Constraint::Min(1),
        Constraint::Length(match ending.len().min(LEASES) {
            0 => 0,
            rows => u16::try_from(rows + 1).unwrap_or(0),
        }),
    ])
    .areas(body);
    let [above, below] =
        Layout::vertical([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(body);
    match view.open() {
        Some(agent) => opened(frame, above, agent, view),
        None => agents(frame, above, view),
    }
    violations(frame, below, view);
    leases(frame, middle, &ending, view.now());
    if let Some(text) = &view.explanation {
        explanation(frame, text);
    }
    keys(frame, foot, view);
}

fn header(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let Some(status) = &view.status else {
        let why = view.problem.as_deref().unwrap_or("asking the daemon …");
        let line = Line::styled(plain(why), Style::new().fg(Color::Yellow));
        frame.render_widget(Paragraph::new(line), area);
        return;
    };
    let (posture, colour) = match status.posture {
        Posture::Enforcing => ("ENFORCING", Color::Green),
        Posture::Degraded => ("DEGRADED", Color::Yellow),
        Posture::NotEnforcing => ("NOT ENFORCING", Color::Red),
    };
    let rest = format!(
        "  since {}  revision {}  {}",
        format::time(status.since_ms),
        status.revision,
        format::count(status.agents.len() as u64, "agent"),
    );
    let first = Line::from(vec![
        Span::raw("remit  "),
        Span::styled(
            posture,
            Style::new().fg(colour).add_modifier(Modifier::BOLD),
        ),
        Span::raw(rest),
    ]);
    let second = match (&view.problem, status.reasons.first()) {
        (Some(why), _) => Line::styled(
            format!("as it was; {}", plain(why)),
            Style::new().fg(Color::Red),
        ),
        (None, Some(reason)) => {
            let more = match status.reasons.len() {
                1 => String::new(),
                reasons => format!(" (and {} more)", reasons - 1),
            };
            Line::styled(
                format!("because {}{more}", plain(reason)),
                Style::new().fg(Color::Yellow),
            )
        }
        (None, None) => Line::raw(""),
    };
    frame.render_widget(Paragraph::new(vec![first, second]), area);
}

fn agents(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let agents = view.agents();
    let rows = agents.iter().map(|agent| {
        let rate = view.rates.get(&agent.id).copied().unwrap_or_default();
        let row = Row::new([
            plain(&agent.id),
            plain(&agent.state),
            plain(&agent.mode),
            agent.processes.to_string(),
            per_second(rate.allowed),
            per_second(rate.refused),
            agent.denied.to_string(),
            agent.expires_ms.map_or_else(|| "never".to_owned(), day),
        ]);
        row.style(style(agent, rate.refused, view))
    });
    let widths = [
        Constraint::Min(12),
        Constraint::Length(9),
        Constraint::Length(7),
        Constraint::Length(5),
        Constraint::Length(7),
        Constraint::Length(6),
        Constraint::Length(9),
        Constraint::Length(10),
    ];
    let heading = Row::new([
        "AGENT", "STATE", "MODE", "PROCS", "ALLOW/S", "DENY/S", "DENIED", "ENDS",
    ]);
    let mut title = format!(" agents by {}", view.sort.name());
    if view.reversed {
        title.push_str(", reversed");
    }
    if !view.filter.is_empty() {
        title.push_str(&format!(", with `{}`", plain(&view.filter)));
    }
    title.push(' ');
    let table = Table::new(rows, widths)
        .header(heading.style(Style::new().add_modifier(Modifier::BOLD)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
        .block(block(title, view.focus != Focus::Violations));
    let mut state = TableState::default().with_selected(Some(view.selected));
    frame.render_stateful_widget(table, area, &mut state);
}

fn style(agent: &AgentStatus, refused: f64, view: &View) -> Style {
    if agent.state != "active" {
        return Style::new().fg(Color::Red);
    }
    // By the daemon's clock, which decides.
    let near = agent
        .expires_ms
        .zip(view.now())
        .is_some_and(|(ends, now)| ends - now < NEAR);
    if near || refused > 0.0 || agent.finding.is_some() {
        return Style::new().fg(Color::Yellow);
    }
    Style::new()
}

fn opened(frame: &mut Frame<'_>, area: Rect, agent: &AgentStatus, view: &View) {
    let rate = view.rates.get(&agent.id).copied().unwrap_or_default();
    let mut lines = vec![
        Line::raw(format!(
            "{}: {}, {}, entry of revision {}, ends {}",
            plain(&agent.name),
            plain(&agent.state),
            plain(&agent.mode),
            agent.revision,
            format::end(agent.expires_ms)
        )),
        Line::raw(format!(
            "allowed {} ({}/s), denied {}, monitored {} ({}/s)",
            agent.allowed,
            per_second(rate.allowed),
            agent.denied,
            agent.monitored,
            per_second(rate.refused)
        )),
    ];
    if let Some(hold) = &agent.hold {
        let held = super::super::lifecycle::hold_line(hold);
        lines.push(Line::styled(held, Style::new().fg(Color::Red)));
    }
    if let Some(finding) = &agent.finding {
        let first = finding.lines().next().unwrap_or_default();
        let kept = format!("last good entry kept: {}", plain(first));
        lines.push(Line::styled(kept, Style::new().fg(Color::Yellow)));
    }
    if !agent.by_reason.is_empty() {
        let reasons: Vec<_> = agent
            .by_reason
            .iter()
            .map(|(reason, count)| format!("{} {count}", plain(reason)))
            .collect();
        lines.push(Line::raw(format!("reasons: {}", reasons.join(", "))));
    }
    for cgroup in &agent.cgroups {
        let processes = match cgroup.processes {
            1 => "1 process".to_owned(),
            processes => format!("{processes} processes"),
        };
        lines.push(Line::raw(format!("{}  {processes}", plain(&cgroup.path))));
    }
    let text = Paragraph::new(lines).wrap(Wrap { trim: false });
    let block = block(format!(" {} ", plain(&agent.id)), true);
    frame.render_widget(text.block(block), area);
}

fn violations(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let violations = view.violations();
    let rows = violations.iter().map(|event| Row::new(cells(event)));
    let focused = view.focus == Focus::Violations || view.opened.is_some();
    let widths = [
        Constraint::Length(8),
        Constraint::Length(15),
        Constraint::Min(24),
        Constraint::Length(13),
        Constraint::Length(6),
        Constraint::Length(9),
    ];
    let title = " last violations, newest first ".to_owned();
    let mut table = Table::new(rows, widths).block(block(title, focused));
    if focused {
        table = table.row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    }
    let mut state = TableState::default().with_selected(Some(view.line));
    frame.render_stateful_widget(table, area, &mut state);
}

/// The leases that end first.
fn leases(frame: &mut Frame<'_>, area: Rect, leases: &[(&str, &Lease)], now: Option<i64>) {
    if leases.is_empty() {
        return;
    }
    let rows = leases.iter().take(LEASES).map(|(agent, lease)| {
        Row::new([
            plain(agent),
            plain(lease.name.as_deref().unwrap_or("(name not known)")),
            lease.addr.to_string(),
            now.map_or_else(|| "?".to_owned(), |now| left(lease.until_ms - now)),
        ])
    });
    let widths = [
        Constraint::Length(15),
        Constraint::Min(20),
        Constraint::Length(24),
        Constraint::Length(12),
    ];
    let title = match leases.len() {
        1 => " 1 lease ".to_owned(),
        all => format!(" {all} leases, the nearest end first "),
    };
    frame.render_widget(Table::new(rows, widths).block(block(title, false)), area);
}

/// How long it lasts.
fn left(millis: i64) -> String {
    match millis {
        ..=0 => "over".to_owned(),
        millis if millis < 120_000 => format!("for {} s", millis / 1000),
        millis if millis < 7_200_000 => format!("for {} min", millis / 60_000),
        millis => format!("for {} h", millis / 3_600_000),
    }
}

/// Time of day, agent, destination, reason, attempts, process: what fits.
fn cells(event: &Value) -> [String; 6] {
    let text = |value: &Value| plain(value.as_str().unwrap_or("?"));
    let time = event["time"].as_i64().map(format::time).unwrap_or_default();
    let time = time.get(DATE..DATE + TIME).unwrap_or("?").to_owned();
    let lost = !event["unmapped"]["lost"].is_null();
    let to = match event["dst_endpoint"].is_object() {
        true => target(event),
        false if lost => "(details lost)".to_owned(),
        false => text(&event["unmapped"]["socket_type"]),
    };
    let count = match event["count"].as_u64() {
        Some(count) => format!("×{count}"),
        None => String::new(),
    };
    let process = &event["actor"]["process"]["name"];
    [
        time,
        text(&event["ai_agent"]["uid"]),
        to,
        text(&event["unmapped"]["reason"]),
        count,
        process.as_str().map(plain).unwrap_or_default(),
    ]
}

fn explanation(frame: &mut Frame<'_>, text: &str) {
    let lines: Vec<_> = text.lines().map(|line| Line::raw(plain(line))).collect();
    let whole = frame.area();
    let height = u16::try_from(lines.len())
        .unwrap_or(u16::MAX)
        .saturating_add(3);
    let [_, area, _] = Layout::vertical([
        Constraint::Fill(1),
        Constraint::Length(height.min(whole.height)),
        Constraint::Fill(1),
    ])
    .areas(whole);
    frame.render_widget(Clear, area);
    let block = block(" what the kernel says now (Esc closes) ".to_owned(), true);
    let text = Paragraph::new(lines).wrap(Wrap { trim: false });
    frame.render_widget(text.block(block), area);
}

fn keys(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let text = match view.focus {
        Focus::Filter => format!(
            "filter: {}_  (Enter keeps it, Esc clears it)",
            plain(&view.filter)
        ),
        Focus::Agents if view.opened.is_none() => {
            "q quit  ↑↓ select  Enter open  s sort  r reverse  / filter  Tab violations".to_owned()
        }
        Focus::Agents | Focus::Violations => {
            "q quit  ↑↓ select  e explain  Esc back  Tab other half".to_owned()
        }
    };
    frame.render_widget(Paragraph::new(text), area);
}

fn block(title: String, focused: bool) -> Block<'static> {
    let style = if focused {
        Style::new().add_modifier(Modifier::BOLD)
    } else {
        Style::new()
    };
    Block::new()
        .borders(Borders::TOP)
        .title(title)
        .title_style(style)
}

/// Three figures at most.
fn per_second(rate: f64) -> String {
    match rate {
        0.0 => "0".to_owned(),
        rate if rate < 10.0 => format!("{rate:.1}"),
        rate if rate < 10_000.0 => format!("{rate:.0}"),
        rate => format!("{:.0}k", rate / 1000.0),
    }
}

fn day(millis: i64) -> String {
    format::time(millis).get(..10).unwrap_or("?").to_owned()
}
