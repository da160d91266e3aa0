//! Real directories in a cgroup of the tests' own.

use std::time::{Duration, Instant};

use super::*;
use crate::cgroup::testing::Sandbox;

const PATIENCE: Duration = Duration::from_secs(5);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn watcher(sandbox: &Sandbox, pairs: &[(u32, &str)]) -> Watcher {
    let pairs: Vec<(u32, String)> = pairs
        .iter()
        .map(|(agent, glob)| (*agent, format!("{}/{glob}", sandbox.path)))
        .collect();
    let selectors =
        Selectors::new(pairs.iter().map(|(agent, glob)| (*agent, glob.as_str()))).unwrap();
    Watcher::new(
        sandbox.hierarchy.clone(),
        vec![sandbox.path.clone()],
        Arc::new(selectors),
    )
    .unwrap()
}

async fn next(watcher: &mut Watcher) -> Vec<Change> {
    tokio::time::timeout(PATIENCE, watcher.changes())
        .await
        .expect("nothing was announced")
        .unwrap()
}

async fn silence(watcher: &mut Watcher) {
    let quiet = tokio::time::timeout(Duration::from_millis(50), watcher.changes()).await;
    assert!(quiet.is_err(), "announced {quiet:?}");
}

fn created(sandbox: &Sandbox, name: &str, claimant: Claimant) -> Change {
    let path: CgroupPath = format!("{}/{name}", sandbox.path).parse().unwrap();
    Change::Created {
        id: sandbox.hierarchy.id(&path).unwrap(),
        path,
        claimant,
    }
}

fn make(sandbox: &Sandbox, name: &str) -> u64 {
    let path = format!("{}/{name}", sandbox.path).parse().unwrap();
    sandbox.hierarchy.create(&path).unwrap().id
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn births_are_announced_fast_with_their_claimant() {
    let sandbox = Sandbox::new("births");
    runtime().block_on(async {
        make(&sandbox, "old");
        let mut watcher = watcher(&sandbox, &[(1, "a*")]);
        let first = next(&mut watcher).await;
        assert_eq!(first, [created(&sandbox, "old", Claimant::Nobody)]);

        let mut times = Vec::new();
        for i in 0..50 {
            let name = format!("a{i}");
            let start = Instant::now();
            make(&sandbox, &name);
            let changes = next(&mut watcher).await;
            times.push(start.elapsed());
            assert_eq!(changes, [created(&sandbox, &name, Claimant::Agent(1))]);
        }
        times.sort();
        let median = times[times.len() / 2];
        eprintln!("mkdir to event: median {median:?}, worst {:?}", times[49]);
        assert!(median < Duration::from_millis(20), "{median:?}");
    });
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn nested_births_are_found_down_to_the_claim_and_not_below() {
    let sandbox = Sandbox::new("nested");
    runtime().block_on(async {
        let mut watcher = watcher(&sandbox, &[(1, "*/a"), (2, "b")]);
        make(&sandbox, "x/a/own");
        make(&sandbox, "b/own/a");
        let mut seen = next(&mut watcher).await;
        while seen.len() < 3 {
            seen.extend(next(&mut watcher).await);
        }
        for (name, claimant) in [
            ("x", Claimant::Nobody),
            ("x/a", Claimant::Agent(1)),
            ("b", Claimant::Agent(2)),
        ] {
            assert!(
                seen.contains(&created(&sandbox, name, claimant)),
                "{name}: {seen:?}"
            );
        }
        assert_eq!(seen.len(), 3, "{seen:?}");
        make(&sandbox, "b/own/more");
        silence(&mut watcher).await;
    });
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn a_cgroup_made_again_is_one_death_and_one_birth() {
    let sandbox = Sandbox::new("again");
    runtime().block_on(async {
        let mut watcher = watcher(&sandbox, &[(1, "a")]);
        let old = make(&sandbox, "a");
        assert_eq!(next(&mut watcher).await.len(), 1);
        let path = sandbox.child("a");
        for _ in 0..3 {
            sandbox.hierarchy.remove(&path).unwrap();
            make(&sandbox, "a");
        }
        let changes = next(&mut watcher).await;
        let expected = [
            Change::Deleted { path, id: old },
            created(&sandbox, "a", Claimant::Agent(1)),
        ];
        assert_eq!(changes, expected);
        silence(&mut watcher).await;
    });
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn deaths_come_children_first() {
    let sandbox = Sandbox::new("deaths");
    runtime().block_on(async {
        let mut watcher = watcher(&sandbox, &[(1, "*/*")]);
        make(&sandbox, "x/a");
        let mut seen = 0;
        while seen < 2 {
            seen += next(&mut watcher).await.len();
        }
        sandbox.hierarchy.remove(&sandbox.child("x")).unwrap();
        let mut gone = Vec::new();
        while gone.len() < 2 {
            for change in next(&mut watcher).await {
                match change {
                    Change::Deleted { path, .. } => gone.push(path),
                    other => panic!("{other:?}"),
                }
            }
        }
        let x = sandbox.child("x");
        assert_eq!(gone, [x.child("a").unwrap(), x.clone()]);
        assert!(!watcher.descriptors.contains_key(&x));
        assert_eq!(watcher.directories.len(), 2, "the root and its parent");
    });
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn a_lost_event_is_made_up_for() {
    let sandbox = Sandbox::new("overflow");
    runtime().block_on(async {
        let mut watcher = watcher(&sandbox, &[(1, "*/*")]);
        make(&sandbox, "x/a");
        make(&sandbox, "y");
        // What the kernel queues now is thrown away, as an overflow does.
        let mut lost = watcher.hints().await.unwrap();
        let mut hint = lost.pop().unwrap();
        hint.mask = EventMask::Q_OVERFLOW;
        watcher.take(&hint).unwrap();
        assert_eq!(watcher.overflows(), 1);
        let changes = next(&mut watcher).await;
        assert_eq!(changes.len(), 3, "{changes:?}");
        assert!(changes.contains(&created(&sandbox, "x/a", Claimant::Agent(1))));
    });
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn the_end_and_return_of_a_root_are_announced() {
    let sandbox = Sandbox::new("root");
    runtime().block_on(async {
        let root = sandbox.child("root");
        sandbox.hierarchy.create(&root).unwrap();
        let selectors = Arc::new(Selectors::new([]).unwrap());
        let mut watcher =
            Watcher::new(sandbox.hierarchy.clone(), vec![root.clone()], selectors).unwrap();
        sandbox.hierarchy.remove(&root).unwrap();
        let deleted = Change::RootDeleted(root.clone());
        assert_eq!(next(&mut watcher).await, [deleted]);
        let id = sandbox.hierarchy.create(&root).unwrap().id;
        sandbox.hierarchy.create(&sandbox.child("beside")).unwrap();
        let path = root;
        assert_eq!(next(&mut watcher).await, [Change::RootCreated { path, id }]);
        silence(&mut watcher).await;
    });
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn new_selectors_announce_everything_anew() {
    let sandbox = Sandbox::new("replace");
    runtime().block_on(async {
        make(&sandbox, "a");
        let mut watcher = watcher(&sandbox, &[]);
        let nobody = created(&sandbox, "a", Claimant::Nobody);
        assert_eq!(next(&mut watcher).await, [nobody]);
        let glob = format!("{}/a", sandbox.path);
        let selectors = Arc::new(Selectors::new([(5, glob.as_str())]).unwrap());
        let roots = vec![sandbox.path.clone()];
        watcher.replace(roots, Arc::clone(&selectors)).unwrap();
        let claimed = created(&sandbox, "a", Claimant::Agent(5));
        assert_eq!(next(&mut watcher).await, [claimed]);
        assert!(
            watcher
                .replace(vec![sandbox.child("none")], selectors)
                .is_err()
        );
        make(&sandbox, "b");
        assert_eq!(next(&mut watcher).await.len(), 1);
    });
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn without_a_runtime_it_is_an_error() {
    let sandbox = Sandbox::new("runtime");
    let selectors = Arc::new(Selectors::new([]).unwrap());
    let made = Watcher::new(
        sandbox.hierarchy.clone(),
        vec![sandbox.path.clone()],
        selectors,
    );
    assert!(made.is_err());
}
