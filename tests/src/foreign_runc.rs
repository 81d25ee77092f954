//! A container that an orchestrator moves by the real `runc checkpoint --lazy-pages` and `runc restore --lazy-pages`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::container::{Container, NAME, Place};
use crate::external::{CRIU_PORT, Orchestrator};
use crate::pair::PATIENCE;
use crate::process::Process;
use crate::rig::Rig;
use crate::shell::pass_descriptor;
use crate::wait::wait_until;

/// The work directories of both runtimes.
#[derive(Debug)]
pub struct RuncWork {
    /// Of `runc checkpoint`.
    pub source: PathBuf,
    /// Of `runc restore`, where CRIU looks for lazy-pages.socket.
    pub destination: PathBuf,
    status: PathBuf,
    logs: PathBuf,
}

impl RuncWork {
    /// Empty directories.
    pub fn new(rig: &Rig) -> Result<Self> {
        let source = rig.make_folder("runc-work-source")?;
        Ok(Self {
            status: source.join("status"),
            source,
            destination: rig.make_folder("runc-work-destination")?,
            logs: rig.make_folder("logs")?,
        })
    }

    /// Starts `runc checkpoint` and returns when it says that its images are complete.
    pub fn checkpoint(
        &self,
        orchestrator: &Orchestrator,
        container: &Container,
    ) -> Result<Process> {
        let mut command = self.runc(&container.source, orchestrator)?;
        command.args(["checkpoint", "--lazy-pages", "--tcp-established"]);
        command.args(["--page-server", &format!("127.0.0.1:{CRIU_PORT}")]);
        let fd = pass_descriptor(&mut command, File::create(&self.status)?);
        command.args(["--status-fd", &fd.to_string()]);
        command.arg("--image-path").arg(&orchestrator.images);
        command.arg("--work-path").arg(&self.source).arg(NAME);
        let mut checkpoint = Process::start("runc-checkpoint", &self.logs, &mut command)?;
        let mut ended = false;
        wait_until(PATIENCE, "runc's dump to be complete", || {
            ended = !checkpoint.is_running();
            ended || fs::read(&self.status).is_ok_and(|said| said == [0])
        })?;
        ensure!(!ended, "runc checkpoint: {}", checkpoint.stderr());
        Ok(checkpoint)
    }

    /// Runs `runc restore`, which returns when the container runs.
    pub fn restore(&self, orchestrator: &Orchestrator, container: &Container) -> Result<()> {
        let place = &container.destination;
        let mut command = self.runc(place, orchestrator)?;
        command.args(["restore", "--detach", "--lazy-pages", "--tcp-established"]);
        command.arg("--image-path").arg(&orchestrator.copied);
        command.arg("--work-path").arg(&self.destination);
        command.arg("--bundle").arg(&place.bundle).arg(NAME);
        // The container inherits these.
        let said = self.logs.join("runc-restore.err");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let status = command.stderr(File::create(&said)?).status()?;
        let said = fs::read_to_string(said)?;
        ensure!(status.success(), "runc restore: {status}: {said}");
        Ok(())
    }

    fn runc(&self, place: &Place, orchestrator: &Orchestrator) -> Result<Command> {
        let programs = orchestrator.criu().parent().context("CRIU has a place")?;
        let mut path = OsString::from(programs);
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let mut command = place.command();
        command.env("PATH", path);
        Ok(command)
    }
}
