//! A connect by io_uring, by raw system calls: one ring of two entries, one submission. A crate
//! would do it in ten lines and bring thousands.

use std::{
    mem::{size_of, zeroed},
    net::SocketAddr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    ptr,
};

use nix::{errno::Errno, sys::socket::SockaddrLike as _};

use super::socket::Socket;

const IORING_OFF_SQ_RING: i64 = 0;
const IORING_OFF_CQ_RING: i64 = 0x0800_0000;
const IORING_OFF_SQES: i64 = 0x1000_0000;
const IORING_ENTER_GETEVENTS: u32 = 1;
const IORING_OP_CONNECT: u8 = 16;
const PAGE: usize = 4096;

/// `struct io_uring_params`.
#[repr(C)]
struct Params {
    entries: [u32; 2],
    flags: u32,
    sq_thread: [u32; 2],
    features: u32,
    wq_fd: u32,
    reserved: [u32; 3],
    sq: SqOffsets,
    cq: CqOffsets,
}

#[repr(C)]
struct SqOffsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    flags: u32,
    dropped: u32,
    array: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct CqOffsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    overflow: u32,
    cqes: u32,
    reserved: [u32; 4],
}

/// `struct io_uring_sqe`, as far as a connect fills it.
#[repr(C)]
struct Submission {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    offset: u64,
    addr: u64,
    rest: [u64; 5],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Completion {
    user_data: u64,
    result: i32,
    flags: u32,
}

/// A mapping that ends with its scope.
struct Mapping(*mut libc::c_void);

impl Mapping {
    fn new(ring: &OwnedFd, offset: i64) -> nix::Result<Self> {
        // SAFETY: a fresh mapping of the ring, at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                ring.as_raw_fd(),
                offset,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self(at))
    }

    /// A pointer to `T` at `offset`, inside the page or refused.
    fn at<T>(&self, offset: usize) -> nix::Result<*mut T> {
        if offset + size_of::<T>() > PAGE || !offset.is_multiple_of(align_of::<T>()) {
            return Err(Errno::EOVERFLOW);
        }
        Ok(self.0.wrapping_byte_add(offset).cast())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this length, and unmapped nowhere else.
        unsafe { libc::munmap(self.0, PAGE) };
    }
}

/// Whether a ring can be made.
pub fn available() -> nix::Result<()> {
    setup().map(drop)
}

/// Connects and waits for the completion. The socket must be blocking-ready: an answer of
/// EAGAIN or EINPROGRESS stands as it came.
pub fn connect(socket: &Socket, addr: SocketAddr) -> nix::Result<()> {
    let (ring, params) = setup()?;
    let submissions = Mapping::new(&ring, IORING_OFF_SQ_RING)?;
    let completions = Mapping::new(&ring, IORING_OFF_CQ_RING)?;
    let entries = Mapping::new(&ring, IORING_OFF_SQES)?;

    let name = socket.address(addr);
    let entry = Submission {
        opcode: IORING_OP_CONNECT,
        flags: 0,
        priority: 0,
        fd: socket.fd(),
        offset: u64::from(name.len()),
        addr: name.as_ptr() as u64,
        rest: [0; 5],
    };
    let slot = entries.at::<Submission>(0)?;
    // SAFETY: `slot` is the first of the entries that the kernel has mapped for us.
    unsafe { slot.write_volatile(entry) };
    let index = submissions.at::<u32>(params.sq.array as usize)?;
    // SAFETY: `index` is the first slot of the submission array in our mapping.
    unsafe { index.write_volatile(0) };
    let tail = submissions.at::<u32>(params.sq.tail as usize)?;
    // SAFETY: `tail` is the submission tail in our mapping; io_uring_enter orders the writes.
    unsafe { tail.write_volatile(1) };

    // SAFETY: numbers, and no signal mask.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_io_uring_enter,
            ring.as_raw_fd(),
            1,
            1,
            IORING_ENTER_GETEVENTS,
            ptr::null::<libc::c_void>(),
            0,
        )
    })?;
    let first = completions.at::<Completion>(params.cq.cqes as usize)?;
    // SAFETY: the kernel has written the first completion: enter waited for one.
    let result = unsafe { first.read_volatile() }.result;
    if result < 0 {
        return Err(Errno::from_raw(-result));
    }
    Ok(())
}

fn setup() -> nix::Result<(OwnedFd, Params)> {
    // SAFETY: all zeros are valid parameters.
    let mut params: Params = unsafe { zeroed() };
    // SAFETY: the pointer describes `params`, which outlives the call.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_io_uring_setup, 2, &raw mut params) })?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just given out the descriptor, and nobody else has it.
    Ok((unsafe { OwnedFd::from_raw_fd(fd) }, params))
}

const _: () = assert!(size_of::<Params>() == 120 && size_of::<Submission>() == 64);
