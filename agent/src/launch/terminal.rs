//! The terminal that a command shares with its caller's shell is a way out: TIOCSTI types into
//! it, and what was typed is read by the shell once the command has ended. Job control needs the
//! terminal, so not it is taken away but the two requests that type: TIOCSTI, which kernels from
//! 6.2 refuse only if `dev.tty.legacy_tiocsti` is 0, and TIOCLINUX, whose selection paste does
//! the same on a console.
//!
//! It is a seccomp filter, set only where there is a terminal. Only ioctl pays for it: the kernel
//! remembers which system calls a filter always allows (a bitmap, since 5.11).

use std::{fs, io, io::IsTerminal as _, os::unix::fs::OpenOptionsExt as _};

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};

/// `TIOCLINUX` of include/uapi/asm-generic/ioctls.h.
const TIOCLINUX: u32 = 0x541c;
const TIOCSTI: u32 = 0x5412;

/// `AUDIT_ARCH_*` of include/uapi/linux/audit.h.
#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;
#[cfg(target_arch = "riscv64")]
const NATIVE: u32 = 0xc000_00f3;

/// Number of ioctl in 64-bit programs.
const IOCTL: u32 = libc::SYS_ioctl as u32;
/// Its number in x32 programs, which look like native ones (arch/x86/entry/syscalls).
const IOCTL_X32: u32 = 0x4000_0000 + 514;
/// Its number in 32-bit programs, on x86 and Arm alike.
const IOCTL_32: u32 = 54;

/// Offsets in `struct seccomp_data`. The request is 32 bits to the kernel, so its lower half
/// alone counts: a comparison of all 64 could be evaded (CVE-2019-10063).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const REQUEST: u32 = 24;

const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;

/// The filter. Jumps count the instructions to skip.
pub(super) const FILTER: [sock_filter; 12] = [
    load(ARCHITECTURE),
    equal(NATIVE, 0, 3),
    load(NUMBER),
    equal(IOCTL, 3, 0),
    equal(IOCTL_X32, 2, 6),
    load(NUMBER),
    equal(IOCTL_32, 0, 4),
    load(REQUEST),
    equal(TIOCSTI, 1, 0),
    equal(TIOCLINUX, 0, 1),
    answer(REFUSE),
    answer(libc::SECCOMP_RET_ALLOW),
];

const fn load(offset: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset)
}

const fn equal(value: u32, yes: u8, no: u8) -> sock_filter {
    statement(BPF_JMP | BPF_JEQ | BPF_K, yes, no, value)
}

const fn answer(action: u32) -> sock_filter {
    statement(BPF_RET | BPF_K, 0, 0, action)
}

const fn statement(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}

/// Whether the command will have a terminal: a controlling one, or one as a standard stream,
/// which a new session could make its own.
pub(super) fn is_shared() -> bool {
    let controlling = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOCTTY)
        .open("/dev/tty");
    controlling.is_ok()
        || io::stdin().is_terminal()
        || io::stdout().is_terminal()
        || io::stderr().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would do with a system call.
    fn run(architecture: u32, number: u32, request: u64) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let step = FILTER[at];
            at += 1;
            match u32::from(step.code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    loaded = match step.k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        REQUEST => request as u32,
                        other => panic!("offset {other}"),
                    };
                }
                code if code == BPF_RET | BPF_K => return step.k,
                _ => at += usize::from(if loaded == step.k { step.jt } else { step.jf }),
            }
        }
    }

    #[test]
    fn only_the_two_requests_that_type_are_refused() {
        const I386: u32 = 0x4000_0003;
        let allow = libc::SECCOMP_RET_ALLOW;
        let (sti, linux, size) = (u64::from(TIOCSTI), u64::from(TIOCLINUX), libc::TIOCGWINSZ);
        let table = [
            (NATIVE, IOCTL, sti, REFUSE),
            (NATIVE, IOCTL, linux, REFUSE),
            (NATIVE, IOCTL, 0xdead_0000_0000 | sti, REFUSE),
            (NATIVE, IOCTL, size, allow),
            (NATIVE, IOCTL_X32, sti, REFUSE),
            (NATIVE, IOCTL_X32, size, allow),
            (NATIVE, IOCTL + 1, sti, allow),
            (NATIVE, 1, linux, allow),
            (I386, IOCTL_32, sti, REFUSE),
            (I386, IOCTL_32, linux, REFUSE),
            (I386, IOCTL_32, size, allow),
            (I386, 16, sti, allow),
        ];
        for (architecture, number, request, expected) in table {
            let answer = run(architecture, number, request);
            assert_eq!(answer, expected, "{architecture:x} {number} {request:x}");
        }
    }
}
