//! Real processes in cgroups of the tests' own.

use std::{
    fs,
    net::TcpListener,
    os::fd::FromRawFd as _,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::cgroup::testing::Sandbox;

const PATIENCE: Duration = Duration::from_secs(10);
/// [`Signals`] is one to a process.
static SIGNALS: Mutex<()> = Mutex::new(());

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

fn shell(script: &str, user: User) -> Launch {
    let argv = ["/bin/sh", "-c", script].map(OsString::from).to_vec();
    Launch::plan(argv, user, true).unwrap()
}

/// Runs a script to its end and returns what it wrote to `$OUT`.
fn output(sandbox: &Sandbox, joining: Joining, script: &str, user: User) -> (Exit, String) {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    fs::write(&out, "").unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode;
    fs::set_permissions(&out, open(0o666)).unwrap();
    fs::set_permissions(directory.path(), open(0o755)).unwrap();
    let mut launch = shell(&format!("{{ {script}; }} </dev/null >>$OUT 2>&1"), user);
    launch.set_env("OUT", &out);
    let mut child = launch
        .spawn_by(&sandbox.hierarchy, &sandbox.path, joining)
        .unwrap();
    let exit = child.wait().unwrap();
    (exit, fs::read_to_string(out).unwrap())
}

fn nobody() -> User {
    User::Account(Account {
        uid: 65_534,
        gid: 65_533,
        groups: vec![65_533, 65_532],
        name: "someone".to_owned(),
        home: "/nonexistent".into(),
        shell: "/bin/sh".into(),
    })
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = soon();
    while !done() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn the_command_is_in_the_cgroup_from_its_first_instruction() {
    let sandbox = Sandbox::new("first");
    for joining in [Joining::Birth, Joining::Move] {
        let (exit, text) = output(&sandbox, joining, "cat /proc/self/cgroup", User::Same);
        assert_eq!(exit.code, 0);
        let line = format!("0::{}", sandbox.path);
        assert!(
            text.lines().any(|other| other == line),
            "{joining:?}: {text}"
        );
    }
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn a_process_that_is_elsewhere_never_becomes_the_command() {
    let sandbox = Sandbox::new("elsewhere");
    let launch = shell("exit 0", User::Same);
    let directory = sandbox.hierarchy.directory(&sandbox.path);
    for joining in [Joining::Birth, Joining::Move] {
        let (report, reported) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let plan = Plan {
            directory: open(&directory, libc::O_PATH | libc::O_DIRECTORY).unwrap(),
            procs: open(&directory.join("cgroup.procs"), 0).unwrap(),
            membership: b"0::/another".to_vec(),
            account: None,
            no_new_privs: true,
            terminal: false,
            images: launch.program.images(&[]).unwrap(),
            streams: None,
            report: reported,
        };
        let (pid, pidfd) = plan.start(joining).unwrap();
        drop(plan);
        let mut bytes = Vec::new();
        fs::File::from(report).read_to_end(&mut bytes).unwrap();
        let report = child::Report::decode(&bytes).unwrap();
        assert_eq!(report.step, Step::Elsewhere);
        let exit = None;
        let mut child = Child { pid, pidfd, exit };
        assert_eq!(child.wait().unwrap().code, 127);
    }
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn a_cgroup_that_is_gone_is_an_error_and_no_process() {
    let sandbox = Sandbox::new("gone");
    let launch = shell("exit 0", User::Same);
    let gone = sandbox.child("gone");
    let error = launch.spawn(&sandbox.hierarchy, &gone).unwrap_err();
    assert!(matches!(error, Error::Cgroup(_)), "{error:?}");
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn descriptors_from_outside_are_closed() {
    let sandbox = Sandbox::new("descriptors");
    // Inherited by anything that does not take care: no close-on-exec.
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    // SAFETY: plain numbers; the call touches no memory of ours.
    let copy = unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::F_DUPFD, 3) };
    assert!(copy >= 3);
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    let _copy = unsafe { OwnedFd::from_raw_fd(copy) };
    for joining in [Joining::Birth, Joining::Move] {
        // A shell's own redirections may sit at 10 and above; sockets never.
        let script = "ls -l /proc/$$/fd";
        let (exit, text) = output(&sandbox, joining, script, User::Same);
        assert_eq!(exit.code, 0, "{text}");
        assert!(!text.contains("socket:"), "{joining:?}: {text}");
        assert!(!text.contains("cgroup"), "{joining:?}: {text}");
    }
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn the_exit_code_is_the_commands() {
    let sandbox = Sandbox::new("codes");
    for (script, code, signal) in [
        ("exit 0", 0, None),
        ("exit 42", 42, None),
        ("exit 255", 255, None),
        ("kill -TERM $$", 143, Some(libc::SIGTERM)),
        ("kill -KILL $$", 137, Some(libc::SIGKILL)),
    ] {
        let mut child = shell(script, User::Same)
            .spawn(&sandbox.hierarchy, &sandbox.path)
            .unwrap();
        let exit = child.wait().unwrap();
        assert_eq!(exit, Exit { code, signal }, "{script}");
        assert_eq!(child.wait().unwrap(), exit, "asked again");
    }
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn what_can_not_be_executed_says_so_as_a_shell_does() {
    let sandbox = Sandbox::new("exec");
    let directory = tempfile::tempdir().unwrap();
    let open = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    let run = |text: &str, mode: u32, user: User| {
        let file = directory.path().join("command");
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, open(mode)).unwrap();
        fs::set_permissions(directory.path(), open(0o755)).unwrap();
        let argv = vec![file.into_os_string(), "7".into()];
        Launch::plan(argv, user, true)?.spawn(&sandbox.hierarchy, &sandbox.path)
    };
    let error = run("#!/no/such/interpreter\n", 0o755, User::Same).unwrap_err();
    assert_eq!(error.exit_code(), Some(127), "{error:?}");
    let error = run("#!/bin/sh\n", 0o700, nobody()).unwrap_err();
    assert_eq!(error.exit_code(), Some(126), "{error:?}");
    let error = run("#!/bin/sh\n", 0o644, User::Same).unwrap_err();
    assert_eq!(error.exit_code(), Some(126), "{error:?}");
    // No format at all: a shell runs it, as execvp does.
    let mut child = run("exit $1\n", 0o755, User::Same).unwrap();
    assert_eq!(child.wait().unwrap().code, 7);
    assert_eq!(
        sandbox.hierarchy.processes(&sandbox.path, true).unwrap(),
        Vec::<u32>::new()
    );
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn signals_are_as_a_shell_expects_them() {
    let sandbox = Sandbox::new("dispositions");
    let mask = |status: &str, name: &str| {
        let mut lines = status.lines();
        let value = lines.find_map(|line| line.strip_prefix(name));
        u64::from_str_radix(value.unwrap().trim(), 16).unwrap()
    };
    let pipe = 1 << (libc::SIGPIPE - 1);
    let own = fs::read_to_string("/proc/self/status").unwrap();
    assert_ne!(mask(&own, "SigIgn:") & pipe, 0, "Rust ignores SIGPIPE");
    for joining in [Joining::Birth, Joining::Move] {
        let (_, status) = output(&sandbox, joining, "cat /proc/self/status", User::Same);
        assert_eq!(mask(&status, "SigBlk:"), 0);
        assert_eq!(mask(&status, "SigCgt:"), 0);
        // What the caller ignores (nohup) stays ignored.
        assert_eq!(mask(&status, "SigIgn:"), mask(&own, "SigIgn:") & !pipe);
    }
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn the_user_is_laid_down_for_good() {
    let sandbox = Sandbox::new("user");
    let script = "grep -E '^(Uid|Gid|Groups|CapPrm|CapEff|CapInh|CapAmb|NoNewPrivs):' \
                  /proc/self/status; echo $HOME $USER $LOGNAME $SHELL";
    for joining in [Joining::Birth, Joining::Move] {
        let (exit, text) = output(&sandbox, joining, script, nobody());
        assert_eq!(exit.code, 0, "{text}");
        let none = "0000000000000000";
        let expected = format!(
            "Uid:\t65534\t65534\t65534\t65534\n\
             Gid:\t65533\t65533\t65533\t65533\n\
             Groups:\t65532 65533 \n\
             CapInh:\t{none}\nCapPrm:\t{none}\nCapEff:\t{none}\nCapAmb:\t{none}\n\
             NoNewPrivs:\t1\n\
             /nonexistent someone someone /bin/sh\n"
        );
        assert_eq!(text, expected, "{joining:?}");
    }
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn the_user_can_not_leave_the_cgroup() {
    let sandbox = Sandbox::new("leave");
    let procs = sandbox
        .hierarchy
        .directory(&CgroupPath::root())
        .join("cgroup.procs");
    let script = format!("echo 0 > '{}' || cat /proc/self/cgroup", procs.display());
    let (_, text) = output(&sandbox, Joining::Birth, &script, nobody());
    assert!(text.contains(&format!("0::{}", sandbox.path)), "{text}");
}

/// Set for the inner half of the test below, which runs itself as the command.
const INSIDE: &str = "REMIT_TEST_INSIDE_TERMINAL";

/// What the command finds.
fn assert_typing_is_refused() {
    let ioctl = |request: libc::c_ulong| {
        // SAFETY: no descriptor -1 is open, so the kernel never looks at the argument.
        unsafe { libc::syscall(libc::SYS_ioctl, -1, request, 0) };
        io::Error::last_os_error().raw_os_error()
    };
    assert_eq!(ioctl(libc::TIOCGWINSZ), Some(libc::EBADF));
    assert_eq!(ioctl(libc::TIOCSTI), Some(libc::EPERM));
    assert_eq!(ioctl(0xbeef_0000_0000 | libc::TIOCSTI), Some(libc::EPERM));
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn the_command_can_not_type_into_a_shared_terminal() {
    if std::env::var_os(INSIDE).is_some() {
        return assert_typing_is_refused();
    }
    let sandbox = Sandbox::new("terminal");
    let exe = std::env::current_exe().unwrap();
    let inner = format!(
        "{INSIDE}=1 '{}' --ignored --exact launch::tests::the_command_can_not_type_into_a_shared_terminal \
         >/dev/null 2>&1",
        exe.display()
    );
    // The user may not be able to read the build's directory; that there is a filter must do.
    let filtered = "grep -q 'Seccomp:.2' /proc/self/status";
    for (shared, script, user, code) in [
        (true, inner.as_str(), User::Same, 0),
        (false, inner.as_str(), User::Same, 101),
        (true, filtered, nobody(), 0),
        (false, filtered, nobody(), 1),
    ] {
        let mut launch = shell(script, user);
        launch.terminal = shared;
        let mut child = launch.spawn(&sandbox.hierarchy, &sandbox.path).unwrap();
        assert_eq!(child.wait().unwrap().code, code, "{shared} {script}");
    }
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn new_privileges_are_a_choice() {
    let sandbox = Sandbox::new("privileges");
    for (wanted, code) in [(true, 0), (false, 1)] {
        let script = "grep -q 'NoNewPrivs:.1' /proc/self/status";
        let mut launch = shell(script, User::Same);
        launch.no_new_privs = wanted;
        let mut child = launch.spawn(&sandbox.hierarchy, &sandbox.path).unwrap();
        assert_eq!(child.wait().unwrap().code, code);
    }
}

/// A signal to this process that looks as if the terminal had sent it.
fn terminal_sends(signal: i32) {
    // SAFETY: the type is plain data for which all zero is valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    info.si_signo = signal;
    info.si_code = libc::SI_KERNEL;
    let pid = std::process::id();
    // SAFETY: `info` is a whole record. A thread may claim any code to itself.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            pid,
            nix::unistd::gettid().as_raw(),
            signal,
            &raw const info,
        )
    };
    assert_eq!(sent, 0);
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn signals_to_remit_reach_the_command_and_those_before_it_too() {
    let _one = SIGNALS.lock();
    let sandbox = Sandbox::new("forward");
    let directory = tempfile::tempdir().unwrap();
    let ready = directory.path().join("ready");
    let mut launch = shell(
        "trap 'exit 9' USR1; trap 'echo term >>$READY' TERM; \
         trap 'echo int >>$READY' INT; echo up >>$READY; \
         while :; do sleep 0.01; done",
        User::Same,
    );
    launch.set_env("READY", &ready);
    let mut signals = Signals::catch().unwrap();
    assert!(Signals::catch().is_err(), "one at a time");
    assert_eq!(signals.interrupted(), None);
    let mut child = launch.spawn(&sandbox.hierarchy, &sandbox.path).unwrap();
    let says = |text: &str| fs::read_to_string(&ready).is_ok_and(|all| all.contains(text));
    eventually("the command is up", || says("up"));

    let own = nix::unistd::Pid::this();
    nix::sys::signal::kill(own, nix::sys::signal::SIGTERM).unwrap();
    eventually("caught", || signals.interrupted() == Some(libc::SIGTERM));
    signals.forward_to(&child).unwrap();
    eventually("what came before is passed on", || says("term"));
    assert_eq!(signals.interrupted(), None);

    // Ctrl-C reaches the command from the terminal itself, so it is not sent a second time.
    terminal_sends(libc::SIGINT);
    assert_eq!(child.try_wait().unwrap(), None);
    nix::sys::signal::kill(own, nix::sys::signal::SIGUSR1).unwrap();
    assert_eq!(child.wait().unwrap().code, 9);
    assert!(!says("int"));
    // With the command gone a signal has no addressee, and harms nobody. (To this very thread:
    // it must have arrived before the handlers go.)
    nix::sys::signal::raise(nix::sys::signal::SIGUSR2).unwrap();
    drop(signals);
    drop(Signals::catch().unwrap());
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn the_cgroup_ends_with_all_that_daemonised_in_it() {
    let sandbox = Sandbox::new("daemons");
    let (hierarchy, path) = (&sandbox.hierarchy, &sandbox.path);
    let script = "(setsid sh -c 'trap \"\" TERM HUP INT; sleep 60 & sleep 60' &) ; exit 3";
    let mut child = shell(script, User::Same).spawn(hierarchy, path).unwrap();
    assert_eq!(child.wait().unwrap().code, 3);
    eventually("the daemons are up", || {
        hierarchy.processes(path, true).unwrap().len() >= 3
    });
    hierarchy.kill(path).unwrap();
    assert!(hierarchy.wait_empty(path, soon()).unwrap());
    assert_eq!(hierarchy.remove(path).unwrap(), 1);
    hierarchy.create(path).unwrap();
}

#[test]
#[ignore = "needs root and cgroup v2"]
fn starting_from_many_threads_is_safe_and_fast() {
    let sandbox = Sandbox::new("threads");
    let launch = shell("exit 0", User::Same);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let relaxed = std::sync::atomic::Ordering::Relaxed;
    let mut times = Vec::new();
    thread::scope(|scope| {
        for _ in 0..3 {
            // Allocation all the time: a child that allocated would meet a held lock.
            scope.spawn(|| {
                while !stop.load(relaxed) {
                    drop(std::hint::black_box(vec![0_u8; 4096]));
                }
            });
        }
        for _ in 0..100 {
            let start = Instant::now();
            let mut child = launch.spawn(&sandbox.hierarchy, &sandbox.path).unwrap();
            times.push(start.elapsed());
            assert_eq!(child.wait().unwrap().code, 0);
        }
        stop.store(true, relaxed);
    });
    times.sort();
    eprintln!(
        "spawn under load: median {:?}, worst {:?}",
        times[50], times[99]
    );
}
