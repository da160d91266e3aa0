//! What agents reached, taken from the kernel: see the kernel side's `access.rs`.
//!
//! A slot of the allow cache is carried to a ring when it is written anew, or to a map where the ring
//! is full, so what a quiet flow sent last lies in its slot for as long as nobody else wants that. It
//! is told from there, and what was told is taken off what is later carried of the same destination. The next daemon needs that book:
//! without it, it tells what lies in the slots once more.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use agent_ebpf::abi::{
    ACCESS_ENTRIES, Access, AccessKey, Addr, CACHE_PLACES, PACKET, Slot, Slots, USED_BYTES, Usage,
};
use aya::maps::{HashMap as KernelHash, MapData, PerCpuArray, RingBuf};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes as _, FromZeros as _, IntoBytes as _};

/// The maps, and what was told of them.
pub struct Accesses {
    /// The map `access` once more, for a call that the library does not make.
    taking: OwnedFd,
    used: RingBuf<MapData>,
    access: KernelHash<MapData, AccessKey, Access>,
    beyond: PerCpuArray<MapData, Access>,
    cache: PerCpuArray<MapData, Slots>,
    /// Its id.
    map: u32,
    /// What came out of the ring and was not asked for yet.
    carried: HashMap<AccessKey, Access>,
    /// What of that found no room.
    lost: Access,
    book: Book,
}

/// CPU, place, slot, and its tenant's number.
type Tenancy = (usize, u32, usize, u32);
/// Agent, protocol and port, and the address.
type Flow = (u32, u32, [u32; 4]);
/// Bytes, packets, connections.
type Sums = [u64; 3];

/// The book, for the next daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    /// Id of the map `cache` that it is about; no two maps of a boot have the same.
    map: u32,
    /// CPU, place, slot, tenancy; bytes, packets, connections told.
    told: Vec<(Tenancy, Sums)>,
    /// Agent, flow, address; bytes, packets, connections owed.
    owed: Vec<(Flow, Sums)>,
}

/// What was told from slots, and is not in the map yet. Pure.
#[derive(Debug, Default)]
struct Book {
    /// By CPU, place and slot: who had it, and how much of that was told.
    told: HashMap<(usize, u32, usize), (u32, Access)>,
    /// By destination: what the map will say once more.
    owed: HashMap<AccessKey, Access>,
}

// === impl Accesses ===

impl Accesses {
    /// Over these maps.
    pub fn new(
        taking: OwnedFd,
        used: RingBuf<MapData>,
        access: KernelHash<MapData, AccessKey, Access>,
        beyond: PerCpuArray<MapData, Access>,
        (cache, map): (PerCpuArray<MapData, Slots>, u32),
    ) -> Self {
        Self {
            taking,
            used,
            access,
            beyond,
            cache,
            map,
            carried: HashMap::new(),
            lost: Access::zeroed(),
            book: Book::default(),
        }
    }

    /// The book, for the next daemon.
    pub fn remembered(&self) -> Remembered {
        let flat = |access: &Access| [access.bytes, access.packets, access.connections];
        let told = self.book.told.iter();
        let owed = self.book.owed.iter();
        Remembered {
            map: self.map,
            told: told
                .map(|((cpu, place, slot), (tenancy, told))| {
                    ((*cpu, *place, *slot, *tenancy), flat(told))
                })
                .collect(),
            owed: owed
                .map(|(key, owed)| ((key.agent, key.flow, key.addr.words), flat(owed)))
                .collect(),
        }
    }

    /// Goes on with an earlier daemon's book. One about other maps is of no use.
    pub fn recall(&mut self, remembered: Remembered) {
        if remembered.map != self.map {
            return;
        }
        let access = |[bytes, packets, connections]: [u64; 3]| Access {
            bytes,
            packets,
            connections,
        };
        for ((cpu, place, slot, tenancy), told) in remembered.told {
            let told = (tenancy, access(told));
            self.book.told.insert((cpu, place, slot), told);
        }
        for ((agent, flow, words), owed) in remembered.owed {
            let addr = Addr { words };
            let key = AccessKey { agent, flow, addr };
            self.book.owed.insert(key, access(owed));
        }
    }

    /// Empties the ring. Returns how many records were in it.
    pub fn drain(&mut self) -> usize {
        // What is in the ring now is in it once at most: whoever fills it holds nobody up.
        let most = USED_BYTES as usize / size_of::<Usage>();
        for taken in 0..most {
            let Some(record) = self.used.next() else {
                return taken;
            };
            // Of another size are those of another ABI, which `open` has excluded.
            let Ok(usage) = Usage::read_from_bytes(&record) else {
                continue;
            };
            if let Some(sum) = self.carried.get_mut(&usage.key) {
                *sum = add(*sum, usage.used);
            } else if self.carried.len() < ACCESS_ENTRIES as usize {
                self.carried.insert(usage.key, usage.used);
            } else {
                self.lost = add(self.lost, usage.used);
            }
        }
        most
    }

    /// What was carried since the last call; of the map's destinations `most`.
    pub fn carried(&mut self, most: usize) -> io::Result<Vec<(AccessKey, Access)>> {
        let keys: Vec<AccessKey> = self
            .access
            .keys()
            .take(most)
            .collect::<Result<_, _>>()
            .map_err(io::Error::other)?;
        let mut taken = Vec::new();
        for (key, used) in self.carried.drain() {
            let news = self.book.pay(&key, used);
            if news != Access::zeroed() {
                taken.push((key, news));
            }
        }
        for key in keys {
            let mut value = Access::new_zeroed();
            let map = self.taking.as_fd();
            if super::sys::take_element(map, key.as_bytes(), value.as_mut_bytes())? {
                let news = self.book.pay(&key, value);
                if news != Access::zeroed() {
                    taken.push((key, news));
                }
            }
        }
        Ok(taken)
    }

    /// What lies in the slots and was not told yet.
    pub fn lying(&mut self) -> io::Result<Vec<(AccessKey, Access)>> {
        let mut found = Vec::new();
        for place in 0..CACHE_PLACES {
            let first = self.cache.get(&place, 0).map_err(io::Error::other)?;
            let in_use = |slots: &Slots| slots.slots.iter().any(|slot| used(slot).is_some());
            if !first.iter().any(in_use) {
                self.book.forget(place);
                continue;
            }
            // Slots change while they are copied: what counts is what two looks agree on.
            let second = self.cache.get(&place, 0).map_err(io::Error::other)?;
            for (cpu, (first, second)) in first.iter().zip(second.iter()).enumerate() {
                for (at, (first, second)) in first.slots.iter().zip(&second.slots).enumerate() {
                    let Some((key, first_used)) = used(first) else {
                        self.book.told.remove(&(cpu, place, at));
                        continue;
                    };
                    let Some((again, _)) = used(second) else {
                        continue;
                    };
                    if key != again || first.sequence != second.sequence {
                        continue;
                    }
                    let slot = (cpu, place, at);
                    let news = self.book.tell(slot, first.sequence, &key, first_used);
                    if news != Access::zeroed() {
                        found.push((key, news));
                    }
                }
            }
        }
        Ok(found)
    }

    /// What found no room, of all agents, since the map was made.
    pub fn beyond(&self) -> Access {
        let mut sum = self.lost;
        if let Ok(values) = self.beyond.get(&0, 0) {
            for value in values.iter() {
                sum = add(sum, *value);
            }
        }
        sum
    }
}

/// What a slot's tenant used; none of one that is empty, was not used, or is being written.
fn used(slot: &Slot) -> Option<(AccessKey, Access)> {
    let used = slot.passed != 0 || slot.extra != 0;
    // The highest bit of a flow says that the slot is a refusal.
    let is_allow = slot.flow >> 31 == 0;
    (used && is_allow && slot.cgroup != 0 && slot.sequence & 1 == 0).then(|| {
        let key = AccessKey {
            agent: slot.agent,
            flow: slot.flow,
            addr: slot.addr,
        };
        let used = Access {
            bytes: slot.passed & (PACKET - 1),
            packets: slot.passed / PACKET,
            connections: u64::from(slot.extra),
        };
        (key, used)
    })
}

/// Both together.
pub fn add(a: Access, b: Access) -> Access {
    Access {
        bytes: a.bytes.saturating_add(b.bytes),
        packets: a.packets.saturating_add(b.packets),
        connections: a.connections.saturating_add(b.connections),
    }
}

/// What of `a` is more than `b`.
fn less(a: Access, b: Access) -> Access {
    Access {
        bytes: a.bytes.saturating_sub(b.bytes),
        packets: a.packets.saturating_sub(b.packets),
        connections: a.connections.saturating_sub(b.connections),
    }
}

// === impl Book ===

impl Book {
    /// What a slot's tenant used that was not told yet. It is owed from now on.
    fn tell(
        &mut self,
        slot: (usize, u32, usize),
        sequence: u32,
        key: &AccessKey,
        used: Access,
    ) -> Access {
        let before = match self.told.get(&slot) {
            Some((tenancy, told)) if *tenancy == sequence => *told,
            Some(_) | None => Access::zeroed(),
        };
        let news = less(used, before);
        self.told.insert(slot, (sequence, add(before, news)));
        if news != Access::zeroed() {
            let owed = self.owed.entry(*key).or_insert(Access::zeroed());
            *owed = add(*owed, news);
        }
        news
    }

    /// What the map says of a destination, without what was told before.
    fn pay(&mut self, key: &AccessKey, carried: Access) -> Access {
        let Some(owed) = self.owed.get_mut(key) else {
            return carried;
        };
        let news = less(carried, *owed);
        *owed = less(*owed, carried);
        if *owed == Access::zeroed() {
            self.owed.remove(key);
        }
        news
    }

    /// A place whose slots are all empty.
    fn forget(&mut self, place: u32) {
        if !self.told.is_empty() {
            self.told.retain(|(_, at, _), _| *at != place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u32) -> AccessKey {
        AccessKey {
            agent: 1,
            flow: 6 << 16 | port,
            addr: Addr::v4([192, 0, 2, 1]),
        }
    }

    fn access(bytes: u64) -> Access {
        Access {
            bytes,
            packets: bytes / 100,
            connections: bytes / 1000,
        }
    }

    const NOTHING: Access = Access::zeroed();

    #[test]
    fn what_was_told_from_a_slot_is_not_told_again_from_the_map() {
        let mut book = Book::default();
        let slot = (0, 7, 1);
        assert_eq!(book.tell(slot, 2, &key(1), access(1000)), access(1000));
        assert_eq!(book.tell(slot, 2, &key(1), access(1000)), NOTHING);
        assert_eq!(book.tell(slot, 2, &key(1), access(5000)), access(4000));
        // The slot is carried with what was used after the look.
        assert_eq!(book.pay(&key(1), access(7000)), access(2000));
        assert!(book.owed.is_empty());
        assert_eq!(book.pay(&key(1), access(300)), access(300));
        // Another tenant, who begins anew.
        assert_eq!(book.tell(slot, 4, &key(2), access(50)), access(50));
    }

    #[test]
    fn sums_are_exact_whenever_it_is_looked() {
        // One flow over many tenancies, looked at and taken at odd moments.
        let mut book = Book::default();
        let (mut used, mut carried, mut told, mut all) = (NOTHING, NOTHING, NOTHING, NOTHING);
        let mut sequence = 2;
        for step in 1..10_000_u64 {
            let more = access(step % 13 * 100);
            used = add(used, more);
            all = add(all, more);
            if step % 7 == 0 {
                told = add(told, book.tell((0, 0, 0), sequence, &key(1), used));
            }
            if step % 11 == 0 {
                carried = add(carried, used);
                used = NOTHING;
                sequence += 2;
            }
            if step % 17 == 0 {
                told = add(told, book.pay(&key(1), carried));
                carried = NOTHING;
            }
        }
        told = add(told, book.tell((0, 0, 0), sequence, &key(1), used));
        told = add(told, book.pay(&key(1), carried));
        assert_eq!(told, all);
    }
}
