//! `runc restore --lazy-pages` of an OCI container from a bundle.
//!
//! The runtime takes no CRIU options of ours, so the gate comes by a configuration file (see
//! [`common::criu::under_runtime`]). When CRIU fails the runtime removes what it made of the container; so an
//! unfinished restore is put away by killing everything below the runtime, not the runtime.

use std::io;
use std::path::{Path, PathBuf};

use common::container::{Bundle, ContainerError, Runtime};
use common::criu::under_runtime;
use common::session_file::ContainerName;
use nix::mount::{MntFlags, umount2};
use tokio::process::Command;

use crate::files::Files;
use crate::restore::RestorePlan;

/// A container to be.
#[derive(Clone, Debug)]
pub struct Container {
    runtime: Runtime,
    id: String,
    /// Where the bundle is, or will be.
    directory: PathBuf,
    /// It, when it is here.
    bundle: Option<Bundle>,
    /// It, or its root filesystem, comes from the source.
    comes: bool,
    /// More arguments for `runc restore`.
    arguments: Vec<String>,
}

impl Container {
    /// The container `id` that the bundle in `directory` is to become, which may be among `files` that come; nobody may
    /// have this name yet.
    pub fn plan(
        runtime: Runtime,
        id: &str,
        directory: &Path,
        files: &Files,
        arguments: Vec<String>,
    ) -> Result<Self, ContainerError> {
        let mut container = Container {
            bundle: None,
            comes: files.bring(directory),
            directory: std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned()),
            runtime,
            id: id.to_owned(),
            arguments,
        };
        if !container.comes {
            let bundle = Bundle::read_config(directory)?;
            container.comes = files.bring(bundle.root());
            if !container.comes {
                bundle.check_root()?;
            }
            container.bundle = Some(bundle);
        }
        container.check()?;
        Ok(container)
    }

    /// Reads the bundle, now that the files are here.
    pub fn read_bundle(&mut self) -> Result<(), ContainerError> {
        if self.comes {
            self.bundle = Some(Bundle::read(&self.directory)?);
        }
        Ok(())
    }

    /// How its runtime knows it.
    pub fn name(&self) -> ContainerName {
        self.runtime.name_of(&self.id)
    }

    /// Whether the bundle, or its root filesystem, comes from the source.
    pub fn comes(&self) -> bool {
        self.comes
    }

    /// Makes sure that the name is still free.
    pub fn check(&self) -> Result<(), ContainerError> {
        self.runtime.check_free(&self.id)
    }

    /// Its bundle, when it is here.
    pub fn bundle(&self) -> Option<&Bundle> {
        self.bundle.as_ref()
    }

    /// Removes what a runtime that was killed has left. Its processes are dead already.
    pub fn remove_remains(&self) {
        // Bound there by `runc restore` for CRIU; a mount point cannot be removed.
        let _ = umount2(
            &self.runtime.directory_of(&self.id).join("criu-root"),
            MntFlags::MNT_DETACH,
        );
        if let Err(error) = self.runtime.delete(&self.id) {
            tracing::warn!(%error, "something of the container may be left here");
        }
    }
}

/// Where the runtime writes its own log.
pub(super) fn log(directory: &Path) -> PathBuf {
    directory.join("runtime.log")
}

pub(super) fn command(
    container: &Container,
    plan: &RestorePlan,
    script: &Path,
) -> io::Result<Command> {
    let options = [("action-script", script.display().to_string())];
    let environment =
        under_runtime::environment(&plan.criu, &plan.directory, &options, &plan.criu_args)?;
    let mut command = Command::new(container.runtime.program());
    command
        .args(container.runtime.arguments(&log(&plan.directory)))
        .args(["restore", "--detach", "--lazy-pages"])
        .arg("--image-path")
        .arg(plan.images())
        .arg("--work-path")
        .arg(plan.work())
        .arg("--bundle")
        .arg(&container.directory)
        .envs(environment);
    if plan.tcp_established {
        command.arg("--tcp-established");
    }
    if plan.shell_job {
        command.arg("--shell-job");
    }
    command.args(&container.arguments).arg(&container.id);
    Ok(command)
}
