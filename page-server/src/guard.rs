//! Cleans up when `page-server` was killed: this very program, in another role.
//!
//! It holds the reading end of a pipe whose writing ends are held by `page-server` and by CRIU, so it wakes when both
//! are gone. If the migration's directory is still there then, nobody else will remove it. Before the point of no
//! return it also makes sure that the workload runs; after it, it touches nothing.

use std::env;
use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use nix::unistd::{Pid, setsid};

use crate::engine::inheritable;
use crate::rescue::rescue;

/// The file that says that the workload has been given away.
const COMMITTED: &str = "committed";

/// `page-server`'s end. Dropping it ends the guard.
#[derive(Debug)]
pub struct Guard {
    child: Child,
    pipe: PipeWriter,
}

impl Guard {
    /// Starts a guard of the workload `root` and the migration's `directory`.
    pub fn start(root: Pid, directory: &Path) -> io::Result<Self> {
        let (reader, pipe): (PipeReader, PipeWriter) = io::pipe()?;
        let child = Command::new(env::current_exe()?)
            .args(["guard", "--pid", &root.to_string(), "--directory"])
            .arg(directory)
            .stdin(Stdio::from(OwnedFd::from(reader)))
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Guard { child, pipe })
    }

    /// A writing end for a child to inherit: the guard waits for the end of whoever has it.
    pub fn leash(&self) -> io::Result<OwnedFd> {
        inheritable(&self.pipe)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // One that is gone already needs no telling.
        let _ = self.pipe.write_all(b".");
        if let Err(error) = self.child.wait() {
            tracing::debug!(%error, "the guard");
        }
    }
}

/// Notes in `directory` that the workload has been given away.
pub fn note_committed(directory: &Path) -> io::Result<()> {
    File::create(directory.join(COMMITTED)).map(drop)
}

/// The guard's own life.
pub fn run(root: Pid, directory: &Path) -> ExitCode {
    // Signals meant for the group of `page-server`, as from a terminal, must not end its guard.
    let _ = setsid();
    let told = io::stdin().read(&mut [0]);
    let is_orphan = matches!(told, Ok(0)) && directory.exists();
    if is_orphan && !directory.join(COMMITTED).exists() {
        rescue(root, directory);
        if let Err(error) = fs::remove_dir_all(directory) {
            eprintln!(
                "page-server: cannot remove {}: {error}",
                directory.display()
            );
        }
    }
    ExitCode::SUCCESS
}
