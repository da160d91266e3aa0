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
//! | 10| loopback: mode any; or own, and the peer is the agent's (or gone, for the tail of a TCP connection) | allow, not cached |
//! | 11| loopback otherwise                                   | deny `loopback_foreign`          |
//! | 12| rule is allow, past its deadline                     | deny `expired`, or `lease_expired` |
//! | 13| the pseudo-agent                                     | deny `unregistered`              |
//! | 14| otherwise                                            | deny `out_of_scope`              |
//!
//! A lease lets an open TCP connection outlive it by its rule's `tail`; that is never cached, for
//! the cache knows no flags.
//!
//! Monitor mode turns `out_of_scope`, `denied` and `lease_expired` (and `unregistered`, of the
//! pseudo-agent) into [`Decision::Monitor`]; nothing else.

pub mod packet;
pub mod socket;

use crate::verifier::{hide, hide32, opaque};

use crate::abi::{
    Addr, AgentRow, Cause, Class, Effect, FLAG_SERVES, Hook, INHERITED, LOOPBACK_ENTRY, Leaf,
    Loopback, Mode, NO_ENTRY, RULE_LEASED, RULES_PER_SET, Reason, Rule, RuleSet, SERVE,
    SETS_PER_ADDRESS, State,
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
    /// TCP's flags byte; 0 where there is none.
    pub tcp_flags: u8,
    /// Boot time in nanoseconds.
    pub now: u64,
}

/// Whose socket a loopback attempt would reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Nobody's: nothing is bound there.
    Nobody,
    /// The agent's own.
    Own,
    /// Somebody else's, or one that carries no tag.
    Foreign,
}

/// The tables, in the kernel or in memory.
pub trait Rules {
    /// The rule set of the longest prefix of `addr` in `space` (an exact address is one of 128
    /// bits).
    fn rule_set_for(&self, space: u64, addr: &Addr) -> Option<Leaf>;
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

/// What the rules of one address say, in words that are plain numbers: see [`find`].
#[derive(Clone, Copy)]
struct Found {
    deadline: u64,
    entry: u32,
    /// The rest in one word, for the sake of the stack: an [`Effect`] or one of the constants below,
    /// then [`crate::abi::Rule::flags`], and in the upper half [`crate::abi::Rule::tail`].
    rest: u64,
}

impl Found {
    #[inline(always)]
    const fn effect(&self) -> u8 {
        self.rest as u8
    }

    #[inline(always)]
    const fn flags(&self) -> u8 {
        (self.rest >> 8) as u8
    }

    #[inline(always)]
    const fn tail(&self) -> u64 {
        self.rest >> 32
    }
}

const IPPROTO_TCP: u8 = 6;
/// TCP flags (RFC 9293, section 3.1).
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// No rule matches.
const NOTHING: u8 = 0;
/// A row points to a block that is not there.
const BROKEN: u8 = u8::MAX;

/// The verdict on `attempt` by the agent with `row`.
#[inline(always)]
pub fn decide<R: Rules>(rules: &R, row: &AgentRow, attempt: &Attempt) -> Decision {
    // Plain comparisons instead of matching each word at once: the verifier follows every
    // combination of words it has been shown, through all that comes after.
    if row.state == 0 || row.mode == 0 || row.loopback == 0 {
        return Decision::Fault(Cause::NoRow);
    }
    if row.state != State::Active as u8 && row.state != State::Unregistered as u8 {
        return match State::from_byte(row.state) {
            Some(State::Draft) => deny(Reason::Draft),
            Some(State::Suspended) => deny(Reason::Suspended),
            Some(State::Revoked) => deny(Reason::Revoked),
            Some(State::Active | State::Unregistered) | None => Decision::Fault(Cause::NoRow),
        };
    }
    if attempt.now < row.not_before {
        return deny(Reason::NotYetValid);
    }
    if attempt.now >= row.deadline {
        return deny(Reason::Expired);
    }

    let class = Class::TABLE[attempt.protocol as usize];
    let mut found = Found {
        deadline: 0,
        entry: NO_ENTRY,
        rest: NOTHING as u64,
    };
    let mut inner = attempt.addr;
    if embedded(&attempt.addr, &mut inner) != 0 {
        let _ = find(
            rules,
            row.policy,
            &inner,
            asked(class, attempt.port),
            &mut found,
        );
        if found.effect() == BROKEN {
            return Decision::Fault(Cause::NoRuleSet);
        }
        if found.effect() == Effect::Floor as u8 {
            return Decision::Deny {
                reason: Reason::Floor,
                entry: found.entry,
            };
        }
        if found.effect() == Effect::Deny as u8 {
            return lift(row, Reason::Denied, found.entry);
        }
    }

    let mut expired = NO_ENTRY;
    let mut leased = 0;
    let _ = find(
        rules,
        row.policy,
        &attempt.addr,
        asked(class, attempt.port),
        &mut found,
    );
    match (found.effect(), Effect::from_byte(found.effect())) {
        (NOTHING, _) => {}
        (_, Some(Effect::Floor)) => {
            return Decision::Deny {
                reason: Reason::Floor,
                entry: found.entry,
            };
        }
        (_, Some(Effect::Deny)) => return lift(row, Reason::Denied, found.entry),
        (_, Some(Effect::Allow)) => {
            if attempt.now < found.deadline {
                let until = if found.deadline < row.deadline {
                    found.deadline
                } else {
                    row.deadline
                };
                return Decision::Allow {
                    entry: found.entry,
                    until,
                    cacheable: class <= Class::Udp as u8,
                };
            }
            expired = found.entry;
            leased = found.flags() & RULE_LEASED;
            if leased != 0
                && goes_on(attempt)
                && attempt.now - found.deadline < found.tail() * 1_000_000_000
            {
                return now(found.entry);
            }
        }
        (_, None) => return Decision::Fault(Cause::NoRuleSet),
    }

    if matches!(attempt.hook, Hook::Egress)
        && row.flags & FLAG_SERVES != 0
        && attempt.tcp_flags & (SYN | ACK) != SYN
    {
        let asked = asked(class, attempt.local_port);
        let _ = find(rules, row.policy | SERVE, &attempt.addr, asked, &mut found);
        if found.effect() == BROKEN {
            return Decision::Fault(Cause::NoRuleSet);
        }
        if found.effect() == Effect::Allow as u8 {
            return now(found.entry);
        }
    }

    if loopback(&attempt.addr) != 0 && row.state == State::Active as u8 {
        let reachable = row.loopback == Loopback::Any as u8
            || row.loopback == Loopback::Own as u8
                && match rules.peer(attempt) {
                    Peer::Own => true,
                    Peer::Foreign => false,
                    Peer::Nobody => is_tail(attempt),
                };
        if reachable {
            return now(LOOPBACK_ENTRY);
        }
        return deny(Reason::LoopbackForeign);
    }
    if expired != NO_ENTRY {
        if leased != 0 {
            return lift(row, Reason::LeaseExpired, expired);
        }
        return Decision::Deny {
            reason: Reason::Expired,
            entry: expired,
        };
    }
    if row.state == State::Unregistered as u8 {
        return lift(row, Reason::Unregistered, NO_ENTRY);
    }
    lift(row, Reason::OutOfScope, NO_ENTRY)
}

/// Whether an attempt belongs to a TCP connection that was let through: its last segments find
/// nobody when the other end has closed, and are harmless. What opens something is refused where
/// nobody listens, since nothing there is the agent's own.
#[inline(always)]
const fn is_tail(attempt: &Attempt) -> bool {
    goes_on(attempt)
}

/// Whether an attempt is a packet of a TCP connection that was opened before.
#[inline(always)]
const fn goes_on(attempt: &Attempt) -> bool {
    matches!(attempt.hook, Hook::Egress)
        && attempt.protocol == IPPROTO_TCP
        && attempt.tcp_flags & (SYN | ACK) != SYN
}

/// [`Addr::embedded_v4`] as a function of its own: see [`find`]. Returns whether there is one.
#[inline(never)]
fn embedded(addr: &Addr, inner: &mut Addr) -> u32 {
    let (word, found) = match addr.embedded_v4() {
        Some(found) => (found.words[3], 1),
        None => (0, 0),
    };
    *inner = Addr::from_v4_word(hide32(word));
    hide32(found)
}

/// [`Addr::is_loopback`] as a function of its own: see [`find`].
#[inline(never)]
fn loopback(addr: &Addr) -> u32 {
    hide32(addr.is_loopback() as u32)
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
const fn lift(row: &AgentRow, reason: Reason, entry: u32) -> Decision {
    if row.mode == Mode::Monitor as u8 {
        return Decision::Monitor { reason, entry };
    }
    Decision::Deny { reason, entry }
}

/// Class and port as one word, since a kernel function has five arguments.
#[inline(always)]
const fn asked(class: u8, port: u16) -> u64 {
    (class as u64) << 16 | port as u64
}

/// Finds the rule for an address, class and port. A function of its own, all of whose ways out
/// look the same to the verifier. The chain and each block are bounded, so that it can walk them.
///
/// The number that it returns says nothing: without one the compiler may leave an address of the
/// stack in the register for it, which Linux 6.1 refuses.
#[inline(never)]
fn find<R: Rules>(rules: &R, space: u64, addr: &Addr, asked: u64, found: &mut Found) -> u32 {
    let (mut rest, mut entry, mut deadline) = (NOTHING as u64, NO_ENTRY, 0);
    if let Some(leaf) = rules.rule_set_for(space, addr) {
        rest = BROKEN as u64;
        let mut index = leaf.set;
        for _ in 0..SETS_PER_ADDRESS {
            let Some(set) = rules.rule_set(index) else {
                break;
            };
            let (class, port) = ((asked >> 16) as i64, (asked & 0xffff) as i64);
            // Most addresses have one rule; the others of a block lie in other lines of the cache.
            let hit = if set.len == 1 {
                hide(missed(&set.rules[0], class, port) ^ 1)
            } else {
                matching(set, class, port)
            };
            if hit != 0 {
                // Masked again where the compiler cannot see that it need not be: the verifier of
                // 6.1 cannot follow the arithmetic that bounds the number.
                let at = opaque(bit_number(hit)) & (RULES_PER_SET - 1);
                let rule = &set.rules[at];
                (entry, deadline) = (rule.entry, rule.deadline);
                rest = rule.effect as u64 | (rule.flags as u64) << 8 | (rule.tail as u64) << 32;
                if entry == INHERITED {
                    entry = leaf.entry;
                }
                break;
            }
            if set.next == 0 {
                rest = NOTHING as u64;
                break;
            }
            index = hide32(set.next - 1);
        }
    }
    found.entry = hide32(entry);
    found.deadline = hide(deadline);
    found.rest = hide(rest);
    hide32(0)
}

/// One bit for each rule of a block that matches: at most one is set, and never that of an unused
/// slot ([`crate::abi::Rule::UNUSED`]). Bits instead of branches: the verifier would follow every
/// combination of outcomes over all rules, and give up at a million instructions.
#[inline(always)]
fn matching(set: &RuleSet, class: i64, port: i64) -> u64 {
    let mut misses = 0_u64;
    for i in 0..RULES_PER_SET {
        misses |= missed(&set.rules[i], class, port) << i;
    }
    !misses & 0xff
}

/// 1 where a rule does not match.
#[inline(always)]
const fn missed(rule: &Rule, class: i64, port: i64) -> u64 {
    let own = rule.class as i64;
    let apart = own - class;
    // Each is negative when its condition does not hold.
    let below = port - rule.low as i64;
    let above = rule.high as i64 - port;
    let other = -(own * apart * apart);
    (below | above | other) as u64 >> 63
}

const _: () = assert!(
    RULES_PER_SET == 8,
    "bits and masks around here are for eight rules"
);

/// Number of the one bit set.
#[inline(always)]
const fn bit_number(bit: u64) -> usize {
    let odd = bit >> 1 | bit >> 3 | bit >> 5 | bit >> 7;
    let twos = bit >> 2 | bit >> 3 | bit >> 6 | bit >> 7;
    let fours = bit >> 4 | bit >> 5 | bit >> 6 | bit >> 7;
    (odd & 1 | (twos & 1) << 1 | (fours & 1) << 2) as usize
}
