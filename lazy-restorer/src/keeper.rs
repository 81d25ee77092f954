//! A tiny process that holds every userfault descriptor as well: this very program, in another role.
//!
//! When the last copy of a descriptor closes, the kernel makes every missing page of its process read as zeros,
//! silently (`userfaultfd_release` in `fs/userfaultfd.c`). With a second copy held here, a killed `lazy-restorer`
//! only makes threads wait. The keeper does nothing else: it receives descriptors on standard input, and ends when
//! it is told that the memory is whole, or when all the processes it holds descriptors of have ended. In the latter
//! case nobody else is left to remove the migration's directory.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::{Pid, setsid};

use crate::exits::pidfd_open;
use crate::uffd::UserFault;

/// A descriptor comes along.
const HOLD: u8 = b'H';
/// A PID comes along, of a process that some descriptor belongs to.
const PROCESS: u8 = b'P';
/// The memory is whole: let go.
const RELEASE: u8 = b'R';
/// Descriptors that are not worth looking through.
const SWEEP_MIN: usize = 32;
/// Bytes of a message: what it is, and a PID.
const MESSAGE_BYTES: usize = 5;

/// `lazy-restorer`'s end.
#[derive(Debug)]
pub struct Keeper {
    socket: UnixStream,
    child: Child,
    released: bool,
}

impl Keeper {
    /// Starts a keeper that holds nothing yet, for the migration that has its files in `directory`.
    pub fn start(directory: &Path) -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let child = Command::new("/proc/self/exe")
            .arg("keeper")
            .arg(directory)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Keeper {
            socket,
            child,
            released: false,
        })
    }

    /// Another end of the same keeper, for another thread.
    pub fn hand(&self) -> io::Result<KeeperHand> {
        let socket = self.socket.try_clone()?;
        Ok(KeeperHand { socket })
    }

    /// Tells of a restored process: as long as it lives the keeper does.
    pub fn watch(&self, pid: Pid) -> io::Result<()> {
        send(&self.socket, PROCESS, pid.as_raw(), None)
    }

    /// The memory is whole, or nothing of it is left: the keeper lets go and ends.
    pub fn release(mut self) -> io::Result<()> {
        self.released = true;
        send(&self.socket, RELEASE, 0, None)?;
        self.child.wait().map(drop)
    }
}

/// Gives descriptors to the keeper.
#[derive(Debug)]
pub struct KeeperHand {
    socket: UnixStream,
}

impl KeeperHand {
    /// Has the keeper hold a descriptor.
    pub fn hold(&self, uffd: &UserFault) -> io::Result<()> {
        send(&self.socket, HOLD, 0, Some(uffd.as_raw_fd()))
    }
}

fn send(socket: &UnixStream, what: u8, pid: i32, fd: Option<RawFd>) -> io::Result<()> {
    let mut message = [what; MESSAGE_BYTES];
    message[1..].copy_from_slice(&pid.to_ne_bytes());
    let fds: Vec<RawFd> = fd.into_iter().collect();
    let control = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() {
        &[][..]
    } else {
        &control[..]
    };
    let parts = [IoSlice::new(&message)];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &parts,
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

impl Drop for Keeper {
    /// Without a word before it the end of the socket is our death to the keeper; this is not.
    fn drop(&mut self) {
        if !self.released {
            let _ = send(&self.socket, RELEASE, 0, None);
            let _ = self.child.wait();
        }
    }
}

/// The keeper's own life.
pub fn run(directory: &Path) -> ExitCode {
    // Signals meant for the group of `lazy-restorer`, as from a terminal, must not end its keeper.
    let _ = setsid();
    // SAFETY: standard input is the socket `start` gave us, and nobody else here uses it.
    let socket = unsafe { OwnedFd::from_raw_fd(libc::STDIN_FILENO) };
    let socket = UnixStream::from(socket);
    let mut held = Held::default();
    match held.collect(&socket) {
        Ok(true) => {}
        // `lazy-restorer` is gone and the memory is not whole: threads wait for as long as there are any.
        Ok(false) | Err(_) => {
            held.wait_for_ends();
            // Nothing is left that could be told of a failure.
            let _ = fs::remove_dir_all(directory);
        }
    }
    ExitCode::SUCCESS
}

#[derive(Default)]
struct Held {
    uffds: Vec<UserFault>,
    /// Descriptors that lived when it was last looked.
    living: usize,
    processes: Vec<OwnedFd>,
}

impl Held {
    /// Takes descriptors until the end; true when told to let go.
    fn collect(&mut self, socket: &UnixStream) -> io::Result<bool> {
        loop {
            let mut message = [0; MESSAGE_BYTES];
            let (length, uffd) = receive(socket, &mut message)?;
            let [what, pid @ ..] = message;
            match what {
                _ if length < MESSAGE_BYTES => return Ok(false),
                HOLD => self.hold(uffd),
                PROCESS => self.watch(Pid::from_raw(i32::from_ne_bytes(pid))),
                RELEASE => return Ok(true),
                _ => return Ok(false),
            }
        }
    }

    fn hold(&mut self, uffd: Option<OwnedFd>) {
        self.uffds.extend(uffd.map(UserFault::from_fd));
        // Children forked here come and go: of a great many only the living are worth a descriptor.
        if self.uffds.len() > 2 * self.living + SWEEP_MIN {
            self.uffds.retain(|uffd| !uffd.is_gone());
            self.living = self.uffds.len();
        }
    }

    fn watch(&mut self, pid: Pid) {
        // One that has ended already needs no keeper.
        self.processes.extend(pidfd_open(pid).ok());
    }

    /// Waits until every process whose PID we know has ended: children forked here do not outlive our use by much.
    fn wait_for_ends(self) {
        for process in &self.processes {
            let mut waiting = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
            while poll(&mut waiting, PollTimeout::NONE) == Err(Errno::EINTR) {}
        }
    }
}

fn receive(socket: &UnixStream, message: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(message)];
    let received = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fd = None;
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel made these descriptors for us with this message; nobody else has them.
            let mut owned = fds
                .into_iter()
                .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
            fd = owned.next();
            owned.for_each(drop);
        }
    }
    Ok((received.bytes, fd))
}
