//! Metrics as Prometheus reads them (OpenMetrics text). Pure: one value goes in, read off when
//! somebody asks.

use std::{collections::BTreeMap, fmt};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeMetric, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

/// The media type of what [`encode`] returns.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What is known at this moment. Counters count since the kernel's maps or the daemon began.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// The daemon's version.
    pub version: String,
    /// Decisions by agent, verdict (`allowed`, `denied`, `monitored`) and reason (empty for
    /// allowed).
    pub decisions: Vec<Decisions>,
    /// Attempts whose details were lost, by stage (`kernel`, `rate`, `disk`), and events not written
    /// in another form (`export`), and
    /// packets that were let through and are in no line of the access log (`access`).
    pub events_lost: BTreeMap<String, u64>,
    /// Roots that the settings name.
    pub expected_roots: u64,
    /// Roots whose links are all live.
    pub enforced_roots: u64,
    /// Differences between registry and kernel found, by kind.
    pub drift: BTreeMap<String, u64>,
    /// Agents by state.
    pub agents: BTreeMap<String, u64>,
    /// When each agent's registration ends, in milliseconds since the Unix epoch.
    pub expiries: Vec<(String, i64)>,
    /// The registry state in force.
    pub revision: u64,
    /// Kernel maps.
    pub maps: Vec<MapUse>,
    /// Lookups of agents that use names, by what came of them.
    pub lookups: Vec<Lookups>,
    /// Questions that were dropped or refused without being anybody's, by why (`busy`: an agent had
    /// too many open, `malformed`, `nobodys`: the kernel saw no agent send it).
    pub lookups_dropped: BTreeMap<String, u64>,
    /// How long lookups took, by part (`guard`, `upstream`).
    pub lookup_times: Vec<(&'static str, Spread)>,
    /// Leases in force of each agent that uses names.
    pub leases: Vec<(String, u64)>,
    /// How long putting a registry in force took.
    pub apply: Option<Times>,
    /// How long putting right what differed took.
    pub repair: Option<Times>,
    /// Probes by what they came to, since the daemon's start.
    pub probes: BTreeMap<String, u64>,
    /// What the last probe of each agent came to.
    pub last_probes: Vec<Probe>,
    /// The audit trail: its last record, and the last one that is signed.
    pub trail: Option<(u64, u64)>,
    /// Problems that `remit status` lists.
    pub problems: u64,
}

/// Decisions of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decisions {
    /// Whose.
    pub agent: String,
    /// What came of them.
    pub verdict: &'static str,
    /// Why.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// Lookups of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookups {
    /// Whose.
    pub agent: String,
    /// What came of them: `answered`, `refused` or `failed`.
    pub outcome: &'static str,
    /// Why: for refused ones what was wrong (`name`, `search`, `kind`, `budget`, `address`, `full`),
    /// for failed ones what failed (`upstream`, `lease`); else empty.
    pub reason: &'static str,
    /// How many.
    pub count: u64,
}

/// How often something took how long.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spread {
    /// Upper bounds in seconds, ascending, and how often it took so long and longer than the one
    /// before.
    pub counts: Vec<(f64, u64)>,
    /// All of it, in seconds.
    pub sum: f64,
}

/// The last probe of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Whose.
    pub agent: String,
    /// What it came to, one of [`VERDICTS`].
    pub verdict: &'static str,
    /// When it began, in milliseconds since the Unix epoch.
    pub time: i64,
}

/// What a probe may come to.
pub const VERDICTS: [&str; 3] = ["pass", "fail", "unknown"];

/// How full a kernel map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapUse {
    /// Its name.
    pub map: String,
    /// Entries in it.
    pub entries: u64,
    /// Entries that it can have.
    pub capacity: u64,
}

/// How often something was done, and for how long.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Times {
    /// How often.
    pub count: u64,
    /// All of it, in seconds.
    pub sum: f64,
    /// The last time, in seconds.
    pub last: f64,
}

/// The metrics as text.
pub fn encode(snapshot: Snapshot) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(snapshot));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut to = Writer(encoder);
        to.gauges(
            "remit_build_info",
            "The daemon's version",
            [([("version", self.version.as_str())], 1_u64)],
        )?;
        to.counters(
            "remit_decisions",
            "Decisions of the kernel side",
            self.decisions.iter().map(|one| {
                let labels = [
                    ("agent", one.agent.as_str()),
                    ("verdict", one.verdict),
                    ("reason", one.reason.as_str()),
                ];
                (labels, one.count)
            }),
        )?;
        to.counters(
            "remit_events_lost",
            "Attempts whose details were lost; they are counted in the log",
            by("stage", &self.events_lost),
        )?;
        to.gauge(
            "remit_expected_roots",
            "Roots that the settings name",
            self.expected_roots,
        )?;
        to.gauge(
            "remit_enforced_roots",
            "Roots whose every link is live",
            self.enforced_roots,
        )?;
        to.counters(
            "remit_drift",
            "Differences found between registry and kernel",
            by("kind", &self.drift),
        )?;
        to.gauges("remit_agents", "Agents by state", by("state", &self.agents))?;
        to.gauges(
            "remit_agent_expiry_timestamp_seconds",
            "When an agent's registration ends",
            self.expiries.iter().map(|(agent, millis)| {
                let seconds = *millis as f64 / 1000.0;
                ([("agent", agent.as_str())], seconds)
            }),
        )?;
        to.gauge(
            "remit_policy_revision",
            "The registry state in force",
            self.revision,
        )?;
        to.gauges(
            "remit_map_entries",
            "Entries of a kernel map",
            self.maps
                .iter()
                .map(|map| ([("map", map.map.as_str())], map.entries)),
        )?;
        to.gauges(
            "remit_map_capacity",
            "Entries that a kernel map can have",
            self.maps
                .iter()
                .map(|map| ([("map", map.map.as_str())], map.capacity)),
        )?;
        to.counters(
            "remit_dns_lookups",
            "Lookups that the DNS guard dealt with",
            self.lookups.iter().map(|one| {
                let labels = [
                    ("agent", one.agent.as_str()),
                    ("outcome", one.outcome),
                    ("reason", one.reason),
                ];
                (labels, one.count)
            }),
        )?;
        to.counters(
            "remit_dns_dropped",
            "Questions that the DNS guard took for no agent's lookup, or had no room for",
            by("reason", &self.lookups_dropped),
        )?;
        to.spreads(
            "remit_dns_lookup_seconds",
            "How long lookups took, in the guard and upstream",
            "part",
            &self.lookup_times,
        )?;
        to.gauges(
            "remit_dns_leases",
            "Leases in force",
            self.leases
                .iter()
                .map(|(agent, count)| ([("agent", agent.as_str())], *count)),
        )?;
        to.counters(
            "remit_probes",
            "Probes by what they came to",
            by("verdict", &self.probes),
        )?;
        to.gauges(
            "remit_probe_verdict",
            "1 for what the last probe of an agent came to",
            self.last_probes.iter().flat_map(|probe| {
                VERDICTS.map(|verdict| {
                    let labels = [("agent", probe.agent.as_str()), ("verdict", verdict)];
                    (labels, u64::from(verdict == probe.verdict))
                })
            }),
        )?;
        to.gauges(
            "remit_probe_timestamp_seconds",
            "When the last probe of an agent began",
            self.last_probes.iter().map(|probe| {
                let labels = [("agent", probe.agent.as_str())];
                (labels, probe.time as f64 / 1000.0)
            }),
        )?;
        let times = [
            ("remit_apply", "Putting a registry in force", self.apply),
            ("remit_repair", "Putting right what differed", self.repair),
        ];
        for (name, help, times) in times {
            if let Some(times) = times {
                to.times(name, help, times)?;
            }
        }
        if let Some((record, signed)) = self.trail {
            to.gauge(
                "remit_audit_record",
                "Last record of the audit trail",
                record,
            )?;
            to.gauge(
                "remit_audit_signed_record",
                "Last record of the audit trail that a checkpoint covers",
                signed,
            )?;
        }
        to.gauge(
            "remit_problems",
            "Problems that `remit status` lists",
            self.problems,
        )
    }
}

fn by<'m>(
    label: &'static str,
    counts: &'m BTreeMap<String, u64>,
) -> impl Iterator<Item = ([(&'m str, &'m str); 1], u64)> {
    counts
        .iter()
        .map(move |(name, count)| ([(label, name.as_str())], *count))
}

struct Writer<'e>(DescriptorEncoder<'e>);

/// Of exemplars, of which there are none.
type NoLabels = [(&'static str, &'static str); 0];

impl Writer<'_> {
    /// A counter; `_total` is added to its name.
    fn counters<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = ([(&'l str, &'l str); N], u64)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in rows {
            ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn gauges<'l, const N: usize, V: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = ([(&'l str, &'l str); N], V)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in rows {
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let encoder = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(value).encode(encoder)
    }

    fn spreads(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        rows: &[(&'static str, Spread)],
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (value, spread) in rows {
            let labels = [(label, *value)];
            let count = spread.counts.iter().map(|(_, count)| count).sum();
            family
                .encode_family(&labels)?
                .encode_histogram::<NoLabels>(spread.sum, count, &spread.counts, None)?;
        }
        Ok(())
    }

    fn times(&mut self, name: &str, help: &str, times: Times) -> fmt::Result {
        let seconds = format!("{name}_seconds");
        let encoder = self.0.encode_descriptor(
            &seconds,
            &format!("{help}, in all"),
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(times.sum).encode(encoder)?;
        let runs = format!("{name}_runs");
        let encoder = self
            .0
            .encode_descriptor(&runs, help, None, MetricType::Counter)?;
        ConstCounter::new(times.count).encode(encoder)?;
        let last = format!("{name}_last_seconds");
        let help = format!("{help}, the last time");
        let encoder = self
            .0
            .encode_descriptor(&last, &help, None, MetricType::Gauge)?;
        ConstGauge::new(times.last).encode(encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
        let owned = pairs
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count));
        owned.collect()
    }

    #[test]
    fn metrics_read_as_prometheus_wants_them() {
        let snapshot = Snapshot {
            version: "0.1.0".to_owned(),
            decisions: vec![
                Decisions {
                    agent: "billing-recon".to_owned(),
                    verdict: "denied",
                    reason: "out_of_scope".to_owned(),
                    count: 37,
                },
                Decisions {
                    agent: "billing-recon".to_owned(),
                    verdict: "allowed",
                    reason: String::new(),
                    count: u64::MAX,
                },
            ],
            events_lost: counts(&[("kernel", 4)]),
            expected_roots: 2,
            enforced_roots: 1,
            drift: counts(&[("detached", 1)]),
            agents: counts(&[("active", 3), ("suspended", 1)]),
            expiries: vec![("billing-recon".to_owned(), 1_830_211_200_500)],
            revision: 12,
            maps: vec![MapUse {
                map: "exacts".to_owned(),
                entries: 10,
                capacity: 100,
            }],
            lookups: vec![Lookups {
                agent: "billing-recon".to_owned(),
                outcome: "refused",
                reason: "name",
                count: 2,
            }],
            lookups_dropped: counts(&[("busy", 3)]),
            lookup_times: vec![(
                "guard",
                Spread {
                    counts: vec![(0.001, 2), (0.5, 0), (f64::INFINITY, 1)],
                    sum: 0.75,
                },
            )],
            leases: vec![("billing-recon".to_owned(), 5)],
            probes: counts(&[("pass", 3)]),
            last_probes: vec![Probe {
                agent: "billing-recon".to_owned(),
                verdict: "pass",
                time: 1_793_836_800_250,
            }],
            apply: Some(Times {
                count: 2,
                sum: 0.5,
                last: 0.25,
            }),
            repair: None,
            trail: Some((25, 24)),
            problems: 0,
        };
        let expected = r#"# HELP remit_build_info The daemon's version
# TYPE remit_build_info gauge
remit_build_info{version="0.1.0"} 1
# HELP remit_decisions Decisions of the kernel side
# TYPE remit_decisions counter
remit_decisions_total{agent="billing-recon",verdict="denied",reason="out_of_scope"} 37
remit_decisions_total{agent="billing-recon",verdict="allowed",reason=""} 18446744073709551615
# HELP remit_events_lost Attempts whose details were lost; they are counted in the log
# TYPE remit_events_lost counter
remit_events_lost_total{stage="kernel"} 4
# HELP remit_expected_roots Roots that the settings name
# TYPE remit_expected_roots gauge
remit_expected_roots 2
# HELP remit_enforced_roots Roots whose every link is live
# TYPE remit_enforced_roots gauge
remit_enforced_roots 1
# HELP remit_drift Differences found between registry and kernel
# TYPE remit_drift counter
remit_drift_total{kind="detached"} 1
# HELP remit_agents Agents by state
# TYPE remit_agents gauge
remit_agents{state="active"} 3
remit_agents{state="suspended"} 1
# HELP remit_agent_expiry_timestamp_seconds When an agent's registration ends
# TYPE remit_agent_expiry_timestamp_seconds gauge
remit_agent_expiry_timestamp_seconds{agent="billing-recon"} 1830211200.5
# HELP remit_policy_revision The registry state in force
# TYPE remit_policy_revision gauge
remit_policy_revision 12
# HELP remit_map_entries Entries of a kernel map
# TYPE remit_map_entries gauge
remit_map_entries{map="exacts"} 10
# HELP remit_map_capacity Entries that a kernel map can have
# TYPE remit_map_capacity gauge
remit_map_capacity{map="exacts"} 100
# HELP remit_dns_lookups Lookups that the DNS guard dealt with
# TYPE remit_dns_lookups counter
remit_dns_lookups_total{agent="billing-recon",outcome="refused",reason="name"} 2
# HELP remit_dns_dropped Questions that the DNS guard took for no agent's lookup, or had no room for
# TYPE remit_dns_dropped counter
remit_dns_dropped_total{reason="busy"} 3
# HELP remit_dns_lookup_seconds How long lookups took, in the guard and upstream
# TYPE remit_dns_lookup_seconds histogram
remit_dns_lookup_seconds_sum{part="guard"} 0.75
remit_dns_lookup_seconds_count{part="guard"} 3
remit_dns_lookup_seconds_bucket{le="0.001",part="guard"} 2
remit_dns_lookup_seconds_bucket{le="0.5",part="guard"} 2
remit_dns_lookup_seconds_bucket{le="+Inf",part="guard"} 3
# HELP remit_dns_leases Leases in force
# TYPE remit_dns_leases gauge
remit_dns_leases{agent="billing-recon"} 5
# HELP remit_probes Probes by what they came to
# TYPE remit_probes counter
remit_probes_total{verdict="pass"} 3
# HELP remit_probe_verdict 1 for what the last probe of an agent came to
# TYPE remit_probe_verdict gauge
remit_probe_verdict{agent="billing-recon",verdict="pass"} 1
remit_probe_verdict{agent="billing-recon",verdict="fail"} 0
remit_probe_verdict{agent="billing-recon",verdict="unknown"} 0
# HELP remit_probe_timestamp_seconds When the last probe of an agent began
# TYPE remit_probe_timestamp_seconds gauge
remit_probe_timestamp_seconds{agent="billing-recon"} 1793836800.25
# HELP remit_apply_seconds Putting a registry in force, in all
# TYPE remit_apply_seconds counter
remit_apply_seconds_total 0.5
# HELP remit_apply_runs Putting a registry in force
# TYPE remit_apply_runs counter
remit_apply_runs_total 2
# HELP remit_apply_last_seconds Putting a registry in force, the last time
# TYPE remit_apply_last_seconds gauge
remit_apply_last_seconds 0.25
# HELP remit_audit_record Last record of the audit trail
# TYPE remit_audit_record gauge
remit_audit_record 25
# HELP remit_audit_signed_record Last record of the audit trail that a checkpoint covers
# TYPE remit_audit_signed_record gauge
remit_audit_signed_record 24
# HELP remit_problems Problems that `remit status` lists
# TYPE remit_problems gauge
remit_problems 0
# EOF
"#;
        assert_eq!(encode(snapshot).unwrap(), expected);
    }

    #[test]
    fn a_label_cannot_break_out_of_its_quotes() {
        let snapshot = Snapshot {
            agents: counts(&[("x\"} 1\nremit_problems 9\\", 1)]),
            ..Snapshot::default()
        };
        let text = encode(snapshot).unwrap();
        assert!(text.contains(r#"remit_agents{state="x\"} 1\nremit_problems 9\\"} 1"#));
        assert_eq!(text.matches("\nremit_problems ").count(), 1);
    }
}
