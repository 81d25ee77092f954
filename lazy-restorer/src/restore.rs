//! Restoring: the program that does it, from its start to its end or its abortion.
//!
//! What is started is the [`engine`](crate::engine)'s affair.

use std::env;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use common::criu::Criu;
use common::session_file::Task;
use common::{mounts, open_files};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use procfs::process::all_processes;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use crate::engine::{Container, Engine};
use crate::exits::{bury, pidfd_open};
use crate::gate::SOCKET_VARIABLE;
use crate::nursery::{EXIT_LINE, INIT_LINE};

/// Any byte will do.
const GO: u8 = b'G';
/// Init reports a command that was killed by this plus the signal's number, as shells do.
const KILLED: i32 = 128;
/// Time a runtime has to put away what it made, when its CRIU was killed.
pub(crate) const PUTTING_AWAY: Duration = Duration::from_secs(10);

/// How to restore.
#[derive(Clone, Debug)]
pub struct RestorePlan {
    /// Who restores.
    pub engine: Engine,
    /// The CRIU to use.
    pub criu: Criu,
    /// Directory of this migration.
    pub directory: PathBuf,
    /// More arguments for `criu restore`.
    pub criu_args: Vec<String>,
    /// Established TCP connections move too.
    pub tcp_established: bool,
    /// The workload belongs to a shell's session.
    pub shell_job: bool,
}

/// Why the workload could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// CRIU cannot be started.
    #[error("cannot start CRIU: {0}")]
    Start(#[from] io::Error),
    /// CRIU failed, or was killed.
    #[error("CRIU could not restore the workload ({status}): {log}")]
    Restore {
        /// How it ended.
        status: String,
        /// It ended by itself, and has killed the tasks before. One that was killed may have let them run.
        by_itself: bool,
        /// Its error lines.
        log: String,
    },
}

impl RestoreError {
    /// Whether nothing of the workload has run, and nothing is left of it.
    pub fn is_certain(&self) -> bool {
        match self {
            RestoreError::Start(_) => false,
            RestoreError::Restore { by_itself, .. } => *by_itself,
        }
    }
}

/// A CRIU that is restoring.
#[derive(Debug)]
pub struct Restore {
    child: Child,
    nursery: Option<Nursery>,
    plan: RestorePlan,
}

/// Whose tree a copy is that has not run yet.
#[derive(Clone, Copy, Debug)]
pub struct Anchor {
    /// The restoring program, or the init it restores under.
    pub pid: Pid,
    /// It puts the copy away by itself when what is below it is killed.
    pub puts_away: bool,
}

/// Kills a copy that must not run any more. Returns a pidfd of each process.
pub(crate) fn kill_copy(anchor: Anchor) -> Vec<OwnedFd> {
    match anchor.puts_away {
        true => kill_below(anchor.pid),
        false => kill_tree(anchor.pid),
    }
}

/// The namespace's init and its reports.
#[derive(Debug)]
struct Nursery {
    init: Pid,
    reports: Lines<BufReader<ChildStdout>>,
    /// A byte here starts CRIU; the end of it, before that, ends the namespace.
    go: ChildStdin,
}

impl RestorePlan {
    /// Where the images are.
    pub fn images(&self) -> PathBuf {
        self.directory.join("images")
    }

    /// Where CRIU writes its log and looks for the lazy-pages socket.
    pub fn work(&self) -> PathBuf {
        self.directory.join("work")
    }

    /// Where the gate's socket is.
    pub fn gate(&self) -> PathBuf {
        self.directory.join("gate")
    }

    /// CRIU's log.
    pub fn log(&self) -> PathBuf {
        self.work().join("restore.log")
    }

    /// Prepares everything that can be done before the skeleton is there.
    pub async fn prepare(self) -> Result<Prepared, RestoreError> {
        let nursery = match self.engine {
            Engine::Nursery => Some(Nursery::open(self.command()?).await?),
            Engine::Criu | Engine::Runc(_) => None,
        };
        Ok(Prepared {
            plan: self,
            nursery,
        })
    }

    fn command(&self) -> Result<Command, RestoreError> {
        let ourselves = env::current_exe()?;
        let mut command = self.engine.command(self, &ourselves)?;
        open_files::as_found(command.as_std_mut());
        command
            .env(SOCKET_VARIABLE, self.gate())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // What lives as long as the workload must not hold on to our standard error; CRIU has its log.
            .stderr(Stdio::null())
            .process_group(0);
        Ok(command)
    }
}

/// A restore that can start at once. Dropping it leaves nothing behind.
#[derive(Debug)]
pub struct Prepared {
    plan: RestorePlan,
    nursery: Option<(Child, Nursery)>,
}

impl Prepared {
    /// The plan.
    pub fn plan(&self) -> &RestorePlan {
        &self.plan
    }

    /// Starts CRIU. It needs the images, the lazy-pages socket and the gate to be there.
    pub async fn start(self) -> Result<Restore, RestoreError> {
        let Some((child, mut nursery)) = self.nursery else {
            let child = self.plan.command()?.spawn()?;
            return Ok(Restore {
                child,
                nursery: None,
                plan: self.plan,
            });
        };
        nursery.go.write_all(&[GO]).await?;
        Ok(Restore {
            child,
            nursery: Some(nursery),
            plan: self.plan,
        })
    }
}

impl Nursery {
    async fn open(mut command: Command) -> Result<(Child, Self), RestoreError> {
        let no_init = || RestoreError::Restore {
            status: String::from("no init"),
            by_itself: true,
            log: String::from("the PID namespace could not be made"),
        };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().ok_or_else(no_init)?;
        let go = child.stdin.take().ok_or_else(no_init)?;
        let mut reports = BufReader::new(stdout).lines();
        let init = next_report(&mut reports, INIT_LINE).await?;
        let nursery = Nursery {
            init: Pid::from_raw(init.ok_or_else(no_init)?),
            reports,
            go,
        };
        Ok((child, nursery))
    }
}

async fn next_report(
    reports: &mut Lines<BufReader<ChildStdout>>,
    prefix: &str,
) -> io::Result<Option<i32>> {
    while let Some(line) = reports.next_line().await? {
        if let Some(value) = line.strip_prefix(prefix) {
            return Ok(value.parse().ok());
        }
    }
    Ok(None)
}

impl Restore {
    /// Whose tree the copy is: the namespace's init, or the restoring program as long as it restores.
    pub fn anchor(&self) -> Option<Anchor> {
        let pid = match &self.nursery {
            Some(nursery) => nursery.init,
            None => Pid::from_raw(self.child.id()? as i32),
        };
        Some(Anchor {
            pid,
            puts_away: matches!(self.plan.engine, Engine::Runc(_)),
        })
    }

    /// The init of the copy's own PID namespace, which lives as long as the copy.
    pub fn init(&self) -> Option<Task> {
        Task::find(self.nursery.as_ref()?.init.as_raw())
    }

    /// Waits until CRIU has ended; an error when it failed. May be cancelled.
    pub async fn finished(&mut self) -> Result<(), RestoreError> {
        let (status, by_itself) = match &mut self.nursery {
            None => {
                let status = self.child.wait().await?;
                if status.success() {
                    return Ok(());
                }
                (status.to_string(), status.code().is_some())
            }
            Some(nursery) => match next_report(&mut nursery.reports, EXIT_LINE).await? {
                Some(0) => return Ok(()),
                Some(code) => (format!("exit status: {code}"), code < KILLED),
                None => (String::from("the namespace's init is gone"), false),
            },
        };
        Err(RestoreError::Restore {
            status,
            by_itself,
            log: self
                .plan
                .engine
                .quote(&self.plan.directory, &self.plan.log()),
        })
    }

    /// Kills CRIU and everything it restored, and waits for the end of it.
    pub async fn abort(mut self) {
        let dying = if let Some(nursery) = &self.nursery {
            // The others are killed by the kernel before it ends.
            let init = pidfd_open(nursery.init);
            kill_quietly(nursery.init);
            init.into_iter().collect()
        } else if let Engine::Runc(container) = self.plan.engine.clone() {
            self.abort_container(&container).await
        } else if let Some(criu) = self.child.id() {
            kill_tree(Pid::from_raw(criu as i32))
        } else {
            Vec::new()
        };
        if let Err(error) = self.child.wait().await {
            tracing::warn!(%error, "waiting for CRIU");
        }
        bury(dying).await;
        mounts::detach_below(&self.plan.directory);
    }
}

impl Restore {
    /// Returns what is dying.
    async fn abort_container(&mut self, container: &Container) -> Vec<OwnedFd> {
        let Some(runtime) = self.child.id() else {
            return Vec::new();
        };
        let mut dying = kill_below(Pid::from_raw(runtime as i32));
        if timeout(PUTTING_AWAY, self.child.wait()).await.is_err() {
            dying.extend(kill_tree(Pid::from_raw(runtime as i32)));
            container.remove_remains();
        }
        dying
    }
}

fn kill_quietly(pid: Pid) {
    if let Err(error) = kill(pid, Signal::SIGKILL) {
        tracing::debug!(%pid, %error, "kill");
    }
}

/// Kills a process and its descendants, parents first so that none is born unseen. Returns a pidfd of each.
pub(crate) fn kill_tree(root: Pid) -> Vec<OwnedFd> {
    let mut family = vec![root];
    let mut next = 0;
    while let Some(pid) = family.get(next).copied() {
        // A stopped parent cannot fork; its children are then all there are.
        let _ = kill(pid, Signal::SIGSTOP);
        family.extend(children(pid));
        next += 1;
    }
    let dying = family.iter().filter_map(|pid| pidfd_open(*pid).ok());
    let dying = dying.collect();
    family.into_iter().for_each(kill_quietly);
    dying
}

/// Kills all descendants of a process that has no reason to start another. Returns a pidfd of each.
pub(crate) fn kill_below(root: Pid) -> Vec<OwnedFd> {
    children(root).into_iter().flat_map(kill_tree).collect()
}

fn children(parent: Pid) -> Vec<Pid> {
    let stats = all_processes()
        .into_iter()
        .flatten()
        .filter_map(|process| process.ok()?.stat().ok());
    stats
        .filter(|stat| stat.ppid == parent.as_raw())
        .map(|stat| Pid::from_raw(stat.pid))
        .collect()
}
