//! A workload that does nothing, with what a test wants it to have open.

use anyhow::Result;
use nix::unistd::Pid;

use crate::pair::PATIENCE;
use crate::process::Process;
use crate::rig::Rig;
use crate::task;
use crate::wait::wait_until;

/// A sleeping process in a session of its own.
#[derive(Debug)]
pub struct Sleeper(Process);

impl Sleeper {
    /// Starts it on the source, with the shell's `redirections`.
    pub fn start(rig: &Rig, redirections: &str) -> Result<Self> {
        let mut command = rig.source.command("setsid");
        command
            .args(["sh", "-c", &format!("exec sleep 1000 {redirections}")])
            .current_dir("/");
        let sleeper = Self(Process::start_detached("sleeper", &mut command)?);
        wait_until(PATIENCE, "it to sleep", || {
            task::name(sleeper.pid()) == "sleep"
        })?;
        Ok(sleeper)
    }

    /// Its PID.
    pub fn pid(&self) -> Pid {
        self.0.pid()
    }
}
