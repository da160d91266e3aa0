//! The binary under test, run as anybody would.

use std::{
    fs::File,
    io::{Read as _, Seek as _},
    path::PathBuf,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// What a command said.
#[derive(Debug)]
pub struct Output {
    /// Exit code; 128 + n when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// `$REMIT_BIN`, or `remit` beside this binary.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("REMIT_BIN") {
        let path = PathBuf::from(path);
        if path.is_file() {
            return Ok(path);
        }
        bail!("REMIT_BIN names no file: {}", path.display());
    }
    let beside = std::env::current_exe()?.with_file_name("remit");
    if beside.is_file() {
        return Ok(beside);
    }
    bail!("no remit binary: set REMIT_BIN")
}

/// `$REMIT_NEXT_BIN`: the same of the next ABI version.
pub fn next_binary() -> Result<PathBuf> {
    let path = std::env::var_os("REMIT_NEXT_BIN").map(PathBuf::from);
    match path {
        Some(path) if path.is_file() => Ok(path),
        Some(path) => bail!("REMIT_NEXT_BIN names no file: {}", path.display()),
        None => bail!("no remit binary of the next ABI version: set REMIT_NEXT_BIN"),
    }
}

/// Runs a command to its end, within a minute.
pub fn output(command: &mut Command) -> Result<Output> {
    output_within(command, Duration::from_secs(60))
}

/// Runs a command to its end; one that takes longer is killed, and that is an error.
pub fn output_within(command: &mut Command, most: Duration) -> Result<Output> {
    let (mut out, mut err) = (unnamed()?, unnamed()?);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(err.try_clone()?)
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let until = Instant::now() + most;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > until {
            child.kill()?;
            child.wait()?;
            bail!("{command:?} does not end");
        }
        sleep(Duration::from_millis(2));
    };
    let mut said = Output {
        code: code(status),
        stdout: String::new(),
        stderr: String::new(),
    };
    for (file, text) in [(&mut out, &mut said.stdout), (&mut err, &mut said.stderr)] {
        file.rewind()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        *text = String::from_utf8_lossy(&bytes).into_owned();
    }
    Ok(said)
}

/// Exit code as a shell tells it.
pub fn code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(-1)
}

/// A file without a name: unlike a pipe, a leftover process that holds it blocks nobody.
fn unnamed() -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(std::env::temp_dir())
        .context("cannot make a temporary file")
}
