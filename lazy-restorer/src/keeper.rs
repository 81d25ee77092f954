//! A tiny process that outlives a killed `lazy-restorer`, and holds every descriptor it had.
//!
//! When the last copy of a userfault descriptor closes, the kernel makes every missing page of its process read as
//! zeros, silently (`userfaultfd_release` in `fs/userfaultfd.c`). The keeper is a fork that *shares the table of
//! descriptors*: whatever `lazy-restorer` has open the keeper has open in the same instant, also the descriptor of a
//! child forked a moment ago, which the kernel puts into that table itself. So a killed `lazy-restorer` only makes
//! threads wait, for a successor that the keeper hands everything to (`keeper/inheritance.rs`).
//!
//! Before the point of no return there is nothing to keep: then it does what `lazy-restorer` would have done, kills the
//! half-restored copy, runs the operator's `--on-aborted` command and removes the migration's directory.

mod inheritance;
mod life;

use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use common::address::MovingAddress;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::restore::Anchor;

pub use self::inheritance::{Inheritance, inherit};

/// Bytes of a message at most.
const MESSAGE_BYTES: usize = 64 << 10;

/// What the keeper must know to clean up, or to be found by a successor.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Setup {
    /// The migration's directory.
    pub directory: PathBuf,
    /// The operator's `--on-aborted` command.
    pub on_aborted: Option<String>,
    /// Its environment.
    pub variables: Vec<(String, String)>,
    /// Where to listen for a successor.
    pub socket: PathBuf,
    /// The session's file.
    pub session: PathBuf,
    /// Service addresses of the copy.
    pub addresses: Vec<MovingAddress>,
}

/// What the keeper is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Told {
    /// What it must know.
    Setup(Setup),
    /// CRIU's PID, or that of the init it restores under. Its tree is the copy.
    ///
    /// The flag says that it puts the copy away by itself when what is below it is killed.
    Anchor(i32, bool),
    /// The operator's `--before-restore` command is about to run.
    Prepared,
    /// A restored process.
    Watch(i32),
    /// The copy is about to run, and is the only one that may: opening its gate is all that is missing. A copy of the
    /// gate's descriptor is for the keeper alone.
    Commit(Option<RawFd>),
    /// The gate is open.
    Opened,
    /// The memory is whole: let go.
    Release,
}

/// `lazy-restorer`'s end. Dropping it before the point of no return lets go.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    pid: Pid,
    committed: bool,
}

impl Keeper {
    /// Forks a keeper. This process must have one thread only: the keeper goes on in a copy of its memory.
    pub fn start() -> io::Result<Self> {
        let (socket, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        // Both ends stay open in the table that both processes share; the keeper is told of our end by our PID.
        let theirs = theirs.into_raw_fd();
        let parent = Pid::this();
        let flags = libc::CLONE_FILES | libc::SIGCHLD;
        // SAFETY: like fork(2), with the table of descriptors shared; there is one thread, so no lock is held.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        match nix::errno::Errno::result(pid)? {
            0 => life::run(theirs, parent),
            pid => Ok(Keeper {
                socket,
                pid: Pid::from_raw(pid as i32),
                committed: false,
            }),
        }
    }

    /// The keeper's process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Tells what it must know. Should we be killed it cleans up from here on.
    pub fn set_up(&self, setup: Setup) -> io::Result<()> {
        self.tell(&Told::Setup(setup))
    }

    /// Tells whose tree the copy is.
    pub fn anchor(&self, anchor: Anchor) -> io::Result<()> {
        self.tell(&Told::Anchor(anchor.pid.as_raw(), anchor.puts_away))
    }

    /// The operator's `--before-restore` command is about to run.
    pub fn prepared(&self) -> io::Result<()> {
        self.tell(&Told::Prepared)
    }

    /// Tells of a restored process.
    pub fn watch(&self, pid: Pid) -> io::Result<()> {
        self.tell(&Told::Watch(pid.as_raw()))
    }

    /// From here on the copy is not killed any more, and its pages are never given up. Should we be killed before the
    /// gate is open, the keeper opens it.
    pub fn commit(&mut self, gate: Option<OwnedFd>) -> io::Result<()> {
        self.committed = true;
        self.tell(&Told::Commit(gate.map(IntoRawFd::into_raw_fd)))
    }

    /// The gate is open.
    pub fn opened(&self) -> io::Result<()> {
        self.tell(&Told::Opened)
    }

    /// The memory is whole, or nothing of it is left: the keeper lets go and ends.
    pub fn release(mut self) -> io::Result<()> {
        self.let_go()
    }

    fn let_go(&mut self) -> io::Result<()> {
        self.committed = true;
        let told = self.tell(&Told::Release);
        waitpid(self.pid, None)?;
        told
    }

    fn tell(&self, told: &Told) -> io::Result<()> {
        let message = postcard::to_extend(told, Vec::new()).map_err(io::Error::other)?;
        if message.len() > MESSAGE_BYTES {
            return Err(io::Error::other("too much to tell the keeper"));
        }
        send(self.socket.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if !self.committed
            && let Err(error) = self.let_go()
        {
            tracing::warn!(%error, "the keeper");
        }
    }
}

/// Where a descriptor of this process leads.
fn link_of(fd: RawFd) -> Option<String> {
    let link = std::fs::read_link(Path::new("/proc/self/fd").join(fd.to_string())).ok()?;
    link.into_os_string().into_string().ok()
}
