//! What the kernel hands out, in the terms of a record. Bytes that are no word of ours make no
//! record: the object and this program are then not of one version, which the loader refuses.

use agent_ebpf::abi::{Addr, Cause, Class, Event, Fold, Hook, Reason, Verdict, Witness};

use super::{Endpoint, EntryRef, ProcessInfo, Subject, Violation};
use crate::policy::tables::UnixMillis;

/// What the kernel's record of an attempt does not say.
#[derive(Clone, Debug)]
pub struct Context {
    /// Its boot time, put on the wall clock.
    pub time: UnixMillis,
    /// The agent of its number.
    pub agent: Subject,
    /// Its process, looked at.
    pub process: ProcessInfo,
    /// Path of its cgroup below the v2 mount.
    pub cgroup: Option<String>,
    /// Which start of its unit that is.
    pub invocation: Option<String>,
    /// The entry of its number, in the policy that it names.
    pub entry: Option<EntryRef>,
    /// Name that the destination was leased for.
    pub dst_name: Option<String>,
    /// The registry state in force.
    pub revision: u64,
    /// Attempts that the line stands for, as the ledger says.
    pub count: u64,
}

impl ProcessInfo {
    /// The process of a ring-buffer record.
    pub fn from_event(event: &Event) -> Self {
        let witness = Witness::from_byte(event.witness).unwrap_or(Witness::Unknown);
        let uid = (witness != Witness::Unknown).then_some(event.uid);
        Self::from_record(event.pid, &event.comm, uid, witness)
    }

    /// The process of a fold slot, which knows its id alone.
    pub fn from_fold(fold: &Fold) -> Self {
        let witness = match fold.pid {
            0 => Witness::Unknown,
            _ => Witness::Owner,
        };
        Self::from_record(fold.pid, b"", None, witness)
    }
}

impl Violation {
    /// A ring-buffer record.
    pub fn from_event(event: &Event, context: Context) -> Option<Self> {
        let hook = Hook::from_byte(event.hook)?;
        let violation = Self {
            time: context.time,
            agent: context.agent,
            verdict: Verdict::from_byte(event.verdict)?,
            reason: Reason::from_byte(event.reason)?,
            hook,
            cause: Cause::from_byte(event.cause)?,
            protocol: event.protocol,
            family: event.family,
            socket_type: event.socket_type,
            dst: destination(hook, event.addr, event.protocol, event.port),
            dst_name: context.dst_name,
            src: endpoint(event.source, event.protocol, event.local_port),
            process: context.process,
            cgroup_id: event.cgroup,
            cgroup: context.cgroup,
            invocation: context.invocation,
            entry: context.entry,
            revision: context.revision,
            count: context.count,
        };
        Some(violation)
    }

    /// Repeats that a fold slot counted.
    pub fn from_fold(fold: &Fold, context: Context) -> Option<Self> {
        let event = Event {
            cgroup: fold.cgroup,
            addr: fold.addr,
            port: fold.port,
            protocol: fold.protocol,
            hook: fold.hook,
            verdict: fold.verdict,
            reason: fold.reason,
            ..Event::zeroed()
        };
        Self::from_event(&event, context)
    }
}

/// None at sock_create, and where a packet was too broken to have one.
fn destination(hook: Hook, addr: Addr, protocol: u8, port: u16) -> Option<Endpoint> {
    match hook {
        Hook::SockCreate => None,
        Hook::Connect4 | Hook::Connect6 | Hook::SendMsg4 | Hook::SendMsg6 | Hook::Egress => {
            endpoint(addr, protocol, port)
        }
    }
}

fn endpoint(addr: Addr, protocol: u8, port: u16) -> Option<Endpoint> {
    let port = Class::of(protocol).has_ports().then_some(port);
    (addr != Addr::zeroed()).then(|| Endpoint {
        ip: addr.into(),
        port,
    })
}
