//! The few `bpf(2)` calls that aya does not make: see the kernel's `include/uapi/linux/bpf.h`.

use std::{
    ffi::CString,
    io,
    mem::size_of,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_long = 21;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_MAP_DELETE_BATCH: libc::c_long = 27;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;

/// Calls `bpf(2)` with one of the attribute structs below, each a prefix of the kernel's union.
fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: the attribute is a live struct of the size given, and every pointer in it was made
    // by the callers below from buffers that outlive the call.
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

#[repr(C)]
#[derive(Default)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Opens what is pinned at `path`.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjGet {
        pathname: name.as_ptr() as u64,
        ..ObjGet::default()
    };
    let fd = bpf(BPF_OBJ_GET, &mut attr)?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Pins what a descriptor stands for at `path`, which must not be there yet.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjGet {
        pathname: name.as_ptr() as u64,
        bpf_fd: object.as_raw_fd().cast_unsigned(),
        ..ObjGet::default()
    };
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// What a descriptor stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A map.
    Map,
    /// A program.
    Program,
    /// A link.
    Link,
    /// Something else.
    Other,
}

/// Tells what a descriptor stands for. Whoever may write to bpffs can pin a map where a link is
/// looked for, and the calls that read one back would take its bytes for a link's.
pub fn kind(object: BorrowedFd<'_>) -> io::Result<Kind> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()))?;
    Ok(match name.to_str() {
        Some("anon_inode:bpf-map") => Kind::Map,
        Some("anon_inode:bpf-prog") => Kind::Program,
        // With an underscore up to now, unlike the other two.
        Some("anon_inode:bpf_link" | "anon_inode:bpf-link") => Kind::Link,
        Some(_) | None => Kind::Other,
    })
}

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner: u32,
    numa: u32,
    name: [u8; 16],
}

/// `enum bpf_map_type`: an array.
pub const ARRAY: u32 = 2;

/// Makes an array map that no program uses. `name` has at most 15 bytes.
pub fn create_array(name: &str, value_size: u32, entries: u32) -> io::Result<OwnedFd> {
    create_map(name, ARRAY, 4, value_size, entries, 0)
}

/// Makes a map of any kind that no program uses. `name` has at most 15 bytes.
pub fn create_map(
    name: &str,
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = MapCreate {
        kind,
        key_size,
        value_size,
        max_entries: entries,
        flags,
        ..MapCreate::default()
    };
    for (slot, byte) in attr.name.iter_mut().take(15).zip(name.bytes()) {
        *slot = byte;
    }
    let fd = bpf(BPF_MAP_CREATE, &mut attr)?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[repr(C)]
#[derive(Default)]
struct Element {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Reads element `index` of an array map (per CPU or not) as bytes. `size` is what the kernel
/// copies: one value, or for a per-CPU map one of a
/// multiple of 8 bytes for each possible CPU.
pub fn read_element(map: BorrowedFd<'_>, index: u32, size: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0_u8; size];
    let mut attr = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: (&raw const index) as u64,
        value: value.as_mut_ptr() as u64,
        ..Element::default()
    };
    bpf(BPF_MAP_LOOKUP_ELEM, &mut attr)?;
    Ok(value)
}

/// Takes an element out of a hash map: reads it and removes it in one step. False where it is gone.
pub fn take_element(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: key.as_ptr() as u64,
        value: value.as_mut_ptr() as u64,
        ..Element::default()
    };
    match bpf(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes element `index` of an array map that is not per CPU.
pub fn write_element(map: BorrowedFd<'_>, index: u32, value: &[u8]) -> io::Result<()> {
    let mut attr = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: (&raw const index) as u64,
        value: value.as_ptr() as u64,
        ..Element::default()
    };
    bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Reads the value of `key` into `value`. `key` has the size of the map's keys, and `value` that of
/// its values; the map is not per CPU. [`io::ErrorKind::NotFound`] where there is no such key.
pub fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<()> {
    let mut attr = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: key.as_ptr() as u64,
        value: value.as_mut_ptr() as u64,
        ..Element::default()
    };
    bpf(BPF_MAP_LOOKUP_ELEM, &mut attr).map(drop)
}

/// Writes the value of `key`. Sizes as for [`lookup`].
pub fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attr = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: key.as_ptr() as u64,
        value: value.as_ptr() as u64,
        ..Element::default()
    };
    bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Removes `key`. [`io::ErrorKind::NotFound`] where it was not there.
pub fn delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<()> {
    let mut attr = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: key.as_ptr() as u64,
        ..Element::default()
    };
    bpf(BPF_MAP_DELETE_ELEM, &mut attr).map(drop)
}

/// Finds the key after `key`, or the first, and puts it into `next`.
/// [`io::ErrorKind::NotFound`] after the last.
pub fn next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<()> {
    let mut attr = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        key: key.map_or(0, |key| key.as_ptr() as u64),
        value: next.as_mut_ptr() as u64,
        ..Element::default()
    };
    bpf(BPF_MAP_GET_NEXT_KEY, &mut attr).map(drop)
}

#[repr(C)]
#[derive(Default)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// A call for many elements that ended early.
#[derive(Debug)]
pub struct Partly {
    /// Elements that it was done for.
    pub done: usize,
    /// Why not for more.
    pub error: io::Error,
}

/// Calls for many elements; how many it was done for.
fn batch(command: libc::c_long, mut attr: Batch) -> Result<usize, Partly> {
    let asked = attr.count;
    match bpf(command, &mut attr) {
        Ok(_) => Ok(attr.count as usize),
        Err(error) => {
            // A count that is still what was asked for was not set: the call was refused as a
            // whole. Only the end of a map can come after as many as there was room for.
            let was_set = attr.count < asked || error.kind() == io::ErrorKind::NotFound;
            let done = if was_set { attr.count as usize } else { 0 };
            Err(Partly { done, error })
        }
    }
}

/// Writes `count` elements in one call. `keys` and `values` have so many of each, one after the
/// other.
pub fn update_batch(
    map: BorrowedFd<'_>,
    keys: &[u8],
    values: &[u8],
    count: u32,
) -> Result<(), Partly> {
    let attr = Batch {
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count,
        map_fd: map.as_raw_fd().cast_unsigned(),
        ..Batch::default()
    };
    batch(BPF_MAP_UPDATE_BATCH, attr).map(drop)
}

/// Removes `count` elements in one call, up to the first that is not there.
pub fn delete_batch(map: BorrowedFd<'_>, keys: &[u8], count: u32) -> Result<(), Partly> {
    let attr = Batch {
        keys: keys.as_ptr() as u64,
        count,
        map_fd: map.as_raw_fd().cast_unsigned(),
        ..Batch::default()
    };
    batch(BPF_MAP_DELETE_BATCH, attr).map(drop)
}

/// Reads up to `count` elements from where `at` says (none: from the start), and sets `next` to
/// where the following call goes on. Both have the size of a key, or of 4 bytes if that is more.
/// After the last element the error is [`io::ErrorKind::NotFound`], with how many there still were.
pub fn lookup_batch(
    map: BorrowedFd<'_>,
    at: Option<&[u8]>,
    next: &mut [u8],
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> Result<usize, Partly> {
    let attr = Batch {
        in_batch: at.map_or(0, |at| at.as_ptr() as u64),
        out_batch: next.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map_fd: map.as_raw_fd().cast_unsigned(),
        ..Batch::default()
    };
    batch(BPF_MAP_LOOKUP_BATCH, attr)
}

/// Waits until every program that was running when this was called has ended (they run in RCU
/// read sections). False where the kernel does not offer that.
pub fn await_running_programs() -> bool {
    const MEMBARRIER_CMD_GLOBAL: libc::c_long = 1;
    // SAFETY: a command without pointers.
    unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) == 0 }
}

#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// Attaches a program to a cgroup by a link, beside whatever others have attached there.
pub fn attach(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        target_fd: cgroup.as_raw_fd().cast_unsigned(),
        attach_type,
        ..LinkCreate::default()
    };
    let fd = bpf(BPF_LINK_CREATE, &mut attr)?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// Puts another program under a link, without a moment in between.
pub fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate {
        link_fd: link.as_raw_fd().cast_unsigned(),
        new_prog_fd: program.as_raw_fd().cast_unsigned(),
        ..LinkUpdate::default()
    };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// What the kernel says of a cgroup link.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CgroupLink {
    /// `enum bpf_link_type`.
    pub kind: u32,
    /// Id of the link.
    pub id: u32,
    /// Id of the program under it.
    pub program: u32,
    pad: u32,
    /// Id of the cgroup; 0 once the cgroup is gone.
    pub cgroup: u64,
    /// `enum bpf_attach_type`.
    pub attach_type: u32,
    tail: u32,
}

#[repr(C)]
struct GetInfo {
    fd: u32,
    len: u32,
    info: u64,
}

/// Reads a cgroup link back; anything else is an error.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<CgroupLink> {
    const BPF_LINK_TYPE_CGROUP: u32 = 3;
    let mut info = CgroupLink::default();
    let mut attr = GetInfo {
        fd: link.as_raw_fd().cast_unsigned(),
        len: size_of::<CgroupLink>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    if kind(link)? != Kind::Link || info.kind != BPF_LINK_TYPE_CGROUP {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no cgroup link"));
    }
    Ok(info)
}

#[repr(C)]
#[derive(Default)]
struct ProgQuery {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    pad: u32,
    attach_flags_list: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// Ids of the programs attached to a cgroup itself, not to its ancestors.
pub fn attached_programs(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    // 64 is the kernel's own limit for one hook of one cgroup.
    let mut ids = [0_u32; 64];
    let mut attr = ProgQuery {
        target_fd: cgroup.as_raw_fd().cast_unsigned(),
        attach_type,
        prog_ids: ids.as_mut_ptr() as u64,
        count: ids.len() as u32,
        ..ProgQuery::default()
    };
    bpf(BPF_PROG_QUERY, &mut attr)?;
    Ok(ids.iter().take(attr.count as usize).copied().collect())
}

#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// Runs a program once on a made-up packet; returns its return value.
pub fn test_run(program: BorrowedFd<'_>, packet: &[u8]) -> io::Result<u32> {
    let mut attr = TestRun {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        data_size_in: u32::try_from(packet.len()).map_err(io::Error::other)?,
        data_in: packet.as_ptr() as u64,
        repeat: 1,
        ..TestRun::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    Ok(attr.retval)
}

/// The cookie of the network namespace that a socket is in: what `bpf_get_netns_cookie` says.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: a live descriptor, and a buffer of the size that is given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cookie)
}

/// `include/uapi/asm-generic/socket.h`, Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Boot time in nanoseconds: the clock of every deadline in the kernel's tables.
pub fn boot_nanos() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a live timespec; this clock always exists (Linux 2.6.39), so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
