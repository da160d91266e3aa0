//! A map of plain keys and values, read and written many elements at a time. One call for a
//! thousand elements costs a third to a fifth of a thousand calls (see docs/performance.md). A kernel
//! that has no such call for a kind of map is asked element by element, which is only slower.

use std::{
    collections::HashMap,
    hash::Hash,
    io,
    marker::PhantomData,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::sys::{self, Partly};

/// Elements in one call. The kernel copies them into buffers of its own, so more would not be
/// quicker.
const CHUNK: usize = 4096;
/// `ENOTSUPP`, which the C library has no name for: this kind of map has no such call.
const NOT_SUPPORTED: i32 = 524;

/// Plain data without padding: what keys and values of maps are made of.
pub trait Plain: FromBytes + IntoBytes + Immutable + Copy {}
impl<T: FromBytes + IntoBytes + Immutable + Copy> Plain for T {}

/// How a map is keyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keyed {
    /// By index: every element is always there.
    Array,
    /// By whatever was put in.
    Free,
}

/// A map, typed. The caller has compared the sizes of key and value with the kernel's.
pub struct Bulk<K, V> {
    map: OwnedFd,
    keyed: Keyed,
    entries: u32,
    /// Whether this kernel takes many elements at once for this kind of map, as far as is known.
    many: AtomicBool,
    plain: PhantomData<fn(K, V)>,
}

/// A write of many elements that failed at one of them.
#[derive(Debug)]
pub struct FailedAt {
    /// Which; those before it were written.
    pub index: usize,
    /// Why.
    pub error: io::Error,
}

// === impl Bulk ===

impl<K: Plain + Eq + Hash, V: Plain> Bulk<K, V> {
    /// A map that holds `entries` elements.
    pub fn new(map: OwnedFd, keyed: Keyed, entries: u32) -> Self {
        Self {
            map,
            keyed,
            entries,
            many: AtomicBool::new(true),
            plain: PhantomData,
        }
    }

    /// Elements that it has room for.
    pub fn len(&self) -> u32 {
        self.entries
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }

    /// The value of a key.
    pub fn get(&self, key: K) -> io::Result<Option<V>> {
        let mut value = V::new_zeroed();
        let found = sys::lookup(self.fd(), key.as_bytes(), as_bytes_mut(&mut value));
        absent(found).map(|found| found.then_some(value))
    }

    /// Writes one element.
    pub fn set(&self, key: K, value: V) -> io::Result<()> {
        sys::update(self.fd(), key.as_bytes(), value.as_bytes())
    }

    /// Removes one element; false where it was not there.
    pub fn remove(&self, key: K) -> io::Result<bool> {
        absent(sys::delete(self.fd(), key.as_bytes()))
    }

    /// Writes all of these, in order.
    pub fn set_all(&self, elements: &[(K, V)]) -> Result<(), FailedAt> {
        let mut index = 0;
        for chunk in elements.chunks(CHUNK) {
            if chunk.len() > 1 && self.many.load(Ordering::Relaxed) {
                let keys = joined(chunk.iter().map(|(key, _)| key));
                let values = joined(chunk.iter().map(|(_, value)| value));
                let count = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
                match sys::update_batch(self.fd(), &keys, &values, count) {
                    Ok(()) => {
                        index += chunk.len();
                        continue;
                    }
                    Err(partly) if self.cannot(&partly) => {}
                    Err(Partly { done, error }) => {
                        let index = index + done;
                        return Err(FailedAt { index, error });
                    }
                }
            }
            for (key, value) in chunk {
                self.set(*key, *value)
                    .map_err(|error| FailedAt { index, error })?;
                index += 1;
            }
        }
        Ok(())
    }

    /// Removes all of these; those that are not there are as good. The first error stops nothing.
    pub fn remove_all(&self, keys: &[K]) -> io::Result<()> {
        let mut result = Ok(());
        for mut chunk in keys.chunks(CHUNK) {
            while chunk.len() > 1 && self.many.load(Ordering::Relaxed) {
                let bytes = joined(chunk.iter());
                let count = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
                match sys::delete_batch(self.fd(), &bytes, count) {
                    Ok(()) => chunk = &[],
                    Err(partly) if self.cannot(&partly) => {}
                    Err(Partly { done, error }) => {
                        // What it stopped at is not there, or cannot be removed.
                        if error.kind() != io::ErrorKind::NotFound {
                            result = result.and(Err(error));
                        }
                        chunk = chunk.get(done + 1..).unwrap_or_default();
                    }
                }
            }
            for key in chunk {
                result = result.and(self.remove(*key).map(drop));
            }
        }
        result
    }

    /// The first of these that the map does not have, or has with another value.
    pub fn first_other(&self, elements: &[(K, V)]) -> io::Result<Option<usize>>
    where
        V: PartialEq,
    {
        let keys: Vec<K> = elements.iter().map(|(key, _)| *key).collect();
        let found = self.get_all(&keys)?;
        let differ = |((_, wanted), found): (&(K, V), &Option<V>)| found.as_ref() != Some(wanted);
        Ok(elements.iter().zip(&found).position(differ))
    }

    /// The values of these keys, in their order.
    pub fn get_all(&self, keys: &[K]) -> io::Result<Vec<Option<V>>> {
        // Beyond some, it is cheaper to read what was not asked for too, if that is not much more.
        if keys.len() > 64 && self.many.load(Ordering::Relaxed) {
            if self.keyed == Keyed::Array {
                let indices = || keys.iter().map(index_of);
                let (first, last) = (indices().min(), indices().max());
                if let (Some(first), Some(last)) = (first, last)
                    && (last - first) as usize / 4 < keys.len()
                {
                    let mut all = Vec::with_capacity((last - first) as usize + 1);
                    self.each_in(first, last, |_, value| all.push(value))?;
                    let at = |index| all.get((index - first) as usize).copied();
                    return Ok(indices().map(at).collect());
                }
            } else if keys.len() >= self.entries as usize / 32 {
                let all: HashMap<K, V> = self.all()?.into_iter().collect();
                return Ok(keys.iter().map(|key| all.get(key).copied()).collect());
            }
        }
        keys.iter().map(|key| self.get(*key)).collect()
    }

    /// Every element; of an array in order.
    pub fn all(&self) -> io::Result<Vec<(K, V)>> {
        let mut found = Vec::new();
        self.each(|key, value| found.push((key, value)))?;
        Ok(found)
    }

    /// Has `take` look at every element; of an array in order.
    pub fn each(&self, take: impl FnMut(K, V)) -> io::Result<()> {
        self.each_from(None, usize::MAX, take)
    }

    /// Has `take` look at the elements `first` to `last` of an array, in order.
    pub fn each_in(&self, first: u32, last: u32, take: impl FnMut(K, V)) -> io::Result<()> {
        let before = first
            .checked_sub(1)
            .and_then(|index| K::read_from_bytes(index.as_bytes()).ok());
        let most = (last - first) as usize + 1;
        self.each_from(before, most, take)
    }

    /// Up to `most` elements after `before`, or from the first.
    fn each_from(
        &self,
        before: Option<K>,
        most: usize,
        mut take: impl FnMut(K, V),
    ) -> io::Result<()> {
        let mut taken = 0_usize;
        if self.many.load(Ordering::Relaxed) {
            let counted = |key, value| {
                taken += 1;
                take(key, value);
            };
            match self.each_of_many(before, most, counted) {
                Err(partly) if taken == 0 && self.cannot(&partly) => {}
                read => return read.map_err(|partly| partly.error),
            }
        }
        let mut key = K::new_zeroed();
        let mut at = before;
        while taken < most {
            let next = sys::next_key(
                self.fd(),
                at.as_ref().map(IntoBytes::as_bytes),
                as_bytes_mut(&mut key),
            );
            if !absent(next)? {
                return Ok(());
            }
            if let Some(value) = self.get(key)? {
                taken += 1;
                take(key, value);
            }
            at = Some(key);
        }
        Ok(())
    }

    fn each_of_many(
        &self,
        before: Option<K>,
        most: usize,
        mut take: impl FnMut(K, V),
    ) -> Result<(), Partly> {
        let (key, value) = (size_of::<K>(), size_of::<V>());
        let mut room = CHUNK.min(self.entries.max(1) as usize);
        let mut keys = vec![0_u8; room * key];
        let mut values = vec![0_u8; room * value];
        let mut at = before.map(|before| before.as_bytes().to_vec());
        let mut left = most;
        while left > 0 {
            let mut next = vec![0_u8; key.max(4)];
            let count = u32::try_from(room.min(left)).unwrap_or(u32::MAX);
            let read = sys::lookup_batch(
                self.fd(),
                at.as_deref(),
                &mut next,
                &mut keys,
                &mut values,
                count,
            );
            let (done, last) = match read {
                Ok(done) => (done, false),
                Err(Partly { done, error }) if error.kind() == io::ErrorKind::NotFound => {
                    (done, true)
                }
                // One bucket of a hash holds more than there is room for.
                Err(Partly { error, .. })
                    if error.raw_os_error() == Some(libc::ENOSPC) && room < 1 << 20 =>
                {
                    room *= 2;
                    keys = vec![0; room * key];
                    values = vec![0; room * value];
                    continue;
                }
                Err(partly) => return Err(partly),
            };
            left = left.saturating_sub(done);
            let pairs = keys.chunks_exact(key).zip(values.chunks_exact(value));
            for (key, value) in pairs.take(done) {
                // The chunks are as long as the types.
                if let (Ok(key), Ok(value)) = (K::read_from_bytes(key), V::read_from_bytes(value)) {
                    take(key, value);
                }
            }
            if last {
                return Ok(());
            }
            at = Some(next);
        }
        Ok(())
    }

    /// Whether a call for many elements failed since this kernel has none for this kind of map.
    /// Then it is not tried again.
    fn cannot(&self, partly: &Partly) -> bool {
        let unknown = matches!(
            partly.error.raw_os_error(),
            Some(libc::EINVAL | libc::EOPNOTSUPP | NOT_SUPPORTED)
        );
        let is_first = partly.done == 0;
        if unknown && is_first {
            self.many.store(false, Ordering::Relaxed);
        }
        unknown && is_first
    }
}

/// The index that the key of an array is.
fn index_of<K: Plain>(key: &K) -> u32 {
    u32::read_from_bytes(key.as_bytes()).unwrap_or(0)
}

/// False where there was no such key.
fn absent(done: io::Result<()>) -> io::Result<bool> {
    match done {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn as_bytes_mut<T: Plain>(value: &mut T) -> &mut [u8] {
    value.as_mut_bytes()
}

/// The bytes of all of these, one after the other.
fn joined<'a, T: Plain + 'a>(all: impl ExactSizeIterator<Item = &'a T>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(all.len() * size_of::<T>());
    for each in all {
        bytes.extend_from_slice(each.as_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: u32 = 1;
    const LPM: u32 = 11;
    const NO_PREALLOC: u32 = 1;

    /// A prefix of four bytes, as a longest-prefix map has it.
    type Prefix = [u8; 8];

    fn make<K: Plain + Eq + Hash>(kind: u32, entries: u32, many: bool) -> Bulk<K, u64> {
        let flags = if kind == LPM { NO_PREALLOC } else { 0 };
        let key = size_of::<K>() as u32;
        let map = sys::create_map("remit_test", kind, key, 8, entries, flags).unwrap();
        let keyed = if kind == sys::ARRAY {
            Keyed::Array
        } else {
            Keyed::Free
        };
        let bulk = Bulk::new(map, keyed, entries);
        bulk.many.store(many, Ordering::Relaxed);
        bulk
    }

    fn prefix(number: u32) -> Prefix {
        let mut key = [0; 8];
        key[..4].copy_from_slice(&32_u32.to_ne_bytes());
        key[4..].copy_from_slice(&number.to_be_bytes());
        key
    }

    /// Writes, reads and removes more than one call takes.
    fn goes_round<K: Plain + Eq + Hash + Ord + std::fmt::Debug>(
        bulk: &Bulk<K, u64>,
        key: impl Fn(u32) -> K,
    ) {
        let count = CHUNK as u32 * 2 + 7;
        let elements: Vec<(K, u64)> = (0..count)
            .map(|number| (key(number), u64::from(number) + 1))
            .collect();
        bulk.set_all(&elements).unwrap();
        assert_eq!(bulk.first_other(&elements).unwrap(), None);
        let mut found: Vec<_> = bulk.all().unwrap();
        found.retain(|(_, value)| *value != 0);
        found.sort_unstable();
        let mut wanted = elements.clone();
        wanted.sort_unstable();
        assert_eq!(found, wanted);

        let mut other = elements.clone();
        other[5000].1 = 0;
        assert_eq!(bulk.first_other(&other).unwrap(), Some(5000));
        bulk.set(key(5000), 9).unwrap();
        assert_eq!(bulk.first_other(&elements).unwrap(), Some(5000));
        assert_eq!(bulk.get(key(5000)).unwrap(), Some(9));
        let some = [key(1), key(count - 1)];
        let values = [Some(2), Some(u64::from(count))];
        assert_eq!(bulk.get_all(&some).unwrap(), values);
    }

    fn removes<K: Plain + Eq + Hash + Ord + std::fmt::Debug>(
        bulk: &Bulk<K, u64>,
        key: impl Fn(u32) -> K,
    ) {
        goes_round(bulk, &key);
        let count = CHUNK as u32 * 2 + 7;
        // Some are gone already, and some were never there.
        for gone in [0, 17, 18, 5000, count - 1] {
            assert!(bulk.remove(key(gone)).unwrap());
            assert!(!bulk.remove(key(gone)).unwrap());
        }
        let keys: Vec<K> = (0..count)
            .rev()
            .filter(|number| *number != 42)
            .map(&key)
            .collect();
        bulk.remove_all(&keys).unwrap();
        assert_eq!(bulk.all().unwrap(), [(key(42), 43)]);
        assert_eq!(bulk.get_all(&[key(41), key(42)]).unwrap(), [None, Some(43)]);
    }

    #[test]
    #[ignore = "needs root"]
    fn many_at_once_and_one_by_one_come_to_the_same() {
        for many in [true, false] {
            removes(&make(HASH, 20_000, many), u64::from);
            removes(&make(LPM, 20_000, many), prefix);
            let array = make(sys::ARRAY, 20_000, many);
            goes_round(&array, |number| number);
            let mut range = Vec::new();
            array
                .each_in(4_090, 4_100, |index, value| range.push((index, value)))
                .unwrap();
            assert_eq!(
                range,
                (4_090..=4_100)
                    .map(|at| (at, u64::from(at) + 1))
                    .collect::<Vec<_>>()
            );
            let mut first = Vec::new();
            array.each_in(0, 1, |index, _| first.push(index)).unwrap();
            assert_eq!(first, [0, 1]);
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn what_does_not_fit_is_told_by_its_place() {
        for many in [true, false] {
            for kind in [HASH, LPM] {
                let bulk = make(kind, 5_000, many);
                let elements: Vec<_> = (0..6_000).map(|at| (prefix(at), 1)).collect();
                let failed = bulk.set_all(&elements).unwrap_err();
                // A hash may lend a processor some elements more than it was made for.
                assert!((5_000..5_100).contains(&failed.index), "{failed:?}");
                assert_eq!(bulk.all().unwrap().len(), failed.index);
            }
            let array = make(sys::ARRAY, 100, many);
            let elements: Vec<_> = (0..200_u32).map(|at| (at, 1)).collect();
            assert_eq!(array.set_all(&elements).unwrap_err().index, 100);
        }
    }
}
