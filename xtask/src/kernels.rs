//! Kernels for the VMs: Debian's cloud images, fetched through an apt directory of our own, so
//! that the machine's sources and package state stay as they are. apt checks the signatures.
//! A kernel that cannot be had is an answer (`Err` with the reason), never a silent absence.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use xshell::{Shell, cmd};

use crate::{apt, talk, workspace::Workspace};

/// Names another mirror than the one in the machine's own sources.
const MIRROR_VARIABLE: &str = "REMIT_DEBIAN_MIRROR";
/// Debian's own keys, as Debian and Ubuntu package them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// cloud kernels: small, with the serial console built in and BPF LSM active.
const PACKAGE_END: &str = "-cloud-amd64";

/// Modules that the tests need, below the kernel's folder of modules: what lists and ends
/// connections, and what knows the other end of a unix socket.
const MODULES: [&str; 3] = [
    "kernel/net/ipv4/inet_diag.ko",
    "kernel/net/ipv4/tcp_diag.ko",
    "kernel/net/unix/unix_diag.ko",
];

/// How Debian compresses modules: the end of the name, and the program and its package.
const COMPRESSIONS: [(&str, Option<(&str, &str)>); 3] = [
    ("", None),
    (".xz", Some(("xz", "xz-utils"))),
    (".zst", Some(("zstd", "zstd"))),
];

/// A kernel that the tests want.
pub struct Wanted {
    /// What `--kernel` calls it, and its folder in the cache.
    pub name: &'static str,
    /// How its version begins; empty takes any.
    series: &'static str,
    /// Suites that may have it. The highest version of all wins when `series` is empty, else the
    /// first suite that has one.
    suites: &'static [&'static str],
}

/// Every kernel of the matrix, oldest first.
pub const WANTED: [Wanted; 3] = [
    Wanted {
        name: "6.1",
        series: "6.1.",
        suites: &["bookworm", "bookworm-updates"],
    },
    Wanted {
        name: "6.12",
        series: "6.12.",
        suites: &["trixie", "bookworm-backports"],
    },
    Wanted {
        name: "newest",
        series: "",
        suites: &["trixie-backports", "sid"],
    },
];

/// A kernel in the cache.
pub struct Kernel {
    /// The name of its [`Wanted`].
    pub name: &'static str,
    /// What `uname -r` says in it.
    pub release: String,
    /// The bootable image.
    pub image: PathBuf,
    /// A folder of modules that the tests need, not compressed. Those built in are missing there.
    pub modules: PathBuf,
}

/// Takes `wanted` from the cache, or fetches it into the cache. `refresh` fetches again.
pub fn ensure(workspace: &Workspace, wanted: &Wanted, refresh: bool) -> Result<Kernel> {
    if let Some(kernel) = cached(workspace, wanted)
        && !refresh
    {
        return Ok(kernel);
    }
    ensure!(
        cfg!(target_arch = "x86_64"),
        "the VMs are x86_64 and this machine is {}",
        env::consts::ARCH
    );
    talk::step(&format!("fetching the {} kernel", wanted.name));
    let mirror = Mirror::find()?;
    let (suite, package) = newest_of(workspace, &mirror, wanted)?;
    let apt = PrivateApt::new(workspace, &mirror, suite)?;
    let release = package.trim_start_matches("linux-image-").to_owned();
    let work = tempfile::tempdir_in(workspace.vm()).context("cannot make a folder to unpack in")?;
    let image = apt.image(&release, work.path())?;
    let modules = apt.modules(&release, work.path())?;
    let folder = folder(workspace, wanted);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // Gone while the image changes, and written last: its presence says that the image is whole.
    let named = folder.join("release");
    if named.exists() {
        fs::remove_file(&named).with_context(|| format!("cannot remove {}", named.display()))?;
    }
    let old = folder.join("modules");
    if old.exists() {
        fs::remove_dir_all(&old).with_context(|| format!("cannot remove {}", old.display()))?;
    }
    for (from, to) in [(image, "vmlinuz"), (modules, "modules")] {
        fs::rename(&from, folder.join(to))
            .with_context(|| format!("cannot move {} to {}", from.display(), folder.display()))?;
    }
    fs::write(&named, &release).with_context(|| format!("cannot write {}", named.display()))?;
    talk::note(&format!("{release} from {suite}"));
    cached(workspace, wanted).with_context(|| format!("{} vanished", folder.display()))
}

fn folder(workspace: &Workspace, wanted: &Wanted) -> PathBuf {
    workspace.vm().join("kernels").join(wanted.name)
}

/// The kernel if it is in the cache.
pub fn cached(workspace: &Workspace, wanted: &Wanted) -> Option<Kernel> {
    let folder = folder(workspace, wanted);
    let release = fs::read_to_string(folder.join("release")).ok()?;
    let (image, modules) = (folder.join("vmlinuz"), folder.join("modules"));
    (image.is_file() && modules.is_dir()).then_some(Kernel {
        name: wanted.name,
        release,
        image,
        modules,
    })
}

/// The best package for `wanted`, and the suite that has it.
fn newest_of<'a>(
    workspace: &Workspace,
    mirror: &Mirror,
    wanted: &'a Wanted,
) -> Result<(&'a str, String)> {
    let mut best: Option<(&str, String)> = None;
    let mut reasons = Vec::new();
    for suite in wanted.suites {
        let found = PrivateApt::new(workspace, mirror, suite)
            .and_then(|apt| apt.update().map(|()| apt))
            .and_then(|apt| apt.kernels());
        let packages = match found {
            Ok(packages) => packages,
            Err(error) => {
                reasons.push(format!("{suite}: {error:#}"));
                continue;
            }
        };
        let newest = packages
            .into_iter()
            .filter(|package| {
                package
                    .trim_start_matches("linux-image-")
                    .starts_with(wanted.series)
            })
            .max_by_key(|package| version_key(package));
        match newest {
            None => reasons.push(format!("{suite}: no {}x kernel in it", wanted.series)),
            Some(package)
                if best
                    .as_ref()
                    .is_none_or(|(_, known)| version_key(known) < version_key(&package)) =>
            {
                best = Some((suite, package))
            }
            Some(_) => {}
        }
        if best.is_some() && !wanted.series.is_empty() {
            break;
        }
    }
    best.with_context(|| reasons.join("; "))
}

/// The numbers in a package name, so that 6.9 sorts before 6.12.
fn version_key(package: &str) -> Vec<u64> {
    package
        .split(|character: char| !character.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// A Debian mirror.
pub struct Mirror {
    uri: String,
}

impl Mirror {
    /// One line of apt's sources for `suite`. Debian's keys are there afterwards.
    pub fn line(&self, shell: &Shell, suite: &str) -> Result<String> {
        if !Path::new(KEYRING).exists() {
            talk::note(&format!(
                "{KEYRING} is missing; it holds Debian's signing keys"
            ));
            apt::install(shell, &["debian-archive-keyring"])?;
        }
        let uri = &self.uri;
        Ok(format!(
            "deb [signed-by={KEYRING} arch=amd64] {uri} {suite} main"
        ))
    }

    /// The mirror that the machine itself uses, or the one that the environment names.
    pub fn find() -> Result<Self> {
        if let Ok(uri) = env::var(MIRROR_VARIABLE) {
            return Ok(Self { uri });
        }
        let system =
            fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
        let field = |name: &str| {
            system
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .map(|value| value.trim_matches('"').to_owned())
        };
        let id = field("ID").unwrap_or_default();
        if id != "debian" {
            bail!(
                "the kernels are Debian's and this is `{id}`: name a Debian mirror in \
                 {MIRROR_VARIABLE}, for example the one nearest to you from debian.org/mirror/list"
            );
        }
        let codename = field("VERSION_CODENAME").unwrap_or_default();
        let uri = Sources::read()
            .iter()
            .find(|source| source.offers(&codename))
            .map(|source| source.uri.clone())
            .with_context(|| {
                format!(
                    "no `{codename}` mirror in /etc/apt/sources.list and sources.list.d: \
                     name one in {MIRROR_VARIABLE}"
                )
            })?;
        Ok(Self { uri })
    }
}

/// One address in apt's sources, with what it serves.
#[derive(Debug, PartialEq)]
struct Source {
    uri: String,
    suites: Vec<String>,
    components: Vec<String>,
}

impl Source {
    /// Whether this is where the release `codename` itself comes from.
    fn offers(&self, codename: &str) -> bool {
        self.suites
            .iter()
            .any(|suite| suite == codename || suite == "stable" || suite == "sid")
            && self.components.iter().any(|component| component == "main")
    }
}

/// Reads both forms of apt's source files.
struct Sources;

impl Sources {
    fn read() -> Vec<Source> {
        let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
        if let Ok(folder) = fs::read_dir("/etc/apt/sources.list.d") {
            files.extend(folder.flatten().map(|entry| entry.path()));
        }
        files.sort();
        files
            .iter()
            .filter_map(|file| {
                let text = fs::read_to_string(file).ok()?;
                match file.extension()?.to_str()? {
                    "list" => Some(Self::lines(&text)),
                    "sources" => Some(Self::stanzas(&text)),
                    _ => None,
                }
            })
            .flatten()
            .collect()
    }

    /// `deb [options] URI SUITE COMPONENT…`, one a line.
    fn lines(text: &str) -> Vec<Source> {
        text.lines()
            .filter_map(|line| {
                let line = line.trim().strip_prefix("deb ")?.trim_start();
                let line = match line.strip_prefix('[') {
                    Some(rest) => rest.split_once(']')?.1,
                    None => line,
                };
                let mut words = line.split_whitespace().map(str::to_owned);
                Some(Source {
                    uri: words.next()?,
                    suites: vec![words.next()?],
                    components: words.collect(),
                })
            })
            .collect()
    }

    /// `Types:`, `URIs:`, `Suites:`, `Components:` in stanzas; comments anywhere.
    fn stanzas(text: &str) -> Vec<Source> {
        let mut sources = Vec::new();
        let text: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        for stanza in text.split(|line| line.trim().is_empty()) {
            let words = |name: &str| -> Vec<String> {
                stanza
                    .iter()
                    .filter_map(|line| line.split_once(':'))
                    .find(|(key, _)| key.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.split_whitespace().map(str::to_owned).collect())
                    .unwrap_or_default()
            };
            let off = words("Enabled")
                .iter()
                .any(|word| word.eq_ignore_ascii_case("no"));
            if off || !words("Types").iter().any(|word| word == "deb") {
                continue;
            }
            sources.extend(words("URIs").into_iter().map(|uri| Source {
                uri,
                suites: words("Suites"),
                components: words("Components"),
            }));
        }
        sources
    }
}

/// apt with sources, lists, status and cache of its own, for one suite.
struct PrivateApt<'a> {
    shell: &'a Shell,
    suite: &'a str,
    options: Vec<String>,
}

impl<'a> PrivateApt<'a> {
    fn new(workspace: &'a Workspace, mirror: &Mirror, suite: &'a str) -> Result<Self> {
        let shell = &workspace.shell;
        if !apt::on_path(shell, "apt-get") || !apt::on_path(shell, "dpkg-deb") {
            bail!("the kernels come as Debian packages and this machine has no apt-get");
        }
        let source = mirror.line(shell, suite)?;
        let folder = workspace.vm().join("apt").join(suite);
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(part))
                .with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let list = folder.join("sources.list");
        fs::write(&list, source + "\n")
            .with_context(|| format!("cannot write {}", list.display()))?;
        let status = folder.join("status");
        fs::write(&status, "").with_context(|| format!("cannot write {}", status.display()))?;
        let folder = folder.display();
        let options = [
            format!("Dir::Etc::SourceList={folder}/sources.list"),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={folder}/lists"),
            format!("Dir::State::Status={folder}/status"),
            format!("Dir::Cache={folder}/cache"),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
            // Package lists only: no translations, icons or file lists.
            "Acquire::Languages=none".to_owned(),
            // Its own user cannot write below a home folder; signatures are checked either way.
            "APT::Sandbox::User=".to_owned(),
        ]
        .into_iter()
        .flat_map(|option| ["-o".to_owned(), option])
        .collect();
        Ok(Self {
            shell,
            suite,
            options,
        })
    }

    fn update(&self) -> Result<()> {
        let options = &self.options;
        let output = cmd!(
            self.shell,
            "apt-get {options...} -q update -o APT::Update::Error-Mode=any"
        )
        .quiet()
        .ignore_status()
        .output()?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            let first = errors
                .lines()
                .find(|line| line.starts_with("E:"))
                .unwrap_or("no reason");
            bail!("apt-get update failed for {}: {first}", self.suite);
        }
        Ok(())
    }

    /// Names of the suite's bootable cloud kernels.
    fn kernels(&self) -> Result<Vec<String>> {
        let options = &self.options;
        let names = cmd!(self.shell, "apt-cache {options...} pkgnames linux-image-")
            .quiet()
            .read()?;
        Ok(names
            .lines()
            .filter(|name| {
                let version = name.trim_start_matches("linux-image-");
                version.starts_with(|first: char| first.is_ascii_digit())
                    && version.ends_with(PACKAGE_END)
            })
            .map(str::to_owned)
            .collect())
    }

    /// Downloads the packages of the kernel `release`, unpacks them below `folder` and returns the
    /// bootable image. From 7.2 on `linux-image-*` is empty and the image is in `linux-binary-*`.
    fn image(&self, release: &str, folder: &Path) -> Result<PathBuf> {
        for kind in ["linux-binary", "linux-image"] {
            let Some(root) = self.unpack(kind, release, folder)? else {
                continue;
            };
            let images = [
                format!("boot/vmlinuz-{release}"),
                format!("usr/lib/modules/{release}/vmlinuz"),
            ];
            let image = images
                .iter()
                .map(|image| root.join(image))
                .find(|image| image.is_file());
            if let Some(image) = image {
                return Ok(image);
            }
        }
        bail!("no package of {release} has a vmlinuz in it")
    }

    /// The same for [`MODULES`], into a folder. One that no package has may be built in, and if
    /// not, the tests that need it say so.
    fn modules(&self, release: &str, folder: &Path) -> Result<PathBuf> {
        let mut places = Vec::new();
        for kind in ["linux-modules", "linux-image"] {
            if let Some(root) = self.unpack(kind, release, folder)? {
                places.push(root.join("lib/modules").join(release));
                places.push(root.join("usr/lib/modules").join(release));
            }
        }
        let to = folder.join("modules");
        fs::create_dir(&to).with_context(|| format!("cannot make {}", to.display()))?;
        for module in MODULES {
            let name = Path::new(module).file_name().context("a module's name")?;
            let found = places.iter().find_map(|place| {
                COMPRESSIONS.iter().find_map(|(end, program)| {
                    let file = place.join(format!("{module}{end}"));
                    file.is_file().then_some((file, program))
                })
            });
            let Some((file, program)) = found else {
                talk::note(&format!("no package of {release} has {module}"));
                continue;
            };
            let to = to.join(name);
            match program {
                None => {
                    fs::copy(&file, &to)
                        .with_context(|| format!("cannot copy {}", file.display()))?;
                }
                Some((program, package)) => {
                    let why = "to unpack the VMs' modules";
                    apt::ensure(self.shell, program, &[package], why)?;
                    let content = cmd!(self.shell, "{program} --decompress --stdout {file}")
                        .quiet()
                        .output()?
                        .stdout;
                    fs::write(&to, content)
                        .with_context(|| format!("cannot write {}", to.display()))?;
                }
            }
        }
        Ok(to)
    }

    /// Downloads and unpacks one package of the kernel `release` below `folder`, once. None when
    /// the suite has no such package.
    fn unpack(&self, kind: &str, release: &str, folder: &Path) -> Result<Option<PathBuf>> {
        let options = &self.options;
        let package = format!("{kind}-{release}");
        let place = folder.join(kind);
        let root = place.join("root");
        if root.is_dir() {
            return Ok(Some(root));
        }
        let names = cmd!(self.shell, "apt-cache {options...} pkgnames {package}")
            .quiet()
            .read()?;
        if !names.lines().any(|name| name == package) {
            return Ok(None);
        }
        fs::create_dir(&place).with_context(|| format!("cannot make {}", place.display()))?;
        let _inside = self.shell.push_dir(&place);
        cmd!(self.shell, "apt-get {options...} -q download {package}")
            .quiet()
            .ignore_stdout()
            .run()?;
        let file = fs::read_dir(&place)
            .with_context(|| format!("cannot list {}", place.display()))?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|end| end == "deb"))
            .with_context(|| format!("apt-get download left no file of {package}"))?;
        cmd!(self.shell, "dpkg-deb -x {file} root").quiet().run()?;
        Ok(Some(root))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_releases_sort_higher() {
        let mut names = [
            "linux-image-6.12.9+deb13-cloud-amd64",
            "linux-image-6.9.107+deb13-cloud-amd64",
            "linux-image-6.12.117+deb13-cloud-amd64",
        ];
        names.sort_by_key(|name| version_key(name));
        assert_eq!(
            names.map(|name| name.contains("6.12.117")),
            [false, false, true]
        );
        assert!(names[0].contains("6.9."));
    }

    #[test]
    fn one_line_sources_are_read_past_options_and_comments() {
        let text = "# deb http://old.example/debian bookworm main\n\
                    deb-src http://m.example/debian bookworm main\n\
                    deb [ signed-by=/k.gpg arch=amd64 ] http://m.example/debian bookworm main contrib\n";
        let sources = Sources::lines(text);
        assert_eq!(sources.len(), 1);
        assert_eq!(sources[0].uri, "http://m.example/debian");
        assert!(sources[0].offers("bookworm"));
    }

    #[test]
    fn the_security_mirror_is_not_taken_for_the_release() {
        let text = "Types: deb\nURIs: http://m.example/debian-security\n\
                    Suites: bookworm-security\nComponents: main\n\n\
                    Types: deb\n# note: inside\nURIs: http://m.example/debian\n\
                    Suites: bookworm bookworm-updates\nComponents: main\n\n\
                    Types: deb\nEnabled: no\nURIs: http://off.example/debian\n\
                    Suites: bookworm\nComponents: main\n";
        let offering: Vec<_> = Sources::stanzas(text)
            .into_iter()
            .filter(|source| source.offers("bookworm"))
            .map(|source| source.uri)
            .collect();
        assert_eq!(offering, ["http://m.example/debian"]);
    }
}
