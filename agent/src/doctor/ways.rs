//! The ways out that this host leaves open, each with the mend. Without containment a process can
//! have something done for it by a process outside; that is what most of these are about. The usual
//! permissions are looked at, and nothing is tried.

use std::{fs, path::Path};

use super::{
    Check, State, others,
    users::{self, User},
};
use crate::{
    cgroup::CgroupPath,
    daemon::{self, settings::Settings},
};

/// Groups whose members start processes outside, or become root.
const GROUPS: [(&str, &str); 13] = [
    ("docker", "starts containers as root"),
    ("podman", "may start containers"),
    ("sudo", "becomes root"),
    ("wheel", "becomes root"),
    ("admin", "becomes root"),
    ("lxd", "starts containers as root"),
    ("incus-admin", "starts containers as root"),
    ("libvirt", "starts virtual machines"),
    ("kvm", "may use /dev/kvm"),
    ("disk", "reads and writes whole disks"),
    ("shadow", "reads password hashes"),
    ("systemd-network", "changes the network"),
    ("remit", "reads the control socket"),
];

/// Sockets of services that do things for their callers.
const SOCKETS: [(&str, &str); 9] = [
    ("/run/docker.sock", "starts containers as root"),
    (
        "/run/containerd/containerd.sock",
        "starts containers as root",
    ),
    ("/run/podman/podman.sock", "starts containers as root"),
    ("/run/crio/crio.sock", "starts containers as root"),
    ("/run/libvirt/libvirt-sock", "starts virtual machines"),
    ("/run/snapd.socket", "installs software"),
    (
        "/run/dbus/system_bus_socket",
        "systemd starts units by it where polkit says yes",
    ),
    ("/run/systemd/private", "systemd starts units by it"),
    ("/run/systemd/io.systemd.ManagedOOM", "talks to systemd"),
];

/// All that is looked at.
pub fn ways(settings: &Settings) -> Vec<Check> {
    let roots: Vec<CgroupPath> = settings
        .enforcement
        .roots
        .iter()
        .filter_map(|root| CgroupPath::new(root).ok())
        .collect();
    let hierarchy = daemon::hierarchy(settings).ok();
    let users = hierarchy
        .as_ref()
        .map(|hierarchy| users::inside(hierarchy, &roots))
        .unwrap_or_default();
    let mut all = Vec::new();
    if users.is_empty() {
        all.push(Check::new(
            "agents' users",
            State::Unknown,
            "nothing runs inside the roots now, so it is not known as whom agents run",
            "run this again while agents run",
        ));
    }
    all.extend(superusers(&users));
    all.extend(members(&users));
    all.extend(sockets(&users));
    all.extend(buses(&users));
    all.extend(writable(settings, &users));
    if let Some(hierarchy) = &hierarchy {
        let above = roots.iter().flat_map(|root| {
            let ancestors = std::iter::successors(Some(root.clone()), CgroupPath::parent);
            ancestors.map(|path| hierarchy.directory(&path).join("cgroup.procs"))
        });
        let above: Vec<_> = above.collect();
        all.extend(may_leave(&users, &above));
        all.push(others::programs(hierarchy, &roots));
    }
    all.extend(jobs(&users));
    all.push(ssh());
    all.push(unprivileged_bpf());
    all.push(user_namespaces());
    all.push(others::translation());
    all
}

fn names(users: &[&User]) -> String {
    let names: Vec<&str> = users.iter().map(|user| user.name.as_str()).collect();
    names.join(", ")
}

/// One check about all users: open for those that `may`.
fn by_user(
    name: &str,
    users: &[User],
    may: impl Fn(&User) -> bool,
    how: &str,
    mend: &str,
) -> Check {
    let those: Vec<&User> = users.iter().filter(|user| may(user)).collect();
    if those.is_empty() {
        return Check::new(name, State::Ok, "no agent's user can", mend);
    }
    Check::new(name, State::Open, format!("{} {how}", names(&those)), mend)
}

fn superusers(users: &[User]) -> Vec<Check> {
    vec![
        by_user(
            "agents as root",
            users,
            |user| user.uid == 0 || user.capable,
            "runs with capabilities inside a root: it may move itself out or load programs",
            "give the unit `User=`, `CapabilityBoundingSet=` and `NoNewPrivileges=yes`",
        ),
        by_user(
            "setuid programs",
            users,
            |user| user.uid != 0 && user.may_gain && setuid().is_some(),
            "may execute setuid programs such as sudo",
            "give the unit `NoNewPrivileges=yes`; `remit run` sets it by itself",
        ),
    ]
}

/// A setuid program that starts something as somebody else.
fn setuid() -> Option<&'static str> {
    use std::os::unix::fs::MetadataExt as _;
    [
        "/usr/bin/sudo",
        "/usr/bin/pkexec",
        "/usr/bin/su",
        "/bin/su",
        "/usr/bin/doas",
    ]
    .into_iter()
    .find(|path| fs::metadata(path).is_ok_and(|meta| meta.mode() & 0o4000 != 0))
}

fn members(users: &[User]) -> Vec<Check> {
    let groups = users::groups();
    let mut all = Vec::new();
    for (group, does) in GROUPS {
        let Some(gid) = groups
            .iter()
            .find(|(_, name)| *name == group)
            .map(|(gid, _)| *gid)
        else {
            continue;
        };
        all.push(by_user(
            &format!("group {group}"),
            users,
            |user| user.uid != 0 && user.groups.contains(&gid),
            &format!("is a member, and so {does}"),
            &format!("take the user out: `gpasswd -d USER {group}`"),
        ));
    }
    all
}

fn sockets(users: &[User]) -> Vec<Check> {
    let mut all = Vec::new();
    for (path, does) in SOCKETS {
        let path = Path::new(path);
        if !path.exists() {
            continue;
        }
        all.push(by_user(
            &format!("socket {}", path.display()),
            users,
            |user| user.may_write(path),
            &format!("may use it: the service {does}"),
            "containment closes it; until then keep the user out by its mode and group, or hide it \
             from the unit with `InaccessiblePaths=`",
        ));
    }
    all
}

/// User managers: whoever has one may have it start processes outside the fence.
fn buses(users: &[User]) -> Vec<Check> {
    vec![by_user(
        "systemd user manager",
        users,
        |user| Path::new(&format!("/run/user/{}/bus", user.uid)).exists(),
        "has a user manager, which starts what it asks for outside the fence (`systemd-run --user`)",
        "run agents as users that never log in: `loginctl disable-linger USER`, a system user",
    )]
}

/// What says what is enforced, and where it is written down.
fn writable(settings: &Settings, users: &[User]) -> Vec<Check> {
    let paths = &settings.paths;
    let places = [
        ("registry", &paths.registry),
        ("floor", &paths.floor),
        ("state directory", &paths.state),
        ("log directory", &paths.log),
        ("run directory", &paths.run),
        ("pins", &paths.bpffs),
    ];
    let mut all: Vec<Check> = places
        .into_iter()
        .filter(|(_, path)| path.exists())
        .map(|(name, path)| {
            by_user(
                &format!("{name} {}", path.display()),
                users,
                |user| user.uid != 0 && user.may_write(path),
                "may write there",
                "leave it to root: `chown root`, `chmod go-w`, `setfacl -b`",
            )
        })
        .collect();
    // Whoever may write to a unix socket may connect to it.
    let socket = settings.socket();
    if socket.exists() {
        all.push(by_user(
            &format!("control socket {}", socket.display()),
            users,
            |user| user.uid != 0 && user.may_write(&socket),
            "may connect: inside the fence it is told of itself alone, outside of every agent",
            "take the user out of group remit; `setfacl -b` on the socket",
        ));
    }
    let log = &paths.log;
    if log.exists() {
        all.push(by_user(
            &format!("logs in {}", log.display()),
            users,
            |user| user.uid != 0 && user.may_read(&log.join("violations.jsonl")),
            "may read what is known of every agent",
            "leave them to root and group adm: `chmod o-r`, `setfacl -b`",
        ));
    }
    all
}

/// Whoever may write to the `cgroup.procs` of a root or of one of its ancestors moves itself there.
fn may_leave(users: &[User], files: &[std::path::PathBuf]) -> Vec<Check> {
    vec![by_user(
        "cgroup files",
        users,
        |user| user.uid != 0 && files.iter().any(|file| user.may_write(file)),
        "may write to cgroup.procs of a root or above it, and so move itself out",
        "leave these files to root; delegate only cgroups below an agent's own",
    )]
}

fn jobs(users: &[User]) -> Vec<Check> {
    let programs = ["/usr/bin/crontab", "/usr/bin/at"];
    let found: Vec<&str> = programs
        .into_iter()
        .filter(|path| Path::new(path).exists())
        .collect();
    if found.is_empty() {
        return Vec::new();
    }
    let listed = |file: &str, user: &User| {
        fs::read_to_string(file)
            .ok()
            .map(|text| text.lines().any(|line| line.trim() == user.name))
    };
    let may = |user: &User| match (
        listed("/etc/cron.allow", user),
        listed("/etc/cron.deny", user),
    ) {
        (Some(allowed), _) => allowed,
        (None, Some(denied)) => !denied,
        (None, None) => true,
    };
    vec![by_user(
        "cron and at",
        users,
        |user| user.uid != 0 && may(user),
        &format!(
            "may have jobs started outside the fence ({})",
            found.join(", ")
        ),
        "write the agents' users into /etc/cron.deny and /etc/at.deny, or remove the programs",
    )]
}

fn ssh() -> Check {
    let listens = ["/proc/net/tcp", "/proc/net/tcp6"].into_iter().any(|file| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines().any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let local = fields.next().unwrap_or_default();
            let state = fields.nth(1).unwrap_or_default();
            local.ends_with(":0016") && state == "0A"
        })
    });
    let mend = "grant no agent port 22 of an address of this host, and keep loopback at \"own\"; \
                `DenyUsers` in sshd_config for the agents' users";
    if listens {
        let found = "sshd listens: whoever reaches it and has a key starts processes outside";
        Check::new("ssh to this host", State::Watch, found, mend)
    } else {
        Check::new(
            "ssh to this host",
            State::Ok,
            "nothing listens on port 22",
            mend,
        )
    }
}

fn unprivileged_bpf() -> Check {
    let name = "unprivileged BPF";
    let mend = "`sysctl kernel.unprivileged_bpf_disabled=1`";
    match fs::read_to_string("/proc/sys/kernel/unprivileged_bpf_disabled") {
        Ok(text) if text.trim() == "0" => Check::new(name, State::Open, "allowed", mend),
        Ok(text) => Check::new(name, State::Ok, format!("disabled ({})", text.trim()), mend),
        Err(error) => Check::new(name, State::Unknown, error.to_string(), mend),
    }
}

fn user_namespaces() -> Check {
    let name = "user namespaces";
    let mend = "`sysctl user.max_user_namespaces=0` where no agent needs them, or \
                `RestrictNamespaces=yes` in the unit";
    let number = |file: &str| {
        fs::read_to_string(file)
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
    };
    let most = number("/proc/sys/user/max_user_namespaces");
    let debian = number("/proc/sys/kernel/unprivileged_userns_clone");
    if most == Some(0) || debian == Some(0) {
        return Check::new(name, State::Ok, "not for users", mend);
    }
    let helpers: Vec<&str> = ["passt", "pasta", "slirp4netns"]
        .into_iter()
        .filter(|program| Path::new("/usr/bin").join(program).exists())
        .collect();
    let found = if helpers.is_empty() {
        "allowed; no helper that carries packets out of one is installed".to_owned()
    } else {
        format!(
            "allowed, and {} can carry packets out: what an agent starts stays fenced, what runs \
             outside already does not",
            helpers.join(", ")
        )
    };
    Check::new(name, State::Watch, found, mend)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_way_is_open_for_those_who_can() {
        let user = |name: &str, uid, groups: &[u32]| User {
            uid,
            name: name.to_owned(),
            groups: groups.iter().copied().collect::<BTreeSet<_>>(),
            ..User::default()
        };
        let users = [user("ana", 1000, &[998]), user("bob", 1001, &[])];
        let check = by_user(
            "group",
            &users,
            |user| user.groups.contains(&998),
            "is in",
            "out",
        );
        assert_eq!(
            (check.state, check.found.as_str()),
            (State::Open, "ana is in")
        );
        let check = by_user(
            "group",
            &users,
            |user| user.groups.contains(&5),
            "is in",
            "out",
        );
        assert_eq!(check.state, State::Ok);

        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cgroup.procs");
        fs::write(&file, "").unwrap();
        use std::os::unix::fs::PermissionsExt as _;
        for (mode, state) in [(0o644, State::Ok), (0o646, State::Open)] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            let stranger = [user("ana", 4_000_000, &[4_000_000])];
            let checks = may_leave(&stranger, std::slice::from_ref(&file));
            assert_eq!(checks[0].state, state, "{mode:o}");
        }
    }
}
