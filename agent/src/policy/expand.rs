//! A scope as a flat list of what applies where: sets opened, the floor added, each piece with the
//! entry that it comes from. Decides nothing; `lower` does.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use agent_ebpf::abi::{Class, Effect, SOCKETS_ANY, SOCKETS_ICMP};

use super::{
    model::{Client, Grant, Scope, Target},
    name::{HostPattern, Id},
    names::{self, NameRule},
    net::{Cidr, Ports},
    source::{SourceFile, Span},
    tables::{Entry, Prefix, UnixMillis},
};

/// Host-wide denials that no file can take away. The last three are multicast and broadcast, which
/// give way to any grant inside them; the others only to a grant of the exact address.
pub const BUILTIN_FLOOR: [(&str, Role); 8] = [
    ("169.254.0.0/16", Role::Floor),
    ("fe80::/10", Role::Floor),
    ("169.254.169.254", Role::Floor),
    ("169.254.170.2", Role::Floor),
    ("fd00:ec2::254", Role::Floor),
    ("224.0.0.0/4", Role::Unlisted),
    ("255.255.255.255", Role::Unlisted),
    ("ff00::/8", Role::Unlisted),
];

/// What a piece does where it applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Denies all but a grant of the exact address.
    Floor,
    /// Denies all but a grant that names the range.
    Unlisted,
    /// Denies.
    Deny,
    /// Allows.
    Allow,
}

/// One prefix of one entry.
#[derive(Clone, Debug)]
pub struct Item {
    pub prefix: Prefix,
    pub role: Role,
    pub ports: Ports,
    /// Index into [`Flat::entries`].
    pub entry: u32,
}

/// A named set as agents use it.
#[derive(Clone, Copy, Debug)]
pub struct Shelf<'a> {
    /// Its file.
    pub file: &'a SourceFile<'a>,
    /// Its entries that are valid.
    pub allow: &'a [Grant],
    /// Whether it, or a set that it includes, has errors.
    pub broken: bool,
}

/// All sets by name.
pub type Shelves<'a> = BTreeMap<Id, Shelf<'a>>;

/// What an `[[…allow]]` of the agent became.
#[derive(Clone, Debug)]
pub struct Opened {
    /// Place in [`Scope::allow`].
    pub position: usize,
    /// Its first entry in [`Flat::entries`].
    pub first: u32,
    /// Past its last entry.
    pub end: u32,
    /// Whether all of it could be read: what it says as a whole may be judged.
    pub whole: bool,
}

/// A scope, flat.
#[derive(Debug, Default)]
pub struct Flat {
    pub entries: Vec<Entry>,
    /// End of an entry's allow, by entry.
    pub expires: Vec<Option<UnixMillis>>,
    /// Where in the agent's own file the entry is called for, by entry; none for the floor.
    pub spans: Vec<Option<Span>>,
    pub reach: Vec<Item>,
    pub serve: Vec<Item>,
    /// In the order of [`super::AgentTables::names`].
    pub names: Vec<NameRule>,
    pub opened: Vec<Opened>,
    /// `agent_ebpf::abi::SOCKETS_*` bits.
    pub sockets: u8,
}

/// Where entries are numbered from.
struct Origin<'a> {
    file: &'a SourceFile<'a>,
    /// `scope.allow`, or `set:github.allow`.
    list: String,
}

/// All that a target stands for, whatever its ports.
#[derive(Default)]
struct Members {
    prefixes: Vec<Prefix>,
    names: Vec<HostPattern>,
    seen: BTreeSet<String>,
}

/// What the entries that lead to a set narrow.
struct Narrowed<'a> {
    ports: &'a Ports,
    expires: Option<UnixMillis>,
    reason: Option<&'a str>,
    /// The agent's own entry.
    via: &'a str,
    span: &'a Span,
}

// === impl Flat ===

impl Flat {
    /// Opens `scope`, which stands in `file` with its lists below `prefix` (`scope.` or nothing).
    pub fn new<'a>(
        file: &'a SourceFile<'a>,
        prefix: &str,
        scope: &Scope,
        shelves: &Shelves<'a>,
        floors: &[(&'a SourceFile<'a>, &'a [Grant])],
    ) -> Self {
        let mut flat = Self::default();
        let allow = Origin {
            file,
            list: format!("{prefix}allow"),
        };
        for (position, grant) in scope.allow.iter().enumerate() {
            let first = flat.count();
            let whole = flat.allow(&allow, grant, shelves);
            let end = flat.count();
            flat.opened.push(Opened {
                position,
                first,
                end,
                whole,
            });
        }
        let deny = Origin {
            file,
            list: format!("{prefix}deny"),
        };
        for grant in &scope.deny {
            flat.deny(&deny, grant, Role::Deny, Some(&grant.span), shelves);
        }
        flat.serve(file, scope);
        for (file, grants) in floors {
            let origin = Origin {
                file,
                list: "floor.deny".into(),
            };
            for grant in *grants {
                flat.deny(&origin, grant, Role::Floor, None, shelves);
            }
        }
        flat.builtin();
        names::sort(&mut flat.names);
        flat.sockets = flat.sockets();
        flat
    }

    fn count(&self) -> u32 {
        // More entries than this do not fit into memory.
        u32::try_from(self.entries.len()).unwrap_or(u32::MAX)
    }

    fn push(&mut self, entry: Entry, expires: Option<UnixMillis>, span: Option<&Span>) -> u32 {
        let index = self.count();
        self.entries.push(entry);
        self.expires.push(expires);
        self.spans.push(span.cloned());
        index
    }

    fn allow(&mut self, origin: &Origin<'_>, grant: &Grant, shelves: &Shelves<'_>) -> bool {
        match &grant.to {
            Target::Net(_) | Target::Name(_) => {
                let entry = origin.entry(grant, format!("{} {}", grant.to, grant.ports));
                let entry = self.push(entry, grant.expires, Some(&grant.span));
                self.lead(grant, grant.ports.clone(), entry);
                true
            }
            Target::Set(name) => {
                let via = format!("{}[{}]", origin.list, grant.index);
                let narrowed = Narrowed {
                    ports: &grant.ports,
                    expires: grant.expires,
                    reason: grant.reason.as_deref(),
                    via: &via,
                    span: &grant.span,
                };
                self.open(name, &narrowed, shelves, &mut Vec::new())
            }
        }
    }

    /// Adds where `grant` leads, if that is no set: `ports` of it, by the entry `entry`.
    fn lead(&mut self, grant: &Grant, ports: Ports, entry: u32) {
        match &grant.to {
            Target::Net(cidr) => self.reach.push(Item {
                prefix: cidr.prefix(),
                role: Role::Allow,
                ports,
                entry,
            }),
            Target::Name(pattern) => {
                let within = grant.within.iter().map(|each| each.value.prefix());
                let expires = self.expires.get(entry as usize).copied().flatten();
                self.names.push(NameRule {
                    pattern: pattern.clone(),
                    effect: Effect::Allow,
                    ports,
                    within: within.collect(),
                    expires,
                    entry,
                });
            }
            Target::Set(_) => {}
        }
    }

    /// Adds what the set grants within `outer`; false if some of it could not be read.
    fn open(
        &mut self,
        name: &Id,
        outer: &Narrowed<'_>,
        shelves: &Shelves<'_>,
        path: &mut Vec<Id>,
    ) -> bool {
        let Some(shelf) = shelves.get(name).filter(|_| !path.contains(name)) else {
            return false;
        };
        path.push(name.clone());
        let mut whole = !shelf.broken;
        let origin = Origin {
            file: shelf.file,
            list: format!("set:{name}.allow"),
        };
        for grant in shelf.allow {
            let ports = grant.ports.intersection(outer.ports);
            if ports.is_empty() {
                continue;
            }
            let expires = match (grant.expires, outer.expires) {
                (Some(inner), Some(outer)) => Some(inner.min(outer)),
                (inner, outer) => inner.or(outer),
            };
            let reason = outer.reason.or(grant.reason.as_deref());
            match &grant.to {
                Target::Net(_) | Target::Name(_) => {
                    let text = format!("{} {ports} via {}", grant.to, outer.via);
                    let mut entry = origin.entry(grant, text);
                    entry.reason = reason.map(Into::into);
                    let entry = self.push(entry, expires, Some(outer.span));
                    self.lead(grant, ports, entry);
                }
                Target::Set(inner) => {
                    let narrowed = Narrowed {
                        ports: &ports,
                        expires,
                        reason,
                        ..*outer
                    };
                    whole &= self.open(inner, &narrowed, shelves, path);
                }
            }
        }
        path.pop();
        whole
    }

    fn deny(
        &mut self,
        origin: &Origin<'_>,
        grant: &Grant,
        role: Role,
        span: Option<&Span>,
        shelves: &Shelves<'_>,
    ) {
        let text = format!("{} {}", grant.to, grant.ports);
        let entry = self.push(origin.entry(grant, text), None, span);
        let mut found = Members::default();
        found.add(&grant.to, shelves, &mut Vec::new());
        for prefix in found.prefixes {
            self.reach.push(Item {
                prefix,
                role,
                ports: grant.ports.clone(),
                entry,
            });
        }
        let effect = match role {
            Role::Floor | Role::Unlisted => Effect::Floor,
            Role::Deny | Role::Allow => Effect::Deny,
        };
        for pattern in found.names {
            self.names.push(NameRule {
                pattern,
                effect,
                ports: grant.ports.clone(),
                within: Vec::new(),
                expires: None,
                entry,
            });
        }
    }

    fn serve(&mut self, file: &SourceFile<'_>, scope: &Scope) {
        for serve in &scope.serve {
            let mut shown = Vec::with_capacity(serve.from.len());
            let mut prefixes = Vec::with_capacity(serve.from.len());
            for client in &serve.from {
                match client {
                    Client::Net(cidr) => {
                        shown.push(cidr.to_string());
                        prefixes.push(cidr.prefix());
                    }
                    Client::Loopback => {
                        shown.push("loopback".into());
                        prefixes.push(Prefix::new(IpAddr::from([127, 0, 0, 0]), 8));
                        prefixes.push(Prefix::new(IpAddr::from(1_u128.to_be_bytes()), 128));
                    }
                }
            }
            let entry = Entry {
                name: format!("scope.serve[{}]", serve.index),
                text: format!("{} from {}", serve.ports, shown.join(", ")),
                file: file.source.path.display().to_string(),
                line: file.position(serve.span.start).0,
                reason: None,
            };
            let entry = self.push(entry, None, Some(&serve.span));
            for prefix in prefixes {
                let ports = serve.ports.clone();
                self.serve.push(Item {
                    prefix,
                    role: Role::Allow,
                    ports,
                    entry,
                });
            }
        }
    }

    fn builtin(&mut self) {
        for (index, (text, role)) in BUILTIN_FLOOR.iter().enumerate() {
            let entry = Entry {
                name: format!("floor.builtin[{index}]"),
                text: format!("{text} any"),
                file: String::new(),
                line: 0,
                reason: None,
            };
            let entry = self.push(entry, None, None);
            // Constants of this file: a test reads each of them.
            if let Ok(cidr) = text.parse::<Cidr>() {
                let (prefix, ports) = (cidr.prefix(), Ports::all());
                self.reach.push(Item {
                    prefix,
                    role: *role,
                    ports,
                    entry,
                });
            }
        }
    }

    fn sockets(&self) -> u8 {
        let reach = self.reach.iter().filter(|item| item.role == Role::Allow);
        let names = self
            .names
            .iter()
            .filter(|rule| rule.effect == Effect::Allow);
        let grants = reach
            .map(|item| &item.ports)
            .chain(names.map(|rule| &rule.ports));
        grants.fold(0, |bits, ports| {
            let icmp = !ports.of(Class::Icmp).is_empty();
            let any = !ports.of(Class::Other).is_empty();
            bits | if icmp { SOCKETS_ICMP } else { 0 } | if any { SOCKETS_ANY } else { 0 }
        })
    }
}

// === impl Origin ===

impl Origin<'_> {
    fn entry(&self, grant: &Grant, text: String) -> Entry {
        Entry {
            name: format!("{}[{}]", self.list, grant.index),
            text,
            file: self.file.source.path.display().to_string(),
            line: self.file.position(grant.span.start).0,
            reason: grant.reason.clone(),
        }
    }
}

// === impl Members ===

impl Members {
    fn add(&mut self, target: &Target, shelves: &Shelves<'_>, path: &mut Vec<Id>) {
        match target {
            Target::Net(cidr) => self.prefixes.push(cidr.prefix()),
            Target::Name(pattern) => {
                // A set may list a name twice; one denial of it is enough.
                if self.seen.insert(pattern.to_string()) {
                    self.names.push(pattern.clone());
                }
            }
            Target::Set(name) => {
                let Some(shelf) = shelves.get(name).filter(|_| !path.contains(name)) else {
                    return;
                };
                path.push(name.clone());
                for grant in shelf.allow {
                    self.add(&grant.to, shelves, path);
                }
                path.pop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builtin_floor_is_readable() {
        for (text, _) in BUILTIN_FLOOR {
            assert!(text.parse::<Cidr>().is_ok(), "{text}");
        }
    }
}
