//! Puts things right after a dump that was killed: what CRIU would have done for its tasks, as far as others can.
//!
//! While a dump holds established connections their packets are dropped and their sockets are in repair mode. A task
//! that ran like this would lose them: its next `recv` fails.

use std::path::{Path, PathBuf};

use common::address;
use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use nix::unistd::Pid;

use crate::network_lock::Network;
use crate::workload::{self, signal_all};
use crate::{freezer, network_lock, sockets};

/// Where CRIU writes the log of the dump that keeps its things in `directory`.
pub fn dump_log(directory: &Path) -> PathBuf {
    directory.join("work").join("dump.log")
}

/// Makes the tree of `root` run again with its connections, after the dump in `directory` was killed.
///
/// The connections come first: a task that runs must not find them in repair mode.
pub fn rescue(root: Pid, directory: &Path) {
    put_addresses_back(directory);
    let tasks = workload::tree_pids(root);
    let connections = end_repair(&tasks);
    network_lock::remove(&dump_log(directory), &Network::of(root));
    signal_all(&tasks, Signal::SIGCONT);
    freezer::thaw_noted(directory);
    tracing::warn!(%root, connections, "CRIU was killed while it held the workload; it runs on");
}

/// The service addresses that the migration in `directory` took, if any, are this host's again.
pub(crate) fn put_addresses_back(directory: &Path) {
    if let Err(error) = address::put_back(directory) {
        tracing::error!(%error, "the workload runs here, but not all of its addresses are back");
    }
}

/// Ends the repair mode of every TCP socket of `tasks`, and returns how many had it.
pub(crate) fn end_repair(tasks: &[Pid]) -> usize {
    let sockets = tasks.iter().flat_map(|task| sockets::of(*task));
    // A socket that is no TCP socket does not know the option; one that several tasks share has it once.
    sockets
        .filter(|socket| matches!(getsockopt(socket, sockopt::TcpRepair), Ok(mode) if mode != 0))
        .filter(|socket| match setsockopt(socket, sockopt::TcpRepair, &0) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "a connection of the workload stays in repair mode");
                false
            }
        })
        .count()
}
