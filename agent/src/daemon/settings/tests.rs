//! Claims about `remit.toml`.

use super::*;

fn mistakes(text: &str) -> Vec<String> {
    match Settings::parse("remit.toml", text) {
        Err(SettingsError::Invalid(mistakes)) => mistakes.iter().map(ToString::to_string).collect(),
        other => panic!("expected mistakes, got {other:?}"),
    }
}

#[track_caller]
fn refused(text: &str, message: &str) {
    let found = mistakes(text);
    assert!(
        found.iter().any(|mistake| mistake.contains(message)),
        "no {message:?} in {found:#?}"
    );
}

#[test]
fn nothing_said_is_the_defaults() {
    assert_eq!(Settings::parse("x", "").unwrap(), Settings::default());
    let empty = "[paths]\n[enforcement]\n[dns]\n[log]\n[reconcile]\n[probe]\n[metrics]\n";
    assert_eq!(Settings::parse("x", empty).unwrap(), Settings::default());
}

#[test]
fn the_documented_defaults_are_the_defaults() {
    let documented = r#"
        [paths]
        registry = "/etc/remit/agents.d"
        sets = ["/etc/remit/sets.d", "/usr/share/remit/sets"]
        floor = "/etc/remit/floor.toml"
        run = "/run/remit"
        log = "/var/log/remit"
        state = "/var/lib/remit"
        bpffs = "/sys/fs/bpf/remit"
        cgroup = "auto"
        [enforcement]
        roots = ["/agents.slice"]
        unregistered = "deny"
        containment = "auto"
        on_bad_registry = "keep"
        [dns]
        enabled = true
        upstream = ["system"]
        min_lease = "60s"
        max_addresses_per_name = 64
        max_lease = "1h"
        wildcard_budget = 1000
        [log]
        max_size = "256MiB"
        retention = "190d"
        per_agent_rate = 200
        per_agent_daily = "64MiB"
        max_total = "8GiB"
        access = "5m"
        export = []
        journal = false
        otlp = "off"
        [reconcile]
        every = "5s"
        [probe]
        every = "off"
        [metrics]
        listen = "off"
        [discover]
        traffic = false
        cgroup = "/"
    "#;
    let settings = Settings::parse("x", documented).unwrap();
    assert_eq!(settings, Settings::default());
    assert_eq!(settings.socket(), Path::new("/run/remit/remit.sock"));
}

#[test]
fn the_packaged_file_says_every_default() {
    // These have no default that could be written.
    const WITHOUT: [&str; 8] = [
        "apis",
        "otlp",
        "signing_key",
        "mask",
        "agents",
        "prefixes",
        "addresses",
        "rule_sets",
    ];
    let text = include_str!("../../../package/remit.toml");
    assert_eq!(Settings::parse("x", text).unwrap(), Settings::default());
    let mut keys = 0;
    let said: Vec<String> = text
        .lines()
        .map(|line| {
            match line
                .strip_prefix('#')
                .map(|rest| (rest, rest.split_once(" = ")))
            {
                Some((rest, Some((key, _)))) if !key.contains(' ') => {
                    if WITHOUT.contains(&key) {
                        return String::new();
                    }
                    keys += 1;
                    rest.to_owned()
                }
                _ => line.to_owned(),
            }
        })
        .collect();
    assert_eq!(
        Settings::parse("x", &said.join("\n")).unwrap(),
        Settings::default()
    );
    assert_eq!(keys, 32, "{said:#?}");
}

#[test]
fn every_key_can_be_set() {
    let text = r#"
        paths = { run = "/tmp/r", cgroup = "/sys/fs/cgroup/unified" }
        enforcement = { roots = ["/a", "/b.slice/c"], unregistered = "monitor", containment = "require", on_bad_registry = "deny" }
        dns = { enabled = false, upstream = ["127.0.0.1:5300", "[::1]:53"] }
        log = { max_size = "64KiB", per_agent_rate = 1_000 }
        reconcile.every = "off"
        probe.every = "15m"
        metrics.listen = "127.0.0.1:9464"
        discover = { traffic = true, apis = ["API.example.com.", "b.test"], cgroup = "/user.slice" }
        limits = { agents = 0x400, prefixes = 100000, addresses = 5, rule_sets = 6 }
    "#;
    let s = Settings::parse("x", text).unwrap();
    assert_eq!(
        s.paths.cgroup,
        CgroupMount::At("/sys/fs/cgroup/unified".into())
    );
    assert_eq!(s.enforcement.roots, ["/a", "/b.slice/c"]);
    assert_eq!(s.enforcement.unregistered, Unregistered::Monitor);
    assert_eq!(s.enforcement.containment, Containment::Require);
    assert_eq!(s.enforcement.on_bad_registry, OnBadRegistry::Deny);
    assert!(!s.dns.enabled);
    assert_eq!(s.dns.upstream[1], Upstream::At("[::1]:53".parse().unwrap()));
    assert_eq!((s.log.max_size, s.log.per_agent_rate), (65_536, 1_000));
    assert_eq!(s.reconcile.every, None);
    assert_eq!(s.probe.every, Some(Duration::from_secs(900)));
    assert_eq!(s.metrics.listen, Some("127.0.0.1:9464".parse().unwrap()));
    assert!(s.discover.traffic);
    let apis = s.discover.apis.as_deref().unwrap_or_default();
    assert_eq!(apis, ["api.example.com", "b.test"]);
    assert_eq!(s.discover.cgroup, "/user.slice");
    assert_eq!(s.limits.agents, Some(1_024));
    assert_eq!(s.limits.rule_sets, Some(6));
}

#[test]
fn all_mistakes_are_told_at_once_with_their_place() {
    let text = "[paths]\nregistry = \"agents.d\"\nregstry = 1\n\n[enforcement]\nroots = [\"/a\", \"/\"]\n[nope]\n";
    let found = mistakes(text);
    assert_eq!(found.len(), 4, "{found:#?}");
    assert_eq!(
        found[0],
        "remit.toml:2:12: error: `registry`: `agents.d` must be an absolute path\n\
         2 | registry = \"agents.d\"\n\
         \x20 |            ^^^^^^^^^^"
    );
    assert!(found[1].starts_with(
        "remit.toml:3:1: error: unknown key `regstry` in `[paths]`\n3 | regstry = 1\n  | ^^^^^^^\n\
         help: the keys here are registry, sets,"
    ));
    assert!(found[2].starts_with(
        "remit.toml:6:16: error: `roots`: root `/` would govern every process of the host"
    ));
    assert!(found[3].starts_with("remit.toml:7:2: error: unknown table `nope`"));
}

#[test]
fn syntax_errors_have_a_place_too() {
    let found = mistakes("[log]\nmax_size = 256MiB\n");
    assert!(found[0].starts_with("remit.toml:2:"), "{found:#?}");
    refused("[log\n", "remit.toml:1:");
    refused(
        "[log]\nmax_size = \"1GiB\"\nmax_size = \"1GiB\"\n",
        "remit.toml:3:1: error: duplicate key",
    );
}

#[test]
fn values_of_the_wrong_kind_are_refused() {
    refused("paths = 1", "`paths` must be a table, not integer");
    refused("[paths]\nsets = \"/x\"", "must be a list, not string");
    refused(
        "[dns]\nenabled = \"yes\"",
        "must be true or false, not string",
    );
    refused("[dns]\nupstream = []", "must not be empty");
    refused(
        "[dns]\nupstream = [\"system\", \"localhost:53\"]",
        "`localhost:53` must be",
    );
    refused("[dns]\nmin_lease = \"0s\"", "longer than nothing");
    refused("[dns]\nmax_addresses_per_name = 0", "1 or more");
    refused("[dns]\nmax_addresses_per_name = -4", "1 or more");
    refused(
        "[log]\nmax_size = 268435456",
        "must be a string, not integer",
    );
    refused("[log]\nmax_size = \"256MB\"", "units: B, KiB");
    refused("[log]\nmax_size = \"99999999999TiB\"", "must be a size");
    refused("[log]\nmax_size = \"1B\"", "64KiB or more");
    refused("[log]\nretention = \"off\"", "is not a duration");
    refused("[log]\nper_agent_rate = 4294967296", "must not exceed");
    refused("[probe]\nevery = \"never\"", "; or \"off\"");
    refused("[metrics]\nlisten = \":9464\"", "an address and a port");
    for elsewhere in ["0.0.0.0:9464", "[::]:9464", "192.0.2.1:9464"] {
        refused(
            &format!("[metrics]\nlisten = \"{elsewhere}\""),
            "is no loopback address; or \"off\"",
        );
    }
    refused(
        "[enforcement]\nunregistered = \"allow\"",
        "one of \"deny\", \"monitor\"",
    );
    refused(
        "[limits]\nagents = 1.5",
        "must be a whole number, not float",
    );
}

#[test]
fn roots_are_plain_paths_apart_from_each_other() {
    for (list, message) in [
        ("[]", "must not be empty"),
        ("['/']", "every process of the host"),
        ("['//']", "every process of the host"),
        ("['agents.slice']", "must start with `/`"),
        ("['']", "must start with `/`"),
        ("['/a/../b']", "`..` parts"),
        ("['/a/']", "empty"),
        ("['/a*']", "not a pattern"),
        ("['/a', '/b', '/a']", "root `/a` is there twice"),
        ("['/a', '/a/b/c']", "root `/a/b/c` lies inside root `/a`"),
        ("['/a/b', '/a']", "root `/a/b` lies inside root `/a`"),
    ] {
        refused(&format!("[enforcement]\nroots = {list}"), message);
    }
    let apart = Settings::parse("x", "[enforcement]\nroots = ['/a', '/ab', '/a.slice/b']");
    assert_eq!(apart.unwrap().enforcement.roots.len(), 3);
}

#[test]
fn a_named_file_must_be_there() {
    let error = Settings::load(Some(Path::new("/nonexistent/remit.toml"))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot read settings `/nonexistent/remit.toml`"
    );
}

#[test]
fn what_is_observed_is_names_and_a_cgroup_outside_the_roots() {
    let found = mistakes("[discover]\napis = [\"api.example.com\", \"*.example.com\"]\n");
    assert_eq!(
        found,
        [
            "remit.toml:2:28: error: `apis`: `*.example.com` is a pattern, and only a name can be \
          looked up\n2 | apis = [\"api.example.com\", \"*.example.com\"]\n  | \
          \u{20}                          ^^^^^^^^^^^^^^^\nhelp: write each host's name, such as \
          \"api.example.com\""
        ]
    );
    refused("[discover]\napis = []\n", "must not be empty");
    refused(
        "[discover]\napis = [\"https://a.example/v1\"]\n",
        "is a URL, not a name",
    );
    refused("[discover]\napis = [\"192.0.2.1\"]\n", "is not a host name");
    refused("[discover]\ncgroup = \"user.slice\"\n", "start with `/`");
    refused("[discover]\ncgroup = \"/a/*\"\n", "not a pattern");
    for inside in ["/agents.slice", "/agents.slice/a.service"] {
        refused(
            &format!("[discover]\ncgroup = \"{inside}\"\n"),
            "nothing would be observed",
        );
    }
    refused(
        "[enforcement]\nroots = [\"/x\"]\n[discover]\ncgroup = \"/x/y\"\n",
        "inside root `/x`",
    );
    refused("[discover]\ntrafic = true\n", "unknown key `trafic`");
    let beside = "[discover]\ncgroup = \"/agents.slices\"\n";
    assert!(Settings::parse("x", beside).is_ok());
}
