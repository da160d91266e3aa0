//! A root user's hands in the kernel's tables, as bpftool has them: a few `bpf(2)` calls on what is
//! pinned. Remit's own library is not asked, for it is what is tested.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

const MAP_LOOKUP: libc::c_long = 1;
const MAP_UPDATE: libc::c_long = 2;
const MAP_DELETE: libc::c_long = 3;
const MAP_NEXT_KEY: libc::c_long = 4;
const PROG_LOAD: libc::c_long = 5;
const OBJ_GET: libc::c_long = 7;
const OBJ_INFO: libc::c_long = 15;
const LINK_UPDATE: libc::c_long = 29;
const LINK_DETACH: libc::c_long = 34;

/// `union bpf_attr`, as words.
type Attr = [u64; 16];

fn bpf(command: libc::c_long, attr: &mut Attr) -> io::Result<i32> {
    // SAFETY: a live buffer of that size; the pointers in it are the callers' live buffers.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of::<Attr>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as i32)
}

fn fd(number: i32) -> OwnedFd {
    // SAFETY: the kernel has just given out this descriptor.
    unsafe { OwnedFd::from_raw_fd(number) }
}

fn word(object: &OwnedFd) -> u64 {
    u64::from(object.as_raw_fd().cast_unsigned())
}

/// Something pinned.
pub struct Pinned(OwnedFd);

/// A cgroup_skb program that lets everything through, loaded and attached nowhere.
pub struct Open(OwnedFd);

// === impl Pinned ===

impl Pinned {
    /// Opens the pin.
    pub fn open(path: &Path) -> io::Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        let mut attr = Attr::default();
        attr[0] = name.as_ptr() as u64;
        bpf(OBJ_GET, &mut attr).map(|number| Self(fd(number)))
    }

    /// The value of a key; `value` must be as long as the map's.
    pub fn lookup(&self, key: &[u8], value: &mut [u8]) -> io::Result<()> {
        let mut attr = Attr::default();
        attr[0] = word(&self.0);
        attr[1] = key.as_ptr() as u64;
        attr[2] = value.as_mut_ptr() as u64;
        bpf(MAP_LOOKUP, &mut attr).map(drop)
    }

    /// Writes a value.
    pub fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        let mut attr = Attr::default();
        attr[0] = word(&self.0);
        attr[1] = key.as_ptr() as u64;
        attr[2] = value.as_ptr() as u64;
        bpf(MAP_UPDATE, &mut attr).map(drop)
    }

    /// Deletes a key.
    pub fn delete(&self, key: &[u8]) -> io::Result<()> {
        let mut attr = Attr::default();
        attr[0] = word(&self.0);
        attr[1] = key.as_ptr() as u64;
        bpf(MAP_DELETE, &mut attr).map(drop)
    }

    /// Sizes of a map's keys and values.
    pub fn sizes(&self) -> io::Result<(usize, usize)> {
        // type, id, key size, value size, and on.
        let mut info = [0_u32; 32];
        let mut attr = Attr::default();
        attr[0] = word(&self.0) | (size_of_val(&info) as u64) << 32;
        attr[1] = info.as_mut_ptr() as u64;
        bpf(OBJ_INFO, &mut attr)?;
        Ok((info[2] as usize, info[3] as usize))
    }

    /// Every key of a map.
    pub fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        let (size, _) = self.sizes()?;
        let mut keys: Vec<Vec<u8>> = Vec::new();
        loop {
            let mut next = vec![0; size];
            let mut attr = Attr::default();
            attr[0] = word(&self.0);
            attr[1] = keys.last().map_or(0, |key| key.as_ptr() as u64);
            attr[2] = next.as_mut_ptr() as u64;
            match bpf(MAP_NEXT_KEY, &mut attr) {
                Ok(_) => keys.push(next),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(keys),
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes the reader's position of a ring, as a reader that is broken would.
    pub fn set_consumer(&self, position: impl FnOnce(u64) -> u64) -> io::Result<()> {
        // SAFETY: a number in, a number out.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let map = |offset: usize, protection| {
            // SAFETY: a fresh mapping of a page that the kernel offers for this; checked below.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    page,
                    protection,
                    libc::MAP_SHARED,
                    self.0.as_raw_fd(),
                    offset as libc::off_t,
                )
            };
            if at == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            Ok(at.cast::<u64>())
        };
        let consumer = map(0, libc::PROT_READ | libc::PROT_WRITE)?;
        let producer = map(page, libc::PROT_READ)?;
        // SAFETY: both pages are mapped, and never unmapped: the case's process ends soon.
        unsafe { consumer.write_volatile(position(producer.read_volatile())) };
        Ok(())
    }

    /// Detaches a link.
    pub fn detach(&self) -> io::Result<()> {
        let mut attr = Attr::default();
        attr[0] = word(&self.0);
        bpf(LINK_DETACH, &mut attr).map(drop)
    }

    /// Puts a program under a link.
    pub fn replace(&self, program: &Open) -> io::Result<()> {
        let mut attr = Attr::default();
        attr[0] = word(&self.0) | word(&program.0) << 32;
        bpf(LINK_UPDATE, &mut attr).map(drop)
    }
}

// === impl Open ===

impl Open {
    /// `return 1`, for the egress hook.
    pub fn egress() -> io::Result<Self> {
        const CGROUP_SKB: u64 = 8;
        const INET_EGRESS: u64 = 1;
        // r0 = 1; exit
        let code: [u64; 2] = [1 << 32 | 0xb7, 0x95];
        let licence = c"GPL";
        let mut attr = Attr::default();
        attr[0] = CGROUP_SKB | (code.len() as u64) << 32;
        attr[1] = code.as_ptr() as u64;
        attr[2] = licence.as_ptr() as u64;
        // kern_version, prog_flags, name and ifindex are zero; then comes expected_attach_type.
        attr[8] = INET_EGRESS << 32;
        bpf(PROG_LOAD, &mut attr).map(|number| Self(fd(number)))
    }
}
