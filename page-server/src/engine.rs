//! Who freezes the workload: CRIU called by us, or a container runtime that calls CRIU.
//!
//! An engine only builds the command. Everything around it (hook, guard, rescue, memory) is shared, because in the end
//! it is one CRIU, with our hook as its action script.

mod criu;
pub mod runc;

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::ExitStatus;

use common::container::forget;
use common::container::quote_runtime;
use common::criu::{ended_by_itself, quote_errors};
use common::session_file::ContainerName;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::os::unix::process::ExitStatusExt;
use tokio::process::Command;

use crate::freeze::FreezePlan;
pub use runc::Container;

/// Descriptors that others inherit have at least this number: the runtime gives CRIU descriptors of its own from 3 on.
const LOWEST_INHERITED: RawFd = 200;

/// Who freezes.
#[derive(Clone, Debug)]
pub enum Engine {
    /// `criu dump` for a process tree.
    Criu,
    /// `runc checkpoint` for a container.
    Runc(Container),
}

impl Engine {
    /// The command that freezes the workload and runs `hook` when all images are complete; CRIU serves its pages to
    /// `page_server`, that is, to nobody.
    pub fn command(
        &self,
        plan: &FreezePlan,
        page_server: &OwnedFd,
        hook: &Path,
    ) -> io::Result<Command> {
        match self {
            Engine::Criu => Ok(criu::command(plan, page_server.as_raw_fd(), hook)),
            Engine::Runc(container) => {
                runc::command(container, plan, page_server.as_raw_fd(), hook)
            }
        }
    }

    /// Whether CRIU was killed with the workload in its hands, when the command ended with `status`.
    pub fn criu_was_killed(&self, status: ExitStatus, log: &Path) -> bool {
        match self {
            Engine::Criu => status.signal().is_some(),
            // The runtime's status says nothing about how CRIU ended.
            Engine::Runc(_) => log.exists() && !ended_by_itself(log),
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

    /// How the workload is known to its runtime, when it is a container.
    pub fn container_name(&self) -> Option<ContainerName> {
        match self {
            Engine::Criu => None,
            Engine::Runc(container) => Some(container.name()),
        }
    }

    /// The original was killed by us and not by CRIU: the runtime must hear of it.
    pub fn forget(&self) {
        if let Some(container) = self.container_name() {
            forget(&container);
        }
    }
}

/// A copy of `fd` for children to inherit.
pub fn inheritable(fd: impl AsFd) -> io::Result<OwnedFd> {
    let copy = fcntl(fd, FcntlArg::F_DUPFD(LOWEST_INHERITED))?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// A socket for CRIU to inherit whose other end is closed: CRIU then serves nobody.
pub fn dead_page_server() -> io::Result<OwnedFd> {
    let (page_server, _peer) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    inheritable(page_server)
}
