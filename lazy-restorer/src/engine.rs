//! Who restores the workload: CRIU called by us, or a container runtime that calls CRIU.
//!
//! An engine builds the command, and knows how to put an unfinished restore away. Everything around it (gate, handover,
//! keeper, memory) is shared, because in the end it is one CRIU, with our gate as its action script.

mod criu;
pub mod runc;

use std::io;
use std::path::Path;

use common::container::quote_runtime;
use common::criu::quote_errors;
use common::session_file::ContainerName;
use tokio::process::Command;

use crate::restore::RestorePlan;
pub use runc::Container;

/// Who restores.
#[derive(Clone, Debug)]
pub enum Engine {
    /// `criu restore`, in this host's PID namespace.
    Criu,
    /// `criu restore`, in a PID namespace of its own with an init of ours.
    Nursery,
    /// `runc restore`.
    Runc(Box<Container>),
}

impl Engine {
    /// The command that restores the workload, with `script` as CRIU's action script.
    pub fn command(&self, plan: &RestorePlan, script: &Path) -> io::Result<Command> {
        match self {
            Engine::Criu => Ok(criu::command(plan, script)),
            Engine::Nursery => Ok(criu::command_in_nursery(plan, script)),
            Engine::Runc(container) => runc::command(container, plan, script),
        }
    }

    /// Whether the restored processes get their old PIDs in the PID namespace of this host.
    pub fn needs_pids_of_host(&self) -> bool {
        matches!(self, Engine::Criu)
    }

    /// How the runtime knows it, if it is a container.
    pub fn container_name(&self) -> Option<ContainerName> {
        match self {
            Engine::Runc(container) => Some(container.name()),
            Engine::Criu | Engine::Nursery => None,
        }
    }

    /// What went wrong, from the logs.
    pub fn quote(&self, directory: &Path, log: &Path) -> String {
        let runtime = || quote_runtime(&runc::log(directory));
        match self {
            Engine::Runc(_) if !log.exists() => runtime().unwrap_or_else(|| quote_errors(log)),
            _ => quote_errors(log),
        }
    }
}
