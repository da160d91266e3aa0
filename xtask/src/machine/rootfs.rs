//! A Debian root file system with systemd and the suite's own kernel, made of packages by
//! mmdebstrap into an ext4 image without mounting anything. It is kept until what it is made of
//! changes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::geteuid;
use xshell::{Shell, cmd};

use crate::{
    apt,
    kernels::{Kernel, Mirror},
    talk,
    workspace::Workspace,
};

/// Debian 12 and 13.
pub const SUITES: [&str; 2] = ["bookworm", "trixie"];

/// What the machine has besides the packages that are essential to Debian, and apt.
const PACKAGES: [&str; 15] = [
    "adduser",
    "crun",
    "dbus",
    "init-system-helpers",
    "iproute2",
    "kmod",
    "libpam-systemd",
    "linux-image-cloud-amd64",
    "logrotate",
    "podman",
    "procps",
    "sudo",
    "systemd",
    "systemd-sysv",
    "udev",
];

/// Room for what the tests write; holes take none here.
const SIZE: &str = "1500M";

/// Merges /usr before packages are unpacked, where the suite wants that.
const MERGE_HOOKS: &str = "/usr/share/mmdebstrap/hooks/maybe-merged-usr";

/// Files of the machine besides those of packages: path, mode, content.
const FILES: [(&str, &str, &str); 7] = [
    ("etc/hostname", "0644", "remit-machine\n"),
    // A machine that has one skips the questions of a first boot.
    (
        "etc/machine-id",
        "0444",
        "5265616c6c7920612074657374206f6e\n",
    ),
    (
        "etc/fstab",
        "0644",
        "/dev/vda / ext4 defaults 0 0\n/dev/vdb /payload ext4 ro 0 0\n",
    ),
    (
        "etc/systemd/system/remit-check.service",
        "0644",
        "[Unit]\n\
         Description=Tests of this machine\n\
         After=multi-user.target\n\
         RequiresMountsFor=/payload\n\
         [Service]\n\
         ExecStart=/payload/remit-tests machine\n\
         Environment=REMIT_TEST_VM=1 REMIT_BIN=/usr/bin/remit\n\
         TimeoutStopSec=5\n\
         [Install]\n\
         WantedBy=multi-user.target\n",
    ),
    // The console belongs to the report.
    (
        "etc/systemd/journald.conf.d/machine.conf",
        "0644",
        "[Journal]\nStorage=persistent\nForwardToConsole=no\n",
    ),
    // Nobody answers there: the machine has no network but its own.
    ("etc/resolv.conf", "0644", "nameserver 198.51.100.53\n"),
    // Where the disk with the package is mounted.
    ("payload/.keep", "0644", ""),
];

/// Links of the machine: path, what it leads to.
const LINKS: [(&str, &str); 8] = [
    (
        "etc/systemd/system/multi-user.target.wants/remit-check.service",
        "/etc/systemd/system/remit-check.service",
    ),
    ("etc/systemd/system/serial-getty@ttyS0.service", "/dev/null"),
    ("etc/systemd/system/getty@tty1.service", "/dev/null"),
    ("etc/systemd/system/apt-daily.timer", "/dev/null"),
    ("etc/systemd/system/apt-daily-upgrade.timer", "/dev/null"),
    ("etc/systemd/system/dpkg-db-backup.timer", "/dev/null"),
    ("etc/systemd/system/e2scrub_reap.service", "/dev/null"),
    (
        "etc/systemd/system/systemd-networkd-wait-online.service",
        "/dev/null",
    ),
];

/// What the packages' own scripts find before they are installed: a small initramfs, without the
/// modules of every disk there is.
const BEFORE: &str = r#"set -e
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/etc/initramfs-tools/hooks"
echo MODULES=list > "$1/etc/initramfs-tools/conf.d/machine"
cat > "$1/etc/initramfs-tools/hooks/machine" <<'END'
#!/bin/sh
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
for module in virtio_pci virtio_blk ext4; do force_load $module; done
END
chmod 755 "$1/etc/initramfs-tools/hooks/machine"
"#;

/// Unpacks `root.tar` in the current folder, adds `files/`, takes the kernel out, and makes the
/// image. Under fakeroot where the user is not root, so it must be one process tree.
const AFTER: &str = r#"set -e
mkdir tree
tar -C tree --exclude='./dev/*' -xf root.tar
rm root.tar
cp tree/boot/vmlinuz-* vmlinuz
cp tree/boot/initrd.img-* initrd
chmod 644 vmlinuz initrd
ls tree/lib/modules > release
rm -rf tree/boot/* tree/usr/share/doc/* tree/usr/share/locale/* tree/var/cache/apt/*
rm -f tree/etc/machine-id tree/etc/hostname tree/etc/resolv.conf
cp -r --no-preserve=ownership files/. tree/
chown -R 0:0 tree/etc/systemd tree/payload
/sbin/mkfs.ext4 -q -F -L root -d tree root.ext4 SIZE
"#;

/// A root file system and what boots it.
pub struct Root {
    /// Its suite.
    pub suite: &'static str,
    /// The suite's kernel.
    pub kernel: Kernel,
    /// Debian's initramfs for it.
    pub initrd: PathBuf,
    /// The whole disk.
    pub image: PathBuf,
}

/// Takes the root file system of `suite` from the cache, or makes it.
pub fn ensure(workspace: &Workspace, folder: &Path, suite: &'static str) -> Result<Root> {
    let place = folder.join(suite);
    let stamp = format!("{PACKAGES:?}\n{FILES:?}\n{LINKS:?}\n{BEFORE}\n{AFTER}\n{SIZE}\n");
    let stamped = place.join("stamp");
    if fs::read_to_string(&stamped).is_ok_and(|found| found == stamp) {
        return root(&place, suite);
    }
    if place.exists() {
        fs::remove_dir_all(&place).with_context(|| format!("cannot empty {}", place.display()))?;
    }
    fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    make(workspace, suite, &place)?;
    // Last: its presence says that the rest is whole.
    fs::write(&stamped, stamp).with_context(|| format!("cannot write {}", stamped.display()))?;
    root(&place, suite)
}

fn root(place: &Path, suite: &'static str) -> Result<Root> {
    let release = fs::read_to_string(place.join("release")).context("the image has no kernel")?;
    Ok(Root {
        suite,
        kernel: Kernel {
            name: suite,
            release: release.trim().to_owned(),
            image: place.join("vmlinuz"),
            modules: PathBuf::new(),
        },
        initrd: place.join("initrd"),
        image: place.join("root.ext4"),
    })
}

fn make(workspace: &Workspace, suite: &str, place: &Path) -> Result<()> {
    let shell = &workspace.shell;
    let why = "to make a Debian machine for the tests";
    apt::ensure(shell, "mmdebstrap", &["mmdebstrap"], why)?;
    ensure!(
        apt::on_path(shell, "mkfs.ext4") || Path::new("/sbin/mkfs.ext4").exists(),
        "there is no mkfs.ext4: install e2fsprogs"
    );
    talk::step(&format!("making a {suite} machine with systemd"));
    let source = Mirror::find()?.line(shell, suite)?;
    let options = place.join("apt.conf");
    fs::write(&options, apt_options(shell)?).context("cannot write apt's settings")?;
    let hook = place.join("before.sh");
    fs::write(&hook, BEFORE).context("cannot write a hook")?;
    let (hook, options) = (hook.display(), options.display());
    let mut arguments = vec![
        "--variant=minbase".to_owned(),
        "--format=tar".to_owned(),
        format!("--include={}", PACKAGES.join(",")),
        format!("--aptopt={options}"),
        format!("--setup-hook=sh {hook} \"$1\""),
    ];
    if Path::new(MERGE_HOOKS).is_dir() {
        arguments.push(format!("--hook-dir={MERGE_HOOKS}"));
    }
    let tar = place.join("root.tar");
    let _inside = shell.push_dir(place);
    cmd!(
        shell,
        "mmdebstrap --quiet {arguments...} {suite} {tar} {source}"
    )
    .quiet()
    .run()
    .context("mmdebstrap failed")?;
    files(&place.join("files"))?;
    let script = AFTER.replace("SIZE", SIZE);
    if geteuid().is_root() {
        cmd!(shell, "sh -c {script}").quiet().run()?;
    } else {
        apt::ensure(shell, "fakeroot", &["fakeroot"], why)?;
        cmd!(shell, "fakeroot sh -c {script}").quiet().run()?;
    }
    for done in ["tree", "files"] {
        fs::remove_dir_all(place.join(done)).with_context(|| format!("cannot remove {done}"))?;
    }
    Ok(())
}

/// How this machine reaches its mirror and how far it believes it, for an apt that reads no
/// settings of the machine.
fn apt_options(shell: &Shell) -> Result<String> {
    let all = cmd!(shell, "apt-config dump").quiet().read()?;
    let kept = ["Acquire::http", "Acquire::Check-", "Acquire::Retries"];
    Ok(all
        .lines()
        .filter(|line| kept.iter().any(|name| line.starts_with(name)) && !line.contains("\"\""))
        .map(|line| format!("{line}\n"))
        .collect())
}

/// Writes [`FILES`] and [`LINKS`] below `folder`.
fn files(folder: &Path) -> Result<()> {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    let at = |path: &str| -> Result<PathBuf> {
        let path = folder.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
        }
        Ok(path)
    };
    for (path, mode, content) in FILES {
        let path = at(path)?;
        let mode = u32::from_str_radix(mode, 8).context("a mode")?;
        fs::write(&path, content)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    for (path, to) in LINKS {
        let path = at(path)?;
        symlink(to, &path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_runs_the_tests_and_has_the_modes_that_are_written() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        files(folder.path()).unwrap();
        let wants = folder.path().join(LINKS[0].0);
        let unit = fs::read_link(wants).unwrap();
        let unit = folder.path().join(unit.strip_prefix("/").unwrap());
        let text = fs::read_to_string(unit).unwrap();
        assert!(
            text.contains("ExecStart=/payload/remit-tests machine\n"),
            "{text}"
        );
        let id = fs::metadata(folder.path().join("etc/machine-id")).unwrap();
        assert_eq!(id.permissions().mode() & 0o777, 0o444);
    }
}
