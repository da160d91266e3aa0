//! The one verdict. The hooks run [`decide`] over maps; `remit explain`, the daemon's self-test
//! and the parity tests run it over memory. It is pure: time and look-ups are arguments.
//!
//! Precedence, first match wins. "Rule" is the one rule that the compiler left for the address
//! (longest prefix), protocol class and port: there a deny has already beaten an allow, and the
//! floor everything but a grant of the exact address.
//!
//! | # | condition                                            | outcome                          |
//! |---|------------------------------------------------------|----------------------------------|
//! | 1 | no row, or an unknown word in it                     | fault                            |
//! | 2 | state is not active                                  | deny `draft`/`suspended`/`revoked` |
//! | 3 | before `not_before`                                  | deny `not_yet_valid`             |
//! | 4 | at or past the agent's deadline                      | deny `expired`                   |
//! | 5 | an embedded IPv4 address meets a floor or deny rule  | deny `floor`/`denied`            |
//! | 6 | rule is floor                                        | deny `floor`                     |
//! | 7 | rule is deny                                         | deny `denied`                    |
//! | 8 | rule is allow, before its deadline                   | allow                            |
//! | 9 | egress, a served port and client, not a TCP opening  | allow, not cached                |
//! | 10| loopback: mode any; or own, and the peer is the agent's or nobody | allow, not cached   |
//! | 11| loopback otherwise                                   | deny `loopback_foreign`          |
//! | 12| rule is allow, past its deadline                     | deny `expired`                   |
//! | 13| the pseudo-agent                                     | deny `unregistered`              |
//! | 14| otherwise                                            | deny `out_of_scope`              |
//!
//! Monitor mode turns `out_of_scope` and `denied` (and `unregistered`, of the pseudo-agent) into
//! [`Decision::Monitor`]; nothing else.

pub mod packet;
pub mod socket;

use crate::abi::{
    Addr, AgentRow, Cause, Class, Effect, FLAG_SERVES, Hook, LOOPBACK_ENTRY, Loopback, Mode,
    NO_ENTRY, RULES_PER_SET, Reason, Rule, RuleSet, SERVE, SETS_PER_ADDRESS, State,
};

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// Destination, already [`Addr::effective`].
    pub addr: Addr,
    /// Destination port in host order; 0 where the protocol has none.
    pub port: u16,
    /// Local port in host order; 0 when not known.
    pub local_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Which hook asks.
    pub hook: Hook,
    /// A TCP SYN without ACK.
    pub opening: bool,
    /// Boot time in nanoseconds.
    pub now: u64,
}

/// Whose socket a loopback attempt would reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Nobody's: the kernel answers with a reset or an ICMP error, so nothing is reached.
    Nobody,
    /// The agent's own.
    Own,
    /// Somebody else's, or one that carries no tag.
    Foreign,
}

/// The tables, in the kernel or in memory.
pub trait Rules {
    /// The rule set of the longest prefix of `addr` in `space` (an exact address is one of 128
    /// bits): its index in the table.
    fn rule_set_for(&self, space: u64, addr: &Addr) -> Option<u32>;
    /// A block of rules.
    fn rule_set(&self, index: u32) -> Option<&RuleSet>;
    /// Whose socket a loopback attempt would reach. Asked only where the answer decides.
    fn peer(&self, attempt: &Attempt) -> Peer;
}

/// The verdict, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Let through.
    Allow {
        /// The entry that grants it.
        entry: u32,
        /// Boot time in nanoseconds until which the same question has the same answer.
        until: u64,
        /// Whether it may be remembered.
        cacheable: bool,
    },
    /// Let through by monitor mode, and reported.
    Monitor {
        /// What enforcement would say.
        reason: Reason,
        /// The entry that decided.
        entry: u32,
    },
    /// Refused.
    Deny {
        /// Why.
        reason: Reason,
        /// The entry that decided.
        entry: u32,
    },
    /// It could not be told: refused, and counted as `fault`.
    Fault(Cause),
}

/// What the rules of one address say.
#[derive(Clone, Copy)]
enum Found {
    Nothing,
    Rule {
        effect: Effect,
        entry: u32,
        deadline: u64,
    },
    Fault(Cause),
}

/// The verdict on `attempt` by the agent with `row`.
#[inline(always)]
pub fn decide<R: Rules>(rules: &R, row: &AgentRow, attempt: &Attempt) -> Decision {
    let (Some(state), Some(mode), Some(loopback)) = (
        State::from_byte(row.state),
        Mode::from_byte(row.mode),
        Loopback::from_byte(row.loopback),
    ) else {
        return Decision::Fault(Cause::NoRow);
    };
    let unlisted = match state {
        State::Active => Reason::OutOfScope,
        State::Unregistered => Reason::Unregistered,
        State::Draft => return deny(Reason::Draft),
        State::Suspended => return deny(Reason::Suspended),
        State::Revoked => return deny(Reason::Revoked),
    };
    if attempt.now < row.not_before {
        return deny(Reason::NotYetValid);
    }
    if attempt.now >= row.deadline {
        return deny(Reason::Expired);
    }

    let class = Class::of(attempt.protocol);
    if let Some(inner) = attempt.addr.embedded_v4() {
        match find(rules, row.policy, &inner, class, attempt.port) {
            Found::Rule {
                effect: Effect::Floor,
                entry,
                ..
            } => {
                return Decision::Deny {
                    reason: Reason::Floor,
                    entry,
                };
            }
            Found::Rule {
                effect: Effect::Deny,
                entry,
                ..
            } => {
                return lift(mode, Reason::Denied, entry);
            }
            Found::Rule {
                effect: Effect::Allow,
                ..
            }
            | Found::Nothing => {}
            Found::Fault(cause) => return Decision::Fault(cause),
        }
    }

    let mut expired = None;
    match find(rules, row.policy, &attempt.addr, class, attempt.port) {
        Found::Rule {
            effect: Effect::Floor,
            entry,
            ..
        } => {
            return Decision::Deny {
                reason: Reason::Floor,
                entry,
            };
        }
        Found::Rule {
            effect: Effect::Deny,
            entry,
            ..
        } => {
            return lift(mode, Reason::Denied, entry);
        }
        Found::Rule {
            effect: Effect::Allow,
            entry,
            deadline,
        } => {
            if attempt.now < deadline {
                let until = if deadline < row.deadline {
                    deadline
                } else {
                    row.deadline
                };
                let cacheable = class.has_ports();
                return Decision::Allow {
                    entry,
                    until,
                    cacheable,
                };
            }
            expired = Some(entry);
        }
        Found::Nothing => {}
        Found::Fault(cause) => return Decision::Fault(cause),
    }

    if matches!(attempt.hook, Hook::Egress)
        && row.flags & FLAG_SERVES != 0
        && !(attempt.opening && matches!(class, Class::Tcp))
    {
        match find(
            rules,
            row.policy | SERVE,
            &attempt.addr,
            class,
            attempt.local_port,
        ) {
            Found::Rule {
                effect: Effect::Allow,
                entry,
                ..
            } => return now(entry),
            Found::Rule { .. } | Found::Nothing => {}
            Found::Fault(cause) => return Decision::Fault(cause),
        }
    }

    if attempt.addr.is_loopback() && matches!(state, State::Active) {
        let reachable = match loopback {
            Loopback::Any => true,
            Loopback::None => false,
            Loopback::Own => !matches!(rules.peer(attempt), Peer::Foreign),
        };
        if reachable {
            return now(LOOPBACK_ENTRY);
        }
        return deny(Reason::LoopbackForeign);
    }
    if let Some(entry) = expired {
        return Decision::Deny {
            reason: Reason::Expired,
            entry,
        };
    }
    lift(mode, unlisted, NO_ENTRY)
}

/// An allow for this once.
#[inline(always)]
const fn now(entry: u32) -> Decision {
    Decision::Allow {
        entry,
        until: 0,
        cacheable: false,
    }
}

#[inline(always)]
const fn deny(reason: Reason) -> Decision {
    Decision::Deny {
        reason,
        entry: NO_ENTRY,
    }
}

/// A refusal that monitor mode may lift.
#[inline(always)]
const fn lift(mode: Mode, reason: Reason, entry: u32) -> Decision {
    match mode {
        Mode::Monitor => Decision::Monitor { reason, entry },
        Mode::Enforce => Decision::Deny { reason, entry },
    }
}

/// The rule for an address, class and port. The chain and each block are bounded, so the verifier
/// can walk them.
#[inline(always)]
fn find<R: Rules>(rules: &R, space: u64, addr: &Addr, class: Class, port: u16) -> Found {
    let Some(mut index) = rules.rule_set_for(space, addr) else {
        return Found::Nothing;
    };
    for _ in 0..SETS_PER_ADDRESS {
        let Some(set) = rules.rule_set(index) else {
            return Found::Fault(Cause::NoRuleSet);
        };
        for i in 0..RULES_PER_SET {
            if i as u32 >= set.len {
                break;
            }
            let rule = &set.rules[i];
            if matches(rule, class, port) {
                let Some(effect) = Effect::from_byte(rule.effect) else {
                    return Found::Fault(Cause::NoRuleSet);
                };
                return Found::Rule {
                    effect,
                    entry: rule.entry,
                    deadline: rule.deadline,
                };
            }
        }
        if set.next == 0 {
            return Found::Nothing;
        }
        index = set.next - 1;
    }
    Found::Fault(Cause::NoRuleSet)
}

#[inline(always)]
fn matches(rule: &Rule, class: Class, port: u16) -> bool {
    (rule.class == 0 || rule.class == class as u8) && rule.low <= port && port <= rule.high
}
