//! What was counted, also in maps that other versions laid out.
//!
//! The value of `counters` is words: attempts let through, then those refused by reason, then those
//! monitored by reason, then at most one word more. So the number of reasons follows from the
//! size, and any version reads any other's.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use agent_ebpf::abi::{Counters, REASONS};
use aya::maps::{MapData, MapType};
use zerocopy::IntoBytes as _;

use super::{pins::map_at, sys};

/// A map of counters that only this process reads: of an earlier set, or sums of such.
#[derive(Debug)]
pub struct Tally {
    map: MapData,
    /// The map's id in the kernel.
    pub id: u32,
    value: usize,
    entries: u32,
    cpus: usize,
}

// === impl Tally ===

impl Tally {
    /// Opens the map pinned at `path`; none where there is no pin.
    pub fn open(path: &Path) -> io::Result<Option<Self>> {
        let map = match map_at(path) {
            Ok(map) => map,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let info = map.info().map_err(io::Error::other)?;
        let cpus = match info.map_type().map_err(io::Error::other)? {
            MapType::Array => 1,
            MapType::PerCpuArray => aya::util::nr_cpus().map_err(|(_, error)| error)?,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "no counters")),
        };
        Ok(Some(Self {
            id: info.id(),
            value: info.value_size() as usize,
            entries: info.max_entries(),
            cpus,
            map,
        }))
    }

    /// An agent's counters, summed over the CPUs; zero for one that has none here.
    pub fn sum(&self, agent: u32) -> io::Result<Counters> {
        let mut sum = Counters::zeroed();
        if agent >= self.entries {
            return Ok(sum);
        }
        // Per CPU, the kernel copies each value rounded up to eight bytes.
        let stride = self.value.next_multiple_of(8);
        let bytes = sys::read_element(self.map.fd().as_fd(), agent, stride * self.cpus)?;
        for value in bytes.chunks_exact(stride) {
            add(&mut sum, &decode(value.get(..self.value).unwrap_or(value)));
        }
        Ok(sum)
    }
}

/// Makes a map of sums: one for each agent, in this version's layout.
pub fn sums(agents: u32, mut sum: impl FnMut(u32) -> io::Result<Counters>) -> io::Result<OwnedFd> {
    let map = sys::create_array("carried", size_of::<Counters>() as u32, agents)?;
    for agent in 0..agents {
        let counters = sum(agent)?;
        if counters != Counters::zeroed() {
            sys::write_element(map.as_fd(), agent, counters.as_bytes())?;
        }
    }
    Ok(map)
}

/// Adds `part` to `sum`.
pub fn add(sum: &mut Counters, part: &Counters) {
    sum.allowed = sum.allowed.wrapping_add(part.allowed);
    let pairs = sum.denied.iter_mut().zip(part.denied);
    for (total, part) in pairs.chain(sum.monitored.iter_mut().zip(part.monitored)) {
        *total = total.wrapping_add(part);
    }
}

/// Reads a value of `counters` in any version's layout. Reasons that this one does not know are
/// left out: there is nothing to call them.
fn decode(value: &[u8]) -> Counters {
    let words: Vec<u64> = value
        .chunks_exact(8)
        .map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default()))
        .collect();
    let mut counters = Counters::zeroed();
    let Some((allowed, rest)) = words.split_first() else {
        return counters;
    };
    counters.allowed = *allowed;
    let reasons = rest.len() / 2;
    let (denied, monitored) = rest.split_at(reasons);
    for (slot, word) in counters.denied.iter_mut().zip(denied) {
        *slot = *word;
    }
    for (slot, word) in counters
        .monitored
        .iter_mut()
        .zip(monitored.iter().take(reasons))
    {
        *slot = *word;
    }
    counters
}

/// Where `counters` keeps to the rule above in this version.
const _: () = assert!((size_of::<Counters>() / 8 - 1) / 2 == REASONS);

#[cfg(test)]
mod tests {
    use super::*;

    /// The words of a layout with `reasons` reasons and `more` words behind them.
    fn value(reasons: u64, more: u64) -> Vec<u8> {
        let denied = (1..=reasons).map(|reason| 100 + reason);
        let monitored = (1..=reasons).map(|reason| 200 + reason);
        let tail = (0..more).map(|_| 999);
        std::iter::once(7)
            .chain(denied)
            .chain(monitored)
            .chain(tail)
            .flat_map(u64::to_ne_bytes)
            .collect()
    }

    #[test]
    fn any_layout_is_read() {
        let reasons = REASONS as u64;
        for (reasons, more) in [
            (reasons, 0),
            (reasons, 1),
            (reasons + 3, 0),
            (reasons - 4, 1),
        ] {
            let counters = decode(&value(reasons, more));
            let known = REASONS.min(reasons as usize);
            assert_eq!(counters.allowed, 7);
            for at in 0..REASONS {
                let expected = |base| if at < known { base + at as u64 + 1 } else { 0 };
                assert_eq!(counters.denied[at], expected(100), "{reasons} {more} {at}");
                assert_eq!(
                    counters.monitored[at],
                    expected(200),
                    "{reasons} {more} {at}"
                );
            }
        }
        assert_eq!(decode(&[]), Counters::zeroed());
        assert_eq!(decode(&[1, 2, 3]), Counters::zeroed());
    }

    #[test]
    fn sums_add_up() {
        let mut sum = decode(&value(REASONS as u64, 0));
        let part = sum;
        add(&mut sum, &part);
        assert_eq!(sum.allowed, 14);
        assert_eq!((sum.denied[0], sum.monitored[1]), (202, 404));
    }
}
