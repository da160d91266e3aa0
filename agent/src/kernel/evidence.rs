//! What the kernel says of the fence beyond its tables: how often a program ran, whose a cgroup is,
//! how far the ring has been read. And what a probe needs for a moment.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
    ptr,
    sync::atomic::{AtomicU64, Ordering},
};

use agent_ebpf::abi::{Addr, RING_BYTES, Rule};

use super::{ApplyError, Enforcer, Loan, object::HOOKS, sys};

/// How far the ring was written and read, in bytes since it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingState {
    /// Where the kernel believes that the reader is.
    pub consumed: u64,
    /// Where the kernel writes next.
    pub produced: u64,
}

// === impl RingState ===

impl RingState {
    /// Bytes that wait for the reader; none where the positions make no sense: the reader is ahead
    /// of the writer, or further behind than the ring is long. The kernel takes neither for an
    /// error: it drops every record from then on, or overwrites what was not read.
    pub const fn waiting(self) -> Option<u64> {
        match self.produced.checked_sub(self.consumed) {
            Some(waiting) if waiting <= RING_BYTES as u64 => Some(waiting),
            Some(_) | None => None,
        }
    }
}

impl Enforcer {
    /// How often the program of a hook has run, on all roots together. None where the kernel does
    /// not count that (`kernel.bpf_stats_enabled`).
    pub fn runs(&self, hook: &str) -> Option<u64> {
        let expected = HOOKS.iter().find(|expected| expected.hook == hook)?;
        let info = self.ebpf.program(expected.program)?.info().ok()?;
        Some(info.run_count()).filter(|count| *count > 0)
    }

    /// The agent that the kernel's own table gives a cgroup to, by its index.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn claimant(&self, cgroup: u64) -> io::Result<Option<u32>> {
        self.tables.claimant(cgroup)
    }

    /// What of an agent's word and row and of the epoch is not as it was put there, in words.
    pub fn inspect_row(&self, agent: u32) -> Vec<String> {
        self.tables.inspect_row(agent)
    }

    /// Where the program of a hook is pinned.
    pub fn program_pin(&self, program: &str) -> PathBuf {
        self.pinned.programs.join(program)
    }

    /// Lends rules at one exact address to an agent. None for one that is not in force.
    ///
    /// # Errors
    /// When they cannot be written; then nothing is lent.
    pub fn lend(
        &mut self,
        agent: u32,
        addr: Addr,
        rules: &[Rule],
    ) -> Result<Option<Loan>, ApplyError> {
        self.tables.lend(agent, addr, rules)
    }

    /// Takes a loan back.
    ///
    /// # Errors
    /// When the kernel refuses; the rules then end at their deadline.
    pub fn take_back(&mut self, loan: Loan) -> Result<(), ApplyError> {
        self.tables.take_back(loan)
    }

    /// How far the ring was written and read, by the kernel's own pages.
    ///
    /// # Errors
    /// When the pages cannot be mapped.
    pub fn ring_state(&self) -> io::Result<RingState> {
        let page = page_size()?;
        let consumer = Page::map(self.events.as_fd().as_raw_fd(), 0, page, false)?;
        let producer = Page::map(self.events.as_fd().as_raw_fd(), page, page, false)?;
        // The reader's place first: it never passes the writer's, read later.
        let consumed = consumer.position().load(Ordering::Acquire);
        let produced = producer.position().load(Ordering::Acquire);
        Ok(RingState { consumed, produced })
    }

    /// Puts the reader's place right, where somebody has written nonsense there: to the writer's,
    /// so what was not read yet is lost, and told by the counters. Nothing is done where the place
    /// makes sense.
    ///
    /// # Errors
    /// When the pages cannot be mapped.
    pub fn mend_ring(&self) -> io::Result<()> {
        let state = self.ring_state()?;
        if state.waiting().is_some() {
            return Ok(());
        }
        let page = page_size()?;
        let consumer = Page::map(self.events.as_fd().as_raw_fd(), 0, page, true)?;
        consumer.position().store(state.produced, Ordering::Release);
        Ok(())
    }
}

/// Runs a pinned program once on a packet (with an Ethernet header in front), as the calling
/// process: the packet's socket is made in its cgroup. Returns the program's id and its verdict.
///
/// # Errors
/// When there is no such pin, or the kernel refuses.
pub fn run_pinned(program: &Path, packet: &[u8]) -> io::Result<(u32, u32)> {
    let id = super::pins::program_at(program)?.id();
    let fd = sys::open_pin(program)?;
    Ok((id, sys::test_run(fd.as_fd(), packet)?))
}

fn page_size() -> io::Result<usize> {
    // SAFETY: a number in, a number out.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).map_err(io::Error::other)
}

/// The first page of a ring's positions, mapped.
struct Page {
    at: *mut libc::c_void,
    length: usize,
}

impl Page {
    fn map(fd: i32, offset: usize, length: usize, writable: bool) -> io::Result<Self> {
        let protection = if writable {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a fresh mapping of a page that the kernel offers for exactly this
        // (Documentation/bpf/ringbuf.rst); nothing of ours is replaced.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                fd,
                offset,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { at, length })
    }

    fn position(&self) -> &AtomicU64 {
        // SAFETY: the page is mapped for as long as `self` lives, and the position is its first
        // word, which the kernel changes atomically.
        unsafe { AtomicU64::from_ptr(self.at.cast()) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody refers to it any more.
        unsafe { libc::munmap(self.at, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_that_make_no_sense_are_told() {
        let state = |consumed, produced| RingState { consumed, produced };
        assert_eq!(state(0, 0).waiting(), Some(0));
        assert_eq!(state(100, 180).waiting(), Some(80));
        let full = u64::from(RING_BYTES);
        assert_eq!(state(0, full).waiting(), Some(full));
        assert_eq!(state(0, full + 8).waiting(), None);
        assert_eq!(state(8, 0).waiting(), None);
    }
}
