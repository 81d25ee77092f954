//! `runc checkpoint --lazy-pages` for an OCI container.
//!
//! runc gives CRIU its options by RPC and takes none of ours, so they come by a configuration file (see
//! [`common::criu::under_runtime`]). It names no page server to CRIU; the file does.

use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use common::container::{Bundle, ContainerError, ContainerFacts, Runtime};
use common::criu::under_runtime;
use common::session_file::ContainerName;
use nix::unistd::Pid;
use tokio::process::Command;

use crate::freeze::FreezePlan;
use crate::freezer;

/// A running container.
#[derive(Clone, Debug)]
pub struct Container {
    runtime: Runtime,
    id: String,
    init: Pid,
    facts: ContainerFacts,
    /// More arguments for `runc checkpoint`.
    arguments: Vec<String>,
}

impl Container {
    /// The running container `id`.
    pub fn find(
        runtime: Runtime,
        id: &str,
        arguments: Vec<String>,
    ) -> Result<Self, ContainerError> {
        let state = runtime.running(id)?;
        let facts = Bundle::read(&state.bundle)?.facts().clone();
        if facts.terminal {
            return Err(ContainerError::Terminal(id.to_owned()));
        }
        // One that is joined by path is called otherwise.
        if facts.namespaces.iter().any(|name| name == "network") {
            return Err(ContainerError::OwnNetwork(id.to_owned()));
        }
        Ok(Container {
            runtime,
            id: id.to_owned(),
            init: Pid::from_raw(state.pid),
            facts,
            arguments,
        })
    }

    /// Its init as this host numbers it: the root of the process tree.
    pub fn init(&self) -> Pid {
        self.init
    }

    /// What it is made of.
    pub fn facts(&self) -> &ContainerFacts {
        &self.facts
    }

    /// Makes sure that it still runs as it did when it was found.
    pub fn check(&self) -> Result<(), ContainerError> {
        let state = self.runtime.running(&self.id)?;
        match state.pid == self.init.as_raw() {
            true => Ok(()),
            false => Err(ContainerError::Replaced(self.id.clone())),
        }
    }

    /// How its runtime knows it.
    pub fn name(&self) -> ContainerName {
        self.runtime.name_of(&self.id)
    }
}

/// Where the runtime writes its own log.
pub(super) fn log(directory: &Path) -> PathBuf {
    directory.join("runtime.log")
}

pub(super) fn command(
    container: &Container,
    plan: &FreezePlan,
    page_server: RawFd,
    hook: &Path,
) -> io::Result<Command> {
    let mut options = vec![
        ("action-script", hook.display().to_string()),
        ("ps-socket", page_server.to_string()),
    ];
    if plan.tcp_established && plan.criu.locks_by_nftables() {
        options.push(("network-lock", String::from("nftables")));
    }
    if let Some(limit) = plan.ghost_limit {
        options.push(("ghost-limit", limit.to_string()));
    }
    let environment =
        under_runtime::environment(&plan.criu, &plan.directory, &options, &plan.criu_args)?;
    let mut command = Command::new(container.runtime.program());
    command
        .args(container.runtime.arguments(&log(&plan.directory)))
        .args(["checkpoint", "--lazy-pages"])
        .arg("--image-path")
        .arg(plan.images())
        .arg("--work-path")
        .arg(plan.work())
        .envs(environment)
        .env(freezer::NOTE_VARIABLE, freezer::note(&plan.directory));
    if plan.tcp_established {
        command.arg("--tcp-established");
    }
    if plan.shell_job {
        command.arg("--shell-job");
    }
    command.args(&container.arguments).arg(&container.id);
    Ok(command)
}
