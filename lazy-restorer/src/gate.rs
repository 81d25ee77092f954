//! CRIU's action script on the destination: this very program, in another role.
//!
//! At `pre-restore` no task exists: the script holds CRIU until the operator has made room for the workload, which takes
//! about as long as CRIU needs to get there. At `post-restore` all tasks are rebuilt and none has run: the script asks `lazy-restorer` and holds CRIU until the
//! source has given the workload away. A refusal, or `lazy-restorer`'s death, makes CRIU kill the tasks. At
//! `post-resume` the tasks run, and the script says so.

use std::env;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use procfs::process::Process;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};

/// Names the socket of the waiting `lazy-restorer`; set for CRIU and inherited by its scripts.
pub const SOCKET_VARIABLE: &str = "POSTCOPY_GATE_SOCKET";
/// Set by CRIU: what the script is called for.
const ACTION_VARIABLE: &str = "CRTOOLS_SCRIPT_ACTION";

/// The script's word: no task is made yet.
const READY: u8 = b'P';
/// The script's word: the tasks wait.
const ARMED: u8 = b'A';
/// The script's word: the tasks run.
const RESUMED: u8 = b'R';
/// Our word: make them, or let them run.
pub(crate) const GO: u8 = b'G';

/// Runs as CRIU's script when called as one.
pub fn run_if_called() -> Option<ExitCode> {
    let action = env::var_os(ACTION_VARIABLE)?;
    let socket = PathBuf::from(env::var_os(SOCKET_VARIABLE)?);
    let passed = match action.to_str() {
        Some("pre-restore") => ask(&socket, READY),
        Some("post-restore") => ask(&socket, ARMED),
        Some("post-resume") => tell_resumed(&socket).map(|()| true),
        _ => Ok(true),
    };
    Some(match passed {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) | Err(_) => ExitCode::FAILURE,
    })
}

/// Waits until CRIU may go on; false when it must not.
fn ask(socket: &Path, word: u8) -> io::Result<bool> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(&[word])?;
    let mut answer = [0];
    let length = stream.read(&mut answer)?;
    Ok(length == 1 && answer[0] == GO)
}

fn tell_resumed(socket: &Path) -> io::Result<()> {
    UnixStream::connect(socket)?.write_all(&[RESUMED])
}

/// `lazy-restorer`'s end.
#[derive(Debug)]
pub struct Gate {
    calls: mpsc::Receiver<Call>,
    begin: watch::Sender<bool>,
}

/// What CRIU's script says.
#[derive(Debug)]
pub enum Call {
    /// All tasks are rebuilt and wait.
    Armed(Held),
    /// The tasks run.
    Resumed,
}

/// CRIU, held with all tasks rebuilt. Dropping it makes CRIU kill them.
#[derive(Debug)]
pub struct Held {
    stream: tokio::net::UnixStream,
    /// CRIU, whose script is at the other end, when it said that.
    criu: Option<i32>,
}

/// The parent of the process at the other end.
fn parent_of_peer(stream: &tokio::net::UnixStream) -> Option<i32> {
    let script = stream.peer_cred().ok()?.pid()?;
    Some(Process::new(script).ok()?.stat().ok()?.ppid)
}

impl Gate {
    /// Binds the socket and listens on the current runtime.
    pub fn bind(socket: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let (send, calls) = mpsc::channel(1);
        let (begin, begun) = watch::channel(false);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Some(call) = understand(stream, begun.clone()).await
                    && send.send(call).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Gate { calls, begin })
    }

    /// CRIU may make tasks.
    pub fn let_begin(&self) {
        self.begin.send_replace(true);
    }

    /// The script's next call. May be cancelled without loss.
    pub async fn next(&mut self) -> Option<Call> {
        self.calls.recv().await
    }
}

async fn understand(
    mut stream: tokio::net::UnixStream,
    mut begun: watch::Receiver<bool>,
) -> Option<Call> {
    match stream.read_u8().await {
        Ok(READY) => {
            // Without a gate there is no migration any more: the script sees the end of the stream.
            begun.wait_for(|begun| *begun).await.ok()?;
            if let Err(error) = stream.write_all(&[GO]).await {
                tracing::warn!(%error, "CRIU's script is gone");
            }
            None
        }
        Ok(ARMED) => Some(Call::Armed(Held {
            criu: parent_of_peer(&stream),
            stream,
        })),
        Ok(RESUMED) => Some(Call::Resumed),
        said => {
            tracing::warn!(?said, "CRIU's script says something else");
            None
        }
    }
}

impl Held {
    /// Another descriptor of the same gate.
    pub fn copy(&self) -> io::Result<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned()
    }

    /// Whether CRIU is gone, or its script: another one is the script's parent then.
    pub fn has_lost_criu(&self) -> bool {
        self.criu.is_none() || parent_of_peer(&self.stream) != self.criu
    }

    /// Lets the tasks run.
    pub async fn open(mut self) -> io::Result<()> {
        self.stream.write_all(&[GO]).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `script` beside `ours`; what `ours` returns is kept until the script ends.
    fn with_gate<T, K>(script: fn(&Path) -> T, ours: impl AsyncFnOnce(Gate) -> K) -> T
    where
        T: Send + 'static,
    {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("gate");
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(async {
                let gate = Gate::bind(&path).expect("bound");
                let script = tokio::task::spawn_blocking(move || script(&path));
                let _kept = ours(gate).await;
                script.await.expect("the script ends")
            })
    }

    #[test]
    fn no_task_is_made_before_there_is_room() {
        let passed = with_gate(
            |path| ask(path, READY),
            async |gate: Gate| {
                gate.let_begin();
                gate
            },
        );
        assert!(passed.expect("connected"));
        let passed = with_gate(|path| ask(path, READY), async |gate| drop(gate));
        assert!(!matches!(passed, Ok(true)));
    }

    #[test]
    fn the_tasks_run_only_when_told() {
        let passed = with_gate(
            |path| ask(path, ARMED),
            async |mut gate: Gate| {
                let Some(Call::Armed(held)) = gate.next().await else {
                    panic!("not armed");
                };
                held.open().await.expect("the script waits");
            },
        );
        assert!(passed.expect("connected"));
    }

    #[test]
    fn a_script_whose_parent_is_the_same_has_not_lost_it() {
        let passed = with_gate(
            |path| ask(path, ARMED),
            async |mut gate: Gate| {
                let Some(Call::Armed(mut held)) = gate.next().await else {
                    panic!("not armed");
                };
                assert!(!held.has_lost_criu());
                held.criu = Some(i32::MAX);
                assert!(held.has_lost_criu());
            },
        );
        assert!(!passed.expect("connected"));
    }

    #[test]
    fn silence_means_no() {
        let passed = with_gate(
            |path| ask(path, ARMED),
            async |mut gate: Gate| drop(gate.next().await),
        );
        assert!(!passed.expect("connected"));
    }

    #[test]
    fn the_resume_is_told() {
        let told = with_gate(tell_resumed, async |mut gate: Gate| {
            assert!(matches!(gate.next().await, Some(Call::Resumed)));
        });
        told.expect("connected");
    }
}
