//! What agents reached, taken from the kernel: see the kernel side's `access.rs`.
//!
//! A slot of the allow cache is carried to a ring when it is written anew, or to a map where the ring
//! is full, so what a quiet flow sent last lies in its slot for as long as nobody else wants that. It
//! is told from there, and what was told is taken off what is later carried of the same destination:
//! once the slot was carried, and not before, for till then only other processors have carried. The
//! next daemon needs that book: without it, it tells what lies in the slots once more.

use std::{
    collections::{BTreeSet, HashMap},
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
    /// What was carried and was not asked for yet.
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
    /// CPU, place, slot, tenancy; agent, flow, address; bytes, packets, connections told.
    told: Vec<(Tenancy, Flow, Sums)>,
    /// Agent, flow, address; bytes, packets, connections owed.
    owed: Vec<(Flow, Sums)>,
}

/// What was told from slots, and what of that will be carried or was. Pure.
#[derive(Debug, Default)]
struct Book {
    /// By CPU, place and slot: what was told of the tenancy that goes on there.
    told: HashMap<Place, Told>,
    /// By destination: what was told of tenancies that have ended. It is carried, too.
    owed: HashMap<AccessKey, Access>,
}

/// CPU, place, slot.
type Place = (usize, u32, usize);

/// What was told of a tenancy.
#[derive(Clone, Copy, Debug)]
struct Told {
    /// Its number.
    tenancy: u32,
    /// Whose it is.
    key: AccessKey,
    /// How much.
    sum: Access,
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
                .map(|((cpu, place, slot), told)| {
                    let tenancy = (*cpu, *place, *slot, told.tenancy);
                    (tenancy, flow(&told.key), flat(&told.sum))
                })
                .collect(),
            owed: owed.map(|(key, owed)| (flow(key), flat(owed))).collect(),
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
        for ((cpu, place, slot, tenancy), flow, told) in remembered.told {
            let told = Told {
                tenancy,
                key: key_of(flow),
                sum: access(told),
            };
            self.book.told.insert((cpu, place, slot), told);
        }
        for (flow, owed) in remembered.owed {
            self.book.owed.insert(key_of(flow), access(owed));
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
            drop(record);
            self.keep(usage.key, usage.used);
        }
        most
    }

    /// Keeps what was carried until it is asked for.
    fn keep(&mut self, key: AccessKey, used: Access) {
        if let Some(sum) = self.carried.get_mut(&key) {
            *sum = add(*sum, used);
        } else if self.carried.len() < ACCESS_ENTRIES as usize {
            self.carried.insert(key, used);
        } else {
            self.lost = add(self.lost, used);
        }
    }

    /// What was carried since the last call; of the map's destinations `most`.
    pub fn carried(&mut self, most: usize) -> io::Result<Vec<(AccessKey, Access)>> {
        let keys: Vec<AccessKey> = self
            .access
            .keys()
            .take(most)
            .collect::<Result<_, _>>()
            .map_err(io::Error::other)?;
        for key in keys {
            let mut value = Access::new_zeroed();
            let map = self.taking.as_fd();
            if super::sys::take_element(map, key.as_bytes(), value.as_mut_bytes())? {
                self.keep(key, value);
            }
        }
        // After what was carried: a slot that is carried between the two is paid for next time.
        self.end_tenancies()?;
        let carried = std::mem::take(&mut self.carried);
        let news = carried.into_iter().map(|(key, carried)| {
            let news = self.book.pay(&key, carried);
            (key, news)
        });
        Ok(news.filter(|(_, news)| *news != Access::zeroed()).collect())
    }

    /// Looks which of the tenancies that were told of have ended, of the destinations that something
    /// was carried of.
    fn end_tenancies(&mut self) -> io::Result<()> {
        for place in self.book.places(&self.carried) {
            let slots = self.cache.get(&place, 0).map_err(io::Error::other)?;
            for (cpu, slots) in slots.iter().enumerate() {
                for (at, slot) in slots.slots.iter().enumerate() {
                    self.book.saw((cpu, place, at), slot.sequence);
                }
            }
        }
        Ok(())
    }

    /// What lies in the slots and was not told yet.
    pub fn lying(&mut self) -> io::Result<Vec<(AccessKey, Access)>> {
        let mut found = Vec::new();
        for place in 0..CACHE_PLACES {
            let first = self.cache.get(&place, 0).map_err(io::Error::other)?;
            let in_use = |slots: &Slots| slots.slots.iter().any(|slot| used(slot).is_some());
            if !first.iter().any(in_use) && !self.book.knows(place) {
                continue;
            }
            // Slots change while they are copied. What the second look found between two sights of
            // one number is that tenancy's; the first may have taken it from the one before.
            let second = self.cache.get(&place, 0).map_err(io::Error::other)?;
            for (cpu, (first, second)) in first.iter().zip(second.iter()).enumerate() {
                for (at, (first, second)) in first.slots.iter().zip(&second.slots).enumerate() {
                    let slot = (cpu, place, at);
                    self.book.saw(slot, second.sequence);
                    let Some((key, used)) = used(second) else {
                        continue;
                    };
                    if first.sequence != second.sequence {
                        continue;
                    }
                    let news = self.book.tell(slot, second.sequence, &key, used);
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

fn flow(key: &AccessKey) -> Flow {
    (key.agent, key.flow, key.addr.words)
}

fn key_of((agent, flow, words): Flow) -> AccessKey {
    let addr = Addr { words };
    AccessKey { agent, flow, addr }
}

// === impl Book ===

impl Book {
    /// What a slot's tenant used that was not told yet.
    fn tell(&mut self, slot: Place, tenancy: u32, key: &AccessKey, used: Access) -> Access {
        self.saw(slot, tenancy);
        let told = self.told.entry(slot).or_insert(Told {
            tenancy,
            key: *key,
            sum: Access::zeroed(),
        });
        let news = less(used, told.sum);
        told.sum = add(told.sum, news);
        news
    }

    /// A slot has this number now. Another one than before: what was told of its tenant was carried,
    /// or is at this moment, and is owed.
    fn saw(&mut self, slot: Place, tenancy: u32) {
        let ended = self.told.get(&slot).filter(|told| told.tenancy != tenancy);
        if let Some(told) = ended.copied() {
            self.told.remove(&slot);
            if told.sum != Access::zeroed() {
                let owed = self.owed.entry(told.key).or_insert(Access::zeroed());
                *owed = add(*owed, told.sum);
            }
        }
    }

    /// What was carried of a destination, without what was told before.
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

    /// The places from which something was told of these destinations.
    fn places(&self, of: &HashMap<AccessKey, Access>) -> BTreeSet<u32> {
        let told = self.told.iter();
        let theirs = told.filter(|(_, told)| of.contains_key(&told.key));
        theirs.map(|((_, place, _), _)| *place).collect()
    }

    fn knows(&self, place: u32) -> bool {
        !self.told.is_empty() && self.told.keys().any(|(_, at, _)| *at == place)
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
        book.saw(slot, 4);
        assert_eq!(book.pay(&key(1), access(7000)), access(2000));
        assert!(book.owed.is_empty());
        assert_eq!(book.pay(&key(1), access(300)), access(300));
        // Another tenant, who begins anew.
        assert_eq!(book.tell(slot, 4, &key(2), access(50)), access(50));
    }

    /// A flow that has moved to another processor: what it carries there is not what was told from
    /// the slot that it left, which lies there for as long as nobody wants it.
    #[test]
    fn what_one_processor_told_is_not_paid_by_another() {
        let mut book = Book::default();
        let (left, now) = ((0, 7, 0), (1, 7, 0));
        assert_eq!(book.tell(left, 2, &key(1), access(4000)), access(4000));
        book.saw(now, 6);
        assert_eq!(book.pay(&key(1), access(3000)), access(3000));
        assert_eq!(book.tell(now, 6, &key(1), access(1000)), access(1000));
        // Both are carried in the end.
        book.saw(left, 4);
        book.saw(now, 8);
        assert_eq!(book.pay(&key(1), access(4000)), NOTHING);
        assert_eq!(book.pay(&key(1), access(1500)), access(500));
        assert!(book.owed.is_empty() && book.told.is_empty());
    }

    #[test]
    fn sums_are_exact_whenever_it_is_looked() {
        // A flow over many tenancies on two processors, looked at and taken at odd moments.
        let mut book = Book::default();
        let (mut carried, mut told, mut all) = (NOTHING, NOTHING, NOTHING);
        let mut used = [NOTHING; 2];
        let mut tenancy = [2_u32; 2];
        for step in 1..10_000_usize {
            let cpu = step / 500 % 2;
            let slot = (cpu, 0, 0);
            let more = access(step as u64 % 13 * 100);
            used[cpu] = add(used[cpu], more);
            all = add(all, more);
            if step % 7 == 0 {
                told = add(told, book.tell(slot, tenancy[cpu], &key(1), used[cpu]));
            }
            if step % 11 == 0 {
                carried = add(carried, used[cpu]);
                used[cpu] = NOTHING;
                tenancy[cpu] += 2;
            }
            if step % 17 == 0 {
                for (cpu, tenancy) in tenancy.iter().enumerate() {
                    book.saw((cpu, 0, 0), *tenancy);
                }
                told = add(told, book.pay(&key(1), carried));
                carried = NOTHING;
            }
            if step % 119 == 0 {
                // All of it was looked at and taken: nothing is missing, whoever has the flow.
                for cpu in 0..2 {
                    let slot = (cpu, 0, 0);
                    told = add(told, book.tell(slot, tenancy[cpu], &key(1), used[cpu]));
                }
                told = add(told, book.pay(&key(1), carried));
                carried = NOTHING;
                assert_eq!(told, all, "after step {step}");
            }
        }
    }
}
