//! Which address is which name's, as resolvers have said. Pure: times come as boot time in
//! nanoseconds.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use agent_ebpf::abi::{Addr, WATCHED};

/// An address is watched for so long after an answer named it last: services answer with a few of
/// many in turn, and clients keep what they were told.
const KEEP: u64 = 3_600_000_000_000;
/// Addresses that are known, so that notes of those that are no longer watched still have names.
const KNOWN: usize = 4 * WATCHED as usize;

/// Names and their addresses.
#[derive(Debug, Default)]
pub struct Book {
    addresses: BTreeMap<IpAddr, Known>,
    /// Of each name that was asked for: why there is no answer now, if so.
    names: BTreeMap<String, Option<String>>,
    /// How many were not asked for yet, or not answered.
    all: usize,
}

/// An address.
#[derive(Debug, Default)]
struct Known {
    names: BTreeSet<String>,
    /// When an answer named it last.
    named: u64,
}

// === impl Book ===

impl Book {
    /// A book for so many names.
    pub fn new(all: usize) -> Self {
        Self {
            all,
            ..Self::default()
        }
    }

    /// Takes what came of a name.
    pub fn learn(&mut self, name: &str, found: Result<BTreeSet<IpAddr>, String>, now: u64) {
        match found {
            Ok(found) => {
                for addr in found.into_iter().filter(is_telling) {
                    let known = self.addresses.entry(addr).or_default();
                    known.names.insert(name.to_owned());
                    known.named = now;
                }
                self.names.insert(name.to_owned(), None);
            }
            Err(why) => drop(self.names.insert(name.to_owned(), Some(why))),
        }
        while self.addresses.len() > KNOWN {
            let oldest = self.addresses.iter().min_by_key(|(_, known)| known.named);
            let Some(oldest) = oldest.map(|(addr, _)| *addr) else {
                break;
            };
            self.addresses.remove(&oldest);
        }
    }

    /// The addresses to watch; where they do not all fit, those named last.
    pub fn watched(&self, now: u64) -> BTreeSet<IpAddr> {
        let mut kept: Vec<(Reverse<u64>, IpAddr)> = self
            .addresses
            .iter()
            .filter(|(_, known)| now.saturating_sub(known.named) < KEEP)
            .map(|(addr, known)| (Reverse(known.named), *addr))
            .collect();
        kept.sort_unstable();
        let most = usize::try_from(WATCHED).unwrap_or(usize::MAX);
        kept.into_iter().take(most).map(|(_, addr)| addr).collect()
    }

    /// The names that lead to an address, as far as they are known.
    pub fn names_of(&self, addr: Addr) -> Vec<String> {
        let known = self.addresses.get(&IpAddr::from(addr));
        known.map_or_else(Vec::new, |known| known.names.iter().cloned().collect())
    }

    /// How many names there are.
    pub fn names(&self) -> usize {
        self.all
    }

    /// What is amiss with the names, in words; none where each was answered.
    pub fn trouble(&self) -> Option<String> {
        let answered = self.names.values().filter(|why| why.is_none()).count();
        let failed = self
            .names
            .iter()
            .find_map(|(name, why)| Some((name, why.as_ref()?)));
        let missing = self.all.saturating_sub(answered);
        let first = failed.map(|(name, why)| format!(", {name} for one: {why}"));
        (missing > 0).then(|| {
            format!(
                "{missing} of {} names have no known address{}",
                self.all,
                first.unwrap_or_default()
            )
        })
    }
}

/// Whether a connection to an address says anything about a name that leads to it. Blocked names
/// lead to the host itself or to nowhere, where everything else goes too.
fn is_telling(addr: &IpAddr) -> bool {
    let addr = addr.to_canonical();
    !(addr.is_loopback() || addr.is_unspecified() || addr.is_multicast())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Result<BTreeSet<IpAddr>, String> {
        Ok(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    fn names_of(book: &Book, addr: &str) -> Vec<String> {
        book.names_of(Addr::from(addr.parse::<IpAddr>().unwrap()))
    }

    #[test]
    fn an_address_has_every_name_that_led_to_it() {
        let mut book = Book::new(2);
        book.learn(
            "a.test",
            addresses(&["192.0.2.1", "2001:db8::1"]),
            1_000_000,
        );
        assert_eq!(
            book.trouble().as_deref(),
            Some("1 of 2 names have no known address")
        );
        book.learn("b.test", addresses(&["192.0.2.1"]), 1_000_000);
        assert_eq!(names_of(&book, "192.0.2.1"), ["a.test", "b.test"]);
        assert_eq!(names_of(&book, "2001:db8::1"), ["a.test"]);
        // As the kernel notes it, an IPv4 address is mapped.
        assert_eq!(names_of(&book, "::ffff:192.0.2.1"), ["a.test", "b.test"]);
        assert!(names_of(&book, "192.0.2.2").is_empty());
        assert_eq!(book.trouble(), None);
    }

    #[test]
    fn an_address_that_is_named_no_more_is_watched_for_a_while_and_known_for_longer() {
        let mut book = Book::new(1);
        book.learn("a.test", addresses(&["192.0.2.1"]), 5);
        book.learn("a.test", addresses(&["192.0.2.2"]), 6);
        assert_eq!(book.watched(6).len(), 2);
        let later: Vec<IpAddr> = book.watched(KEEP + 5).into_iter().collect();
        assert_eq!(later, ["192.0.2.2".parse::<IpAddr>().unwrap()]);
        assert_eq!(names_of(&book, "192.0.2.1"), ["a.test"]);
        book.learn("a.test", Err("no answer".to_owned()), 7);
        assert_eq!(book.watched(7).len(), 2, "no answer takes nothing away");
        assert_eq!(
            book.trouble().as_deref(),
            Some("1 of 1 names have no known address, a.test for one: no answer")
        );
    }

    #[test]
    fn where_a_name_is_blocked_nothing_is_watched_that_others_use() {
        let mut book = Book::new(1);
        let nowhere = ["127.0.0.1", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"];
        book.learn("a.test", addresses(&nowhere), 1);
        assert!(book.watched(1).is_empty());
    }

    #[test]
    fn what_is_known_is_bounded_and_the_latest_stays() {
        let mut book = Book::new(1);
        let count = u32::try_from(KNOWN).unwrap() + 100;
        for number in 0..count {
            let addr = IpAddr::from(std::net::Ipv4Addr::from(0x0a00_0000 + number));
            book.learn("a.test", Ok(BTreeSet::from([addr])), u64::from(number));
        }
        assert_eq!(book.addresses.len(), KNOWN);
        let watched = book.watched(u64::from(count));
        assert_eq!(watched.len(), WATCHED as usize);
        let last = IpAddr::from(std::net::Ipv4Addr::from(0x0a00_0000 + count - 1));
        assert!(watched.contains(&last));
    }
}
