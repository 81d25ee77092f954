//! Cleans up when `page-server` was killed: this very program, in another role.
//!
//! It holds the reading end of a pipe whose writing ends are held by `page-server` and by CRIU, so it wakes when both
//! are gone. If the migration's directory is still there then, nobody else will remove it. Before the point of no
//! return it also makes sure that the workload runs; after it, it touches nothing as long as there is a workload.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use common::session_file::{self, Staleness, Standing};
use nix::unistd::{Pid, setsid};

use crate::engine::inheritable;
use crate::network_lock::{self, Network};
use crate::privileges;
use crate::rescue::{dump_log, rescue};

/// The file that says that the workload has been given away.
const COMMITTED: &str = "committed";
/// The file that says where the session's file is.
const SESSION: &str = "session";

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

/// Notes in `directory` where the session's file is, which means nothing once the workload runs again.
pub fn note_session(directory: &Path, file: &Path) -> io::Result<()> {
    fs::write(directory.join(SESSION), file.as_os_str().as_bytes())
}

/// Removes the session's file, and the state directory if nothing else is in it.
fn forget_session(directory: &Path) {
    let noted = fs::read(directory.join(SESSION)).unwrap_or_default();
    let file = Path::new(OsStr::from_bytes(&noted));
    if fs::remove_file(file).is_ok() {
        let _ = file.parent().map(fs::remove_dir);
    }
}

/// Whether the session's program was killed when nothing was left to do but to clean up: the original is dead.
fn is_over(directory: &Path) -> bool {
    let noted = fs::read(directory.join(SESSION)).unwrap_or_default();
    let bytes = fs::read(OsStr::from_bytes(&noted)).unwrap_or_default();
    let file = session_file::decode(&bytes);
    // Not so when a successor serves it.
    file.is_ok_and(|file| file.standing() == Standing::Stale(Staleness::TasksGone))
}

/// The guard's own life.
pub fn run(root: Pid, directory: &Path) -> ExitCode {
    // Signals meant for the group of `page-server`, as from a terminal, must not end its guard.
    let _ = setsid();
    // One that may do more than it needs is better than none.
    let _ = privileges::give_up();
    // Nobody may live in it any more when its lock is to be removed.
    let network = Network::of(root);
    let told = io::stdin().read(&mut [0]);
    let is_orphan = matches!(told, Ok(0)) && directory.exists();
    let was_given_away = directory.join(COMMITTED).exists();
    if is_orphan && !was_given_away {
        rescue(root, directory);
    }
    let is_over = was_given_away && is_over(directory);
    if is_orphan && is_over {
        // CRIU does not remove it when it kills the tasks.
        network_lock::remove(&dump_log(directory), &network);
    }
    if is_orphan && (!was_given_away || is_over) {
        forget_session(directory);
        if let Err(error) = fs::remove_dir_all(directory) {
            eprintln!(
                "page-server: cannot remove {}: {error}",
                directory.display()
            );
        }
    }
    ExitCode::SUCCESS
}
