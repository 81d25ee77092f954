//! A `criu dump --lazy-pages` that somebody else runs, as far as it can be held, ended and undone from outside.
//!
//! When its images are complete that CRIU waits as a page server for one TCP client, with the tasks frozen by ptrace,
//! and does with them what the client's end says (`page_server_serve` in `criu/page-xfer.c`, `cr_dump_finish` in
//! `criu/cr-dump.c`): after a closing command it kills them, after a command it does not know it lets them run, but
//! with their connections still locked and in repair mode. So nobody connects before the end is decided, and after a
//! rollback the connections are put right here.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use common::images::{self, ReadImagesError};
use common::proc_text::field;
use common::session_file::{FrozenTasks, Task};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use procfs::net::TcpState;
use procfs::process::{FDTarget, Process};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::adopt::{LeftError, are_there, stand_still};
use crate::iptables_lock::IptablesLock;
use crate::network_lock::{self, Network};
use crate::rescue::end_repair;
use crate::sockets::pidfd_open;
use crate::workload::{signal_all, tree_pids};

/// Pause between looks whether the dump is complete.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// Time to find a dump that waits already.
const FINDING: Duration = Duration::from_secs(5);
/// Time that CRIU has to let tasks go, or to kill them.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a command to CRIU's page server (`struct page_server_iov`, CRIU 4.2 and later).
const COMMAND_BYTES: usize = 32;
/// Ends the service: the tasks are killed (`PS_IOV_CLOSE`).
const CLOSE: u32 = 0x1023;
/// No command: CRIU fails, and lets the tasks run.
const NONSENSE: u32 = 0xffff;

/// The tasks as a foreign CRIU holds them.
#[derive(Debug)]
pub struct ForeignDump {
    root: Pid,
    tasks: Vec<Pid>,
    criu: Pid,
    ended: AsyncFd<OwnedFd>,
    page_server: SocketAddr,
    run: Option<String>,
    /// Where its connections are, and which: also when the tasks were killed.
    network: Network,
    lock: IptablesLock,
}

/// Why a foreign dump cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is none.
    #[error(
        "no dump of process {0} waits: no process that traces it listens on a TCP port; start `criu dump \
         --lazy-pages` for it first, without --ps-socket"
    )]
    NoDump(Pid),
    /// The images.
    #[error(transparent)]
    Images(#[from] ReadImagesError),
    /// CRIU.
    #[error("CRIU (PID {criu}) cannot be told what to do: {error}")]
    Criu {
        /// Its PID.
        criu: Pid,
        /// The system's word.
        error: io::Error,
    },
    /// It does not end.
    #[error("CRIU (PID {0}) did not end in time after being told to")]
    Stuck(Pid),
    /// What a killed `page-server` left behind is not what it was.
    #[error(transparent)]
    Left(#[from] LeftError),
    /// It is another one than before.
    #[error(
        "the CRIU that held the workload (PID {0}) is gone; nobody can serve its memory any more, but `page-server thaw` can let it run here"
    )]
    Replaced(i32),
    /// It is gone.
    #[error("the CRIU that held the workload (PID {0}) is gone")]
    Gone(Pid),
}

impl ForeignDump {
    /// Waits, at most for `limit`, until the tree of `root` is frozen and its dump in `images` complete.
    pub async fn find(root: Pid, images: &Path, limit: Duration) -> Result<Self, AttachError> {
        let waiting = async {
            loop {
                if let Some(found) = waiting_criu(root) {
                    return found;
                }
                sleep(LOOK_PAUSE).await;
            }
        };
        let (criu, page_server) = timeout(limit, waiting)
            .await
            .map_err(|_| AttachError::NoDump(root))?;
        let failed = |error| AttachError::Criu { criu, error };
        let pidfd = pidfd_open(criu).map_err(failed)?;
        // SAFETY: the descriptor is owned and goes into the `AsyncFd`.
        let ended = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }
            .map_err(|error| failed(io::Error::other(error.to_string())))?;
        let tasks = tree_pids(root);
        Ok(ForeignDump {
            root,
            network: Network::of(root),
            lock: IptablesLock::on(&tasks),
            tasks,
            criu,
            ended,
            page_server,
            run: run_id(images)?,
        })
    }

    /// The dump that a killed `page-server` was attached to, if all of it is as it was.
    pub async fn find_whole(frozen: &FrozenTasks, images: &Path) -> Result<Self, AttachError> {
        are_there(frozen)?;
        Self::find_again(frozen, images).await
    }

    /// The dump that a killed `page-server` was attached to, if it still holds what is left of its tasks.
    pub async fn find_again(frozen: &FrozenTasks, images: &Path) -> Result<Self, AttachError> {
        stand_still(frozen)?;
        if !frozen.criu.is_alive() {
            return Err(AttachError::Replaced(frozen.criu.pid));
        }
        let dump = Self::find(Pid::from_raw(frozen.root.pid), images, FINDING).await?;
        match dump.criu.as_raw() == frozen.criu.pid {
            true => Ok(dump),
            false => Err(AttachError::Replaced(frozen.criu.pid)),
        }
    }

    /// What a successor must know of it; `None` when it is gone.
    pub fn noted(&self) -> Option<FrozenTasks> {
        let find = |pid: &Pid| Task::find(pid.as_raw());
        Some(FrozenTasks {
            root: find(&self.root)?,
            // Of a zombie nothing is frozen.
            tasks: self.tasks.iter().filter_map(find).collect(),
            // When their CRIU is gone nobody goes on with them.
            at_rest: Vec::new(),
            criu: find(&self.criu)?,
            container: None,
        })
    }

    /// The point of no return: from here on the tasks do not run again even if CRIU should be killed. Ptrace would let
    /// them; this stop is pending then and catches them.
    pub fn commit(&self) {
        signal_all(&self.tasks, Signal::SIGSTOP);
    }

    /// Resolves when CRIU ends although nobody told it to. May be cancelled.
    pub async fn lost(&self) -> AttachError {
        match self.ended.readable().await {
            Ok(_) => AttachError::Gone(self.criu),
            Err(error) => AttachError::Criu {
                criu: self.criu,
                error,
            },
        }
    }

    /// Has the frozen original killed: the workload lives elsewhere.
    pub async fn release(self) -> Result<(), AttachError> {
        let told = self.tell(CLOSE).await;
        let ended = self.wait().await;
        // CRIU leaves its lock behind when it kills; should the workload ever come back its connections would be mute.
        self.unlock();
        // Whom CRIU did not kill stands still by our stop.
        signal_all(&self.tasks, Signal::SIGKILL);
        told.and(ended)
    }

    /// Lets the workload run on as if nothing had happened; its CRIU ends with an error.
    pub async fn thaw(self) -> Result<(), AttachError> {
        // Nobody is to run before the connections are put right.
        signal_all(&self.tasks, Signal::SIGSTOP);
        let told = self.tell(NONSENSE).await;
        let ended = self.wait().await;
        if ended.is_err() {
            signal_all(&[self.criu], Signal::SIGKILL);
            self.wait().await?;
        }
        let connections = end_repair(&self.tasks);
        self.unlock();
        signal_all(&self.tasks, Signal::SIGCONT);
        tracing::info!(root = %self.root, connections, "the workload runs on");
        told
    }

    /// Lets tasks run on whose CRIU was killed, and that only our stop holds.
    pub fn thaw_without_criu(frozen: &FrozenTasks, images: &Path) -> Result<(), AttachError> {
        stand_still(frozen)?;
        let root = Pid::from_raw(frozen.root.pid);
        let left = frozen.tasks.iter().filter(|task| task.is_alive());
        let tasks: Vec<Pid> = left.map(|task| Pid::from_raw(task.pid)).collect();
        let connections = end_repair(&tasks);
        let network = Network::of(root);
        if let Some(run) = run_id(images)? {
            network_lock::remove_of_run(&run, &network);
        }
        IptablesLock::on(&tasks).remove(&network);
        signal_all(&tasks, Signal::SIGCONT);
        tracing::info!(%root, connections, "the workload runs on");
        Ok(())
    }

    fn unlock(&self) {
        if let Some(run) = &self.run {
            network_lock::remove_of_run(run, &self.network);
        }
        self.lock.remove(&self.network);
    }

    /// Connects to CRIU's page server and ends its service with `command`.
    async fn tell(&self, command: u32) -> Result<(), AttachError> {
        let failed = |error| AttachError::Criu {
            criu: self.criu,
            error,
        };
        let exchange = async {
            let mut stream = TcpStream::connect(self.page_server).await?;
            let mut message = [0; COMMAND_BYTES];
            message[..4].copy_from_slice(&command.to_ne_bytes());
            stream.write_all(&message).await?;
            // CRIU answers the closing command and waits for us to close; after nonsense it closes or resets.
            let mut status = [0; 4];
            let answer = stream.read_exact(&mut status).await;
            match command {
                CLOSE => answer.map(drop),
                _ => Ok(()),
            }
        };
        match timeout(RELEASE_TIMEOUT, exchange).await {
            Ok(told) => told.map_err(failed),
            Err(_) => Err(AttachError::Stuck(self.criu)),
        }
    }

    async fn wait(&self) -> Result<(), AttachError> {
        match timeout(RELEASE_TIMEOUT, self.ended.readable()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(AttachError::Stuck(self.criu)),
        }
    }
}

/// The process that traces `root` and listens on a TCP port, and that port.
fn waiting_criu(root: Pid) -> Option<(Pid, SocketAddr)> {
    let status = fs::read(format!("/proc/{root}/status")).ok()?;
    let tracer = field(&status, "TracerPid")?.parse().ok()?;
    let criu = Process::new(tracer).ok()?;
    let listening = listening_sockets(&criu)?;
    let descriptors = criu.fd().ok()?.flatten();
    let address = descriptors
        .filter_map(|descriptor| match descriptor.target {
            FDTarget::Socket(inode) => Some(inode),
            _ => None,
        })
        .find_map(|inode| listening.iter().find(|(own, _)| *own == inode))
        .map(|(_, address)| reachable(*address))?;
    Some((Pid::from_raw(criu.pid), address))
}

/// Inodes and addresses of all listening TCP sockets in the network namespace of `process`.
fn listening_sockets(process: &Process) -> Option<Vec<(u64, SocketAddr)>> {
    let mut sockets = process.tcp().ok()?;
    sockets.extend(process.tcp6().into_iter().flatten());
    let listening = sockets
        .into_iter()
        .filter(|socket| socket.state == TcpState::Listen)
        .map(|socket| (socket.inode, socket.local_address));
    Some(listening.collect())
}

/// Where to connect to reach a listener: one on all addresses is reached by the loopback.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

fn run_id(directory: &Path) -> Result<Option<String>, ReadImagesError> {
    let name = String::from("inventory.img");
    let file = match fs::read(directory.join(&name)) {
        Ok(file) => file,
        Err(error) => return Err(ReadImagesError::Read { name, error }),
    };
    images::run_id(&file).map_err(|error| ReadImagesError::Image { name, error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_nobody_dumps_is_no_dump() {
        let nobody = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(ForeignDump::find(
                Pid::this(),
                Path::new("/nonexistent"),
                Duration::ZERO,
            ));
        assert!(matches!(nobody, Err(AttachError::NoDump(_))));
    }

    #[test]
    fn our_own_listener_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = listener.local_addr().expect("bound");
        let process = Process::myself().expect("ourselves");
        let sockets = listening_sockets(&process).expect("listed");
        assert!(sockets.iter().any(|(_, found)| *found == address));
    }

    #[test]
    fn a_listener_on_all_addresses_is_reached_here() {
        let all: SocketAddr = "0.0.0.0:7".parse().expect("an address");
        assert_eq!(reachable(all).to_string(), "127.0.0.1:7");
        let all: SocketAddr = "[::]:7".parse().expect("an address");
        assert_eq!(reachable(all).to_string(), "[::1]:7");
    }
}
