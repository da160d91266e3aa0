//! Gathers what is packed, and packs it: the .deb by cargo-deb, the tarball by tar. What goes where
//! is said once, in agent/Cargo.toml.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use xshell::cmd;

use super::{
    Release, machine,
    page::{self, Title},
};
use crate::{talk, workspace::STATIC_TARGET};

/// What stands for the folder of the build in the list of what is packed.
const BUILT: &str = "target/release/";

impl Release<'_> {
    /// Gathers the stripped program, its debug information beside what is published, manual pages and
    /// completions.
    pub(super) fn stage(&self, folder: &Path) -> Result<()> {
        talk::step("gathering what is packed");
        let shell = &self.workspace.shell;
        let staged = self.staged();
        if staged.exists() {
            fs::remove_dir_all(&staged)
                .with_context(|| format!("cannot empty {}", staged.display()))?;
        }
        for name in ["bin", "man", "completions"] {
            fs::create_dir_all(staged.join(name))?;
        }
        let built = self.built().join("remit");
        let program = staged.join("bin/remit");
        let debug = folder.join(format!("{}.debug", self.stem()));
        cmd!(shell, "objcopy --only-keep-debug {built} {debug}").run()?;
        cmd!(
            shell,
            "objcopy --strip-all -R .comment --add-gnu-debuglink={debug} {built} {program}"
        )
        .run()?;
        fs::set_permissions(&debug, fs::Permissions::from_mode(0o644))?;

        // No settings of this machine.
        let none = "";
        let man = staged.join("man");
        cmd!(shell, "{program} man --all {man}")
            .env("REMIT_CONFIG", none)
            .run()?;
        for (name, text) in self.pages()? {
            fs::write(man.join(name), text)?;
        }
        let pages: Vec<PathBuf> = fs::read_dir(&man)?
            .flatten()
            .map(|entry| entry.path())
            .collect();
        cmd!(shell, "gzip --no-name --best {pages...}")
            .quiet()
            .run()?;
        for (kind, name) in [("bash", "remit"), ("zsh", "_remit"), ("fish", "remit.fish")] {
            let script = cmd!(shell, "{program} completions {kind}")
                .env("REMIT_CONFIG", none)
                .quiet()
                .read()?;
            fs::write(staged.join("completions").join(name), format!("{script}\n"))?;
        }
        Ok(())
    }

    /// The pages that are no command's: file name and text.
    fn pages(&self) -> Result<Vec<(String, String)>> {
        let shell = &self.workspace.shell;
        let at = format!("@{}", self.epoch);
        let date = cmd!(shell, "date -u -d {at} +%F").quiet().read()?;
        let read = |name: &str| {
            let path = self.workspace.root.join(name);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let title = |name, section, about| Title {
            name,
            section,
            about,
            date: &date,
            version: &self.package.version,
        };
        let settings = title("remit.toml", 5, "settings of Remit's daemon");
        let registry = title("remit-registry", 5, "what an AI agent may reach");
        let events = title("remit-events", 7, "the lines of Remit's logs");
        Ok(vec![
            (
                "remit.toml.5".to_owned(),
                page::of_settings(settings, &read("agent/package/remit.toml")?),
            ),
            (
                "remit-registry.5".to_owned(),
                page::of_markdown(registry, &read("policies/README.md")?),
            ),
            (
                "remit-events.7".to_owned(),
                page::of_markdown(events, &read("docs/events.md")?),
            ),
        ])
    }

    /// `remit-0.1.0-x86_64`.
    pub(super) fn stem(&self) -> String {
        let (name, version) = (&self.package.name, &self.package.version);
        format!("{name}-{version}-{}", machine())
    }

    /// Packs the Debian package.
    pub(super) fn deb(&self, folder: &Path, revision: &str) -> Result<PathBuf> {
        talk::step("packing the Debian package");
        let arguments = [
            "deb",
            "--package",
            &self.package.name,
            "--no-build",
            "--no-strip",
            "--locked",
            "--profile",
            self.profile,
            "--target",
            STATIC_TARGET,
            "--deb-revision",
            revision,
        ];
        self.workspace
            .cargo(&arguments)
            .arg("--output")
            .arg(folder)
            .env("SOURCE_DATE_EPOCH", &self.epoch)
            .run()?;
        let architecture = match machine() {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let (name, version) = (&self.package.name, &self.package.version);
        let deb = folder.join(format!("{name}_{version}-{revision}_{architecture}.deb"));
        ensure!(deb.is_file(), "cargo-deb did not leave {}", deb.display());
        Ok(deb)
    }

    /// Packs the same files as a tarball, to be unpacked in `/` where there is no dpkg.
    pub(super) fn tarball(&self, folder: &Path) -> Result<()> {
        talk::step("packing the tarball");
        let stem = self.stem();
        let place = tempfile::tempdir()?;
        let tree = place.path().join(&stem);
        for [source, destination, mode] in &self.package.metadata.deb.assets {
            let mode = u32::from_str_radix(mode, 8)
                .with_context(|| format!("`{mode}` of `{source}` is no mode"))?;
            for from in self.sources(source)? {
                let mut to = tree.join(destination);
                if destination.ends_with('/') {
                    to.push(from.file_name().context("an asset without a name")?);
                }
                install(&from, &to, mode)?;
            }
        }
        for name in ["LICENSE", "README.md"] {
            install(&self.workspace.root.join(name), &tree.join(name), 0o644)?;
        }
        let shell = self.workspace.shell.clone();
        shell.change_dir(place.path());
        let (at, tar) = (format!("@{}", self.epoch), place.path().join("tar"));
        let alike = [
            "--format=gnu",
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--mode=go-w",
        ];
        cmd!(
            shell,
            "tar --create --file={tar} {alike...} --mtime={at} {stem}"
        )
        .run()?;
        let packed = cmd!(shell, "gzip --no-name --best --stdout {tar}")
            .quiet()
            .output()?;
        fs::write(folder.join(format!("{stem}.tar.gz")), packed.stdout)?;
        Ok(())
    }

    /// The files that a source stands for, in order.
    fn sources(&self, source: &str) -> Result<Vec<PathBuf>> {
        let path = match source.strip_prefix(BUILT) {
            Some(rest) => self.built().join(rest),
            None => self.workspace.root.join("agent").join(source),
        };
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .with_context(|| format!("`{source}` names no file"))?;
        let Some(ending) = name.strip_prefix('*') else {
            return Ok(vec![path]);
        };
        let parent = path.parent().context("no folder")?;
        let mut found: Vec<PathBuf> = fs::read_dir(parent)
            .with_context(|| format!("cannot list {}", parent.display()))?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.to_string_lossy().ends_with(ending))
            .collect();
        found.sort();
        ensure!(!found.is_empty(), "nothing is `{source}`");
        Ok(found)
    }
}

fn install(from: &Path, to: &Path, mode: u32) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}
