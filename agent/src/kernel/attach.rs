//! Links on a root: one for each hook, pinned, so that they outlive the daemon. A root that is
//! fenced already gets the new programs by link update, without a moment in between, whichever
//! version pinned its links.
//!
//! At every step one link of ours holds each hook, and its pin is either where it was or where it
//! belongs. So whatever ends this process, the next one finds the fence standing.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use aya::{Ebpf, programs::Program};

use super::{
    error::AttachError,
    object::{Expected, all_hooks},
    pins::{Known, replace_pin},
    sys,
};

/// One hook of a fenced root, as read back from the kernel.
#[derive(Clone, Debug)]
pub struct Guard {
    /// Hook name.
    pub hook: &'static str,
    /// What was found; none when the link is gone.
    pub link: Option<sys::CgroupLink>,
    /// Id of the program that was put there.
    pub wanted: u32,
    /// Whether the kernel lists the link's program on the cgroup.
    pub listed: bool,
    /// The programs of others on the same hook of the same cgroup, by their ids.
    pub others: Vec<u32>,
}

/// A program that Remit has no record of, under a link that Remit pinned. It was replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignProgram {
    /// Hook name.
    pub hook: &'static str,
    /// Id of the program.
    pub program: u32,
}

/// A fenced root.
pub struct Fence {
    /// The root's directory.
    pub directory: PathBuf,
    /// Its id when it was fenced.
    pub cgroup: u64,
    pins: PathBuf,
    links: Vec<Held>,
    foreign: Vec<ForeignProgram>,
}

/// A link of ours.
struct Held {
    expected: Expected,
    link: OwnedFd,
    id: u32,
    program: u32,
}

/// What raising a fence takes.
pub(super) struct Raising<'a> {
    /// The object, its programs loaded.
    pub ebpf: &'a Ebpf,
    /// What to attach.
    pub hooks: &'a [Expected],
    /// Programs of earlier starts.
    pub known: &'a Known,
    /// Where this version pins the root's links.
    pub pins: &'a Path,
    /// Where other versions may have pinned them.
    pub elsewhere: &'a [PathBuf],
    /// The fence that this process has on the root already.
    pub standing: Option<&'a Fence>,
}

/// How a hook of a fence differs from what was put there.
pub(super) enum Fault {
    /// The link holds no cgroup any more, or cannot be read.
    Detached(String),
    /// Another program is under the link: found, wanted.
    Foreign(u32, u32),
    /// The kernel does not run the program there.
    NotListed,
    /// The pin is not there, or something else is: in words.
    Pin(String),
}

/// The name of a root's pin directory: its path with `/` turned into `:`. (bpffs refuses dots in
/// names, so they are turned into `+`.)
pub fn pin_name(root: &str) -> String {
    root.trim_matches('/').replace('/', ":").replace('.', "+")
}

fn boxed<E: std::error::Error + Send + Sync + 'static>(
    error: E,
) -> Box<dyn std::error::Error + Send + Sync> {
    Box::new(error)
}

/// A pin that could not be handled.
fn pin_failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> AttachError {
    move |source| AttachError::Pin {
        what,
        path: path.to_owned(),
        source: boxed(source),
    }
}

impl Fence {
    /// Attaches every hook to the cgroup at `directory`.
    pub(super) fn raise(raising: &Raising<'_>, directory: &Path) -> Result<Self, AttachError> {
        let open = |source| AttachError::Open {
            path: directory.to_owned(),
            source,
        };
        let cgroup = File::open(directory).map_err(open)?;
        let id = cgroup.metadata().map_err(open)?.ino();
        let pins = raising.pins.to_owned();
        fs::create_dir_all(&pins).map_err(pin_failed("create the directory of", &pins))?;
        let mut fence = Self {
            directory: directory.to_owned(),
            cgroup: id,
            pins: pins.clone(),
            links: Vec::new(),
            foreign: Vec::new(),
        };
        for expected in raising.hooks {
            let held = fence.raise_hook(raising, *expected, &cgroup)?;
            fence.links.push(held);
        }
        for guard in fence.guards() {
            if guard.link.is_none_or(|link| link.cgroup != id) || !guard.listed {
                return Err(AttachError::NotThere {
                    program: program_of(guard.hook),
                    path: directory.to_owned(),
                });
            }
        }
        remove_others(&pins, raising.hooks).map_err(pin_failed("remove what is no", &pins))?;
        Ok(fence)
    }

    fn raise_hook(
        &mut self,
        raising: &Raising<'_>,
        expected: Expected,
        cgroup: &File,
    ) -> Result<Held, AttachError> {
        let pin = self.pins.join(expected.program);
        let is_ours = |info: &sys::CgroupLink| {
            info.cgroup == self.cgroup && info.attach_type == expected.attach_type
        };
        // The link that we hold, where we pin it, and where others do: the first that is good.
        let held = raising
            .standing
            .and_then(|fence| fence.links.iter().find(|held| held.expected == expected))
            .and_then(|held| held.link.try_clone().ok());
        let places: Vec<PathBuf> = std::iter::once(pin.clone())
            .chain(
                raising
                    .elsewhere
                    .iter()
                    .map(|dir| dir.join(expected.program)),
            )
            .collect();
        let candidates = held
            .into_iter()
            .chain(places.iter().filter_map(|path| sys::open_pin(path).ok()));
        let mut found = None;
        for link in candidates {
            if let Some(info) = sys::link_info(link.as_fd()).ok().filter(is_ours) {
                found = Some((link, info));
                break;
            }
        }
        let program = loaded(raising.ebpf, expected, &self.directory)?;
        let (link, info) = match found {
            Some((link, info)) => {
                if info.program != program && !raising.known.contains_key(&info.program) {
                    self.foreign.push(ForeignProgram {
                        hook: expected.hook,
                        program: info.program,
                    });
                }
                let fd = program_fd(raising.ebpf, expected)
                    .ok_or_else(|| not_loaded(expected, &self.directory))?;
                sys::update_link(link.as_fd(), fd).map_err(pin_failed("update", &pin))?;
                (link, info)
            }
            None => {
                let link = attach(raising.ebpf, expected, cgroup, &self.directory)?;
                let info = sys::link_info(link.as_fd()).map_err(pin_failed("read", &pin))?;
                (link, info)
            }
        };
        pin_at(&link, info.id, &pin, &places)?;
        Ok(Held {
            expected,
            link,
            id: info.id,
            program,
        })
    }

    /// Every hook as the kernel has it now.
    pub fn guards(&self) -> Vec<Guard> {
        let cgroup = File::open(&self.directory).ok();
        self.links
            .iter()
            .map(|held| {
                let info = sys::link_info(held.link.as_fd())
                    .ok()
                    .filter(|info| info.cgroup != 0);
                let mut others = cgroup
                    .as_ref()
                    .and_then(|cgroup| {
                        sys::attached_programs(cgroup.as_fd(), held.expected.attach_type).ok()
                    })
                    .unwrap_or_default();
                let ours = info
                    .and_then(|info| others.iter().position(|program| *program == info.program));
                if let Some(at) = ours {
                    others.remove(at);
                }
                Guard {
                    hook: held.expected.hook,
                    link: info,
                    wanted: held.program,
                    listed: ours.is_some(),
                    others,
                }
            })
            .collect()
    }

    /// The hooks that are not as they were raised.
    pub(super) fn faults(&self) -> Vec<(&'static str, Fault)> {
        let mut faults = Vec::new();
        let guards = self.guards();
        for (held, guard) in self.links.iter().zip(guards) {
            let hook = held.expected.hook;
            match guard.link {
                None => {
                    let why = sys::link_info(held.link.as_fd())
                        .map_or_else(|error| error.to_string(), |_| "no cgroup".to_owned());
                    faults.push((hook, Fault::Detached(why)));
                }
                Some(info) if info.program != held.program => {
                    faults.push((hook, Fault::Foreign(info.program, held.program)));
                }
                Some(_) if !guard.listed => faults.push((hook, Fault::NotListed)),
                Some(_) => {}
            }
            let pin = self.pins.join(held.expected.program);
            match pinned_link(&pin) {
                Ok(id) if id == held.id => {}
                Ok(id) => faults.push((hook, Fault::Pin(format!("link {id}")))),
                Err(error) => faults.push((hook, Fault::Pin(error.to_string()))),
            }
        }
        faults
    }

    /// The programs that were found under the links and that Remit has no record of.
    pub fn found_foreign(&self) -> &[ForeignProgram] {
        &self.foreign
    }

    /// The programs that its links hold.
    pub(super) fn programs(&self) -> impl Iterator<Item = &'static str> {
        self.links.iter().map(|held| held.expected.program)
    }

    /// Whether the DNS guard's hooks are there, and the kernel runs them.
    pub fn turns_lookups(&self) -> bool {
        let guards = self.guards();
        super::DNS_HOOKS.iter().all(|hook| {
            guards
                .iter()
                .any(|guard| guard.hook == hook.hook && guard.listed && guard.link.is_some())
        })
    }

    /// Where the links are pinned.
    pub(super) fn pins(&self) -> &Path {
        &self.pins
    }

    /// Whether the root's directory is still the cgroup that was fenced.
    pub fn stands(&self) -> bool {
        fs::metadata(&self.directory).is_ok_and(|found| found.ino() == self.cgroup)
    }

    /// Takes the fence down: unpins and detaches every link.
    pub fn lift(self) -> io::Result<()> {
        for held in self.links {
            match fs::remove_file(self.pins.join(held.expected.program)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
            drop(held.link);
        }
        fs::remove_dir(&self.pins)
    }
}

/// Moves a link whose root this process does not govern (it left the settings) to our programs:
/// it goes on denying, by the maps in force. Returns false for a link that holds nothing, and for
/// a hook that this version does not have; their pins are removed.
pub(super) fn move_stray(
    ebpf: &Ebpf,
    program: &str,
    from: &Path,
    to: &Path,
) -> Result<bool, AttachError> {
    let expected = all_hooks().find(|expected| expected.program == program);
    let link = sys::open_pin(from).map_err(pin_failed("open", from))?;
    let info = sys::link_info(link.as_fd()).ok();
    let fd = expected
        .filter(|expected| {
            info.is_some_and(|info| info.cgroup != 0 && info.attach_type == expected.attach_type)
        })
        .and_then(|expected| program_fd(ebpf, expected));
    let Some(fd) = fd else {
        fs::remove_file(from).map_err(pin_failed("remove dead", from))?;
        return Ok(false);
    };
    sys::update_link(link.as_fd(), fd).map_err(pin_failed("update", from))?;
    if from != to {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(pin_failed("create the directory of", to))?;
        }
        fs::rename(from, to).map_err(pin_failed("move", from))?;
    }
    Ok(true)
}

/// The id of the link pinned at `pin`.
fn pinned_link(pin: &Path) -> io::Result<u32> {
    let link = sys::open_pin(pin)?;
    Ok(sys::link_info(link.as_fd())?.id)
}

/// Sees to it that the link is pinned at `pin`, and at none of the other `places`.
fn pin_at(link: &OwnedFd, id: u32, pin: &Path, places: &[PathBuf]) -> Result<(), AttachError> {
    if pinned_link(pin).ok() != Some(id) {
        let moved = places
            .iter()
            .find(|place| *place != pin && pinned_link(place).ok() == Some(id));
        // In one step: what was pinned there, if anything, is only let go of now.
        match moved {
            Some(place) => fs::rename(place, pin).map_err(pin_failed("move", place))?,
            None => replace_pin(link.as_fd(), pin).map_err(pin_failed("create", pin))?,
        }
    }
    for place in places.iter().filter(|place| *place != pin) {
        match fs::remove_file(place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(pin_failed("remove the old", place)(error));
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Removes pins that are none of a fence's: of a step that was cut short, of a hook that only
/// another version has, or of one that is not needed any more.
fn remove_others(pins: &Path, hooks: &[Expected]) -> io::Result<()> {
    for entry in fs::read_dir(pins)? {
        let entry = entry?;
        let name = entry.file_name();
        if !hooks.iter().any(|expected| *expected.program == *name) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn program_of(hook: &str) -> &'static str {
    all_hooks()
        .find(|expected| expected.hook == hook)
        .map_or("program", |expected| expected.program)
}

/// The id of a loaded program.
pub(super) fn program_id(ebpf: &Ebpf, program: &str) -> Option<u32> {
    let info = ebpf.program(program)?.info().ok()?;
    Some(info.id())
}

fn not_loaded(expected: Expected, directory: &Path) -> AttachError {
    AttachError::Attach {
        program: expected.program,
        path: directory.to_owned(),
        source: boxed(io::Error::other("program is not loaded")),
    }
}

fn loaded(ebpf: &Ebpf, expected: Expected, directory: &Path) -> Result<u32, AttachError> {
    program_id(ebpf, expected.program).ok_or_else(|| not_loaded(expected, directory))
}

pub(super) fn program_fd(ebpf: &Ebpf, expected: Expected) -> Option<BorrowedFd<'_>> {
    match ebpf.program(expected.program)? {
        Program::CgroupSkb(program) => program.fd().ok().map(|fd| fd.as_fd()),
        Program::CgroupSockAddr(program) => program.fd().ok().map(|fd| fd.as_fd()),
        Program::CgroupSock(program) => program.fd().ok().map(|fd| fd.as_fd()),
        _ => None,
    }
}

/// Attaches a loaded program. By hand, since the library gives no link out before it is pinned.
pub(super) fn attach(
    ebpf: &Ebpf,
    expected: Expected,
    cgroup: &File,
    directory: &Path,
) -> Result<OwnedFd, AttachError> {
    let program = program_fd(ebpf, expected).ok_or_else(|| not_loaded(expected, directory))?;
    sys::attach(program, cgroup.as_fd(), expected.attach_type).map_err(|source| {
        AttachError::Attach {
            program: expected.program,
            path: directory.to_owned(),
            source: boxed(source),
        }
    })
}
