//! The `post-dump` action script of CRIU: this very program, in another role.
//!
//! CRIU runs it first before the dump: for a container it freezes the cgroup then ([`freezer`]). CRIU runs it again when all images are complete and the tasks still frozen, and does with the tasks what its exit code
//! says: 0 kills them, anything else lets them run again with their network unlocked. It asks `page-server` over a
//! local socket and waits. If `page-server` dies before the point of no return it lets the tasks run; after it,
//! it holds them until a new `page-server` takes over, for the copy on the destination may be running.

use std::env;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::freezer;
use crate::privileges;
use crate::rescue::put_addresses_back;
use crate::workload::{signal_all, tree_pids};

/// Names the socket of the waiting `page-server`; set for CRIU and inherited by its scripts.
pub const SOCKET_VARIABLE: &str = "POSTCOPY_HOOK_SOCKET";
/// The operator's `--on-thawed` command, for the case that nobody else is left to run it.
pub const ON_THAWED_VARIABLE: &str = "POSTCOPY_HOOK_ON_THAWED";
/// Set by CRIU: what the script is called for.
const ACTION_VARIABLE: &str = "CRTOOLS_SCRIPT_ACTION";

/// Set by CRIU: the root task, as this host numbers it.
const ROOT_VARIABLE: &str = "CRTOOLS_INIT_PID";

/// Pause between attempts to reach a restarted `page-server`.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

/// What `page-server` tells the script, one byte each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The point of no return is passed: from here on only another verdict ends the wait.
    Commit,
    /// The workload lives on the destination: kill the frozen original.
    Release,
    /// Let the workload run on.
    Thaw,
}

impl Verdict {
    /// The verdict's byte.
    pub fn byte(self) -> u8 {
        match self {
            Verdict::Commit => b'C',
            Verdict::Release => b'R',
            Verdict::Thaw => b'T',
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Verdict::Commit, Verdict::Release, Verdict::Thaw]
            .into_iter()
            .find(|verdict| verdict.byte() == byte)
    }
}

/// Runs as CRIU's script when called as one.
pub fn run_if_called() -> Option<ExitCode> {
    let action = env::var_os(ACTION_VARIABLE)?;
    let socket = PathBuf::from(env::var_os(SOCKET_VARIABLE)?);
    // One that may do more than it needs is better than none.
    let _ = privileges::give_up();
    let code = match action.to_str() {
        Some("pre-dump") => freeze_cgroup(),
        Some("post-dump") => wait_for_verdict(&socket),
        _ => 0,
    };
    Some(ExitCode::from(code))
}

/// Freezes the workload's cgroup ahead of CRIU, where that is wanted.
fn freeze_cgroup() -> u8 {
    if let (Some(note), Some(root)) = (env::var_os(freezer::NOTE_VARIABLE), root()) {
        // CRIU freezes it all the same, only slower.
        let _ = freezer::freeze(root, Path::new(&note));
    }
    0
}

/// The root task.
fn root() -> Option<Pid> {
    let root = env::var(ROOT_VARIABLE).ok()?;
    root.parse().ok().map(Pid::from_raw)
}

/// Waits for the verdict and returns the exit code that carries it out.
fn wait_for_verdict(socket: &Path) -> u8 {
    let mut committed = false;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                if let Some(code) = follow(stream, &mut committed) {
                    return code;
                }
            }
            Err(_) if committed => {}
            Err(_) => return thaw_alone(socket),
        }
        if !committed {
            return thaw_alone(socket);
        }
        thread::sleep(RECONNECT_PAUSE);
    }
}

/// Reads verdicts until one decides; `None` when `page-server` is gone.
fn follow(mut stream: UnixStream, committed: &mut bool) -> Option<u8> {
    let mut byte = [0];
    loop {
        match stream.read(&mut byte) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return None,
        }
        match Verdict::from_byte(byte[0])? {
            Verdict::Commit => *committed = true,
            Verdict::Release => return Some(0),
            Verdict::Thaw => return Some(1),
        }
    }
}

/// `page-server` is gone: do what it would have done before letting the tasks run.
fn thaw_alone(socket: &Path) -> u8 {
    if let Some(directory) = socket.parent() {
        put_addresses_back(directory);
    }
    if let Some(command) = env::var_os(ON_THAWED_VARIABLE) {
        let _ = Command::new("sh")
            .arg("-c")
            .arg(command)
            .env("POSTCOPY_PHASE", "aborted")
            .stdin(Stdio::null())
            .status();
    }
    if let Some(root) = root() {
        // `page-server` may have stopped them, against CRIU's death; that stop would outlive the freeze.
        signal_all(&tree_pids(root), Signal::SIGCONT);
    }
    1
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Sends `verdicts` on one connection after the other and returns the script's exit code.
    fn script_told(connections: &[&[Verdict]]) -> u8 {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("hook");
        let listener = UnixListener::bind(&path).expect("bound");
        let script = thread::spawn(move || wait_for_verdict(&path));
        for verdicts in connections {
            let (mut stream, _) = listener.accept().expect("the script connects");
            let bytes: Vec<u8> = verdicts.iter().map(|verdict| verdict.byte()).collect();
            stream.write_all(&bytes).expect("the script listens");
        }
        drop(listener);
        script.join().expect("the script ends")
    }

    #[test]
    fn the_verdict_is_the_exit_code() {
        assert_eq!(script_told(&[&[Verdict::Commit, Verdict::Release]]), 0);
        assert_eq!(script_told(&[&[Verdict::Thaw]]), 1);
        assert_eq!(script_told(&[&[Verdict::Commit, Verdict::Thaw]]), 1);
    }

    #[test]
    fn without_page_server_the_tasks_run_on_before_the_point_of_no_return() {
        assert_eq!(script_told(&[&[]]), 1);
    }

    #[test]
    fn after_the_point_of_no_return_it_waits_for_a_new_page_server() {
        assert_eq!(
            script_told(&[&[Verdict::Commit], &[], &[Verdict::Release]]),
            0
        );
    }
}
