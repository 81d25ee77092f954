//! CRIU run by somebody else: `criu dump` and `criu restore` as an orchestrator calls them, with our pair between.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::unistd::Pid;

use crate::binaries;
use crate::criu_baseline::BaselineHome;
use crate::identity::Identities;
use crate::pair::{PATIENCE, PORT, Side};
use crate::process::Process;
use crate::rig::Rig;
use crate::shell::{pass_descriptor, run};
use crate::task;

/// The port of CRIU's own page server, to which nobody connects but `page-server`.
pub(crate) const CRIU_PORT: &str = "27028";

/// A dump made by an orchestrator, and its directories on both hosts.
#[derive(Debug)]
pub struct Orchestrator<'a> {
    rig: &'a Rig,
    criu: PathBuf,
    /// Identity directories.
    pub identities: Identities,
    /// The images on the source.
    pub images: PathBuf,
    /// The images on the destination.
    pub copied: PathBuf,
}

impl<'a> Orchestrator<'a> {
    /// Nothing is dumped yet.
    pub fn new(rig: &'a Rig) -> Result<Self> {
        Ok(Self {
            rig,
            criu: binaries::criu()?,
            identities: Identities::make(&rig.make_folder("identities")?)?,
            images: rig.make_folder("images")?,
            copied: rig.make_folder("copied")?,
        })
    }

    /// The CRIU that is used.
    pub fn criu(&self) -> &Path {
        &self.criu
    }

    /// Dumps the tree under `pid` with all its pages, and leaves nothing of it running.
    pub fn dump(&self, pid: Pid) -> Result<()> {
        run(&mut self.dump_command(pid)).map(drop)
    }

    /// Starts a lazy dump of the tree under `pid`; it waits for its lazy-pages daemon.
    pub fn start_lazy_dump(&self, pid: Pid) -> Result<Process> {
        let mut command = self.dump_command(pid);
        command.args([
            "--lazy-pages",
            "--address",
            "127.0.0.1",
            "--port",
            CRIU_PORT,
        ]);
        Process::start("criu-dump", &self.rig.make_folder("logs")?, &mut command)
    }

    fn dump_command(&self, pid: Pid) -> Command {
        let mut command = self.rig.source.command(&self.criu);
        command.args(["dump", "--tree", &pid.to_string(), "--tcp-established"]);
        command.args(["--log-file", "dump.log", "--images-dir"]);
        command.arg(&self.images);
        command
    }

    /// Starts `page-server` with `arguments` and returns when it listens.
    pub fn start_server(&self, arguments: &[&str]) -> Result<Side> {
        let mut command = self.rig.source.command(binaries::program("page-server")?);
        command.args(arguments).arg("--images").arg(&self.images);
        command.args(["--listen", &format!("{}:{PORT}", self.rig.source.address())]);
        command.arg("--identity").arg(&self.identities.source);
        let mut side = Side::start_program(self.rig, "page-server", &mut command)?;
        side.process.wait_for_output(PATIENCE, "listening on")?;
        Ok(side)
    }

    /// Carries the images to the destination, as an orchestrator does by `scp` or otherwise.
    pub fn copy_images(&self) -> Result<()> {
        let all = format!("{}/.", self.images.display());
        run(Command::new("cp").arg("-a").arg(all).arg(&self.copied)).map(drop)
    }

    /// Starts `lazy-restorer lazy-pages` and returns when CRIU may begin.
    pub fn start_lazy_pages(&self) -> Result<Side> {
        self.start_lazy_pages_with(&[])
    }

    /// The same with more options.
    pub fn start_lazy_pages_with(&self, options: &[&str]) -> Result<Side> {
        let mut side = self.spawn_lazy_pages(&self.copied, options)?;
        side.process.wait_for_output(PATIENCE, "ready")?;
        Ok(side)
    }

    /// Starts `lazy-restorer lazy-pages` for `images` and does not wait.
    pub fn spawn_lazy_pages(&self, images: &Path, options: &[&str]) -> Result<Side> {
        self.spawn_lazy_pages_in(&[], images, options)
    }

    /// The same in an environment.
    pub fn spawn_lazy_pages_in(
        &self,
        variables: &[(&str, &str)],
        images: &Path,
        options: &[&str],
    ) -> Result<Side> {
        let mut command = self
            .rig
            .destination
            .command(binaries::program("lazy-restorer")?);
        command.args(["lazy-pages", "--images-dir"]).arg(images);
        command.args(["--from", &format!("{}:{PORT}", self.rig.source.address())]);
        command.arg("--identity").arg(&self.identities.destination);
        command.args(options).envs(variables.iter().copied());
        Side::start_program(self.rig, "lazy-restorer", &mut command)
    }

    /// Starts `lazy-restorer lazy-pages` in the background with the command line of `criu lazy-pages`: its work directory
    /// is `work`, and it says on a descriptor, the file `status` there, that it is ready.
    pub fn start_daemon(&self, work: &Path) -> Result<Side> {
        let mut command = self
            .rig
            .destination
            .command(binaries::program("lazy-restorer")?);
        command.args(["lazy-pages", "--page-server", "--images-dir"]);
        command.arg(&self.copied).arg("--work-dir").arg(work);
        command.args(["--address", &self.rig.source.address().to_string()]);
        command.args(["--port", &PORT.to_string(), "-v4", "-o", "lazy.log"]);
        command.args(["--daemon", "--pidfile", "lazy.pid"]);
        command.arg("--identity").arg(&self.identities.destination);
        let fd = pass_descriptor(&mut command, File::create(work.join("status"))?);
        command.args(["--status-fd", &fd.to_string()]);
        Side::start_program(self.rig, "lazy-restorer", &mut command)
    }

    /// Starts `lazy-restorer restore` for copy number `copy`, which moves the images as well.
    pub fn start_restorer(&self, copy: usize, options: &[&str]) -> Result<Side> {
        let mut command = self
            .rig
            .destination
            .command(binaries::program("lazy-restorer")?);
        command.args(["restore", "--pidns"]);
        command.args(["--from", &format!("{}:{PORT}", self.rig.source.address())]);
        command.arg("--identity").arg(&self.identities.destination);
        command.arg("--criu").arg(&self.criu).args(options);
        Side::start_program(self.rig, &format!("lazy-restorer-{copy}"), &mut command)
    }

    /// Runs `criu restore` in `home`; the PID of the restored root there was `pid` on the source.
    pub fn restore(&self, home: &BaselineHome, pid: Pid) -> Result<Pid> {
        run(&mut self.restore_command(home))?;
        task::outer_pid(home.init(), pid.as_raw()).context("the restored root is not there")
    }

    /// The same with a work directory that is not the images'.
    pub fn restore_in(&self, home: &BaselineHome, pid: Pid, work: &Path) -> Result<Pid> {
        run(self.restore_command(home).arg("--work-dir").arg(work))?;
        task::outer_pid(home.init(), pid.as_raw()).context("the restored root is not there")
    }

    /// `criu restore` in `home`.
    pub fn restore_command(&self, home: &BaselineHome) -> Command {
        let mut command = self.rig.destination.command("nsenter");
        command
            .args(["-t", &home.init().to_string(), "--pid", "--mount", "--"])
            .arg(&self.criu);
        command.args([
            "restore",
            "--lazy-pages",
            "--restore-detached",
            "--tcp-established",
        ]);
        command.args(["--log-file", "restore.log", "--images-dir"]);
        command.arg(&self.copied);
        command
    }
}
