//! Every file in `policies/invalid` has one mistake, and beside it stands, to the letter, what the
//! compiler says about it. `REMIT_BLESS=1` writes the goldens anew; read the difference before
//! committing it.
//!
//! A mistake that takes several files is a folder with `agents/`, `sets/` and `floor.toml`.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot read its input has failed"
)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use remit::policy::{Compilation, Source, SourceKind, compile};

/// 2026-10-01T00:00:00Z.
const NOW: i64 = 1_790_812_800_000;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies/invalid")
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// A source under the name that messages show.
fn source(path: &Path, kind: SourceKind) -> Source {
    Source {
        path: path.strip_prefix(root()).unwrap().to_owned(),
        text: fs::read_to_string(path).unwrap(),
        kind,
    }
}

fn sources(case: &Path) -> Vec<Source> {
    if case.is_file() {
        return vec![source(case, SourceKind::Agent)];
    }
    let mut sources = Vec::new();
    for (folder, kind) in [
        ("agents", SourceKind::Agent),
        ("more-agents", SourceKind::Agent),
        ("sets", SourceKind::Set),
    ] {
        sources.extend(
            entries(&case.join(folder))
                .iter()
                .map(|path| source(path, kind)),
        );
    }
    let floor = case.join("floor.toml");
    if floor.exists() {
        sources.push(source(&floor, SourceKind::Floor));
    }
    sources
}

fn cases() -> Vec<PathBuf> {
    let cases = entries(&root()).into_iter();
    cases
        .filter(|path| path.is_dir() || path.extension().is_some_and(|ext| ext == "toml"))
        .collect()
}

fn rendered(compilation: &Compilation) -> String {
    compilation
        .findings
        .iter()
        .map(|finding| format!("{finding}\n\n"))
        .collect()
}

#[test]
fn every_mistake_is_reported_to_the_letter() {
    let bless = std::env::var_os("REMIT_BLESS").is_some();
    let mut wrong = Vec::new();
    for case in cases() {
        let golden = case.with_extension("stderr");
        let found = rendered(&compile(&sources(&case), NOW));
        if bless {
            fs::write(&golden, &found).unwrap();
            continue;
        }
        match fs::read_to_string(&golden) {
            Ok(expected) if expected == found => {}
            Ok(expected) => wrong.push(format!(
                "{}:\n--- expected\n{expected}--- found\n{found}",
                golden.display()
            )),
            Err(error) => wrong.push(format!("{}: {error}\n{found}", golden.display())),
        }
    }
    assert!(
        wrong.is_empty(),
        "{}\nREMIT_BLESS=1 writes the goldens anew",
        wrong.join("\n")
    );
}

#[test]
fn every_golden_has_its_case_and_says_something() {
    let cases = cases();
    assert!(cases.len() >= 50, "{} cases", cases.len());
    for golden in entries(&root()) {
        if golden.extension().is_some_and(|ext| ext == "stderr") {
            let case = cases
                .iter()
                .any(|case| case.with_extension("stderr") == golden);
            assert!(case, "{} belongs to no case", golden.display());
            let text = fs::read_to_string(&golden).unwrap();
            assert!(
                text.contains("error: ") || text.contains("warning: "),
                "{}",
                golden.display()
            );
            assert!(
                text.contains("^") && text.contains("\nhelp: "),
                "{}",
                golden.display()
            );
        }
    }
}

#[test]
fn a_bad_file_takes_no_other_agent_away() {
    let root = root();
    let good = source(
        &root
            .join("../agents/billing-recon.toml")
            .canonicalize()
            .unwrap(),
        &root,
    );
    fn source(path: &Path, _root: &Path) -> Source {
        let text = fs::read_to_string(path).unwrap();
        Source {
            path: "billing-recon.toml".into(),
            text,
            kind: SourceKind::Agent,
        }
    }
    for case in cases() {
        let mut sources = sources(&case);
        sources.push(good.clone());
        let compilation = compile(&sources, NOW);
        let ids: Vec<&str> = compilation
            .agents
            .iter()
            .map(|agent| agent.id.as_str())
            .collect();
        assert!(
            ids.contains(&"billing-recon"),
            "{}: {ids:?}",
            case.display()
        );
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig {
        cases: 1_000,
        failure_persistence: None,
        ..Default::default()
    })]

    /// Whatever a file holds, the compiler ends, and its findings lie inside the file.
    #[test]
    fn no_text_is_too_broken(
        edits in proptest::collection::vec(
            (proptest::prelude::any::<proptest::sample::Index>(), 0..6_usize, 0..14_usize),
            1..6,
        ),
        kind in 0..3_usize,
    ) {
        const BITS: [&str; 14] = [
            "\"", "[", "]", "=", "\n", "[[scope.allow]]", "\u{fffd}ö", "{", "}", ",", "#", "\\", "'''",
            "0.0.0.0/0",
        ];
        let (file, kind) = [
            ("agents/billing-recon.toml", SourceKind::Agent),
            ("sets/github.toml", SourceKind::Set),
            ("floor.toml", SourceKind::Floor),
        ][kind];
        let mut text: Vec<char> =
            fs::read_to_string(root().join("..").join(file)).unwrap().chars().collect();
        for (at, removed, bit) in edits {
            let at = at.index(text.len());
            let end = (at + removed).min(text.len());
            text.splice(at..end, BITS[bit].chars());
        }
        let text: String = text.into_iter().collect();
        let lines = u32::try_from(text.lines().count() + 1).unwrap();
        let sources = [Source { path: file.into(), text, kind }];
        for finding in compile(&sources, NOW).findings {
            proptest::prop_assert!((1..=lines).contains(&finding.line));
            proptest::prop_assert!(finding.span.end <= sources[0].text.len());
            proptest::prop_assert!(finding.to_string().contains('^'));
        }
    }
}
