//! What a start does about the maps that are pinned already: take them over as they are, or build
//! a set of its own beside them, which replaces them once every link has moved to it.
//!
//! A set is built whenever the pinned one cannot be used as it is (another ABI version laid it
//! out, a map has another shape, is missing or too small) and whenever there are several, for then
//! an earlier change was cut short and no set alone has all that counts. Until a link moves, its
//! old programs enforce the old maps; from then on the new ones the new.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use agent_ebpf::abi::ABI_VERSION;

use super::{
    Capacity, object,
    pins::{Dir, Known, Survey, dir_name, map_at, next_serial},
    sys,
    tally::Tally,
};

/// How the maps in use came about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Succession {
    /// Nothing was there.
    Fresh,
    /// The pinned maps were taken over as they were.
    Adopted,
    /// A new set replaces what was pinned.
    Replaced {
        /// ABI versions of the sets that are replaced.
        from: Vec<u32>,
        /// Why they could not be used as they were.
        why: String,
        /// Maps whose content could not be taken along, of those that it is lost with: with
        /// `tags`, bound loopback sockets are foreign to their own agents until they bind anew;
        /// with the others, details of log lines.
        lost: Vec<&'static str>,
    },
}

/// Maps that go from set to set as they are, while their shape is the same. All others are this
/// process's own to fill.
const CARRIED: [&str; 13] = [
    "tags", "owners", "events", "folds", "budgets", "names", "counters", "used", "access",
    "beyond", "guards", "asked", "askers",
];
/// Of those, the ones that older versions do not have, and that are made anew in no time.
const RENEWED: [&str; 4] = ["used", "guards", "asked", "askers"];
/// Of those, the ones whose content is copied or summed up where their shape is another.
const COPIED: [&str; 2] = ["names", "counters"];
/// Maps that say what is allowed.
const POLICY: [&str; 7] = [
    "claims", "epoch", "agents", "rows", "exacts", "prefixes", "rulesets",
];
/// A program that uses all of those.
const JUDGES: &str = "remit_egress";
/// Sums of sets that are gone, pinned in the set that took them over. Once it is there, all sets
/// with lower numbers are in it.
pub const SUMS: &str = "carried";

/// What is to be done.
#[derive(Debug)]
pub struct Plan {
    /// How.
    pub succession: Succession,
    /// The set that will be in use.
    pub set: PathBuf,
    /// Every other, the youngest last.
    pub old: Vec<Dir>,
}

/// Decides, from what is pinned.
pub fn plan(base: &Path, survey: &Survey, known: &Known) -> Plan {
    let own = |serial| {
        base.join(format!("v{ABI_VERSION}"))
            .join(dir_name("maps", serial))
    };
    if survey.links.is_empty() {
        return Plan {
            succession: Succession::Fresh,
            set: own(1),
            old: Vec::new(),
        };
    }
    let why = match survey.sets.as_slice() {
        [set] => match unusable(set, survey, known) {
            None => {
                return Plan {
                    succession: Succession::Adopted,
                    set: set.path.clone(),
                    old: Vec::new(),
                };
            }
            Some(why) => why,
        },
        [] => "the pins of its maps are gone".to_owned(),
        many => format!(
            "{} sets of maps are pinned: a change was cut short",
            many.len()
        ),
    };
    replace(base, &survey.sets, why)
}

/// A plan that replaces `old`.
pub fn replace(base: &Path, old: &[Dir], why: String) -> Plan {
    let mut from: Vec<u32> = old.iter().map(|dir| dir.version).collect();
    from.sort_unstable();
    from.dedup();
    Plan {
        succession: Succession::Replaced {
            from,
            why,
            lost: Vec::new(),
        },
        set: base
            .join(format!("v{ABI_VERSION}"))
            .join(dir_name("maps", next_serial(old))),
        old: old.to_vec(),
    }
}

/// Why a set cannot be used as it is.
fn unusable(set: &Dir, survey: &Survey, known: &Known) -> Option<String> {
    if set.version != ABI_VERSION {
        return Some(format!(
            "they are of ABI version {}, this is {ABI_VERSION}",
            set.version
        ));
    }
    let sizes = match object::sizes(&set.path) {
        Ok(sizes) => sizes,
        Err(error) => return Some(format!("{:#}", anyhow::Error::from(error))),
    };
    let mut policy = HashSet::new();
    for shape in object::shapes(&sizes) {
        let info =
            map_at(&set.path.join(shape.name)).and_then(|map| map.info().map_err(io::Error::other));
        match info {
            Ok(info) => {
                if let Some(why) = shape.misfit(&info, sizes.agents) {
                    return Some(why);
                }
                if POLICY.contains(&shape.name) {
                    policy.insert(info.id());
                }
            }
            Err(error) => return Some(format!("map `{}` cannot be used: {error}", shape.name)),
        }
    }
    uses_others(survey, known, &policy)
        .then(|| "the programs in force use other maps than those pinned".to_owned())
}

/// Whether a program of ours that is in force does not use these maps: then what is changed in
/// them would not change what is in force. Of programs that are not ours it is no matter.
fn uses_others(survey: &Survey, known: &Known, policy: &HashSet<u32>) -> bool {
    let judges = survey.links.iter().filter(|pin| pin.program == JUDGES);
    judges
        .filter_map(|pin| {
            let link = sys::open_pin(&pin.path).ok()?;
            let info = sys::link_info(link.as_fd()).ok()?;
            known.get(&info.program).filter(|_| info.cgroup != 0)
        })
        .any(|maps| !policy.iter().all(|map| maps.contains(map)))
}

/// Pins in `set` the maps of `old` that go on as they are. Returns those that do not, of what is
/// lost with it.
pub fn carry(old: &[Dir], set: &Path, capacity: &Capacity) -> io::Result<Vec<&'static str>> {
    let mut lost = Vec::new();
    let shapes = object::shapes(capacity);
    for shape in shapes.iter().filter(|shape| CARRIED.contains(&shape.name)) {
        let fits = |dir: &Dir| {
            let map = map_at(&dir.path.join(shape.name)).ok()?;
            let info = map.info().ok()?;
            shape
                .misfit(&info, capacity.agents)
                .is_none()
                .then_some(map)
        };
        match old.iter().rev().find_map(fits) {
            Some(map) => sys::pin(map.fd().as_fd(), &set.join(shape.name))?,
            None if old.is_empty()
                || COPIED.contains(&shape.name)
                || RENEWED.contains(&shape.name) => {}
            None => lost.push(shape.name),
        }
    }
    Ok(lost)
}

/// The agents' indices in all of `old`. Where sets disagree the older is right: the younger was
/// copied from it.
pub fn names(old: &[Dir]) -> BTreeMap<u32, String> {
    let mut names = BTreeMap::new();
    let mut taken = HashSet::new();
    for dir in old {
        let Ok(map) = map_at(&dir.path.join("names")) else {
            continue;
        };
        let Ok(info) = map.info() else { continue };
        for index in 0..info.max_entries() {
            let size = info.value_size() as usize;
            let Ok(bytes) = sys::read_element(map.fd().as_fd(), index, size) else {
                break;
            };
            let id: Vec<u8> = bytes.into_iter().take_while(|byte| *byte != 0).collect();
            if let Ok(id) = String::from_utf8(id)
                && !id.is_empty()
                && !names.contains_key(&index)
                && taken.insert(id.clone())
            {
                names.insert(index, id);
            }
        }
    }
    names
}

/// The highest policy id in the rows of `old`: the first word of each, in every version.
pub fn last_policy(old: &[Dir]) -> u64 {
    let mut last = 0;
    for dir in old {
        let Ok(map) = map_at(&dir.path.join("rows")) else {
            continue;
        };
        let Ok(info) = map.info() else { continue };
        let size = info.value_size() as usize;
        for index in 0..info.max_entries() {
            let Ok(bytes) = sys::read_element(map.fd().as_fd(), index, size) else {
                break;
            };
            if let Some(policy) = bytes.first_chunk::<8>() {
                let policy = u64::from_ne_bytes(*policy);
                if policy < 1 << 62 {
                    last = last.max(policy);
                }
            }
        }
    }
    last
}

/// What was counted in other maps than the set's own `counters` (whose id is `own`): by the old
/// sets, and by those before them.
pub fn tallies(old: &[Dir], own: u32) -> io::Result<Vec<Tally>> {
    let mut tallies: Vec<Tally> = Vec::new();
    let mut seen = HashSet::from([own]);
    for dir in old.iter().rev() {
        let counters = Tally::open(&dir.path.join("counters"))?;
        tallies.extend(counters.filter(|tally| seen.insert(tally.id)));
        if let Some(sums) = Tally::open(&dir.path.join(SUMS))? {
            tallies.push(sums);
            break;
        }
    }
    Ok(tallies)
}

/// When the oldest counters of these sets were made.
pub fn born<'a>(sets: impl Iterator<Item = &'a Path>) -> Option<SystemTime> {
    sets.filter_map(|set| fs::metadata(set.join("counters")).ok()?.modified().ok())
        .min()
}

/// Has the set's counters be as old as those that they carry on.
pub fn predate(set: &Path, born: SystemTime) -> io::Result<()> {
    let since = born.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let time = nix::sys::time::TimeSpec::from_duration(since);
    nix::sys::stat::utimensat(
        nix::fcntl::AT_FDCWD,
        &set.join("counters"),
        &time,
        &time,
        nix::sys::stat::UtimensatFlags::FollowSymlink,
    )
    .map_err(io::Error::from)
}
