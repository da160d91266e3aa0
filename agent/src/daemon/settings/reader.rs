//! Text to [`Settings`]: walks the parsed tables key by key, so that every mistake is found, with
//! its place.

use std::{net::SocketAddr, ops::Range, path::PathBuf, time::Duration};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    CgroupMount, Containment, Mistake, OnBadRegistry, OnProbeFail, Settings, Unregistered, Upstream,
};
use crate::{
    audit::{Mask, encode::Format, span},
    policy::{Depth, HostError, HostPattern},
};

/// Reads `text`. The settings are of use only when there are no mistakes; those come in the
/// file's order.
pub(super) fn read(name: &str, text: &str) -> (Settings, Vec<Mistake>) {
    let mut reader = Reader {
        name,
        text,
        mistakes: Vec::new(),
    };
    let (root, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        reader.mistake(error.span().unwrap_or(0..0), error.message(), None);
    }
    let mut settings = Settings::default();
    reader.fill(root.into_inner(), &mut settings);
    reader.mistakes.sort_by_key(|m| (m.line, m.column));
    (settings, reader.mistakes)
}

type Value<'t> = Spanned<DeValue<'t>>;

/// What is wrong with a value, and where if not all of it.
struct Fault {
    span: Option<Range<usize>>,
    message: String,
    help: Option<String>,
}

struct Reader<'t> {
    name: &'t str,
    text: &'t str,
    mistakes: Vec<Mistake>,
}

/// A table being emptied key by key; what stays is unknown.
struct Section<'r, 't> {
    reader: &'r mut Reader<'t>,
    title: &'static str,
    table: DeTable<'t>,
    known: Vec<&'static str>,
}

impl<'t> Reader<'t> {
    fn fill(&mut self, root: DeTable<'t>, s: &mut Settings) {
        let mut root = Section {
            reader: self,
            title: "",
            table: root,
            known: Vec::new(),
        };
        if let Some(mut t) = root.section("paths") {
            t.set("registry", &mut s.paths.registry, path);
            t.set("sets", &mut s.paths.sets, |v| list(v, path));
            t.set("floor", &mut s.paths.floor, path);
            t.set("run", &mut s.paths.run, path);
            t.set("log", &mut s.paths.log, path);
            t.set("state", &mut s.paths.state, path);
            t.set("bpffs", &mut s.paths.bpffs, path);
            t.set("cgroup", &mut s.paths.cgroup, |v| match text(v)? {
                "auto" => Ok(CgroupMount::Auto),
                _ => path(v).map(CgroupMount::At),
            });
            t.finish();
        }
        if let Some(mut t) = root.section("enforcement") {
            let e = &mut s.enforcement;
            t.set("roots", &mut e.roots, roots);
            t.set("unregistered", &mut e.unregistered, |v| {
                word(
                    v,
                    &[
                        ("deny", Unregistered::Deny),
                        ("monitor", Unregistered::Monitor),
                    ],
                )
            });
            t.set("containment", &mut e.containment, |v| {
                word(
                    v,
                    &[
                        ("auto", Containment::Auto),
                        ("require", Containment::Require),
                        ("off", Containment::Off),
                    ],
                )
            });
            t.set("on_bad_registry", &mut e.on_bad_registry, |v| {
                word(
                    v,
                    &[("keep", OnBadRegistry::Keep), ("deny", OnBadRegistry::Deny)],
                )
            });
            t.set("on_probe_fail", &mut e.on_probe_fail, |v| {
                word(
                    v,
                    &[("report", OnProbeFail::Report), ("deny", OnProbeFail::Deny)],
                )
            });
            t.finish();
        }
        if let Some(mut t) = root.section("dns") {
            t.set("enabled", &mut s.dns.enabled, boolean);
            t.set("upstream", &mut s.dns.upstream, |v| filled(v, upstream));
            t.set("min_lease", &mut s.dns.min_lease, duration);
            t.set(
                "max_addresses_per_name",
                &mut s.dns.max_addresses_per_name,
                |v| number(v, 1),
            );
            t.set("max_lease", &mut s.dns.max_lease, duration);
            t.set("wildcard_budget", &mut s.dns.wildcard_budget, |v| {
                number(v, 0)
            });
            t.finish();
        }
        if let Some(mut t) = root.section("log") {
            t.set("max_size", &mut s.log.max_size, |v| size(v, 64 << 10));
            t.set("retention", &mut s.log.retention, duration);
            t.set("per_agent_rate", &mut s.log.per_agent_rate, |v| {
                narrow(v, 1)
            });
            t.set("per_agent_daily", &mut s.log.per_agent_daily, |v| {
                size(v, 64 << 10)
            });
            t.set("max_total", &mut s.log.max_total, |v| size(v, 64 << 10));
            t.set("access", &mut s.log.access, period);
            t.set("mask", &mut s.log.mask, |v| list(v, pattern).map(Some));
            t.set("export", &mut s.log.export, |v| {
                list(v, |v| {
                    word(v, &Format::ALL.map(|format| (format.name(), format)))
                })
            });
            t.set("journal", &mut s.log.journal, boolean);
            t.set("otlp", &mut s.log.otlp, |v| off_or(v, collector));
            t.set("signing_key", &mut s.log.signing_key, |v| path(v).map(Some));
            t.finish();
        }
        if let Some(mut t) = root.section("reconcile") {
            t.set("every", &mut s.reconcile.every, period);
            t.finish();
        }
        if let Some(mut t) = root.section("probe") {
            t.set("every", &mut s.probe.every, period);
            t.finish();
        }
        if let Some(mut t) = root.section("metrics") {
            t.set("listen", &mut s.metrics.listen, |v| off_or(v, loopback));
            t.finish();
        }
        if let Some(mut t) = root.section("discover") {
            let roots = &s.enforcement.roots;
            t.set("traffic", &mut s.discover.traffic, boolean);
            t.set("apis", &mut s.discover.apis, |v| apis(v).map(Some));
            t.set("cgroup", &mut s.discover.cgroup, |v| outside(v, roots));
            t.finish();
        }
        if let Some(mut t) = root.section("limits") {
            t.set("agents", &mut s.limits.agents, |v| narrow(v, 1).map(Some));
            t.set("prefixes", &mut s.limits.prefixes, |v| {
                narrow(v, 1).map(Some)
            });
            t.set("addresses", &mut s.limits.addresses, |v| {
                narrow(v, 1).map(Some)
            });
            t.set("rule_sets", &mut s.limits.rule_sets, |v| {
                narrow(v, 1).map(Some)
            });
            t.finish();
        }
        root.finish();
    }

    fn mistake(&mut self, span: Range<usize>, message: impl Into<String>, help: Option<String>) {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let start = before.rfind('\n').map_or(0, |at| at + 1);
        let rest = self.text.get(start..).unwrap_or("");
        let excerpt = rest.lines().next().unwrap_or("").to_owned();
        let column = before.get(start..).unwrap_or("").chars().count() + 1;
        let marked = self
            .text
            .get(span)
            .unwrap_or("")
            .lines()
            .next()
            .unwrap_or("");
        self.mistakes.push(Mistake {
            file: self.name.to_owned(),
            line,
            column,
            message: message.into(),
            excerpt,
            width: marked.chars().count().max(1),
            help,
        });
    }
}

impl<'t> Section<'_, 't> {
    /// The table named `key`, if the file has it.
    fn section(&mut self, key: &'static str) -> Option<Section<'_, 't>> {
        self.known.push(key);
        let value = self.table.remove(key)?;
        let span = value.span();
        match value.into_inner() {
            DeValue::Table(table) => Some(Section {
                reader: self.reader,
                title: key,
                table,
                known: Vec::new(),
            }),
            other => {
                let found = other.type_str();
                let message = format!("`{key}` must be a table, not {found}");
                self.reader
                    .mistake(span, message, Some(format!("write `[{key}]`")));
                None
            }
        }
    }

    /// Puts the value of `key` into `slot`, if the file has it and it makes sense.
    fn set<T>(
        &mut self,
        key: &'static str,
        slot: &mut T,
        parse: impl FnOnce(&Value<'t>) -> Result<T, Fault>,
    ) {
        self.known.push(key);
        let Some(value) = self.table.remove(key) else {
            return;
        };
        match parse(&value) {
            Ok(parsed) => *slot = parsed,
            Err(fault) => {
                let span = fault.span.unwrap_or_else(|| value.span());
                let message = format!("`{key}`: {}", fault.message);
                self.reader.mistake(span, message, fault.help);
            }
        }
    }

    /// Whatever is left over is a mistake.
    fn finish(self) {
        let known = self.known.join(", ");
        for (key, _) in self.table {
            let (message, help) = if self.title.is_empty() {
                (
                    format!("unknown table `{key}`", key = key.get_ref()),
                    "tables",
                )
            } else {
                let title = self.title;
                (
                    format!("unknown key `{}` in `[{title}]`", key.get_ref()),
                    "keys",
                )
            };
            let help = format!("the {help} here are {known}");
            self.reader.mistake(key.span(), message, Some(help));
        }
    }
}

fn fault<T>(message: impl Into<String>) -> Result<T, Fault> {
    Err(Fault {
        span: None,
        message: message.into(),
        help: None,
    })
}

fn text<'v>(value: &'v Value<'_>) -> Result<&'v str, Fault> {
    match value.get_ref().as_str() {
        Some(text) => Ok(text),
        None => fault(format!(
            "must be a string, not {}",
            value.get_ref().type_str()
        )),
    }
}

fn boolean(value: &Value<'_>) -> Result<bool, Fault> {
    match value.get_ref().as_bool() {
        Some(flag) => Ok(flag),
        None => fault(format!(
            "must be true or false, not {}",
            value.get_ref().type_str()
        )),
    }
}

fn path(value: &Value<'_>) -> Result<PathBuf, Fault> {
    let path = PathBuf::from(text(value)?);
    if path.is_absolute() {
        return Ok(path);
    }
    fault(format!("`{}` must be an absolute path", path.display()))
}

fn pattern(value: &Value<'_>) -> Result<String, Fault> {
    let text = text(value)?;
    match Mask::new([text]) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => fault(error.to_string()),
    }
}

fn word<T: Copy>(value: &Value<'_>, words: &[(&str, T)]) -> Result<T, Fault> {
    let text = text(value)?;
    if let Some((_, meaning)) = words.iter().find(|(word, _)| *word == text) {
        return Ok(*meaning);
    }
    let known: Vec<_> = words
        .iter()
        .map(|(word, _)| format!("\"{word}\""))
        .collect();
    fault(format!("`{text}` must be one of {}", known.join(", ")))
}

fn list<'t, T>(
    value: &Value<'t>,
    item: impl Fn(&Value<'t>) -> Result<T, Fault>,
) -> Result<Vec<T>, Fault> {
    let Some(items) = value.get_ref().as_array() else {
        return fault(format!(
            "must be a list, not {}",
            value.get_ref().type_str()
        ));
    };
    let at = |v: &Value<'t>| {
        item(v).map_err(|fault| Fault {
            span: fault.span.or_else(|| Some(v.span())),
            ..fault
        })
    };
    items.iter().map(at).collect()
}

fn filled<'t, T>(
    value: &Value<'t>,
    item: impl Fn(&Value<'t>) -> Result<T, Fault>,
) -> Result<Vec<T>, Fault> {
    let items = list(value, item)?;
    if items.is_empty() {
        return fault("must not be empty");
    }
    Ok(items)
}

fn number(value: &Value<'_>, least: u64) -> Result<u64, Fault> {
    let Some(integer) = value.get_ref().as_integer() else {
        return fault(format!(
            "must be a whole number, not {}",
            value.get_ref().type_str()
        ));
    };
    match u64::from_str_radix(integer.as_str(), integer.radix()) {
        Ok(number) if number >= least => Ok(number),
        Ok(_) | Err(_) => fault(format!(
            "`{integer}` must be a whole number of {least} or more"
        )),
    }
}

fn narrow(value: &Value<'_>, least: u64) -> Result<u32, Fault> {
    let number = number(value, least)?;
    u32::try_from(number).or_else(|_| fault(format!("`{number}` must not exceed {}", u32::MAX)))
}

fn duration(value: &Value<'_>) -> Result<Duration, Fault> {
    let length = span::parse(text(value)?).or_else(|error| fault(error.to_string()))?;
    if length.is_zero() {
        return fault("must be longer than nothing");
    }
    Ok(length)
}

fn off_or<'t, T>(
    value: &Value<'t>,
    parse: impl FnOnce(&Value<'t>) -> Result<T, Fault>,
) -> Result<Option<T>, Fault> {
    if text(value)? == "off" {
        return Ok(None);
    }
    parse(value).map(Some).map_err(|fault| Fault {
        message: format!("{}; or \"off\"", fault.message),
        ..fault
    })
}

fn period(value: &Value<'_>) -> Result<Option<Duration>, Fault> {
    off_or(value, duration)
}

fn address(value: &Value<'_>) -> Result<SocketAddr, Fault> {
    let text = text(value)?;
    text.parse().or_else(|_| {
        fault(format!(
            "`{text}` must be an address and a port such as \"127.0.0.1:9464\""
        ))
    })
}

/// Metrics are no secret of the host's, but the network has no business with them.
fn loopback(value: &Value<'_>) -> Result<SocketAddr, Fault> {
    let address = address(value)?;
    if address.ip().to_canonical().is_loopback() {
        return Ok(address);
    }
    Err(Fault {
        span: None,
        message: format!("`{address}` is no loopback address"),
        help: Some(
            "metrics are served to this host alone: \"127.0.0.1:9464\" or \"[::1]:9464\"; to the \
             network a proxy can, with whatever protects it there"
                .to_owned(),
        ),
    })
}

#[cfg(feature = "otlp")]
fn collector(value: &Value<'_>) -> Result<String, Fault> {
    let text = text(value)?;
    match text.parse::<crate::audit::otlp::Collector>() {
        Ok(_) => Ok(text.to_owned()),
        Err(why) => fault(why),
    }
}

#[cfg(not(feature = "otlp"))]
fn collector(_: &Value<'_>) -> Result<String, Fault> {
    fault("this build sends nothing to collectors: it was built without the feature `otlp`")
}

fn upstream(value: &Value<'_>) -> Result<Upstream, Fault> {
    match text(value)? {
        "system" => Ok(Upstream::System),
        other => other.parse().map(Upstream::At).or_else(|_| {
            fault(format!(
                "`{other}` must be \"system\" or an address and a port such as \"127.0.0.1:5300\""
            ))
        }),
    }
}

/// `256MiB`, `8GiB`, `64KiB` or `512B`.
fn size(value: &Value<'_>, least: u64) -> Result<u64, Fault> {
    let text = text(value)?;
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => {
            return fault(format!(
                "`{text}` must be a size such as \"256MiB\" (units: B, KiB, MiB, GiB, TiB)"
            ));
        }
    };
    match number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
    {
        Some(bytes) if bytes >= least => Ok(bytes),
        Some(_) => fault(format!("`{text}` must be {}KiB or more", least >> 10)),
        None => fault(format!("`{text}` must be a size such as \"256MiB\"")),
    }
}

/// Cgroup paths below the v2 mount. Each becomes the place where programs are attached, so none
/// may be the whole host, and none may lie inside another, where packets would be judged twice.
fn roots(value: &Value<'_>) -> Result<Vec<String>, Fault> {
    let found = filled(value, |v| root(v).map(|path| (path, v.span())))?;
    for (i, (inner, at)) in found.iter().enumerate() {
        for (j, (outer, _)) in found.iter().enumerate() {
            let message = if i > j && inner == outer {
                format!("root `{inner}` is there twice")
            } else if inner.starts_with(&format!("{outer}/")) {
                format!("root `{inner}` lies inside root `{outer}`, which governs it already")
            } else {
                continue;
            };
            return Err(Fault {
                span: Some(at.clone()),
                message,
                help: Some("remove it".to_owned()),
            });
        }
    }
    Ok(found.into_iter().map(|(path, _)| path).collect())
}

/// Names that are looked up, so no patterns.
fn apis(value: &Value<'_>) -> Result<Vec<String>, Fault> {
    const MOST: usize = 256;
    let found = filled(value, |v| {
        let name = text(v)?;
        let host: HostPattern = name.parse().map_err(|why: HostError| Fault {
            span: None,
            message: why.to_string(),
            help: Some("write a host name alone, such as \"api.example.com\"".to_owned()),
        })?;
        if host.depth() == Depth::Exact {
            return Ok(host.base().to_owned());
        }
        Err(Fault {
            span: None,
            message: format!("`{name}` is a pattern, and only a name can be looked up"),
            help: Some("write each host's name, such as \"api.example.com\"".to_owned()),
        })
    })?;
    if found.len() > MOST {
        return fault(format!(
            "{} names, and at most {MOST} are watched",
            found.len()
        ));
    }
    Ok(found)
}

/// A cgroup whose processes are looked at, and what is in a root is not.
fn outside(value: &Value<'_>, roots: &[String]) -> Result<String, Fault> {
    let path = text(value)?;
    if path == "/" {
        return Ok(path.to_owned());
    }
    let path = plain(path, "cgroup")?;
    for root in roots {
        if path == *root || path.starts_with(&format!("{root}/")) {
            return Err(Fault {
                span: None,
                message: format!(
                    "cgroup `{path}` lies inside root `{root}`, whose processes are left out: \
                     nothing would be observed"
                ),
                help: Some("\"/\" is every process of the host".to_owned()),
            });
        }
    }
    Ok(path)
}

fn root(value: &Value<'_>) -> Result<String, Fault> {
    let path = text(value)?;
    if path.bytes().all(|b| b == b'/') && !path.is_empty() {
        return Err(Fault {
            span: None,
            message: "root `/` would govern every process of the host, the daemon too".to_owned(),
            help: Some("name a cgroup of its own, such as \"/agents.slice\"".to_owned()),
        });
    }
    plain(path, "root")
}

/// The path of a cgroup, which is none of the hierarchy's top; `what` it is of.
fn plain(path: &str, what: &str) -> Result<String, Fault> {
    let Some(relative) = path.strip_prefix('/') else {
        return fault(format!(
            "{what} `{path}` must start with `/`: it is a path below the cgroup v2 mount"
        ));
    };
    for part in relative.split('/') {
        if matches!(part, "" | "." | "..") {
            return fault(format!(
                "{what} `{path}` must not have empty, `.` or `..` parts"
            ));
        }
        if part.contains(|c: char| c.is_control() || matches!(c, '*' | '?' | '[' | ']' | '{' | '}'))
        {
            return fault(format!(
                "{what} `{path}` must be a plain path, not a pattern"
            ));
        }
    }
    Ok(path.to_owned())
}
