//! Both programs, started as an operator starts them: one on each host, with hooks that move the service address.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::binaries;
use crate::host::INTERFACE;
use crate::identity::Identities;
use crate::process::Process;
use crate::record::Record;
use crate::rig::Rig;
use crate::wait::wait_until;

/// The port `page-server` listens on; bulk data takes the next one.
pub const PORT: u16 = 7700;
/// Longer than any step of a migration that works.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How the two programs are to be started; every field may be changed before they are.
#[derive(Debug, Clone)]
pub struct PairPlan {
    /// Options that name what moves; without them it is the process given to [`Self::start_server`].
    pub subject: Option<Vec<OsString>>,
    /// Options of `page-server serve` besides the necessary ones.
    pub server: Vec<OsString>,
    /// Options of `lazy-restorer restore` besides the necessary ones.
    pub restorer: Vec<OsString>,
    /// Where the destination finds the source, when that is not the source's own address.
    pub source_seen_at: Option<Ipv4Addr>,
    /// The init of the PID namespace in which the workload is, when that is not the machine's: `page-server` and its CRIU
    /// are started in there.
    pub source_home: Option<Pid>,
    /// The environment of `lazy-restorer`.
    pub restorer_env: Vec<(String, String)>,
    /// Directories that `lazy-restorer` sees in the place of others: what is there, and where.
    pub destination_mounts: Vec<(PathBuf, PathBuf)>,
    /// CRIU on the source.
    pub source_criu: PathBuf,
    /// CRIU on the destination.
    pub destination_criu: PathBuf,
    /// Identity directories.
    pub identities: Identities,
    /// The line of shell `--on-frozen` runs.
    pub on_frozen: String,
    /// The line of shell `--on-thawed` runs.
    pub on_thawed: String,
    /// The line of shell `--before-restore` runs.
    pub before_restore: String,
    /// The line of shell `--on-resumed` runs.
    pub on_resumed: String,
    /// The line of shell `--on-aborted` runs.
    pub on_aborted: String,
}

impl PairPlan {
    /// The plan of a migration that moves the service address and restores into a new PID namespace.
    pub fn new(rig: &Rig) -> Result<Self> {
        let criu = binaries::criu()?;
        let service = rig.service;
        Ok(Self {
            subject: None,
            server: vec!["--tcp-established".into()],
            restorer: vec!["--pidns".into()],
            source_seen_at: None,
            source_home: None,
            restorer_env: Vec::new(),
            destination_mounts: Vec::new(),
            source_criu: criu.clone(),
            destination_criu: criu,
            identities: Identities::make(&rig.make_folder("identities")?)?,
            on_frozen: service.on_frozen(),
            on_thawed: service.on_thawed(),
            before_restore: service.before_restore(),
            on_resumed: service.on_resumed(),
            on_aborted: service.on_aborted(),
        })
    }

    /// The same with the built-in `--move-address` in place of the hooks.
    pub fn move_address(mut self, rig: &Rig) -> Self {
        let address = format!("{}/32", rig.service.0);
        let options = ["--move-address", &address, "--dev", INTERFACE];
        self.server.extend(options.map(OsString::from));
        self.restorer.extend(options.map(OsString::from));
        for hook in [
            &mut self.on_frozen,
            &mut self.on_thawed,
            &mut self.before_restore,
            &mut self.on_resumed,
            &mut self.on_aborted,
        ] {
            hook.clear();
        }
        self
    }

    /// Starts `page-server` for `pid` and returns when it listens.
    pub fn start_server(&self, rig: &Rig, pid: Pid) -> Result<Side> {
        let mut side = self.spawn_server(rig, pid)?;
        side.process.wait_for_output(PATIENCE, "listening on")?;
        Ok(side)
    }

    /// Starts `page-server` for `pid` and does not wait.
    pub fn spawn_server(&self, rig: &Rig, pid: Pid) -> Result<Side> {
        let files = SideFiles::make(rig, "page-server")?;
        let program = binaries::program("page-server")?;
        let mut command = match self.source_home {
            None => rig.source.command(program),
            Some(init) => {
                let mut command = rig.source.command("nsenter");
                command.args(["-t", &init.to_string(), "--pid", "--mount", "--"]);
                command.arg(program);
                command
            }
        };
        command.arg("serve");
        match &self.subject {
            Some(subject) => command.args(subject),
            None => command.args(["--pid", &pid.to_string()]),
        };
        command.args(["--listen", &format!("{}:{PORT}", rig.source.address())]);
        command.arg("--identity").arg(&self.identities.source);
        command.arg("--criu").arg(&self.source_criu);
        command.args([
            "--on-frozen",
            &self.on_frozen,
            "--on-thawed",
            &self.on_thawed,
        ]);
        command.arg("--json").arg(&files.json).args(&self.server);
        command.env("TMPDIR", &files.temporary);
        Side::start("page-server", files, &mut command)
    }

    /// Starts another `page-server` for the one session the first one left behind, and returns when it listens, or has
    /// ended because there was nothing left to wait for.
    pub fn resume_server(&self, rig: &Rig, options: &[&str]) -> Result<Side> {
        resume_server(rig, &session_of(rig, "source")?, options)
    }

    /// `lazy-restorer` on the destination, in a mount namespace of its own when it is to see other directories.
    fn restorer_command(&self, rig: &Rig) -> Result<std::process::Command> {
        let program = binaries::program("lazy-restorer")?;
        if self.destination_mounts.is_empty() {
            return Ok(rig.destination.command(program));
        }
        let mut script = String::from("set -e; ");
        for (there, path) in &self.destination_mounts {
            script += &format!("mount --bind '{}' '{}'; ", there.display(), path.display());
        }
        script += "exec \"$@\"";
        let mut command = rig.destination.command("unshare");
        command
            .args(["--mount", "sh", "-c", &script, "sh"])
            .arg(program);
        Ok(command)
    }

    /// Starts another `lazy-restorer` for the one session the first one left behind.
    pub fn resume_restorer(&self, rig: &Rig, options: &[&str]) -> Result<Side> {
        resume_restorer(rig, &session_of(rig, "destination")?, options)
    }

    /// Starts `lazy-restorer`.
    pub fn start_restorer(&self, rig: &Rig) -> Result<Side> {
        let files = SideFiles::make(rig, "lazy-restorer")?;
        let mut command = self.restorer_command(rig)?;
        let source = self.source_seen_at.unwrap_or(rig.source.address());
        command.args(["restore", "--from", &format!("{source}:{PORT}")]);
        command.arg("--identity").arg(&self.identities.destination);
        command.arg("--criu").arg(&self.destination_criu);
        command.args([
            "--before-restore",
            &self.before_restore,
            "--on-resumed",
            &self.on_resumed,
        ]);
        command.args(["--on-aborted", &self.on_aborted]);
        command
            .arg("--json")
            .arg(&files.json)
            .arg("--pidfile")
            .arg(&files.pidfile)
            .args(&self.restorer);
        command
            .env("TMPDIR", &files.temporary)
            .envs(self.restorer_env.iter().cloned());
        Side::start("lazy-restorer", files, &mut command)
    }

    /// Migrates `pid` from beginning to end.
    pub fn migrate(&self, rig: &Rig, pid: Pid) -> Result<Migration> {
        let mut server = self.start_server(rig, pid)?;
        let started = std::time::Instant::now();
        let mut restorer = self.start_restorer(rig)?;
        restorer.expect_success()?;
        server.expect_success()?;
        let total = started.elapsed();
        let pid = restorer.restored_pid()?;
        Ok(Migration {
            source: server.record()?,
            destination: restorer.record()?,
            pid,
            total,
        })
    }
}

/// Starts another `page-server` for a session that was left behind, and returns when it listens.
pub fn resume_server(rig: &Rig, session: &str, options: &[&str]) -> Result<Side> {
    let mut files = SideFiles::make(rig, "page-server-2")?;
    // What the first one left goes away with the second.
    files.temporary = rig.make_folder("page-server-tmp")?;
    let mut command = rig.source.command(binaries::program("page-server")?);
    command
        .args(["resume", "--session", session])
        .arg("--json")
        .arg(&files.json)
        .args(options);
    let mut side = Side::start("page-server-2", files, &mut command)?;
    wait_until(PATIENCE, "the successor to listen", || {
        !side.process.is_running() || side.process.stdout().contains("listening on")
    })?;
    Ok(side)
}

/// Starts another `lazy-restorer` for a session that was left behind.
pub fn resume_restorer(rig: &Rig, session: &str, options: &[&str]) -> Result<Side> {
    let mut files = SideFiles::make(rig, "lazy-restorer-2")?;
    // What the first one left goes away with the second.
    files.temporary = rig.make_folder("lazy-restorer-tmp")?;
    let mut command = rig.destination.command(binaries::program("lazy-restorer")?);
    command
        .args(["resume", "--session", session])
        .arg("--json")
        .arg(&files.json)
        .args(options);
    Side::start("lazy-restorer-2", files, &mut command)
}

/// The name of the one session of `role` on this rig.
pub fn session_of(rig: &Rig, role: &str) -> Result<String> {
    let mut found = sessions(rig, role)?;
    let session = found.pop().context("no session was left behind")?;
    ensure!(found.is_empty(), "more than one session");
    let id = session["session"].as_str().context("it has a name")?;
    Ok(id.to_owned())
}

/// What `sessions --json` of the program of `role` lists.
pub fn sessions(rig: &Rig, role: &str) -> Result<Vec<serde_json::Value>> {
    let (host, program) = match role {
        "source" => (&rig.source, "page-server"),
        _ => (&rig.destination, "lazy-restorer"),
    };
    let mut command = host.command(binaries::program(program)?);
    let listed = crate::shell::run(command.args(["sessions", "--json"]))?;
    Ok(serde_json::from_str(&listed)?)
}

/// A migration that succeeded.
#[derive(Debug, Clone)]
pub struct Migration {
    /// The source's record.
    pub source: Record,
    /// The destination's record.
    pub destination: Record,
    /// The restored root as this machine sees it.
    pub pid: Pid,
    /// From the start of `lazy-restorer` until both programs have ended.
    pub total: Duration,
}

/// Where one side keeps what.
#[derive(Debug, Clone)]
pub struct SideFiles {
    logs: PathBuf,
    json: PathBuf,
    pidfile: PathBuf,
    /// The side's directory for temporary files, which must be empty in the end.
    pub temporary: PathBuf,
}

impl SideFiles {
    fn make(rig: &Rig, name: &str) -> Result<Self> {
        let logs = rig.make_folder("logs")?;
        let json = rig.folder().join(format!("{name}.json"));
        // A record of an earlier migration on this rig is not this one's.
        let _ = std::fs::remove_file(&json);
        let temporary = rig.make_folder(&format!("{name}-tmp"))?;
        Ok(Self {
            logs,
            json,
            pidfile: rig.folder().join("restored.pid"),
            temporary,
        })
    }
}

/// One of the two programs.
#[derive(Debug)]
pub struct Side {
    /// The program.
    pub process: Process,
    /// Its files.
    pub files: SideFiles,
}

impl Side {
    /// Starts `command` as one of the programs, with no options but its own.
    pub fn start_program(
        rig: &Rig,
        name: &str,
        command: &mut std::process::Command,
    ) -> Result<Self> {
        Self::start(name, SideFiles::make(rig, name)?, command)
    }

    /// Asks it to end and waits until it has.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        kill(self.process.pid(), Signal::SIGTERM).context("it has ended already")?;
        self.end()
    }

    fn start(name: &str, files: SideFiles, command: &mut std::process::Command) -> Result<Self> {
        Ok(Self {
            process: Process::start(name, &files.logs, command)?,
            files,
        })
    }

    /// Waits for the end and returns how it ended. Clients would find a service that was not announced, a minute later.
    pub fn end(&mut self) -> Result<ExitStatus> {
        let status = self.process.wait(PATIENCE)?;
        let stderr = self.process.stderr();
        ensure!(!stderr.contains("neighbours will learn late"), "{stderr}");
        Ok(status)
    }

    /// Waits for the end, which must be a success.
    pub fn expect_success(&mut self) -> Result<()> {
        let status = self.end()?;
        ensure!(status.success(), "{status}: {}", self.process.stderr());
        Ok(())
    }

    /// The record it wrote.
    pub fn record(&self) -> Result<Record> {
        Record::read(&self.files.json)
    }

    /// The one line that says why it failed.
    pub fn error_line(&self) -> Result<String> {
        let stderr = self.process.stderr();
        let mut lines = stderr.lines().filter(|line| line.contains(": error: "));
        let line = lines
            .next()
            .with_context(|| format!("no error line in: {stderr}"))?;
        ensure!(lines.next().is_none(), "more than one error line: {stderr}");
        Ok(line.to_owned())
    }

    /// How often it has said that its link is lost.
    pub fn losses(&self) -> usize {
        let stderr = self.process.stderr();
        let words = ["trying to reconnect", "link lost", "is lost again"];
        words.map(|word| stderr.matches(word).count()).iter().sum()
    }

    /// Waits until it has said so more often than `before`, or has ended.
    pub fn wait_for_loss(&mut self, before: usize) -> Result<()> {
        let noticed = wait_until(PATIENCE, "the loss of the link to be noticed", || {
            !self.process.is_running() || self.losses() > before
        });
        noticed.with_context(|| format!("all it said: {}", self.process.stderr()))
    }

    /// Waits until the copy runs; fails at once when the program ends before.
    pub fn wait_for_copy(&mut self) -> Result<Pid> {
        let mut ended = false;
        wait_until(PATIENCE, "the PID file", || {
            ended = !self.process.is_running();
            ended || self.restored_pid().is_ok()
        })?;
        self.restored_pid()
            .with_context(|| format!("it ended: {}", self.process.stderr()))
    }

    /// Whether it is a destination that has nothing to do but to tell its source how it ended.
    pub fn is_telling(&self) -> bool {
        let said = self.process.stderr();
        said.contains("never ran and is dead") || said.contains("every page is here")
    }

    /// Waits for the end of a destination. One that goes on telling a source which has ended is told to end; true then, and
    /// its session is left for `resume`.
    pub fn end_telling(&mut self, source_has_ended: bool) -> Result<bool> {
        wait_until(PATIENCE, "lazy-restorer to end or to go on telling", || {
            !self.process.is_running() || (source_has_ended && self.is_telling())
        })?;
        let is_telling = self.process.is_running();
        if is_telling {
            self.terminate()?;
        }
        self.end()?;
        Ok(is_telling)
    }

    /// The PID of the restored root.
    pub fn restored_pid(&self) -> Result<Pid> {
        read_pid(&self.files.pidfile)
    }
}

fn read_pid(path: &Path) -> Result<Pid> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("no PID file {}", path.display()))?;
    Ok(Pid::from_raw(text.trim().parse().with_context(|| {
        format!("{} holds {text:?}", path.display())
    })?))
}
