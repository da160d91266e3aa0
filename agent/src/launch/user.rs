//! As whom the command runs. Remit needs root, the agent does not: under sudo the command gets
//! the ids of who typed it. A variable of sudo that makes no sense is an error, never root.

use std::{
    ffi::{CString, OsStr, OsString},
    io,
    path::PathBuf,
};

use nix::unistd::{Gid, Uid, User as Passwd, geteuid, getgrouplist};

/// As whom the command runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// As remit itself.
    Same,
    /// As somebody else.
    Account(Account),
}

/// A user to become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// All groups, the primary one included.
    pub groups: Vec<u32>,
    /// Login name.
    pub name: String,
    /// Home directory.
    pub home: PathBuf,
    /// Login shell.
    pub shell: PathBuf,
}

/// Why it is not clear as whom to run.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// `SUDO_UID` without `SUDO_GID` or the other way round.
    #[error("{0} is set but {1} is not: cannot tell who called sudo (`--as-root` runs as root)")]
    Half(&'static str, &'static str),
    /// Not a plain number.
    #[error("{variable} is `{value}`, which is no id (`--as-root` runs as root)")]
    NotAnId {
        /// `SUDO_UID` or `SUDO_GID`.
        variable: &'static str,
        /// What it holds.
        value: String,
    },
    /// The name and the number are different users.
    #[error(
        "SUDO_USER `{name}` has user id {actual}, but SUDO_UID is {claimed} (`--as-root` runs as root)"
    )]
    Mismatch {
        /// `SUDO_USER`.
        name: String,
        /// Its id.
        actual: u32,
        /// `SUDO_UID`.
        claimed: u32,
    },
    /// The user database can't be read.
    #[error("cannot look up user {0}")]
    Lookup(u32, #[source] io::Error),
}

/// What [`super::child`] needs of an account.
#[derive(Clone, Debug)]
pub(super) struct Ids {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
}

/// What sudo says of its caller.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Caller {
    uid: u32,
    gid: u32,
    name: Option<String>,
}

/// Who called sudo, or [`User::Same`] when nobody did, or root did.
///
/// # Errors
/// When the variables make no sense or the user database can't be read.
pub(super) fn invoking() -> Result<User, UserError> {
    match caller(geteuid().is_root(), |name| std::env::var_os(name))? {
        None => Ok(User::Same),
        Some(caller) => account(caller).map(User::Account),
    }
}

/// Who called sudo, by its variables alone.
fn caller(
    root: bool,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Option<Caller>, UserError> {
    // Without privileges there are none to lay down, and whoever set these is the caller anyway.
    if !root {
        return Ok(None);
    }
    let (uid, gid) = match (variable("SUDO_UID"), variable("SUDO_GID")) {
        (None, None) => return Ok(None),
        (Some(_), None) => return Err(UserError::Half("SUDO_UID", "SUDO_GID")),
        (None, Some(_)) => return Err(UserError::Half("SUDO_GID", "SUDO_UID")),
        (Some(uid), Some(gid)) => (id("SUDO_UID", &uid)?, id("SUDO_GID", &gid)?),
    };
    if uid == 0 {
        return Ok(None);
    }
    let name = variable("SUDO_USER")
        .and_then(|name| name.into_string().ok())
        .filter(|name| !name.is_empty());
    Ok(Some(Caller { uid, gid, name }))
}

/// A number as sudo writes it. `u32::MAX` means "leave as it is" to the kernel.
fn id(variable: &'static str, value: &OsStr) -> Result<u32, UserError> {
    let digits = value
        .to_str()
        .filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()));
    match digits.and_then(|text| text.parse().ok()) {
        Some(id) if id != u32::MAX => Ok(id),
        _ => Err(UserError::NotAnId {
            variable,
            value: value.to_string_lossy().into_owned(),
        }),
    }
}

fn account(caller: Caller) -> Result<Account, UserError> {
    let Caller { uid, gid, name } = caller;
    let failed = |error: nix::Error| UserError::Lookup(uid, error.into());
    let by_name = match &name {
        Some(name) => Passwd::from_name(name).map_err(failed)?,
        None => None,
    };
    let passwd = match by_name {
        Some(passwd) if passwd.uid.as_raw() != uid => {
            return Err(UserError::Mismatch {
                name: passwd.name,
                actual: passwd.uid.as_raw(),
                claimed: uid,
            });
        }
        Some(passwd) => Some(passwd),
        None => Passwd::from_uid(Uid::from_raw(uid)).map_err(failed)?,
    };
    let Some(passwd) = passwd else {
        // A static binary does not see users of LDAP and the like. The numbers are enough; the
        // further groups are lost, which is the safe side.
        return Ok(Account {
            uid,
            gid,
            groups: vec![gid],
            name: name.unwrap_or_else(|| uid.to_string()),
            home: PathBuf::from("/"),
            shell: PathBuf::from("/bin/sh"),
        });
    };
    let groups = match CString::new(passwd.name.as_str()) {
        Ok(name) => getgrouplist(&name, Gid::from_raw(gid)).map_err(failed)?,
        Err(_) => vec![Gid::from_raw(gid)],
    };
    Ok(Account {
        uid,
        gid,
        groups: groups.into_iter().map(Gid::as_raw).collect(),
        name: passwd.name,
        home: passwd.dir,
        shell: passwd.shell,
    })
}

// === impl User, Account ===

impl User {
    /// The environment for the command, made from remit's own.
    pub(super) fn environment(
        &self,
        inherited: impl Iterator<Item = (OsString, OsString)>,
    ) -> Vec<(OsString, OsString)> {
        let account = match self {
            Self::Same => None,
            Self::Account(account) => Some(account),
        };
        let dropped = |name: &OsStr| {
            let name = name.as_encoded_bytes();
            // The descriptors of socket activation are closed; saying they are there would lie.
            name.starts_with(b"LISTEN_")
                || account.is_some()
                    && (name.starts_with(b"SUDO_")
                        || matches!(name, b"HOME" | b"USER" | b"LOGNAME" | b"SHELL" | b"MAIL"))
        };
        let mut environment: Vec<_> = inherited.filter(|(name, _)| !dropped(name)).collect();
        if let Some(account) = account {
            environment.extend([
                ("HOME".into(), account.home.clone().into_os_string()),
                ("USER".into(), account.name.clone().into()),
                ("LOGNAME".into(), account.name.clone().into()),
                ("SHELL".into(), account.shell.clone().into_os_string()),
            ]);
        }
        environment
    }
}

impl Account {
    pub(super) fn ids(&self) -> Ids {
        Ids {
            uid: self.uid,
            gid: self.gid,
            groups: self.groups.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn ask(root: bool, variables: &[(&str, &str)]) -> Result<Option<Caller>, UserError> {
        let map: HashMap<&str, &str> = variables.iter().copied().collect();
        caller(root, |name| map.get(name).map(OsString::from))
    }

    #[test]
    fn sudo_names_its_caller() {
        let variables = [
            ("SUDO_UID", "1000"),
            ("SUDO_GID", "100"),
            ("SUDO_USER", "ann"),
        ];
        let expected = Caller {
            uid: 1000,
            gid: 100,
            name: Some("ann".to_owned()),
        };
        assert_eq!(ask(true, &variables).unwrap(), Some(expected));
        assert_eq!(ask(false, &variables).unwrap(), None);
        assert_eq!(ask(true, &[]).unwrap(), None);
        let by_root = [("SUDO_UID", "0"), ("SUDO_GID", "0")];
        assert_eq!(ask(true, &by_root).unwrap(), None);
    }

    #[test]
    fn nonsense_is_refused_and_never_root() {
        for value in [
            "",
            "-1",
            "+5",
            " 5",
            "5 ",
            "0x0",
            "4294967295",
            "4294967296",
            "root",
            "1e3",
            "00x",
        ] {
            for (uid, gid) in [(value, "100"), ("1000", value)] {
                let answer = ask(true, &[("SUDO_UID", uid), ("SUDO_GID", gid)]);
                assert!(
                    matches!(answer, Err(UserError::NotAnId { .. })),
                    "{uid}/{gid}: {answer:?}"
                );
            }
        }
        for half in ["SUDO_UID", "SUDO_GID"] {
            let answer = ask(true, &[(half, "1000")]);
            assert!(matches!(answer, Err(UserError::Half(_, _))), "{answer:?}");
        }
    }

    #[test]
    fn a_name_that_is_somebody_else_is_refused() {
        let caller = Caller {
            uid: 1234,
            gid: 1,
            name: Some("root".to_owned()),
        };
        let error = account(caller).unwrap_err();
        assert!(matches!(error, UserError::Mismatch { actual: 0, .. }));
    }

    #[test]
    fn a_user_without_an_entry_keeps_the_numbers_and_no_groups() {
        let caller = Caller {
            uid: 3_999_999_999,
            gid: 77,
            name: None,
        };
        let account = account(caller).unwrap();
        assert_eq!((account.uid, account.gid), (3_999_999_999, 77));
        assert_eq!(account.groups, [77]);
        assert_eq!(account.name, "3999999999");
    }

    #[test]
    fn the_environment_is_the_users_and_says_nothing_of_sudo() {
        let account = Account {
            uid: 1000,
            gid: 100,
            groups: vec![100],
            name: "ann".to_owned(),
            home: "/home/ann".into(),
            shell: "/bin/zsh".into(),
        };
        let inherited = [
            ("PATH", "/bin"),
            ("HOME", "/root"),
            ("USER", "root"),
            ("SUDO_UID", "1000"),
            ("SUDO_COMMAND", "x"),
            ("LISTEN_FDS", "1"),
            ("MAIL", "/var/mail/root"),
        ]
        .map(|(name, value)| (OsString::from(name), OsString::from(value)));

        let theirs: HashMap<_, _> = User::Account(account)
            .environment(inherited.clone().into_iter())
            .into_iter()
            .collect();
        let mut names: Vec<_> = theirs.keys().map(|name| name.to_str().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(names, ["HOME", "LOGNAME", "PATH", "SHELL", "USER"]);
        assert_eq!(theirs[OsStr::new("HOME")], "/home/ann");
        assert_eq!(theirs[OsStr::new("USER")], "ann");

        let same: HashMap<_, _> = User::Same
            .environment(inherited.into_iter())
            .into_iter()
            .collect();
        assert_eq!(same[OsStr::new("HOME")], "/root");
        assert_eq!(same[OsStr::new("SUDO_UID")], "1000");
        assert!(!same.contains_key(OsStr::new("LISTEN_FDS")));
    }
}
