//! A real, unmodified `redis-server` as workload.

use std::process::Command;

use anyhow::Result;

use crate::process::Process;
use crate::rig::Rig;

/// The port redis listens on.
pub const PORT: u16 = 6379;

/// The command line of a redis that keeps its data in memory only, in a session of its own.
pub fn arguments(folder: &std::path::Path) -> Vec<String> {
    let text = format!(
        "setsid redis-server --port {PORT} --bind 0.0.0.0 --protected-mode no --save  --appendonly no --daemonize no \
         --logfile  --dir {}",
        folder.display()
    );
    // Two spaces are an empty argument: no snapshots, no log file.
    text.split(' ').map(str::to_owned).collect()
}

/// Starts redis on the source of `rig`.
pub fn start(rig: &Rig) -> Result<Process> {
    let words = arguments(&rig.make_folder("redis")?);
    let mut command: Command = rig.source.command(&words[0]);
    command.args(&words[1..]);
    Process::start_detached("redis", &mut command)
}
