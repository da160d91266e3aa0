//! What a machine gets to test, on a disk of its own: the package, a second one with a higher
//! version and a daemon of the next ABI version, what the README says to do, and the tests.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use xshell::cmd;

use super::verdict;
use crate::{
    apt, build, dist,
    report::{Outcome, Verdict},
    talk,
    workspace::Workspace,
};

/// The mark of the README's blocks that are run word for word.
const MARK: &str = "```sh install";
/// What is added to the version of the second package.
const HIGHER: &str = "+next1";
/// Room besides the files.
const SLACK: u64 = 8 << 20;

/// A disk with the package, and what lintian said of that.
pub struct Payload {
    /// An ext4 image.
    pub disk: PathBuf,
    /// Whether lintian has nothing to complain of.
    pub lint: Verdict,
}

/// Builds both packages and the disk.
pub fn build(workspace: &Workspace, folder: &Path) -> Result<Payload> {
    let packed = tempfile::tempdir_in(folder).context("cannot make a folder to pack in")?;
    let package = dist::package_for_tests(workspace, packed.path())?;
    let lint = lint(workspace, &package)?;
    let readme = workspace.root.join("README.md");
    let readme =
        fs::read_to_string(&readme).with_context(|| format!("cannot read {}", readme.display()))?;
    let script = install_script(&readme)?;
    let content = tempfile::tempdir_in(folder).context("cannot make a folder to pack")?;
    let at = |name: &str| content.path().join(name);
    fs::write(at("install.sh"), script).context("cannot write the script")?;
    let name = package.file_name().context("the package has no name")?;
    let programs = workspace.static_release();
    for (from, to) in [
        (&package, content.path().join(name)),
        (&programs.join("remit-tests"), at("remit-tests")),
    ] {
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    // A folder of its own: what is installed must be the only package beside the script.
    fs::create_dir(at("next")).context("cannot make a folder")?;
    let next = at("next").join("remit.deb");
    repack(workspace, &package, &programs.join(build::NEXT), &next)?;
    let disk = folder.join("payload.ext4");
    image(content.path(), &disk)?;
    Ok(Payload { disk, lint })
}

/// All that the README's marked blocks say, in order.
fn install_script(readme: &str) -> Result<String> {
    let mut script = String::new();
    let mut inside = false;
    for line in readme.lines() {
        match (inside, line.trim_end()) {
            (false, MARK) => inside = true,
            (true, "```") => inside = false,
            (true, _) => {
                script.push_str(line);
                script.push('\n');
            }
            (false, _) => {}
        }
    }
    ensure!(!inside, "the README's block of commands has no end");
    ensure!(
        !script.trim().is_empty(),
        "the README has no block that begins with {MARK}"
    );
    Ok(script)
}

/// The same package with a higher version, and `program` in place of the daemon.
fn repack(workspace: &Workspace, package: &Path, program: &Path, to: &Path) -> Result<()> {
    const DAEMON: &str = "usr/bin/remit";
    let shell = &workspace.shell;
    let work = tempfile::tempdir_in(workspace.vm()).context("cannot make a folder to unpack in")?;
    let tree = work.path().join("tree");
    cmd!(shell, "dpkg-deb -R {package} {tree}").quiet().run()?;
    let control = tree.join("DEBIAN/control");
    let text = fs::read_to_string(&control).context("the package has no control file")?;
    let higher: String = text
        .lines()
        .map(|line| match line.starts_with("Version: ") {
            true => format!("{line}{HIGHER}\n"),
            false => format!("{line}\n"),
        })
        .collect();
    ensure!(higher.contains(HIGHER), "the package has no version");
    fs::write(&control, higher).context("cannot write the control file")?;
    let daemon = tree.join(DAEMON);
    ensure!(daemon.is_file(), "the package has no {DAEMON}");
    // Over the file, whose mode stays.
    let content =
        fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    fs::write(&daemon, content).with_context(|| format!("cannot write {}", daemon.display()))?;
    let sums = tree.join("DEBIAN/md5sums");
    if let Ok(old) = fs::read_to_string(&sums) {
        let sum = cmd!(shell, "md5sum {daemon}").quiet().read()?;
        let sum = sum
            .split_whitespace()
            .next()
            .context("md5sum says nothing")?;
        let new: String = old
            .lines()
            .map(|line| match line.ends_with(DAEMON) {
                true => format!("{sum}  {DAEMON}\n"),
                false => format!("{line}\n"),
            })
            .collect();
        fs::write(&sums, new).context("cannot write the sums")?;
    }
    cmd!(
        shell,
        "dpkg-deb --root-owner-group -Zgzip -z1 -b {tree} {to}"
    )
    .quiet()
    .ignore_stdout()
    .run()?;
    Ok(())
}

/// Holds the package against Debian's policy.
fn lint(workspace: &Workspace, package: &Path) -> Result<Verdict> {
    const TEST: &str = "package::lintian_has_nothing_to_say";
    let began = Instant::now();
    let shell = &workspace.shell;
    let why = "to check the package";
    if let Err(error) = apt::ensure(shell, "lintian", &["lintian"], why) {
        let why = format!("no lintian: {error:#}");
        return Ok(verdict(TEST, Outcome::NotTested, why, began));
    }
    talk::step("checking the package");
    let output = Command::new("lintian")
        .args(["--allow-root", "--fail-on", "error,warning"])
        .arg(package)
        .output()
        .context("cannot start lintian")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let outcome = match output.status.success() {
        true => Outcome::Passed,
        false => Outcome::Failed,
    };
    let said = match said.trim() {
        "" => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        said => said.to_owned(),
    };
    Ok(verdict(TEST, outcome, said, began))
}

/// An ext4 image of `folder`, everything root's.
fn image(folder: &Path, to: &Path) -> Result<()> {
    let bytes = size(folder)?;
    // Inodes and bitmaps take a part of it.
    let kibibytes = (bytes + bytes / 8 + SLACK) / 1024;
    if to.exists() {
        fs::remove_file(to).with_context(|| format!("cannot remove {}", to.display()))?;
    }
    let output = Command::new("/sbin/mkfs.ext4")
        .args(["-q", "-F", "-E", "root_owner=0:0", "-d"])
        .args([folder, to])
        .arg(format!("{kibibytes}k"))
        .output()
        .context("cannot start mkfs.ext4")?;
    if !output.status.success() {
        bail!("mkfs.ext4: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn size(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
        let about = entry.metadata().context("cannot look at a file")?;
        bytes += match about.is_dir() {
            true => size(&entry.path())?,
            false => about.len(),
        };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_marked_blocks_are_taken_word_for_word() {
        let readme = "text\n```sh\nno\n```\n```sh install\nsudo one\n  two # so\n```\nmore\n\
                      ```sh install\nthree\n```\n```console\nno\n```\n";
        assert_eq!(
            install_script(readme).unwrap(),
            "sudo one\n  two # so\nthree\n"
        );
        assert!(install_script("```sh\nno\n```\n").is_err());
        assert!(install_script("```sh install\nopen\n").is_err());
    }
}
