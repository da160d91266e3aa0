//! A hand in the kernel's tables, as root with bpftool has it: pins are opened, map entries read,
//! changed, added and deleted, links detached, by bpf(2) itself (include/uapi/linux/bpf.h).

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_DETACH: libc::c_long = 34;

/// A pinned map.
pub struct Map {
    fd: OwnedFd,
    key: usize,
    value: usize,
}

/// The pins of a daemon.
pub struct Pins(PathBuf);

// === impl Pins ===

impl Pins {
    /// Those below a bpffs folder.
    pub fn below(bpffs: &Path) -> Self {
        Self(bpffs.to_owned())
    }

    /// The map pinned as `name`.
    pub fn map(&self, name: &str) -> Result<Map> {
        Map::open(&self.only(name)?)
    }

    /// Where the one link of a program is pinned.
    pub fn link(&self, program: &str) -> Result<PathBuf> {
        let mut found = Vec::new();
        self.find(&self.0, program, &mut found);
        found.retain(|path| path.components().any(|part| part.as_os_str() == "links"));
        one(found, program)
    }

    fn only(&self, name: &str) -> Result<PathBuf> {
        let mut found = Vec::new();
        self.find(&self.0, name, &mut found);
        one(found, name)
    }

    fn find(&self, dir: &Path, name: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                self.find(&path, name, found);
            } else if entry.file_name() == name {
                found.push(path);
            }
        }
    }
}

fn one(found: Vec<PathBuf>, name: &str) -> Result<PathBuf> {
    match found.as_slice() {
        [path] => Ok(path.clone()),
        [] => bail!("`{name}` is not pinned"),
        more => bail!("`{name}` is pinned more than once: {more:?}"),
    }
}

/// Detaches a link for good, whoever holds it.
pub fn detach(pin: &Path) -> Result<()> {
    let link = open_pin(pin)?;
    let mut attr = link.as_raw_fd().cast_unsigned();
    bpf(BPF_LINK_DETACH, &mut attr).context("cannot detach")?;
    Ok(())
}

// === impl Map ===

impl Map {
    fn open(pin: &Path) -> Result<Self> {
        let fd = open_pin(pin)?;
        // type, id, key size, value size, and on.
        let mut info = [0_u32; 32];
        let mut attr = GetInfo {
            fd: fd.as_raw_fd().cast_unsigned(),
            length: size_of_val(&info) as u32,
            info: info.as_mut_ptr() as u64,
        };
        bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).context("cannot read the map's sizes")?;
        Ok(Self {
            fd,
            key: info[2] as usize,
            value: info[3] as usize,
        })
    }

    /// An entry.
    pub fn get(&self, key: &[u8]) -> Result<Vec<u8>> {
        let mut value = vec![0; self.value];
        self.call(BPF_MAP_LOOKUP_ELEM, key, value.as_mut_ptr() as u64)?;
        Ok(value)
    }

    /// Sets an entry, new or not.
    pub fn set(&self, key: &[u8], value: &[u8]) -> Result<()> {
        if value.len() != self.value {
            bail!("{} bytes for a value of {}", value.len(), self.value);
        }
        self.call(BPF_MAP_UPDATE_ELEM, key, value.as_ptr() as u64)
    }

    /// Deletes an entry.
    pub fn delete(&self, key: &[u8]) -> Result<()> {
        self.call(BPF_MAP_DELETE_ELEM, key, 0)
    }

    /// Every key.
    pub fn keys(&self) -> Result<Vec<Vec<u8>>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        loop {
            let mut next = vec![0; self.key];
            let last = keys.last().map_or(0, |key| key.as_ptr() as u64);
            let mut attr = self.element(last, next.as_mut_ptr() as u64);
            match bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) {
                Ok(_) => keys.push(next),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(keys),
                Err(error) => return Err(error).context("cannot list the keys"),
            }
        }
    }

    fn call(&self, command: libc::c_long, key: &[u8], value: u64) -> Result<()> {
        if key.len() != self.key {
            bail!("{} bytes for a key of {}", key.len(), self.key);
        }
        let mut attr = self.element(key.as_ptr() as u64, value);
        bpf(command, &mut attr)
            .map(drop)
            .with_context(|| format!("map command {command} on key {key:?}"))
    }

    fn element(&self, key: u64, value: u64) -> Element {
        Element {
            fd: self.fd.as_raw_fd().cast_unsigned(),
            pad: 0,
            key,
            value,
            flags: 0,
        }
    }
}

#[repr(C)]
struct Element {
    fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct GetInfo {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct ObjGet {
    path: u64,
    fd: u32,
    flags: u32,
}

fn open_pin(path: &Path) -> Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjGet {
        path: name.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    let fd = bpf(BPF_OBJ_GET, &mut attr)
        .with_context(|| format!("cannot open the pin {}", path.display()))?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Calls bpf(2) with one of the attributes above, each a prefix of the kernel's union.
fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: the attribute is a live value of the size given; the pointers in it were made by the
    // callers above from buffers of the map's own sizes that outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}
