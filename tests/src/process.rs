//! A process the rig started: its logs, its end, and the certainty that it does end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::task;
use crate::wait::{wait_for, wait_until};

/// The kernel takes a moment to bury a killed process.
const BURIAL: Duration = Duration::from_secs(3);

/// A running process with its output in files; killed with all it started when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    /// Starts `command`; its output goes to `NAME.out` and `NAME.err` in `logs`.
    pub fn start(name: &str, logs: &Path, command: &mut Command) -> Result<Self> {
        let stdout = logs.join(format!("{name}.out"));
        let stderr = logs.join(format!("{name}.err"));
        let create = |path: &Path| {
            File::create(path).with_context(|| format!("cannot create {}", path.display()))
        };
        command
            .stdin(Stdio::null())
            .stdout(create(&stdout)?)
            .stderr(create(&stderr)?);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            stdout,
            stderr,
        })
    }

    /// Starts `command` as a workload: a session of its own and no file of the rig's open, so CRIU can dump it.
    pub fn start_detached(name: &str, command: &mut Command) -> Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let nowhere = PathBuf::from("/dev/null");
        Ok(Self {
            name: name.to_owned(),
            child,
            stdout: nowhere.clone(),
            stderr: nowhere,
        })
    }

    /// The process's PID.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// What it has written to its standard output so far.
    pub fn stdout(&self) -> String {
        fs::read_to_string(&self.stdout).unwrap_or_default()
    }

    /// What it has written to its standard error so far.
    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("{} (PID {}) to end", self.name, self.child.id());
        let child = &mut self.child;
        wait_for(limit, &what, || child.try_wait().ok().flatten())
    }

    /// Waits for `text` on its standard output; fails at once when the process ends without saying it.
    pub fn wait_for_output(&mut self, limit: Duration, text: &str) -> Result<()> {
        let what = format!("{} to say {text:?}", self.name);
        let mut ended = false;
        wait_until(limit, &what, || {
            // The order matters: what it said before it ended must be seen.
            ended = !self.is_running();
            ended || self.stdout().contains(text)
        })?;
        anyhow::ensure!(
            self.stdout().contains(text),
            "{} ended before it said {text:?}: {}",
            self.name,
            self.stderr().trim()
        );
        Ok(())
    }

    /// Kills it with everything it started.
    pub fn kill(&mut self) {
        for pid in task::descendants(self.pid()).into_iter().rev() {
            // Gone already is as good.
            let _ = kill(pid, Signal::SIGKILL);
        }
        let _ = self.child.kill();
        // One that a tracer holds is not buried before the tracer is gone, which the rig's warden sees to.
        let child = &mut self.child;
        let _ = wait_for(BURIAL, "its end", || child.try_wait().ok().flatten());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_running() {
            self.kill();
        }
    }
}
