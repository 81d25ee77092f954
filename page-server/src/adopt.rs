//! Taking over the workload that a killed `page-server` left frozen: CRIU still holds it, and CRIU's script waits for
//! somebody to bind its socket again.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use common::container::forget;
use common::session_file::{ContainerName, FrozenTasks, Original, SessionFile, Task};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, sleep, timeout};

use crate::freeze::FreezeError;
use crate::freezer;
use crate::hook::Verdict;
use crate::network_lock::{self, Network};
use crate::rescue::{dump_log, put_addresses_back, rescue};
use crate::workload::signal_all;

/// Time CRIU's script has to call: it tries several times a second.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Time CRIU has to let tasks go, or to kill them.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause between looks at a CRIU that is not our child.
const PAUSE: Duration = Duration::from_millis(10);

/// What a killed `page-server` left behind, found to be whole.
#[derive(Debug)]
pub struct Left {
    /// The frozen root.
    pub root: Pid,
    tasks: Vec<Task>,
    criu: Task,
    container: Option<ContainerName>,
    directory: PathBuf,
}

/// Why what was left cannot be taken over. It is not touched.
#[derive(Debug, thiserror::Error)]
pub enum LeftError {
    /// The session is the other end's.
    #[error("this is no session of a source")]
    NotOurs,
    /// A process has ended, or its PID is another's by now.
    #[error("process {0} of the workload has ended: its memory is gone")]
    Gone(i32),
    /// Somebody let it run.
    #[error("process {0} of the workload runs: its memory is not what it was when it was frozen")]
    Runs(i32),
    /// Somebody let it run, and stopped it again.
    #[error(
        "process {0} of the workload ran since it was frozen: its memory is not what it was; `page-server thaw` lets it run on"
    )]
    Ran(i32),
    /// The images are gone.
    #[error("the images in {0} are gone")]
    NoImages(PathBuf),
}

/// Whether the tasks are the same, and none of them runs.
pub fn are_frozen(frozen: &FrozenTasks) -> Result<(), LeftError> {
    for task in &frozen.tasks {
        if !task.is_alive() {
            return Err(LeftError::Gone(task.pid));
        }
        if !task.is_frozen() {
            return Err(LeftError::Runs(task.pid));
        }
    }
    Ok(())
}

/// Whether none of them ran since.
fn are_untouched(frozen: &FrozenTasks) -> Result<(), LeftError> {
    let by_criu = frozen.criu.is_alive();
    // The freezer of a container's cgroup sends tasks to sleep as well when CRIU does not hold them any more.
    if !by_criu && frozen.container.is_some() {
        return Ok(());
    }
    let mut touched = frozen.at_rest.iter();
    match touched.find(|at_rest| !at_rest.is_untouched(by_criu)) {
        Some(at_rest) => Err(LeftError::Ran(at_rest.task.pid)),
        None => Ok(()),
    }
}

impl Left {
    /// Looks whether the workload of `file` is still what it was: the same processes, none of which ran since.
    pub fn find_untouched(file: &SessionFile) -> Result<Self, LeftError> {
        let left = Self::find(file)?;
        match file.source().and_then(|source| source.original.frozen()) {
            Some(frozen) => are_untouched(frozen).map(|()| left),
            None => Err(LeftError::NotOurs),
        }
    }

    /// Looks whether the workload of `file` is still there: the same processes, none of which runs.
    pub fn find(file: &SessionFile) -> Result<Self, LeftError> {
        let source = file.source().ok_or(LeftError::NotOurs)?;
        let Original::Frozen(frozen) = &source.original else {
            return Err(LeftError::NotOurs);
        };
        are_frozen(frozen)?;
        let left = Left {
            root: Pid::from_raw(frozen.root.pid),
            tasks: frozen.tasks.clone(),
            criu: frozen.criu,
            container: frozen.container.clone(),
            directory: PathBuf::from(&file.directory),
        };
        match left.images().is_dir() {
            true => Ok(left),
            false => Err(LeftError::NoImages(left.images())),
        }
    }

    /// Where the images are.
    pub fn images(&self) -> PathBuf {
        self.directory.join("images")
    }

    /// Binds the socket of CRIU's script again and waits until it calls.
    pub async fn adopt(self) -> Result<Adopted, FreezeError> {
        let socket = self.directory.join("hook");
        let failed = |what| move |error: io::Error| FreezeError::Prepare { what, error };
        // The one before us left it bound to nobody.
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).map_err(failed("hook socket"))?;
        let hook = match self.criu.is_alive() {
            true => match timeout(CALL_TIMEOUT, listener.accept()).await {
                Ok(accepted) => Some(accepted.map_err(failed("hook connection"))?.0),
                Err(_) => {
                    tracing::warn!("CRIU holds the workload but its script is gone");
                    None
                }
            },
            // The tasks stand still by the stop that waited for this.
            false => None,
        };
        Ok(Adopted {
            left: self,
            hook,
            _listener: listener,
        })
    }
}

/// A frozen workload that is ours now. Dropping it leaves everything as it is, for yet another successor.
#[derive(Debug)]
pub struct Adopted {
    left: Left,
    /// CRIU's script; `None` when CRIU was killed.
    hook: Option<UnixStream>,
    _listener: UnixListener,
}

impl Adopted {
    /// Kills the frozen original: the workload lives elsewhere.
    pub async fn release(mut self) -> Result<(), FreezeError> {
        let network = Network::of(self.left.root);
        let told = self.tell(Verdict::Release).await;
        network_lock::remove(&dump_log(&self.left.directory), &network);
        // Whoever CRIU did not kill stands still by the stop that waited for this.
        let by_criu = self.hook.is_some() && told.is_ok();
        self.signal(Signal::SIGKILL);
        freezer::thaw_noted(&self.left.directory);
        if let Some(container) = self.left.container.as_ref().filter(|_| !by_criu) {
            forget(container);
        }
        self.remove_directory();
        told
    }

    /// Lets the workload run on as if nothing had happened.
    pub async fn thaw(mut self) -> Result<(), FreezeError> {
        put_addresses_back(&self.left.directory);
        let criu_holds = self.hook.is_some() && self.left.criu.is_alive();
        if criu_holds {
            // The stop that waits for them must not outlive the freeze.
            self.signal(Signal::SIGCONT);
        }
        let told = self.tell(Verdict::Thaw).await;
        if !criu_holds || told.is_err() {
            self.kill_criu().await;
            rescue(self.left.root, &self.left.directory);
        }
        self.signal(Signal::SIGCONT);
        freezer::thaw_noted(&self.left.directory);
        self.remove_directory();
        Ok(())
    }

    /// Tells CRIU's script and waits for CRIU's end; CRIU that is gone already has nothing to be told.
    async fn tell(&mut self, verdict: Verdict) -> Result<(), FreezeError> {
        let Some(hook) = &mut self.hook else {
            return Ok(());
        };
        let told = hook.write_all(&[verdict.byte()]).await;
        told.map_err(FreezeError::HookLost)?;
        self.await_criu().await
    }

    async fn await_criu(&self) -> Result<(), FreezeError> {
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        while self.left.criu.is_alive() {
            if Instant::now() > deadline {
                return Err(FreezeError::Stuck);
            }
            sleep(PAUSE).await;
        }
        Ok(())
    }

    async fn kill_criu(&self) {
        if self.left.criu.is_alive() {
            signal_all(&[Pid::from_raw(self.left.criu.pid)], Signal::SIGKILL);
            if let Err(error) = self.await_criu().await {
                tracing::error!(%error, "CRIU was killed");
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let alive = self.left.tasks.iter().filter(|task| task.is_alive());
        let pids: Vec<Pid> = alive.map(|task| Pid::from_raw(task.pid)).collect();
        signal_all(&pids, signal);
    }

    fn remove_directory(&self) {
        let directory = &self.left.directory;
        if let Err(error) = fs::remove_dir_all(directory) {
            tracing::warn!(directory = %directory.display(), %error, "cannot remove");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use common::proto::control::{Secret, SessionId};
    use common::session::State;
    use common::session_file::{Side, SourceSide};

    use super::*;

    fn file(task: Task, directory: &std::path::Path) -> SessionFile {
        let nowhere = "127.0.0.1:1".parse().expect("an address");
        SessionFile {
            id: SessionId([1; 16]),
            state: State::Postcopy,
            boot: String::new(),
            program: task,
            directory: directory.display().to_string(),
            identity: String::new(),
            accept: Vec::new(),
            mtu: None,
            secret: Secret([0; 32]),
            peer_host: String::new(),
            side: Side::Source(SourceSide {
                original: Original::Frozen(FrozenTasks {
                    root: task,
                    tasks: vec![task],
                    at_rest: Vec::new(),
                    criu: Task { pid: 1, start: 0 },
                    container: None,
                }),
                version: 3,
                criu_program: String::new(),
                fault: nowhere,
                bulk: nowhere,
                on_thawed: None,
                makes_clones: false,
            }),
        }
    }

    #[test]
    fn only_the_same_and_frozen_processes_are_taken_over() {
        let directory = tempfile::tempdir().expect("a directory");
        let images = directory.path().join("images");
        fs::create_dir(&images).expect("made");
        fs::set_permissions(&images, fs::Permissions::from_mode(0o700)).expect("ours");
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep runs");
        let pid = Pid::from_raw(child.id().cast_signed());
        let task = Task::find(pid.as_raw()).expect("it lives");
        let find = |task| Left::find(&file(task, directory.path()));
        assert!(matches!(find(task), Err(LeftError::Runs(_))));
        let other = Task {
            start: task.start + 1,
            ..task
        };
        assert!(matches!(find(other), Err(LeftError::Gone(_))));
        signal_all(&[pid], Signal::SIGSTOP);
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while !task.is_frozen() {
            assert!(std::time::Instant::now() < deadline, "it does not stop");
        }
        assert_eq!(find(task).expect("as it was").root, pid);
        fs::remove_dir(&images).expect("empty");
        assert!(matches!(find(task), Err(LeftError::NoImages(_))));
        child.kill().expect("our child");
        child.wait().expect("our child");
    }
}
