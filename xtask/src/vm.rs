//! Boots each kernel of the matrix with the static test programs as its whole user space, and
//! reads their report from the serial console. No network card, no disk, nothing shared with the
//! machine that runs it.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    num::NonZeroUsize,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::{Mutex, OnceLock, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use nix::sys::{prctl, signal::Signal};

use crate::{
    apt, build,
    initramfs::Archive,
    kernels::{self, Kernel, WANTED, Wanted},
    machine,
    report::{self, Findings, Place, State},
    talk,
    watch::{self, Limits, Show},
    workspace::Workspace,
};

pub const QEMU: &str = "qemu-system-x86_64";
/// A test that says nothing for so long hangs, also on emulated processors of a busy machine.
const SILENCE: Duration = Duration::from_secs(180);
/// No kernel's tests take longer than this on emulated processors.
const WHOLE: Duration = Duration::from_secs(60 * 60);
/// The same for tests in their full length.
const FULL: Limits = Limits {
    silence: Duration::from_secs(90 * 60),
    whole: Duration::from_secs(6 * 3600),
};
/// Boots that are tried anew when the emulator failed.
pub const RETRIES: usize = 2;
/// A test waits more than it works, so two VMs at a time end sooner than one after the other.
const JOBS: NonZeroUsize = NonZeroUsize::new(2).unwrap();
/// Ample for a kernel that runs on real processors to get as far as looking for its root.
const PROBE: Duration = Duration::from_secs(20);

/// What `cargo xtask vm` takes.
#[derive(Args, Clone)]
pub struct Options {
    /// Boot only this kernel: 6.1, 6.12 or newest; may be given more than once
    #[arg(long, value_name = "NAME")]
    kernel: Vec<String>,
    /// Run only tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Run the long tests in their full length: hours on emulated processors
    #[arg(long)]
    full: bool,
    /// Say which kernels there are, and boot none
    #[arg(long)]
    list: bool,
    /// Look for newer kernels instead of taking the cached ones
    #[arg(long)]
    refresh: bool,
    /// VMs that run at the same time; emulated, two of them keep two cores busy
    #[arg(long, default_value_t = JOBS, value_name = "N")]
    jobs: NonZeroUsize,
    /// Memory of a VM in MiB
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    mem: u32,
    /// Boot this static program as the first process instead of the kernel tests
    #[arg(long, value_name = "FILE")]
    init: Option<PathBuf>,
    /// Boot whole Debian machines with systemd instead, and test the package there
    #[arg(long, conflicts_with_all = ["kernel", "filter", "full", "list", "refresh", "mem", "init"])]
    systemd: bool,
    /// Boot only the machine of this suite: bookworm or trixie; may be given more than once
    #[arg(long, value_name = "NAME", requires = "systemd")]
    suite: Vec<String>,
    /// Take the programs as the last build left them
    #[arg(long)]
    as_built: bool,
    /// Print the whole console
    #[arg(long, short)]
    verbose: bool,
}

impl Options {
    /// Every kernel and every test.
    pub fn all(verbose: bool) -> Self {
        Self {
            kernel: Vec::new(),
            filter: None,
            full: false,
            list: false,
            refresh: false,
            jobs: JOBS,
            mem: 1024,
            init: None,
            systemd: false,
            suite: Vec::new(),
            as_built: false,
            verbose,
        }
    }
}

/// `cargo xtask vm`.
pub fn command(workspace: &Workspace, options: &Options) -> Result<ExitCode> {
    let wanted = chosen(&options.kernel)?;
    if options.list {
        for wanted in wanted {
            match kernels::cached(workspace, wanted) {
                Some(kernel) => println!("{:<8} {}", wanted.name, kernel.release),
                None => println!("{:<8} not fetched yet", wanted.name),
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    if options.init.is_none() && !options.as_built {
        build::static_programs(workspace)?;
    }
    let places = if options.systemd {
        machine::run(workspace, &options.suite, options.verbose)?
    } else {
        run(workspace, options)?
    };
    print!("{}", report::table(&places));
    let sum = report::total(&places);
    println!("{sum}");
    // Asked for VMs and got none: that is no success either.
    let none = places
        .iter()
        .all(|place| matches!(place.state, State::NotTested(_)));
    Ok(if sum.failed > 0 || none {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Boots the chosen kernels, as many at a time as asked for. The static programs must have been
/// built. Whatever keeps a kernel from running is that place's state, not an error of the whole.
pub fn run(workspace: &Workspace, options: &Options) -> Result<Vec<Place>> {
    if let Some(filter) = &options.filter {
        ensure!(
            filter
                .chars()
                .all(|character| character.is_ascii_graphic() && character != '"'),
            "`{filter}` cannot be passed on a kernel's command line: no spaces or quotes"
        );
    }
    let folder = workspace.vm();
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let wanted = chosen(&options.kernel)?;
    let qemu = apt::ensure(
        &workspace.shell,
        QEMU,
        &["qemu-system-x86"],
        "to boot kernels for the tests",
    );
    let mut guests = Vec::new();
    // Fetched one after the other: apt stands no company.
    for wanted in &wanted {
        let kernel = match &qemu {
            Err(error) => Err(format!("{error:#}")),
            Ok(()) => kernels::ensure(workspace, wanted, options.refresh)
                .map_err(|error| format!("no kernel: {error:#}")),
        };
        guests.push(match kernel {
            Err(why) => Err(why),
            Ok(kernel) => Ok(Guest {
                accelerator: Accelerator::find(&folder, &kernel)?,
                initramfs: initramfs(workspace, &kernel, options.init.as_deref())?,
                log: folder.join(format!("{}.log", kernel.name)),
                kernel,
            }),
        });
    }
    let places: Vec<OnceLock<Place>> = wanted.iter().map(|_| OnceLock::new()).collect();
    // The newest first: its verifier makes it the longest.
    let waiting: Mutex<Vec<usize>> = Mutex::new((0..wanted.len()).collect());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop();
    thread::scope(|scope| {
        for _ in 0..options.jobs.get() {
            scope.spawn(|| {
                while let Some(index) = next() {
                    let place = place(wanted[index], guests[index].as_ref(), options);
                    talk::note(&place.closing());
                    // Each index is handed out once.
                    drop(places[index].set(place));
                }
            });
        }
    });
    Ok(places
        .into_iter()
        .filter_map(OnceLock::into_inner)
        .collect())
}

/// What becomes of one kernel.
fn place(wanted: &Wanted, guest: Result<&Guest, &String>, options: &Options) -> Place {
    let began = Instant::now();
    let (release, state) = match guest {
        Err(why) => ("-", State::NotTested(why.clone())),
        Ok(guest) => {
            let findings = guest.run(options);
            let findings = findings.unwrap_or_else(|error| Findings::broken(&error));
            (guest.kernel.release.as_str(), State::Ran(findings))
        }
    };
    Place {
        name: format!("VM {}", wanted.name),
        kernel: release.to_owned(),
        state,
        took: began.elapsed(),
    }
}

/// Places for kernels that are not booted at all, so that the table still names them.
pub fn not_tested(why: &str) -> Vec<Place> {
    WANTED
        .iter()
        .map(|wanted| Place {
            name: format!("VM {}", wanted.name),
            kernel: "-".to_owned(),
            state: State::NotTested(why.to_owned()),
            took: Duration::ZERO,
        })
        .collect()
}

fn chosen(names: &[String]) -> Result<Vec<&'static Wanted>> {
    for name in names {
        ensure!(
            WANTED.iter().any(|wanted| wanted.name == name),
            "there is no kernel `{name}`: there are {}",
            WANTED.map(|wanted| wanted.name).join(", ")
        );
    }
    Ok(WANTED
        .iter()
        .filter(|wanted| names.is_empty() || names.iter().any(|name| name == wanted.name))
        .collect())
}

/// A VM that is ready to boot.
struct Guest {
    kernel: Kernel,
    accelerator: Accelerator,
    initramfs: PathBuf,
    log: PathBuf,
}

impl Guest {
    /// Boots it and reads its report.
    fn run(&self, options: &Options) -> Result<Findings> {
        let filter = match &options.filter {
            Some(filter) => format!(" remit.filter={filter}"),
            None => String::new(),
        };
        let full = if options.full { " remit.full" } else { "" };
        let show = Show {
            name: &format!("VM {}", self.kernel.name),
            log: &self.log,
            verbose: options.verbose,
        };
        let lean = Limits {
            silence: SILENCE,
            whole: WHOLE,
        };
        let limits = if options.full { &FULL } else { &lean };
        for retry in 0..=RETRIES {
            let mut qemu = emulator(&self.kernel, self.accelerator, options.mem);
            qemu.arg("-initrd").arg(&self.initramfs);
            qemu.args([
                "-append",
                &format!("console=ttyS0 panic=-1 quiet{filter}{full}"),
            ]);
            let findings = watch::run(qemu, limits, &show)?;
            if self.accelerator != Accelerator::Tcg
                || retry == RETRIES
                || !emulator_failed(&self.log)
            {
                return Ok(findings);
            }
            talk::note(&format!(
                "{}: the emulator ran a breakpoint that the kernel had taken away; booting again",
                self.kernel.name
            ));
        }
        bail!("no boot of {} was tried", self.kernel.name)
    }
}

/// Whether the kernel died of an `int3` of its own. It patches code that runs (static keys) by way
/// of a breakpoint, and emulated processors of several threads can run into one that is gone.
/// Nothing in user space can cause it.
pub fn emulator_failed(log: &Path) -> bool {
    fs::read(log).is_ok_and(|text| {
        let text = String::from_utf8_lossy(&text);
        text.contains("Oops: int3") && text.contains("Kernel panic")
    })
}

/// Writes the kernel's initramfs, and says where it is.
fn initramfs(workspace: &Workspace, kernel: &Kernel, init: Option<&Path>) -> Result<PathBuf> {
    let mut archive = Archive::new()?;
    match init {
        Some(init) => archive.program("init", init)?,
        None => {
            let programs = workspace.static_release();
            archive.program("init", &programs.join("init"))?;
            archive.program("bin/remit", &programs.join("remit"))?;
            archive.program("bin/remit-next", &programs.join(build::NEXT))?;
            archive.program("bin/remit-tests", &programs.join("remit-tests"))?;
        }
    }
    let policies = workspace.root.join("policies");
    if policies.is_dir() {
        archive.tree("policies", &policies)?;
    }
    archive.tree("modules", &kernel.modules)?;
    let image = workspace.vm().join(format!("{}.cpio", kernel.name));
    fs::write(&image, archive.finish()?)
        .with_context(|| format!("cannot write {}", image.display()))?;
    Ok(image)
}

/// QEMU with everything but the initramfs, disks and the kernel's command line.
pub fn emulator(kernel: &Kernel, accelerator: Accelerator, mem: u32) -> Command {
    let mut qemu = Command::new(QEMU);
    qemu.args(accelerator.arguments());
    qemu.args([
        "-m",
        &mem.to_string(),
        "-smp",
        "2",
        "-nic",
        "none",
        "-no-reboot",
    ]);
    qemu.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(&kernel.image);
    let end_with_us = || Ok(prctl::set_pdeathsig(Signal::SIGKILL)?);
    // SAFETY: the closure runs between fork and exec and makes one prctl system call: it takes no
    // lock and allocates nothing.
    unsafe { qemu.pre_exec(end_with_us) };
    qemu
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Accelerator {
    Kvm,
    /// QEMU's own translation.
    Tcg,
}

impl Accelerator {
    fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }

    /// KVM where a guest runs on it. A device that opens proves nothing (nested virtualisation
    /// may be off or broken), so a kernel is booted; the answer is kept for this host kernel.
    pub fn find(folder: &Path, kernel: &Kernel) -> Result<Self> {
        let host = nix::sys::utsname::uname().context("cannot tell this kernel's release")?;
        let host = host.release().to_string_lossy().into_owned();
        let cache = folder.join("accelerator");
        let known = fs::read_to_string(&cache).unwrap_or_default();
        match known.split_once(' ') {
            Some(("kvm", on)) if on == host => return Ok(Self::Kvm),
            Some(("tcg", on)) if on == host => return Ok(Self::Tcg),
            _ => {}
        }
        let (found, word) = if Path::new("/dev/kvm").exists() && Self::kvm_boots(kernel)? {
            (Self::Kvm, "kvm")
        } else {
            (Self::Tcg, "tcg")
        };
        talk::note(match found {
            Self::Kvm => "guests run on KVM",
            Self::Tcg => "no guest runs on KVM here: emulating, which is slower",
        });
        fs::write(&cache, format!("{word} {host}"))
            .with_context(|| format!("cannot write {}", cache.display()))?;
        Ok(found)
    }

    /// Whether `kernel`, given no root at all, gets as far as to complain about it.
    fn kvm_boots(kernel: &Kernel) -> Result<bool> {
        let mut qemu = emulator(kernel, Self::Kvm, 512);
        qemu.args(["-append", "console=ttyS0 panic=-1"]);
        qemu.stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = qemu
            .spawn()
            .with_context(|| format!("cannot start {QEMU}"))?;
        let console = child.stdout.take().context("QEMU has no console")?;
        let (sender, answer) = mpsc::channel();
        thread::spawn(move || {
            let booted = BufReader::new(console)
                .split(b'\n')
                .map_while(Result::ok)
                .any(|line| String::from_utf8_lossy(&line).contains("Unable to mount root fs"));
            // The probe may be over; then no one waits for the answer.
            let _ = sender.send(booted);
        });
        let booted = answer.recv_timeout(PROBE).unwrap_or(false);
        // Ended by itself after the panic, or must end now.
        drop(child.kill());
        child
            .wait()
            .with_context(|| format!("cannot wait for {QEMU}"))?;
        Ok(booted)
    }
}
