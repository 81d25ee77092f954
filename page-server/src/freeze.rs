//! Freezing by CRIU, with the end of the dump in our hands.
//!
//! Who calls CRIU is the [`engine`](crate::engine)'s affair. CRIU serves nobody: its page-server descriptor is a socket whose other end is closed. Its `post-dump` script is
//! our [`hook`](crate::hook), which waits for our verdict while we serve the frozen memory. No TCP port is opened.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, SystemTime};

use common::criu::{Criu, log_time};
use common::lost::Limit;
use common::open_files;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use procfs::process::Process;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Child;
use tokio::time::{Instant, sleep, timeout};

use crate::engine::{Engine, dead_page_server};
use crate::freezer;
use crate::guard::{Guard, note_committed};
use crate::hook::{ON_THAWED_VARIABLE, SOCKET_VARIABLE, Verdict};
use crate::network_lock::{self, Network};
use crate::rescue::{dump_log, put_addresses_back, rescue};
use crate::session::until;
use crate::workload::{Workload, signal_all};

/// Time CRIU has to let tasks go, or to kill them.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause between looks at a CRIU that is not our child.
const CRIU_PAUSE: Duration = Duration::from_millis(5);

/// What to freeze and how.
#[derive(Clone, Debug)]
pub struct FreezePlan {
    /// Who calls CRIU.
    pub engine: Engine,
    /// The CRIU to use.
    pub criu: Criu,
    /// Who is frozen.
    pub workload: Workload,
    /// Directory of this migration; images go into `images` below it.
    pub directory: PathBuf,
    /// Established TCP connections move too.
    pub tcp_established: bool,
    /// The workload belongs to a shell's session.
    pub shell_job: bool,
    /// Bytes that a file without a name may have; CRIU's own limit when not given.
    pub ghost_limit: Option<u64>,
    /// More arguments for `criu dump`.
    pub criu_args: Vec<String>,
    /// The operator's command for a rollback that the hook must do alone.
    pub on_thawed: Option<String>,
    /// How long the dump may take.
    pub limit: Limit,
}

/// Why the workload could not be frozen, or not be let go as asked.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// A system call of our own preparation.
    #[error("cannot prepare the dump ({what}): {error}")]
    Prepare {
        /// What was being done.
        what: &'static str,
        /// The system's word.
        error: io::Error,
    },
    /// CRIU failed.
    #[error("CRIU could not dump process {pid} ({status}): {log}")]
    Dump {
        /// The root task.
        pid: Pid,
        /// How CRIU ended.
        status: ExitStatus,
        /// Its error lines.
        log: String,
    },
    /// CRIU took too long, and was killed.
    #[error("{}", .0.exceeded())]
    TooLong(Limit),
    /// CRIU does not end.
    #[error("CRIU did not end within {} s of being told to", RELEASE_TIMEOUT.as_secs())]
    Stuck,
    /// The hook is gone: nobody can tell CRIU any more.
    #[error("CRIU's post-dump script is gone: {0}")]
    HookLost(io::Error),
}

fn prepare<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> FreezeError {
    move |error| FreezeError::Prepare {
        what,
        error: error.into(),
    }
}

/// A workload held frozen by CRIU. Dropping it before [`commit`](Self::commit) thaws the workload: the hook takes
/// our silence for that verdict.
#[derive(Debug)]
pub struct Frozen {
    /// CRIU, or the runtime that called it.
    child: Child,
    /// CRIU.
    criu: Option<Pid>,
    hook: UnixStream,
    /// Keeps the hook's socket bound, so that a later `page-server` finds nothing stale.
    _listener: UnixListener,
    plan: FreezePlan,
    tasks: Vec<Pid>,
    /// Where the tasks' connections are locked.
    network: Network,
    frozen_at: SystemTime,
    _guard: Guard,
}

impl FreezePlan {
    /// Where CRIU writes the images.
    pub fn images(&self) -> PathBuf {
        self.directory.join("images")
    }

    /// Where CRIU works.
    pub fn work(&self) -> PathBuf {
        self.directory.join("work")
    }

    /// CRIU's log.
    pub fn log(&self) -> PathBuf {
        dump_log(&self.directory)
    }

    /// Freezes the workload. On failure CRIU has let it run again.
    pub async fn freeze(self) -> Result<Frozen, FreezeError> {
        for directory in [self.images(), self.work()] {
            fs::create_dir_all(directory).map_err(prepare("directories"))?;
        }
        let guard =
            Guard::start(self.workload.root(), &self.directory).map_err(prepare("guard"))?;
        let socket = self.directory.join("hook");
        let listener = UnixListener::bind(&socket).map_err(prepare("hook socket"))?;
        let started = SystemTime::now();
        let thaw_by = self.limit.0.map(|limit| Instant::now() + limit);
        let mut child = self.spawn(&socket, &guard)?;
        let hook = tokio::select! {
            accepted = listener.accept() => accepted.map_err(prepare("hook connection"))?.0,
            status = child.wait() => {
                let status = status.map_err(prepare("waiting for CRIU"))?;
                self.rescue_after(status);
                return Err(self.dump_error(status));
            }
            () = until(thaw_by) => {
                // Nobody is to run before the connections are put right; this stop catches them when ptrace lets go.
                signal_all(&self.workload.pids(), Signal::SIGSTOP);
                // With what it started: its script, or the CRIU of a runtime.
                killpg(Pid::from_raw(child.id().unwrap_or_default().cast_signed()), Signal::SIGKILL)
                    .map_err(prepare("killing CRIU"))?;
                let status = child.wait().await.map_err(prepare("waiting for CRIU"))?;
                self.rescue_after(status);
                signal_all(&self.workload.pids(), Signal::SIGCONT);
                return Err(FreezeError::TooLong(self.limit));
            }
        };
        let criu = script_of(&hook);
        let tasks = self.workload.pids();
        // Should CRIU be killed now, ptrace would let the tasks run; this stop is pending then and catches them.
        signal_all(&tasks, Signal::SIGSTOP);
        let seized_at = || seized_at(&self.log(), started);
        let frozen_at = freezer::frozen_at(&self.directory).or_else(seized_at);
        Ok(Frozen {
            child,
            criu,
            hook,
            _listener: listener,
            network: Network::of(self.workload.root()),
            plan: self,
            tasks,
            frozen_at: frozen_at.unwrap_or(started),
            _guard: guard,
        })
    }

    fn spawn(&self, socket: &Path, guard: &Guard) -> Result<Child, FreezeError> {
        let page_server = dead_page_server().map_err(prepare("page-server socket"))?;
        let _leash = guard.leash().map_err(prepare("guard"))?;
        let program = env::current_exe().map_err(prepare("own program"))?;
        let command = self.engine.command(self, &page_server, &program);
        let mut command = command.map_err(prepare("command"))?;
        open_files::as_found(command.as_std_mut());
        command
            .env(SOCKET_VARIABLE, socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Ctrl-C is for us to handle: CRIU dying of it would leave the network locked.
            .process_group(0);
        if let Some(on_thawed) = &self.on_thawed {
            command.env(ON_THAWED_VARIABLE, on_thawed);
        }
        command.spawn().map_err(prepare("starting CRIU"))
    }

    /// CRIU has ended, perhaps with the workload in its hands.
    fn rescue_after(&self, status: ExitStatus) {
        if self.engine.criu_was_killed(status, &self.log()) {
            rescue(self.workload.root(), &self.directory);
        }
        freezer::thaw_noted(&self.directory);
    }

    fn dump_error(&self, status: ExitStatus) -> FreezeError {
        FreezeError::Dump {
            pid: self.workload.root(),
            status,
            log: self.engine.quote(&self.directory, &self.log()),
        }
    }
}

impl Frozen {
    /// When the first task stood still.
    pub fn frozen_at(&self) -> SystemTime {
        self.frozen_at
    }

    /// The frozen processes.
    pub fn tasks(&self) -> &[Pid] {
        &self.tasks
    }

    /// CRIU, as long as it holds them.
    pub fn criu(&self) -> Option<Pid> {
        self.criu
    }

    /// The plan this came from.
    pub fn plan(&self) -> &FreezePlan {
        &self.plan
    }

    /// The point of no return: from here on silence of ours does not thaw the workload any more.
    pub async fn commit(&mut self) -> Result<(), FreezeError> {
        note_committed(&self.plan.directory).map_err(prepare("note of the cutover"))?;
        self.tell(Verdict::Commit).await
    }

    /// Lets the workload run on as if nothing had happened.
    pub async fn thaw(mut self) -> Result<(), FreezeError> {
        put_addresses_back(&self.plan.directory);
        // Tasks that nobody holds any more are not to run before their connections are put right. That CRIU lives
        // counts, not the runtime that called it.
        if self.criu.is_some_and(is_alive) {
            signal_all(&self.tasks, Signal::SIGCONT);
        }
        if let Err(error) = self.tell(Verdict::Thaw).await {
            // CRIU takes the end of its script for the same verdict.
            tracing::debug!(%error, "thawing");
        }
        let status = match self.wait().await {
            Err(FreezeError::Stuck) => self.kill_criu().await?,
            ended => ended?,
        };
        // Tasks whose CRIU was killed must not run before their connections are put right.
        self.plan.rescue_after(status);
        // CRIU may also have ended by itself before.
        signal_all(&self.tasks, Signal::SIGCONT);
        Ok(())
    }

    async fn kill_criu(&mut self) -> Result<ExitStatus, FreezeError> {
        if let Some(criu) = self.criu {
            signal_all(&[criu], Signal::SIGKILL);
        }
        self.child.start_kill().map_err(prepare("killing CRIU"))?;
        self.wait().await
    }

    /// Kills the frozen original: the workload lives elsewhere.
    pub async fn release(mut self) -> Result<(), FreezeError> {
        let told = self.tell(Verdict::Release).await;
        let ended = match told {
            Ok(()) => self.wait().await,
            Err(error) => Err(error),
        };
        // CRIU keeps the connections locked so that none is reset when its sockets die; that is done now, and a lock
        // left behind would silence the same connections should the workload ever come back here.
        network_lock::remove(&self.plan.log(), &self.network);
        match ended {
            Ok(status) if status.success() => Ok(()),
            ended => {
                // CRIU has died and killed nobody: they stand still by the stop that waited for this, as themselves.
                signal_all(&self.tasks, Signal::SIGKILL);
                freezer::thaw_noted(&self.plan.directory);
                self.wait_for_the_dead().await;
                self.plan.engine.forget();
                Err(self.plan.dump_error(ended?))
            }
        }
    }

    /// Who hears that this host has released the workload must not find it here.
    async fn wait_for_the_dead(&self) {
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        while self.tasks.iter().any(|task| is_alive(*task)) && Instant::now() < deadline {
            sleep(CRIU_PAUSE).await;
        }
    }

    async fn tell(&mut self, verdict: Verdict) -> Result<(), FreezeError> {
        self.hook
            .write_all(&[verdict.byte()])
            .await
            .map_err(FreezeError::HookLost)
    }

    async fn wait(&mut self) -> Result<ExitStatus, FreezeError> {
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        let status = timeout(RELEASE_TIMEOUT, self.child.wait())
            .await
            .map_err(|_| FreezeError::Stuck)?
            .map_err(prepare("waiting for CRIU"))?;
        // A runtime that was killed leaves CRIU behind.
        while self.criu.is_some_and(is_alive) {
            if Instant::now() > deadline {
                return Err(FreezeError::Stuck);
            }
            sleep(CRIU_PAUSE).await;
        }
        Ok(status)
    }

    /// Resolves when CRIU ends although nobody told it to.
    pub async fn lost(&mut self) -> FreezeError {
        match self.child.wait().await {
            Ok(status) => self.plan.dump_error(status),
            Err(error) => prepare("waiting for CRIU")(error),
        }
    }
}

/// The CRIU whose script is at the other end of `hook`, as this host numbers it.
fn script_of(hook: &UnixStream) -> Option<Pid> {
    let script = hook.peer_cred().ok()?.pid()?;
    let criu = Process::new(script).ok()?.stat().ok()?.ppid;
    // A parent that is gone has left the script to an init.
    (criu > 1).then(|| Pid::from_raw(criu))
}

fn is_alive(pid: Pid) -> bool {
    let stat = Process::new(pid.as_raw()).and_then(|process| process.stat());
    stat.is_ok_and(|stat| stat.state != 'Z')
}

/// When CRIU seized the first task, from the times in its log, which count from its start.
fn seized_at(log: &Path, started: SystemTime) -> Option<SystemTime> {
    let log = fs::read(log).ok()?;
    let log = String::from_utf8_lossy(&log);
    let line = log.lines().find(|line| line.contains("Seized task"))?;
    let seconds = log_time(line).filter(|seconds| (0.0..3600.0).contains(seconds))?;
    Some(started + Duration::from_secs_f64(seconds))
}
