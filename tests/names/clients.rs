//! Unmodified programs: each resolves and reaches what is in scope, and is told of what is not.
//! Those that a machine does not have are not tested there.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};

use super::{Spec, Zone, guarded, once};
use crate::{
    actor::Op,
    harness::{Case, Outcome},
    support::{Agent, Ctx, Fixture, claim, expect},
};

const NAME: &str = "api.names.example";
const OTHER: &str = "paste.names.example";
const ADDR: &str = "203.0.113.50";
/// What the server says.
pub const HELLO: &str = "hello from inside the scope";

/// A program, and how it is made to ask for a name.
struct Program {
    name: &'static str,
    /// What it needs to be there, and a way to see that it works.
    needs: &'static [&'static [&'static str]],
    /// Its arguments: `{name}` and `{dir}` are filled in.
    line: &'static [&'static str],
    /// Part of what it prints when all went well.
    says: &'static str,
}

/// Go's own resolver; built where there is a Go.
const GO: &str = r#"
package main

import ("fmt"; "io"; "net"; "os")

func main() {
	net.DefaultResolver.PreferGo = true
	stream, err := net.Dial("tcp", os.Args[1]+":80")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Fprintf(stream, "GET /hello HTTP/1.0\r\nHost: %s\r\n\r\n", os.Args[1])
	text, _ := io.ReadAll(stream)
	fmt.Println(string(text))
}
"#;

const PROGRAMS: [Program; 8] = [
    Program {
        name: "curl",
        needs: &[&["curl", "--version"]],
        line: &["curl", "-sS", "--max-time", "20", "http://{name}/hello"],
        says: HELLO,
    },
    Program {
        name: "python_requests",
        needs: &[&["python3", "-c", "import requests"]],
        line: &[
            "python3",
            "-c",
            "import requests; print(requests.get('http://{name}/hello', timeout=20).text)",
        ],
        says: HELLO,
    },
    Program {
        name: "node_fetch",
        needs: &[&["node", "-e", "fetch"]],
        line: &[
            "node",
            "-e",
            "fetch('http://{name}/hello').then(r => r.text()).then(console.log).catch(e => { \
             console.error(e); process.exit(1) })",
        ],
        says: HELLO,
    },
    // c-ares, which `fetch` does not use.
    Program {
        name: "node_resolve",
        needs: &[&["node", "-e", "fetch"]],
        line: &[
            "node",
            "-e",
            "require('dns').resolve4('{name}', (e, found) => { console.log(e ? e.code : found[0]); \
             process.exit(e ? 1 : 0) })",
        ],
        says: ADDR,
    },
    Program {
        name: "go",
        needs: &[&["go", "version"]],
        line: &["go", "run", "{dir}/ask.go", "{name}"],
        says: HELLO,
    },
    Program {
        name: "dig",
        needs: &[&["dig", "-v"]],
        line: &["dig", "+tries=1", "+time=10", "{name}"],
        says: ADDR,
    },
    Program {
        name: "git_over_https",
        needs: &[&["git", "--version"], &["openssl", "version"]],
        line: &[
            "git",
            "-c",
            "http.sslVerify=false",
            "ls-remote",
            "https://{name}/repo.git",
        ],
        says: "refs/heads/main",
    },
    Program {
        name: "pip",
        needs: &[&["python3", "-m", "pip", "--version"]],
        line: &[
            "python3",
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--no-cache-dir",
            "--retries=0",
            "download",
            "--no-deps",
            "--index-url",
            "http://{name}/simple/",
            "--trusted-host={name}",
            "--dest={dir}/down",
            "probe-of-names",
        ],
        says: "probe_of_names-1.0",
    },
];

/// Serves a folder by HTTP and, where there is a certificate, HTTPS.
const SERVER: &str = r#"
import functools, http.server, os, ssl, sys, threading, zipfile
root, cert = sys.argv[1], sys.argv[2]
with zipfile.ZipFile(os.path.join(root, "probe_of_names-1.0-py3-none-any.whl"), "w") as wheel:
    info = "probe_of_names-1.0.dist-info/"
    wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: probe-of-names\nVersion: 1.0\n")
    wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(info + "RECORD", "")
class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass
handler = functools.partial(Quiet, directory=root)
servers = [http.server.ThreadingHTTPServer(("0.0.0.0", 80), handler)]
if os.path.exists(cert):
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 443), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    servers.append(server)
for server in servers:
    threading.Thread(target=server.serve_forever, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"#;

/// The web server of a case, outside of the fence.
pub struct Web(Child);

impl Drop for Web {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Runs a command to its end; whether it went well, and all that it said.
pub fn said(command: &mut Command) -> Result<(bool, String)> {
    let output = command.stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    Ok((output.status.success(), text))
}

/// The first of these commands that does not work here.
pub fn missing(needs: &[&[&str]]) -> Option<String> {
    let first = needs.iter().find(|needed| !works(needed))?;
    Some(format!("no {}", first.join(" ")))
}

fn works(line: &[&str]) -> bool {
    let mut words = line.iter();
    let program = words.next();
    program.is_some_and(|program| {
        said(Command::new(program).args(words)).is_ok_and(|(works, _)| works)
    })
}

/// Lays out what the server serves, and starts it.
pub fn web(dir: &Path) -> Result<Web> {
    let root = dir.join("web");
    fs::create_dir_all(root.join("simple/probe-of-names"))?;
    fs::write(root.join("hello"), HELLO)?;
    fs::write(
        root.join("simple/probe-of-names/index.html"),
        "<a href=\"/probe_of_names-1.0-py3-none-any.whl\">probe_of_names-1.0-py3-none-any.whl</a>",
    )?;
    // A repository as a plain web server serves it.
    let repo = root.join("repo.git");
    fs::create_dir_all(repo.join("info"))?;
    fs::write(repo.join("HEAD"), "ref: refs/heads/main\n")?;
    fs::write(
        repo.join("info/refs"),
        format!("{}\trefs/heads/main\n", "1".repeat(40)),
    )?;
    let cert = dir.join("cert.pem");
    let path = cert.display().to_string();
    let subject = format!("/CN={NAME}");
    // Without openssl there is no HTTPS, and no case that needs it.
    drop(said(Command::new("openssl").args([
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", &subject,
        "-keyout", &path, "-out", &path,
    ])));
    if let Ok(text) = fs::read_to_string(&cert)
        && !text.contains("PRIVATE KEY")
    {
        bail!("openssl wrote no key into {path}");
    }
    let mut child = Command::new("python3")
        .args(["-c", SERVER])
        .args([&root, &cert])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the web server")?;
    let mut line = String::new();
    let out = child.stdout.take().context("no output")?;
    BufReader::new(out).read_line(&mut line)?;
    let web = Web(child);
    expect("the web server", line.trim(), "ready")?;
    Ok(web)
}

/// A `resolv.conf` of the case's own, for what reads one.
pub fn resolv(ctx: &Ctx) -> Result<()> {
    let path = ctx.dir().join("resolv.conf");
    fs::write(&path, "nameserver 192.0.2.53\noptions timeout:5\n")?;
    mount(
        Some(&path),
        "/etc/resolv.conf",
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .context("cannot mount over /etc/resolv.conf")
}

fn agent() -> Agent {
    Agent::new("alpha").allow(NAME, "80, 443")
}

fn spec() -> Spec {
    Spec::new().host(NAME, &[ADDR]).host(OTHER, &[ADDR])
}

/// The program with `name`, inside the fence.
fn inside(fx: &Fixture, dir: &Path, program: &Program, name: &str) -> Result<(bool, String)> {
    let fill = |word: &&str| {
        word.replace("{name}", name)
            .replace("{dir}", &dir.display().to_string())
    };
    let words: Vec<String> = program.line.iter().map(fill).collect();
    let (first, rest) = words.split_first().context("no command")?;
    let mut command = Command::new(first);
    command
        .args(rest)
        .current_dir(dir)
        .env("HOME", dir)
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GO111MODULE", "off")
        .env("GOTOOLCHAIN", "local")
        .env("CGO_ENABLED", "0");
    for proxy in [
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    ] {
        command.env_remove(proxy);
    }
    for variable in std::env::vars().map(|(key, _)| key) {
        if variable.starts_with("PIP_") {
            command.env_remove(variable);
        }
    }
    let procs = fx.cgroup("alpha")?.path().join("cgroup.procs");
    // SAFETY: the case's process has one thread, so the child may allocate.
    unsafe { command.pre_exec(move || fs::write(&procs, "0")) };
    said(&mut command)
}

fn program(ctx: &Ctx, program: &Program) -> Result<Outcome> {
    if !works(&["python3", "-c", "import ssl, zipfile"]) {
        return Ok(Outcome::NotTested("no python3 to serve with".to_owned()));
    }
    if let Some(missing) = missing(program.needs) {
        return Ok(Outcome::NotTested(missing));
    }
    resolv(ctx)?;
    let mut zone = Zone::start(&spec())?;
    let fx = guarded(ctx, &[agent()], &zone, "")?;
    let _web = web(ctx.dir())?;
    fs::write(ctx.dir().join("ask.go"), GO)?;
    let (went_well, text) = inside(&fx, ctx.dir(), program, NAME)?;
    claim(went_well && text.contains(program.says), || {
        format!("with {NAME}: {text}")
    })?;
    let before = fx.violations()?.len();
    let (went_well, text) = inside(&fx, ctx.dir(), program, OTHER)?;
    claim(
        !text.contains(program.says) && (!went_well || program.name == "dig"),
        || format!("with {OTHER}: {text}"),
    )?;
    if program.name == "dig" {
        // Extended DNS Errors are printed by dig 9.18 and later.
        let reason = format!("agent alpha may not resolve {OTHER}");
        for told in ["REFUSED", "EDE: 18", &reason] {
            claim(text.contains(told), || format!("no {told} in {text}"))?;
        }
    }
    let line = fx.await_line(before, "alpha", |line| {
        line.text("/metadata/event_code") == "RM1101"
    })?;
    expect("name", line.text("/query/hostname"), OTHER)?;
    let leaked = zone.asked()?.iter().any(|(name, _)| name == OTHER);
    claim(!leaked, || "upstream was asked for it".to_owned())?;
    Ok(Outcome::Passed)
}

/// musl's own resolver: that of this binary.
fn musl(ctx: &Ctx) -> Result<()> {
    resolv(ctx)?;
    let zone = Zone::start(&spec())?;
    let mut fx = guarded(ctx, &[agent()], &zone, "")?;
    let mut actor = fx.actor("alpha")?;
    let found = actor.ask(&Op::GetAddrInfo {
        host: NAME.to_owned(),
    })?;
    expect("errno", found.errno, 0)?;
    expect(
        "address",
        found.addr.map(|addr| addr.ip()),
        Some(ADDR.parse()?),
    )?;
    let to = format!("{ADDR}:443").parse()?;
    let id = actor.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let reply = actor.ask(&Op::Connect {
        id,
        addr: to,
        timeout_ms: 2000,
    })?;
    // Let through, to where nobody listens.
    expect("errno of the connect", reply.errno, libc::ECONNREFUSED)?;
    let before = fx.violations()?.len();
    let found = actor.ask(&Op::GetAddrInfo {
        host: OTHER.to_owned(),
    })?;
    claim(found.errno != 0, || "it found the other".to_owned())?;
    let line = fx.await_line(before, "alpha", |line| line.0["class_uid"] == 4003)?;
    expect("name", line.text("/query/hostname"), OTHER)?;
    // It overlooks that sendto was refused, and waits for its own timeout.
    fx.daemon.kill()?;
    let found = actor.ask(&Op::GetAddrInfo {
        host: NAME.to_owned(),
    })?;
    claim(found.errno != 0 && found.ms < 8000.0, || {
        format!(
            "without a daemon: errno {} after {} ms",
            found.errno, found.ms
        )
    })
}

/// All cases here.
pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = PROGRAMS
        .iter()
        .map(|each| {
            let mut case = Case::with_outcome(format!("names::client_{}", each.name), move |ctx| {
                program(ctx, each)
            });
            if each.name == "go" {
                // It compiles its standard library first.
                case.deadline = Duration::from_secs(180);
            }
            case
        })
        .collect();
    cases.push(once("client_musl", |ctx| musl(ctx)));
    cases
}
