//! Taking over the workload that a killed `page-server` left frozen: CRIU still holds it, and CRIU's script waits for
//! somebody to bind its socket again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
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
    /// The root has ended, or its PID is another's by now.
    #[error("process {0}, the root of the workload, has ended: its memory is gone")]
    Gone(i32),
    /// Another process has, which was killed or let run.
    #[error(
        "process {0} of the workload has ended since it was frozen: its memory is gone; `page-server thaw` lets the others run on"
    )]
    Ended(i32),
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

/// Whether the root is the same, and whoever is left of the tasks stands still.
pub fn stand_still(frozen: &FrozenTasks) -> Result<(), LeftError> {
    if !frozen.root.is_alive() {
        return Err(LeftError::Gone(frozen.root.pid));
    }
    let mut left = frozen.tasks.iter().filter(|task| task.is_alive());
    match left.find(|task| !task.is_frozen()) {
        Some(task) => Err(LeftError::Runs(task.pid)),
        None => Ok(()),
    }
}

/// Whether all tasks are there.
pub fn are_there(frozen: &FrozenTasks) -> Result<(), LeftError> {
    match frozen.tasks.iter().find(|task| !task.is_alive()) {
        Some(task) => Err(LeftError::Ended(task.pid)),
        None => Ok(()),
    }
}

/// Whether none of those that are left ran since.
fn are_untouched(frozen: &FrozenTasks) -> Result<(), LeftError> {
    let by_criu = frozen.criu.is_alive();
    // The freezer of a container's cgroup sends tasks to sleep as well when CRIU does not hold them any more.
    if !by_criu && frozen.container.is_some() {
        return Ok(());
    }
    let mut left = frozen.at_rest.iter().filter(|rest| rest.task.is_alive());
    match left.find(|at_rest| !at_rest.is_untouched(by_criu)) {
        Some(at_rest) => Err(LeftError::Ran(at_rest.task.pid)),
        None => Ok(()),
    }
}

impl Left {
    /// Looks whether the workload of `file` is still what it was: the same processes, none of which ran since.
    pub fn find_untouched(file: &SessionFile) -> Result<Self, LeftError> {
        let left = Self::find(file)?;
        match file.source().and_then(|source| source.original.frozen()) {
            // Whoever was let run may have ended by that: the more telling of the two comes first.
            Some(frozen) => are_untouched(frozen)
                .and_then(|()| are_there(frozen))
                .map(|()| left),
            None => Err(LeftError::NotOurs),
        }
    }

    /// Looks whether the workload of `file` is still there: its root, and nobody runs. Of others some may have ended, which
    /// is no reason to leave the rest frozen.
    pub fn find(file: &SessionFile) -> Result<Self, LeftError> {
        let source = file.source().ok_or(LeftError::NotOurs)?;
        let Original::Frozen(frozen) = &source.original else {
            return Err(LeftError::NotOurs);
        };
        stand_still(frozen)?;
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

    /// The same for an original that is to be killed. CRIU may be doing that at this moment: a process that dies neither
    /// stands still nor has ended.
    pub async fn find_to_kill(file: &SessionFile) -> Result<Self, LeftError> {
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        loop {
            match Left::find(file) {
                Err(LeftError::Runs(_)) if Instant::now() < deadline => sleep(PAUSE).await,
                found => return found,
            }
        }
    }

    /// Kills whoever is left of an original whose root has been killed.
    pub fn kill_rest(file: &SessionFile) {
        let frozen = file.source().and_then(|source| source.original.frozen());
        let tasks = frozen.map_or(&[][..], |frozen| &frozen.tasks);
        signal_left(tasks, Signal::SIGKILL);
        // In a frozen cgroup nobody dies.
        freezer::thaw_noted(Path::new(&file.directory));
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
        signal_left(&self.left.tasks, signal);
    }

    fn remove_directory(&self) {
        let directory = &self.left.directory;
        if let Err(error) = fs::remove_dir_all(directory) {
            tracing::warn!(directory = %directory.display(), %error, "cannot remove");
        }
    }
}

/// Signals those of the tasks that have not ended.
fn signal_left(tasks: &[Task], signal: Signal) {
    let alive = tasks.iter().filter(|task| task.is_alive());
    let pids: Vec<Pid> = alive.map(|task| Pid::from_raw(task.pid)).collect();
    signal_all(&pids, signal);
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use common::proto::control::{Secret, SessionId};
    use common::session::State;
    use common::session_file::{AtRest, Side, SourceSide};

    use super::*;

    fn file(tasks: Vec<Task>, at_rest: Vec<AtRest>, directory: &Path) -> SessionFile {
        let nowhere = "127.0.0.1:1".parse().expect("an address");
        SessionFile {
            id: SessionId([1; 16]),
            state: State::Postcopy,
            boot: String::new(),
            program: tasks[0],
            directory: directory.display().to_string(),
            identity: String::new(),
            accept: Vec::new(),
            mtu: None,
            secret: Secret([0; 32]),
            peer_host: String::new(),
            side: Side::Source(SourceSide {
                original: Original::Frozen(FrozenTasks {
                    root: tasks[0],
                    tasks,
                    at_rest,
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

    /// A child of the test that stands still, to be killed with it.
    struct Still(std::process::Child);

    impl Still {
        fn start() -> Self {
            let mut command = Command::new("sleep");
            let child = Still(command.arg("60").spawn().expect("sleep runs"));
            assert!(child.task().is_alive());
            child
        }

        fn pid(&self) -> Pid {
            Pid::from_raw(self.0.id().cast_signed())
        }

        fn task(&self) -> Task {
            Task::find(self.pid().as_raw()).expect("it lives")
        }

        fn stop(&self) {
            signal_all(&[self.pid()], Signal::SIGSTOP);
            let deadline = std::time::Instant::now() + Duration::from_secs(10);
            while !self.task().is_frozen() {
                assert!(std::time::Instant::now() < deadline, "it does not stop");
            }
        }

        fn end(&mut self) {
            self.0.kill().expect("our child");
            self.0.wait().expect("our child");
        }
    }

    impl Drop for Still {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn directory() -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a directory");
        let images = directory.path().join("images");
        fs::create_dir(&images).expect("made");
        fs::set_permissions(&images, fs::Permissions::from_mode(0o700)).expect("ours");
        directory
    }

    #[test]
    fn only_the_same_and_frozen_processes_are_taken_over() {
        let directory = directory();
        let child = Still::start();
        let task = child.task();
        let find = |task| Left::find(&file(vec![task], Vec::new(), directory.path()));
        assert!(matches!(find(task), Err(LeftError::Runs(_))));
        let other = Task {
            start: task.start + 1,
            ..task
        };
        assert!(matches!(find(other), Err(LeftError::Gone(_))));
        child.stop();
        assert_eq!(find(task).expect("as it was").root, child.pid());
        fs::remove_dir(directory.path().join("images")).expect("empty");
        assert!(matches!(find(task), Err(LeftError::NoImages(_))));
    }

    /// A killed or ended child is a reason not to serve what is left, and none not to let it run on.
    #[test]
    fn what_is_left_without_a_child_that_ended_may_run_and_is_not_served() {
        let directory = directory();
        let (root, mut child) = (Still::start(), Still::start());
        root.stop();
        child.stop();
        let tasks = vec![root.task(), child.task()];
        let rest = |task| AtRest::look(task).expect("it lives");
        let at_rest: Vec<AtRest> = tasks.iter().map(|task| rest(*task)).collect();
        let file = file(tasks, at_rest, directory.path());
        Left::find_untouched(&file).expect("as it was");
        let gone = child.task().pid;
        child.end();
        let refused = Left::find_untouched(&file).expect_err("one is missing");
        assert!(matches!(refused, LeftError::Ended(pid) if pid == gone));
        assert!(refused.to_string().contains("page-server thaw"));
        assert_eq!(Left::find(&file).expect("the rest").root, root.pid());
        // Who was let run is told of before who ended by that: here the root goes to sleep twice more.
        for _ in 0..2 {
            signal_all(&[root.pid()], Signal::SIGCONT);
            root.stop();
        }
        let refused = Left::find_untouched(&file).expect_err("it ran");
        assert!(matches!(refused, LeftError::Ran(pid) if pid == root.pid().as_raw()));
    }

    /// A successor that has only to kill the original came while CRIU was killing it, and said that it runs.
    #[tokio::test]
    async fn an_original_that_is_dying_is_waited_for() {
        let directory = directory();
        let mut child = Still::start();
        let file = file(vec![child.task()], Vec::new(), directory.path());
        // It is asked for first, and does not stand still then.
        let (found, ()) = tokio::join!(Left::find_to_kill(&file), async { child.end() });
        assert!(matches!(found, Err(LeftError::Gone(_))), "{found:?}");
    }

    #[test]
    fn who_is_left_when_the_root_was_killed_is_killed_too() {
        let directory = directory();
        let (mut root, mut child) = (Still::start(), Still::start());
        child.stop();
        let file = file(
            vec![root.task(), child.task()],
            Vec::new(),
            directory.path(),
        );
        root.end();
        assert!(matches!(Left::find(&file), Err(LeftError::Gone(_))));
        Left::kill_rest(&file);
        let status = child.0.wait().expect("our child");
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9)
        );
    }
}
