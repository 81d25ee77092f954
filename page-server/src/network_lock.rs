//! CRIU's lock on the connections of a frozen task: an nftables table with a rule for each, which drops its packets.
//!
//! CRIU removes it when it lets the tasks run again, and never when it kills them.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::Pid;

/// What CRIU writes into its log before the identifier of its run.
const RUN_ID: &str = "CRIU run id = ";
/// How the names of its tables begin; a part of the identifier follows (`criu/netfilter.c`).
const TABLE_PREFIX: &str = "CRIU-";

/// A network namespace that may hold a lock, also when nobody lives in it any more.
#[derive(Debug)]
pub struct Network {
    /// `None` when it is ours.
    handle: Option<File>,
}

impl Network {
    /// The one that `inhabitant` lives in; ours if it is gone.
    pub fn of(inhabitant: Pid) -> Self {
        let inode = |file: &File| file.metadata().map(|metadata| metadata.ino()).ok();
        let ours = File::open("/proc/self/ns/net").ok();
        let theirs = File::open(format!("/proc/{inhabitant}/ns/net")).ok();
        let handle = theirs.filter(|theirs| inode(theirs) != ours.as_ref().and_then(inode));
        Network { handle }
    }

    /// A command that will run in it.
    pub fn command(&self, program: &str) -> Command {
        let Some(handle) = &self.handle else {
            return Command::new(program);
        };
        let (ourselves, fd) = (std::process::id(), handle.as_raw_fd());
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{ourselves}/fd/{fd}"));
        command.args(["--", program]);
        command
    }
}

/// Removes the table of the CRIU that wrote `log`, if there is one, from `network`.
pub fn remove(log: &Path, network: &Network) {
    // Names of files in it need not be UTF-8.
    let log = fs::read(log).unwrap_or_default();
    if let Some(run) = run_id(&String::from_utf8_lossy(&log)) {
        remove_of_run(&run, network);
    }
}

/// The same for the CRIU whose run is called `run`.
pub fn remove_of_run(run: &str, network: &Network) {
    let nft = |arguments: &[&str]| nft(network, arguments);
    let listed = nft(&["list", "tables", "inet"]).unwrap_or_default();
    for table in tables(&listed).filter(|table| belongs(table, run)) {
        let delete = ["delete", "table", "inet", table];
        if nft(&delete).is_none() {
            tracing::warn!(
                table,
                "cannot remove CRIU's lock; `nft delete table inet` does"
            );
        }
    }
}

/// The identifier of the run that wrote a log; called by a runtime CRIU makes itself a second one, and that counts.
pub fn run_id(log: &str) -> Option<String> {
    let lines = log.lines().rev();
    let line = lines.filter_map(|line| line.split_once(RUN_ID)).next()?;
    let id = line.1.trim();
    (!id.is_empty()).then(|| id.to_owned())
}

/// Whether a table is that run's: its name holds as much of the identifier as fits.
pub fn belongs(table: &str, run: &str) -> bool {
    let part = table.strip_prefix(TABLE_PREFIX).unwrap_or_default();
    !part.is_empty() && run.starts_with(part)
}

/// The names of the tables `nft` listed.
pub fn tables(listed: &str) -> impl Iterator<Item = &str> {
    listed
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
}

/// What `nft` says; `None` when it fails or is not there.
fn nft(network: &Network, arguments: &[&str]) -> Option<String> {
    let output = network
        .command("nft")
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success().then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = "0b014ddc-bd5e-45f0-9c68-d007b2a630d7";

    #[test]
    fn the_run_is_found_in_the_log() {
        let log = format!("(00.000000) CRIU run id = {RUN}\n(00.000032) Version: 4.2.1\n");
        assert_eq!(run_id(&log).as_deref(), Some(RUN));
        let twice = format!("(00.000000) CRIU run id = first\n{log}");
        assert_eq!(run_id(&twice).as_deref(), Some(RUN));
        assert_eq!(run_id("(00.0) Version: 4.2.1"), None);
    }

    #[test]
    fn only_tables_of_this_run_are_ours() {
        assert!(belongs("CRIU-0b014ddc-bd5e-45f0-9c", RUN));
        assert!(!belongs("CRIU-1b014ddc-bd5e-45f0-9c", RUN));
        assert!(!belongs("CRIU-", RUN));
        assert!(!belongs("filter", RUN));
    }
}
