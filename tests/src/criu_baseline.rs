//! The rival: CRIU's own `dump --lazy-pages`, `lazy-pages` and `restore`, over plain TCP, as its manual tells.
//!
//! The choreography is as tight as a careful operator's script can make it: images are in memory on both hosts and go over
//! the path in one TCP connection without a program being started for it, the daemon starts while the address moves, logs
//! are at the default level.

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;
use serde::Serialize;

use crate::identity::Identities;
use crate::images::Images;
use crate::process::Process;
use crate::rig::Rig;
use crate::sysctl::Sysctl;
use crate::task;
use crate::wait::wait_for;

/// CRIU's page server on the source.
const PORT: &str = "27027";
/// Longer than any step of a move that works.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pipes that CRIU's dump may have where it lacks CAP_SYS_RESOURCE, which else sets no limit to them. With those of 1 MiB
/// that are the default it holds many more of them, and the dump of 1 GiB takes some 40 ms longer.
const PIPE_BYTES: u64 = 64 << 20;

/// What the move took, each from the start of `criu dump`.
#[derive(Debug, Clone, Serialize)]
pub struct BaselineRecord {
    /// The dump is complete and its page server listens.
    pub dumped_us: u64,
    /// `criu restore` has returned: the tasks run.
    pub restored_us: u64,
    /// The last page has arrived and both ends are gone.
    pub total_us: u64,
    /// The root of the tree on the destination.
    #[serde(skip)]
    pub pid: Pid,
}

/// A PID namespace on the destination, for the tree wants its old PIDs; kept until dropped.
#[derive(Debug)]
pub struct BaselineHome {
    _holder: Process,
    init: Pid,
}

impl BaselineHome {
    /// Makes the namespace; nothing of it is part of what is measured.
    pub fn new(rig: &Rig) -> Result<Self> {
        let mut command = rig.destination.command("unshare");
        command.args([
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sleep",
            "infinity",
        ]);
        let holder = Process::start_detached("baseline-home", &mut command)?;
        let init = wait_for(PATIENCE, "the init of the new PID namespace", || {
            task::descendants(holder.pid())
                .into_iter()
                .find(|pid| task::name(*pid) == "sleep")
        })?;
        Ok(Self {
            _holder: holder,
            init,
        })
    }

    /// Its first process.
    pub(crate) fn init(&self) -> Pid {
        self.init
    }
}

/// Lets CRIU have pipes as large as it likes, whoever calls it, until this is dropped.
pub fn large_pipes() -> Result<Sysctl> {
    Sysctl::raise("fs/pipe-max-size", PIPE_BYTES)
}

/// Moves the tree under `pid` from the source of `rig` to `home`, with the service address.
pub fn migrate(rig: &Rig, home: &BaselineHome, criu: &Path, pid: Pid) -> Result<BaselineRecord> {
    migrate_with(rig, home, criu, pid, None)
}

/// The same, with pages going over TLS between hosts that have `identities`.
pub fn migrate_with(
    rig: &Rig,
    home: &BaselineHome,
    criu: &Path,
    pid: Pid,
    identities: Option<&Identities>,
) -> Result<BaselineRecord> {
    let _pipes = large_pipes()?;
    let run = Run::new(rig, home, criu, identities)?;
    run.go(pid).with_context(|| run.errors())
}

/// Options of `criu dump` that have it lock connections as our programs have it do, if it can: by default it starts
/// iptables twice for each, which takes seconds for hundreds of them.
pub fn network_lock(criu: &Path) -> &'static [&'static str] {
    static CAN: OnceLock<bool> = OnceLock::new();
    let can = || {
        let mut check = Command::new(criu);
        check.args(["check", "--feature", "network_lock_nftables"]);
        let quiet = check.stdout(Stdio::null()).stderr(Stdio::null());
        quiet.status().is_ok_and(|status| status.success())
    };
    match CAN.get_or_init(can) {
        true => &["--network-lock", "nftables"],
        false => &[],
    }
}

struct Run<'a> {
    rig: &'a Rig,
    home: &'a BaselineHome,
    criu: &'a Path,
    images: Images,
    identities: Option<&'a Identities>,
    started: Instant,
}

impl<'a> Run<'a> {
    fn new(
        rig: &'a Rig,
        home: &'a BaselineHome,
        criu: &'a Path,
        identities: Option<&'a Identities>,
    ) -> Result<Self> {
        Ok(Self {
            rig,
            home,
            criu,
            images: Images::make()?,
            identities,
            started: Instant::now(),
        })
    }

    fn go(&self, pid: Pid) -> Result<BaselineRecord> {
        let mut restored = self.until_restored(pid)?;
        restored.daemon.finish()?;
        restored.dump.finish()?;
        Ok(BaselineRecord {
            dumped_us: restored.dumped_us,
            restored_us: restored.restored_us,
            total_us: self.elapsed_us(),
            pid: self.root_of(pid)?,
        })
    }

    /// From the frozen tree to the running one, most of whose pages are missing.
    fn until_restored(&self, pid: Pid) -> Result<Restored> {
        let service = self.rig.service;
        let dump = Background::start("criu dump", self.dump(pid))?;
        let dumped_us = self.elapsed_us();
        let daemon = std::thread::scope(|scope| {
            let daemon = scope.spawn(|| {
                self.images.copy(self.rig)?;
                Background::start("criu lazy-pages", self.lazy_pages())
            });
            self.rig.source.shell(&service.on_frozen())?;
            self.rig.destination.shell(&service.before_restore())?;
            daemon
                .join()
                .unwrap_or_else(|_| bail!("starting criu lazy-pages panicked"))
        });
        let daemon = daemon?;
        crate::shell::run(&mut self.restore())?;
        let restored_us = self.elapsed_us();
        self.rig.destination.shell(&service.on_resumed())?;
        Ok(Restored {
            dump,
            daemon,
            dumped_us,
            restored_us,
        })
    }

    fn root_of(&self, pid: Pid) -> Result<Pid> {
        task::outer_pid(self.home.init, pid.as_raw()).context("the restored root is not there")
    }

    fn dump(&self, pid: Pid) -> Command {
        let mut command = self.rig.source.command(self.criu);
        command.args([
            "dump",
            "--tree",
            &pid.to_string(),
            "--log-file",
            "dump.log",
            "--lazy-pages",
        ]);
        command.args(["--address", "0.0.0.0", "--port", PORT, "--tcp-established"]);
        command.args(network_lock(self.criu));
        command.args(tls(self.identities.map(|both| &both.source)));
        complete(command, self.images.here())
    }

    fn lazy_pages(&self) -> Command {
        let mut command = self.rig.destination.command(self.criu);
        command.args([
            "lazy-pages",
            "--page-server",
            "--log-file",
            "lazy-pages.log",
        ]);
        command.args([
            "--address",
            &self.rig.source.address().to_string(),
            "--port",
            PORT,
        ]);
        command.args(tls(self.identities.map(|both| &both.destination)));
        complete(command, self.images.there())
    }

    fn restore(&self) -> Command {
        let mut command = self.rig.destination.command("nsenter");
        command
            .args(["-t", &self.home.init.to_string(), "--pid", "--mount", "--"])
            .arg(self.criu);
        command.args([
            "restore",
            "--lazy-pages",
            "--restore-detached",
            "--tcp-established",
        ]);
        command
            .args(["--log-file", "restore.log", "--images-dir"])
            .arg(self.images.there());
        command
    }

    fn elapsed_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    fn errors(&self) -> String {
        let mut text = String::from("CRIU's own lazy migration failed");
        for log in ["dump.log", "lazy-pages.log", "restore.log"] {
            let content = std::fs::read_to_string(self.images.log(log)).unwrap_or_default();
            for line in content.lines().filter(|line| line.contains("Error")) {
                text.push_str(&format!("\n  {log}: {line}"));
            }
        }
        text
    }
}

fn complete(mut command: Command, images: &Path) -> Command {
    command
        .arg("--images-dir")
        .arg(images)
        .args(["--status-fd", "1"]);
    command
}

fn tls(identity: Option<&PathBuf>) -> Vec<OsString> {
    let Some(folder) = identity else {
        return Vec::new();
    };
    let mut arguments: Vec<OsString> = vec!["--tls".into(), "--tls-no-cn-verify".into()];
    for (option, file) in [
        ("--tls-cacert", "ca.pem"),
        ("--tls-cert", "host.pem"),
        ("--tls-key", "host.key"),
    ] {
        arguments.extend([option.into(), folder.join(file).into()]);
    }
    arguments
}

/// A tree that runs while its pages are still on the other host, and both of CRIU's programs.
struct Restored {
    dump: Background,
    daemon: Background,
    dumped_us: u64,
    restored_us: u64,
}

/// A tree whose daemon was killed while it ran; its source's CRIU is killed when this is dropped.
#[derive(Debug)]
pub struct Abandoned {
    _dump: Background,
    /// The root on the destination.
    pub pid: Pid,
}

/// Moves the tree under `pid` as [`migrate`] does; the tree runs, `until` returns, and `criu lazy-pages` is killed.
pub fn lose_the_daemon(
    rig: &Rig,
    home: &BaselineHome,
    pid: Pid,
    until: impl FnOnce(),
) -> Result<Abandoned> {
    let criu = &crate::binaries::criu()?;
    let _pipes = large_pipes()?;
    let run = Run::new(rig, home, criu, None)?;
    let restored = run.until_restored(pid).with_context(|| run.errors())?;
    until();
    let mut daemon = restored.daemon;
    daemon.child.kill().context("the daemon has ended")?;
    daemon.child.wait().context("the daemon does not end")?;
    Ok(Abandoned {
        _dump: restored.dump,
        pid: run.root_of(pid)?,
    })
}

/// A CRIU command that says when it is ready and goes on.
#[derive(Debug)]
struct Background {
    name: &'static str,
    child: Child,
}

impl Background {
    /// Starts it and returns when it is ready: it then writes one byte, for which its standard output serves.
    fn start(name: &'static str, mut command: Command) -> Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let stdout = child.stdout.take().context("its output is a pipe")?;
        let mut background = Self { name, child };
        if !is_ready(stdout)? {
            background.finish()?;
            bail!("{name} ended without being ready");
        }
        Ok(background)
    }

    fn finish(&mut self) -> Result<()> {
        let child = &mut self.child;
        let status = wait_for(PATIENCE, self.name, || child.try_wait().ok().flatten())?;
        anyhow::ensure!(status.success(), "{} ended with {status}", self.name);
        Ok(())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // It has ended unless something went wrong.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_ready(mut stdout: ChildStdout) -> Result<bool> {
    let timeout = PollTimeout::try_from(PATIENCE).context("the patience fits")?;
    let mut fds = [PollFd::new(
        std::os::fd::AsFd::as_fd(&stdout),
        PollFlags::POLLIN,
    )];
    let ready = poll(&mut fds, timeout).context("cannot wait for CRIU")?;
    Ok(ready > 0
        && stdout
            .read(&mut [0; 1])
            .context("cannot read CRIU's status")?
            == 1)
}
