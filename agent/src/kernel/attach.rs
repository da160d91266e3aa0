//! Links on a root: one for each hook, pinned, so that they outlive the daemon. A root that is
//! fenced already gets the new programs by link update, without a moment in between.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        CgroupAttachMode, CgroupSkbAttachType, Program,
        links::{FdLink, LinkError},
    },
};

use super::{
    error::AttachError,
    object::{Expected, HOOKS},
    sys,
};

/// One hook of a fenced root, as read back from the kernel.
#[derive(Clone, Debug)]
pub struct Guard {
    /// Hook name.
    pub hook: &'static str,
    /// What was found; none when the link is gone.
    pub link: Option<sys::CgroupLink>,
    /// Whether the kernel lists the link's program on the cgroup.
    pub listed: bool,
}

/// A fenced root.
pub struct Fence {
    /// The root's directory.
    pub directory: PathBuf,
    /// Its id when it was fenced.
    pub cgroup: u64,
    pins: PathBuf,
    links: Vec<(Expected, OwnedFd)>,
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

impl Fence {
    /// Attaches every hook to the cgroup at `directory`, with pins in `pins`.
    pub fn raise(ebpf: &mut Ebpf, directory: &Path, pins: &Path) -> Result<Self, AttachError> {
        let open = |source| AttachError::Open {
            path: directory.to_owned(),
            source,
        };
        let cgroup = File::open(directory).map_err(open)?;
        let id = cgroup.metadata().map_err(open)?.ino();
        fs::create_dir_all(pins).map_err(|source| AttachError::Pin {
            what: "create the directory of",
            path: pins.to_owned(),
            source: boxed(source),
        })?;
        let mut links = Vec::new();
        for expected in HOOKS {
            let pin = pins.join(expected.program);
            let link = match adopt(ebpf, expected, &pin, id)? {
                Some(link) => link,
                None => attach(ebpf, expected, &cgroup, directory, &pin)?,
            };
            links.push((expected, link));
        }
        let fence = Self {
            directory: directory.to_owned(),
            cgroup: id,
            pins: pins.to_owned(),
            links,
        };
        for guard in fence.guards() {
            if guard.link.is_none_or(|link| link.cgroup != id) || !guard.listed {
                let program = HOOKS
                    .iter()
                    .find(|expected| expected.hook == guard.hook)
                    .map_or("program", |expected| expected.program);
                return Err(AttachError::NotThere {
                    program,
                    path: directory.to_owned(),
                });
            }
        }
        Ok(fence)
    }

    /// Every hook as the kernel has it now.
    pub fn guards(&self) -> Vec<Guard> {
        let cgroup = File::open(&self.directory).ok();
        self.links
            .iter()
            .map(|(expected, link)| {
                let info = sys::link_info(link.as_fd())
                    .ok()
                    .filter(|info| info.cgroup != 0);
                let listed = cgroup.as_ref().zip(info).is_some_and(|(cgroup, info)| {
                    sys::attached_programs(cgroup.as_fd(), expected.attach_type)
                        .is_ok_and(|ids| ids.contains(&info.program))
                });
                Guard {
                    hook: expected.hook,
                    link: info,
                    listed,
                }
            })
            .collect()
    }

    /// Whether the root's directory is still the cgroup that was fenced.
    pub fn stands(&self) -> bool {
        fs::metadata(&self.directory).is_ok_and(|found| found.ino() == self.cgroup)
    }

    /// Takes the fence down: unpins and detaches every link.
    pub fn lift(self) -> io::Result<()> {
        for (expected, link) in self.links {
            fs::remove_file(self.pins.join(expected.program))?;
            drop(link);
        }
        fs::remove_dir(&self.pins)
    }
}

fn program_fd<'a>(ebpf: &'a Ebpf, expected: Expected) -> Option<BorrowedFd<'a>> {
    match ebpf.program(expected.program)? {
        Program::CgroupSkb(program) => program.fd().ok().map(|fd| fd.as_fd()),
        Program::CgroupSockAddr(program) => program.fd().ok().map(|fd| fd.as_fd()),
        Program::CgroupSock(program) => program.fd().ok().map(|fd| fd.as_fd()),
        _ => None,
    }
}

/// Takes over a pinned link of the same cgroup; a dead one is swept away.
fn adopt(
    ebpf: &Ebpf,
    expected: Expected,
    pin: &Path,
    cgroup: u64,
) -> Result<Option<OwnedFd>, AttachError> {
    if !pin.exists() {
        return Ok(None);
    }
    let failed = |what| {
        move |source: io::Error| AttachError::Pin {
            what,
            path: pin.to_owned(),
            source: boxed(source),
        }
    };
    let link = sys::open_pin(pin).map_err(failed("open"))?;
    let info = sys::link_info(link.as_fd()).map_err(failed("read"))?;
    if info.cgroup != cgroup {
        fs::remove_file(pin).map_err(failed("remove dead"))?;
        return Ok(None);
    }
    let program = program_fd(ebpf, expected)
        .ok_or_else(|| failed("update")(io::Error::other("program is not loaded")))?;
    sys::update_link(link.as_fd(), program).map_err(failed("update"))?;
    Ok(Some(link))
}

fn attach(
    ebpf: &mut Ebpf,
    expected: Expected,
    cgroup: &File,
    directory: &Path,
    pin: &Path,
) -> Result<OwnedFd, AttachError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| AttachError::Attach {
        program: expected.program,
        path: directory.to_owned(),
        source,
    };
    // `Single` on a link lets others attach beside it; see the kernel's handling of links.
    let mode = CgroupAttachMode::Single;
    let link: Result<FdLink, LinkError> = match ebpf.program_mut(expected.program) {
        Some(Program::CgroupSkb(program)) => {
            let id = program
                .attach(cgroup, CgroupSkbAttachType::Egress, mode)
                .map_err(|error| failed(boxed(error)))?;
            program
                .take_link(id)
                .map_err(|error| failed(boxed(error)))?
                .try_into()
        }
        Some(Program::CgroupSockAddr(program)) => {
            let id = program
                .attach(cgroup, mode)
                .map_err(|error| failed(boxed(error)))?;
            program
                .take_link(id)
                .map_err(|error| failed(boxed(error)))?
                .try_into()
        }
        Some(Program::CgroupSock(program)) => {
            let id = program
                .attach(cgroup, mode)
                .map_err(|error| failed(boxed(error)))?;
            program
                .take_link(id)
                .map_err(|error| failed(boxed(error)))?
                .try_into()
        }
        Some(_) | None => return Err(failed(boxed(io::Error::other("program is not loaded")))),
    };
    let link = link.map_err(|error| failed(boxed(error)))?;
    let pinned = link.pin(pin).map_err(|source| AttachError::Pin {
        what: "create",
        path: pin.to_owned(),
        source: boxed(source),
    })?;
    drop(pinned);
    sys::open_pin(pin).map_err(|source| AttachError::Pin {
        what: "open",
        path: pin.to_owned(),
        source: boxed(source),
    })
}
