//! Tests of `query`.

use std::fs;

use serde_json::json;

use super::*;

fn event(time: i64, agent: &str, ip: &str, port: u16) -> Value {
    json!({
        "time": time,
        "ai_agent": { "uid": agent },
        "dst_endpoint": { "ip": ip, "port": port, "hostname": "API.example.com." },
        "metadata": { "event_code": "RM1001" },
        "unmapped": { "verdict": "denied", "reason": "floor" },
    })
}

fn destination(text: &str) -> Destination {
    text.parse().unwrap()
}

#[test]
fn destinations_are_found_by_address_net_name_and_port() {
    let v4 = event(1, "a", "10.1.2.3", 443);
    for (text, found) in [
        ("10.1.2.3", true),
        ("10.1.2.3:443", true),
        ("10.1.2.3:80", false),
        ("10.0.0.0/8", true),
        ("10.0.0.0/8:443", true),
        ("192.0.2.0/24", false),
        ("::ffff:10.1.2.3", true),
        ("api.example.com", true),
        ("api.example.com:443", true),
        ("example.com", false),
        ("*.example.com", true),
        ("**.com", true),
        ("*.ample.com", false),
        (":443", true),
        (":80", false),
    ] {
        assert_eq!(destination(text).is_of(&v4), found, "{text}");
    }
    let v6 = event(1, "a", "2001:db8::7", 53);
    for (text, found) in [
        ("2001:db8::7", true),
        ("[2001:db8::7]:53", true),
        ("[2001:db8::7]:54", false),
        ("2001:db8::/32", true),
        ("10.0.0.0/8", false),
    ] {
        assert_eq!(destination(text).is_of(&v6), found, "{text}");
    }
    for text in ["", ":", ":x", "a b", "10.0.0.0/8:", "*."] {
        assert!(text.parse::<Destination>().is_err(), "{text}");
    }
}

#[test]
fn all_that_is_asked_must_hold() {
    let event = event(5, "a", "10.1.2.3", 443);
    let all = Query::default();
    assert!(all.wants(&event));
    let with = |change: fn(&mut Query)| {
        let mut query = Query::default();
        change(&mut query);
        query.wants(&event)
    };
    assert!(with(|q| q.agents = vec!["b".to_owned(), "a".to_owned()]));
    assert!(!with(|q| q.agents = vec!["b".to_owned()]));
    assert!(with(|q| (q.since, q.until) = (Some(5), Some(6))));
    assert!(!with(|q| q.until = Some(5)));
    assert!(!with(|q| q.since = Some(6)));
    assert!(!with(|q| q.reasons = vec!["denied".to_owned()]));
    assert!(with(|q| q.kinds = vec!["denied".parse().unwrap()]));
    assert!(with(|q| q.kinds = vec!["RM1001".parse().unwrap()]));
    assert!(!with(|q| q.kinds = vec!["lifecycle".parse().unwrap()]));
    assert!("RM1".parse::<Kind>().is_err());
    let audit = json!({ "unmapped": { "agent": "a" }, "metadata": {} });
    let query = Query {
        agents: vec!["a".to_owned()],
        ..all
    };
    assert!(query.wants(&audit));
    for event in [json!(null), json!([]), json!({ "time": "x" })] {
        assert!(!query.wants(&event));
    }
}

#[test]
fn logs_are_merged_by_time_over_all_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let write = |name: &str, times: &[i64]| {
        let lines: String = times
            .iter()
            .map(|time| format!("{}\n", event(*time, "a", "10.0.0.1", 1)))
            .collect();
        fs::write(path(name), lines).unwrap();
    };
    write("v.jsonl-20261101", &[1, 2]);
    write("v.jsonl.1", &[5, 6]);
    write("v.jsonl", &[8]);
    write("a.jsonl.1", &[3, 4]);
    write("a.jsonl", &[7, 9]);
    let mut text = fs::read_to_string(path("v.jsonl")).unwrap();
    text.push_str("rubbish\n{\"time\":1");
    fs::write(path("v.jsonl"), text).unwrap();
    let paths = [path("v.jsonl"), path("a.jsonl"), path("none.jsonl")];
    let times = |query: Query| {
        let mut search = Search::open(&paths, query).unwrap();
        let mut times = Vec::new();
        while let Some(line) = search.next_line().unwrap() {
            times.push(line.event["time"].as_i64().unwrap());
        }
        (times, search.skipped())
    };
    assert_eq!(times(Query::default()), ((1..10).collect(), 1));
    let some = Query {
        since: Some(3),
        until: Some(8),
        ..Query::default()
    };
    assert_eq!(times(some).0, [3, 4, 5, 6, 7]);
}

#[test]
fn a_tally_adds_up_lines_and_attempts() {
    let mut tally = Tally::default();
    let mut folded = event(1, "a", "10.0.0.1", 1);
    folded["count"] = json!(7);
    tally.add(&folded);
    tally.add(&event(2, "a", "10.0.0.1", 1));
    tally.add(&json!({ "metadata": { "event_code": "RM9001" } }));
    let key = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
    assert_eq!(
        tally.0[&key("a", "denied", "floor")],
        Counted {
            lines: 2,
            attempts: 8
        }
    );
    assert_eq!(tally.0[&key("-", "RM9001", "-")].attempts, 0);
}
