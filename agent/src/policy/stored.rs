//! How tables are written as JSON, and what is asked of tables that were read from it. Words are
//! written as their names and prefixes as people do, so that a file on disk can be read and
//! compared; the same tables always make the same text.

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, Ipv6Addr},
    path::PathBuf,
    str::FromStr,
};

use agent_ebpf::abi::{Class, State};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{
    assemble::{RULES, UNREGISTERED_ID},
    name::Id,
    names,
    net::network_mask,
    tables::{AgentTables, Placed, Prefix},
};

/// Length of an IPv4 address's prefix in the 128-bit form.
const MAPPED_LEN: u8 = 96;

/// Functions for `#[serde(with = …)]` that write a word as its name.
macro_rules! by_name {
    ($($module:ident $word:ident,)*) => {$(
        pub(super) mod $module {
            use std::borrow::Cow;

            use agent_ebpf::abi::$word;
            use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

            pub(in crate::policy) fn serialize<S: Serializer>(
                word: &$word,
                serializer: S,
            ) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(word.name())
            }

            pub(in crate::policy) fn deserialize<'de, D: Deserializer<'de>>(
                deserializer: D,
            ) -> Result<$word, D::Error> {
                let name = Cow::<'de, str>::deserialize(deserializer)?;
                $word::ALL
                    .iter()
                    .copied()
                    .find(|word| word.name() == name)
                    .ok_or_else(|| D::Error::custom(format!("`{name}` is no {}", stringify!($module))))
            }
        }
    )*};
}

by_name! {
    state State,
    mode Mode,
    loopback Loopback,
    effect Effect,
}

/// A protocol class; none is written as `any`.
pub(super) mod class {
    use super::{Class, Cow, Deserialize as _, Deserializer, Serializer};
    use serde::de::Error as _;

    const ANY: &str = "any";

    pub(in crate::policy) fn serialize<S: Serializer>(
        class: &Option<Class>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(class.map_or(ANY, Class::name))
    }

    pub(in crate::policy) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Class>, D::Error> {
        let name = Cow::<'de, str>::deserialize(deserializer)?;
        if name == ANY {
            return Ok(None);
        }
        let known = Class::ALL.iter().copied().find(|word| word.name() == name);
        known
            .map(Some)
            .ok_or_else(|| D::Error::custom(format!("`{name}` is no class")))
    }
}

/// A path; what of it is not UTF-8 is replaced, for it is only shown.
pub(super) mod path {
    use super::{Deserialize as _, Deserializer, PathBuf, Serializer};

    pub(in crate::policy) fn serialize<S: Serializer>(
        path: &std::path::Path,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&path.to_string_lossy())
    }

    pub(in crate::policy) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<PathBuf, D::Error> {
        PathBuf::deserialize(deserializer)
    }
}

// === impl Prefix ===

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = Ipv6Addr::from(self.addr.octets());
        match ip.to_ipv4_mapped() {
            Some(ip) if self.len >= MAPPED_LEN => write!(f, "{ip}/{}", self.len - MAPPED_LEN),
            _ => write!(f, "{ip}/{}", self.len),
        }
    }
}

/// Why a text is no [`Prefix`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no prefix as Remit writes them")]
pub struct PrefixError(String);

impl FromStr for Prefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || PrefixError(text.to_owned());
        let (ip, len) = text.split_once('/').ok_or_else(wrong)?;
        let (Ok(ip), Ok(len)) = (ip.parse::<IpAddr>(), len.parse::<u8>()) else {
            return Err(wrong());
        };
        if len > if ip.is_ipv4() { 32 } else { 128 } {
            return Err(wrong());
        }
        let prefix = Self::new(ip, len);
        if prefix.bits() & !network_mask(prefix.len) != 0 {
            return Err(wrong());
        }
        Ok(prefix)
    }
}

impl Serialize for Prefix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

// === impl AgentTables ===

impl AgentTables {
    /// Whether these are tables as the compiler makes them. For tables that were read from a file:
    /// what follows relies on their order and bounds.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<(), String> {
        let pseudo = self.id == UNREGISTERED_ID;
        if pseudo != (self.state == State::Unregistered) {
            return Err(format!("its state is {}", self.state.name()));
        }
        if !pseudo && self.id.parse::<Id>().is_err() {
            return Err("its id is none".to_owned());
        }
        if let Some(odd) = self.selectors.iter().find(|glob| !glob.starts_with('/')) {
            return Err(format!("its selector `{odd}` is no path"));
        }
        if !names::is_sound(&self.names, self.entries.len()) {
            return Err("its names are not sorted, or name no entry".to_owned());
        }
        self.check_places(&self.scope.reach)?;
        self.check_places(&self.scope.serve)
    }

    fn check_places(&self, places: &[Placed]) -> Result<(), String> {
        let key = |placed: &Placed| (placed.prefix.bits(), placed.prefix.len);
        if let Some(pair) = places
            .windows(2)
            .find(|pair| matches!(pair, [left, right] if key(left) >= key(right)))
        {
            let places: Vec<_> = pair.iter().map(|each| each.prefix.to_string()).collect();
            return Err(format!("its prefixes {} are not sorted", places.join(", ")));
        }
        for placed in places {
            let at = placed.prefix;
            if placed.rules.len() > RULES {
                return Err(format!("{at} has more than {RULES} rules"));
            }
            for rule in &placed.rules {
                if rule.low > rule.high {
                    return Err(format!("{at} has a rule without ports"));
                }
                if usize::try_from(rule.entry).is_ok_and(|entry| entry >= self.entries.len()) {
                    return Err(format!("{at} has a rule of no entry"));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use agent_ebpf::abi::Mode;
    use proptest::prelude::*;

    use super::*;
    use crate::policy::{Source, SourceKind, compile};

    fn prefix(text: &str) -> Result<Prefix, PrefixError> {
        text.parse()
    }

    fn compiled() -> AgentTables {
        let text = "schema = 1\n[agent]\nid = \"a\"\nowner = \"o\"\n[lifecycle]\nstate = \
                    \"active\"\napproved_by = \"p\"\napproval_ref = \"CHG-1\"\nexpires = \
                    2027-12-31T00:00:00Z\n[selector]\ncgroup = [\"/r/a\"]\n[scope]\nmode = \
                    \"monitor\"\n[[scope.serve]]\nports = [8080]\nfrom = [\"10.0.0.0/8\", \
                    \"loopback\"]\n[[scope.allow]]\nto = \"10.0.0.0/8\"\nports = [443, \
                    \"53/udp\", \"icmp\"]\nexpires = 2027-11-30T00:00:00Z\n[[scope.allow]]\nto = \
                    \"2001:db8::/32\"\nports = [\"any\"]\n[[scope.allow]]\nto = \
                    \"*.example.com\"\nports = [443]\nwithin = [\"10.0.0.0/8\"]\n\
                    [[scope.allow]]\nto = \"a.example.com\"\nports = [80]\n[[scope.deny]]\nto = \"10.20.9.0/24\"\n";
        let source = Source {
            path: "agents.d/a.toml".into(),
            text: text.to_owned(),
            kind: SourceKind::Agent,
        };
        let compilation = compile(&[source], 1_790_812_800_000);
        assert!(!compilation.has_errors(), "{:?}", compilation.findings);
        (*compilation.agents[0]).clone()
    }

    #[test]
    fn compiled_tables_come_back_as_they_were() {
        let tables = compiled();
        assert_eq!(tables.check(), Ok(()));
        assert_eq!(tables.approved_by.as_deref(), Some("p"));
        let text = serde_json::to_string(&tables).unwrap();
        assert_eq!(serde_json::from_str::<AgentTables>(&text).unwrap(), tables);
        let pseudo = compile(&[], 0).unregistered;
        assert_eq!(pseudo.check(), Ok(()));
        let text = serde_json::to_string(&pseudo).unwrap();
        assert_eq!(serde_json::from_str::<AgentTables>(&text).unwrap(), pseudo);
    }

    #[test]
    fn prefixes_are_written_as_people_do() {
        for text in [
            "0.0.0.0/0",
            "10.0.0.0/8",
            "192.0.2.1/32",
            "::/0",
            "::1/128",
            "2001:db8::/32",
            "::ffff:0:0/95",
        ] {
            let spelled = prefix(text).map(|prefix| prefix.to_string());
            let host_bits = text == "::ffff:0:0/95";
            assert_eq!(spelled.is_err(), host_bits, "{text}");
            if !host_bits {
                assert_eq!(spelled.unwrap(), text);
            }
        }
        assert_eq!(prefix("::ffff:10.0.0.0/104"), prefix("10.0.0.0/8"));
        for text in ["10.0.0.1/8", "10.0.0.0/33", "::/129", "::", "10.0.0.0/", ""] {
            assert!(prefix(text).is_err(), "{text}");
        }
    }

    #[test]
    fn tables_that_no_compiler_makes_are_refused() {
        let sound = compiled();
        let spoilt = |spoil: fn(&mut AgentTables)| {
            let mut tables = sound.clone();
            spoil(&mut tables);
            tables.check().is_err()
        };
        assert!(!spoilt(|tables| tables.mode = Mode::Enforce));
        assert!(spoilt(|tables| tables.state = State::Unregistered));
        assert!(spoilt(|tables| tables.id = "../a".to_owned()));
        assert!(spoilt(|tables| tables.selectors[0] = "r/a".to_owned()));
        assert!(spoilt(|tables| tables.scope.reach.swap(0, 1)));
        assert!(spoilt(|tables| tables.names.swap(0, 1)));
        assert!(spoilt(|tables| tables.names[1].entry = u32::MAX));
        assert!(spoilt(|tables| tables.entries.clear()));
        assert!(spoilt(|tables| {
            let last = tables.scope.reach.last().unwrap().clone();
            tables.scope.reach.push(last);
        }));
    }

    #[test]
    fn unknown_words_and_keys_are_no_tables() {
        let text = serde_json::to_string(&compiled()).unwrap();
        for (from, to) in [
            ("\"state\":\"active\"", "\"state\":\"actife\""),
            ("\"class\":\"tcp\"", "\"class\":\"TCP\""),
            ("\"mode\":", "\"mood\":"),
            ("\"owner\":", "\"extra\":1,\"owner\":"),
        ] {
            let changed = text.replacen(from, to, 1);
            assert_ne!(changed, text, "{from}");
            assert!(
                serde_json::from_str::<AgentTables>(&changed).is_err(),
                "{to}"
            );
        }
    }

    proptest! {
        #[test]
        fn every_prefix_comes_back(bits: u128, len in 0_u8..=128) {
            let addr = Ipv6Addr::from(bits & network_mask(len));
            let prefix = Prefix { addr: agent_ebpf::abi::Addr::from_octets(addr.octets()), len };
            prop_assert_eq!(prefix.to_string().parse(), Ok(prefix));
        }

        #[test]
        fn every_mapped_prefix_comes_back(bits: u32, len in 0_u8..=32) {
            let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
            let prefix = Prefix::new(IpAddr::from((bits & mask).to_be_bytes()), len);
            prop_assert_eq!(prefix.to_string().parse(), Ok(prefix));
        }
    }
}
