//! Names as the scope knows them: lower case, A-labels, no trailing dot. Pure.

use std::net::IpAddr;

use hickory_proto::rr::Name;

/// Octets of a host name (RFC 1035, section 2.3.4, without the root's).
const HOST_OCTETS: usize = 253;

/// The name as the scope knows it; none for the root and for names with octets that no host name
/// and no service name (`_tcp`) has. What is compared as text must be no other name as text: a
/// label may hold a dot.
pub fn canonical(name: &Name) -> Option<String> {
    let mut text = String::with_capacity(name.len());
    for label in name {
        if !text.is_empty() {
            text.push('.');
        }
        let plain = |octet: &u8| octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'_');
        if label.is_empty() || !label.iter().all(plain) {
            return None;
        }
        text.extend(
            label
                .iter()
                .map(|octet| char::from(octet.to_ascii_lowercase())),
        );
    }
    (!text.is_empty() && text.len() <= HOST_OCTETS).then_some(text)
}

/// The name of a text that [`canonical`] made, as it goes over the wire.
pub fn wire(name: &str) -> Option<Name> {
    let mut wire = Name::from_labels(name.split('.').map(str::as_bytes)).ok()?;
    wire.set_fqdn(true);
    Some(wire)
}

/// The name for people and logs, whatever its octets: printable, bounded.
pub fn shown(name: &Name) -> String {
    const SHOWN: usize = 255;
    let mut text = name.to_ascii();
    if text.len() > 1 && text.ends_with('.') {
        text.pop();
    }
    // `to_ascii` escapes what is not printable, four characters an octet at worst.
    text.truncate(SHOWN);
    text
}

/// The address of a whole reverse name (`4.3.2.1.in-addr.arpa`).
pub fn reversed(name: &Name) -> Option<IpAddr> {
    let mut absolute = name.clone();
    absolute.set_fqdn(true);
    let network = absolute.parse_arpa_name().ok()?;
    (network.prefix_len() == network.max_prefix_len()).then(|| network.addr())
}

/// Whether `name` is something below one of `domains`, as a resolver makes it that tries the
/// host's search domains in turn.
pub fn is_searched(name: &str, domains: &[String]) -> bool {
    domains.iter().any(|domain| {
        name.strip_suffix(domain.as_str())
            .and_then(|rest| rest.strip_suffix('.'))
            .is_some_and(|rest| !rest.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(labels: &[&[u8]]) -> Name {
        let mut name = Name::from_labels(labels.iter().copied()).unwrap();
        name.set_fqdn(true);
        name
    }

    #[test]
    fn names_have_one_form() {
        let cases: &[(&[&[u8]], Option<&str>)] = &[
            (&[b"API", b"Example", b"com"], Some("api.example.com")),
            (&[b"_443", b"_tcp", b"a"], Some("_443._tcp.a")),
            (&[b"a.example", b"com"], None),
            (&[b"a\0", b"com"], None),
            (&[b"a b"], None),
            (&[b"\xff\xfe"], None),
            (&[b"*", b"com"], None),
        ];
        for (raw, expected) in cases {
            assert_eq!(canonical(&labels(raw)).as_deref(), *expected, "{raw:?}");
        }
        assert_eq!(canonical(&Name::root()), None);
    }

    #[test]
    fn what_goes_over_the_wire_comes_back() {
        let name = wire("_443._tcp.api.example.com").unwrap();
        assert!(name.is_fqdn());
        assert_eq!(
            canonical(&name).as_deref(),
            Some("_443._tcp.api.example.com")
        );
    }

    #[test]
    fn reverse_names_are_whole_addresses() {
        for (name, expected) in [
            ("4.3.2.1.in-addr.arpa.", Some("1.2.3.4")),
            ("4.3.2.1.IN-ADDR.ARPA.", Some("1.2.3.4")),
            (
                "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.",
                Some("2001:db8::1"),
            ),
            ("3.2.1.in-addr.arpa.", None),
            ("x.4.3.2.1.in-addr.arpa.", None),
            ("999.3.2.1.in-addr.arpa.", None),
            ("in-addr.arpa.", None),
            ("example.com.", None),
        ] {
            let expected = expected.map(|text| text.parse().unwrap());
            assert_eq!(
                reversed(&Name::from_ascii(name).unwrap()),
                expected,
                "{name}"
            );
        }
    }

    #[test]
    fn search_domains_are_whole_labels() {
        let domains = ["corp.example".to_owned()];
        assert!(is_searched("db.corp.example", &domains));
        assert!(is_searched("api.example.com.corp.example", &domains));
        assert!(!is_searched("corp.example", &domains));
        assert!(!is_searched("dbcorp.example", &domains));
        assert!(!is_searched("db.corp.example", &[]));
    }

    #[test]
    fn long_names_are_shown_short() {
        let name = labels(&[&[0xff; 63], &[0xff; 63], &[0xff; 63]]);
        assert!(shown(&name).len() <= 255);
        assert_eq!(shown(&Name::root()), ".");
    }
}
