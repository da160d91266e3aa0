//! Who runs inside the roots, and what these users may do by the usual permissions.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use crate::cgroup::{CgroupPath, Hierarchy};

/// A user that runs something inside a root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Name, if it has one.
    pub name: String,
    /// All of its groups: those of its processes, and those that a new login would have.
    pub groups: BTreeSet<u32>,
    /// Processes.
    pub pids: Vec<u32>,
    /// Whether one of them may gain privileges by executing something.
    pub may_gain: bool,
    /// Whether one of them has capabilities.
    pub capable: bool,
}

/// Group names by id.
pub type Groups = BTreeMap<u32, String>;

/// The users that run inside these roots.
pub fn inside(hierarchy: &Hierarchy, roots: &[CgroupPath]) -> Vec<User> {
    let mut users: BTreeMap<u32, User> = BTreeMap::new();
    for root in roots {
        for pid in hierarchy.processes(root, true).unwrap_or_default() {
            let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
                continue;
            };
            let Some(process) = parse(&status) else {
                continue;
            };
            let user = users.entry(process.uid).or_default();
            user.uid = process.uid;
            user.pids.push(pid);
            user.groups.extend(process.groups);
            user.may_gain |= !process.no_new_privs;
            user.capable |= process.capable;
        }
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let group = fs::read_to_string("/etc/group").unwrap_or_default();
    for user in users.values_mut() {
        know(user, &passwd, &group);
    }
    users.into_values().collect()
}

/// Names of the groups.
pub fn groups() -> Groups {
    let text = fs::read_to_string("/etc/group").unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            Some((fields.nth(1)?.parse().ok()?, name.to_owned()))
        })
        .collect()
}

/// What `/proc/PID/status` says.
#[derive(Debug, PartialEq, Eq)]
struct Process {
    uid: u32,
    groups: BTreeSet<u32>,
    no_new_privs: bool,
    capable: bool,
}

fn parse(status: &str) -> Option<Process> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let first = |text: &str| text.split_whitespace().next()?.parse().ok();
    let mut groups: BTreeSet<u32> = field("Groups:")
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|group| group.parse().ok())
        .collect();
    groups.extend(field("Gid:").and_then(first));
    let effective = field("CapEff:").and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    Some(Process {
        uid: field("Uid:").and_then(first)?,
        groups,
        no_new_privs: field("NoNewPrivs:").is_some_and(|text| text.trim() == "1"),
        capable: effective.is_none_or(|bits| bits != 0),
    })
}

/// Name and groups out of passwd(5) and group(5).
fn know(user: &mut User, passwd: &str, group: &str) {
    for line in passwd.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if let [name, _, uid, gid, ..] = fields.as_slice()
            && uid.parse() == Ok(user.uid)
        {
            (*name).clone_into(&mut user.name);
            user.groups.extend(gid.parse::<u32>());
        }
    }
    if user.name.is_empty() {
        user.name = user.uid.to_string();
        return;
    }
    for line in group.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if let [_, _, gid, members] = fields.as_slice()
            && members.split(',').any(|member| member == user.name)
        {
            user.groups.extend(gid.parse::<u32>());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_and_its_user_are_read() {
        let status = "Name:\tx\nUid:\t1000\t1000\t1000\t1000\nGid:\t100\t100\t100\t100\n\
                      Groups:\t100 999 \nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n";
        let process = parse(status).unwrap();
        assert_eq!(process.uid, 1000);
        assert_eq!(process.groups, BTreeSet::from([100, 999]));
        assert!(process.no_new_privs && !process.capable);
        let root = parse("Uid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\nNoNewPrivs:\t0\n").unwrap();
        assert!(root.capable && !root.no_new_privs);
        assert_eq!(parse("Name:\tx\n"), None);

        let mut user = User {
            uid: 1000,
            ..User::default()
        };
        know(
            &mut user,
            "root:x:0:0::/:/bin/sh\nana:x:1000:1000::/home/ana:/bin/sh\n",
            "docker:x:998:ana,bob\nsudo:x:27:bob\n",
        );
        assert_eq!(user.name, "ana");
        assert_eq!(user.groups, BTreeSet::from([998, 1000]));
    }
}
