//! A tiny process that outlives a killed `lazy-restorer`: this very program, in another role.
//!
//! It holds every userfault descriptor as well. When the last copy of one closes, the kernel makes every missing page
//! of its process read as zeros, silently (`userfaultfd_release` in `fs/userfaultfd.c`). With a second copy held here,
//! a killed `lazy-restorer` only makes threads wait. The keeper ends when it is told that the memory is whole, or when
//! all the processes it holds descriptors of have ended.
//!
//! Before the point of no return there is nothing to keep: then it does what `lazy-restorer` would have done, kills the
//! half-restored copy, runs the operator's `--on-aborted` command and removes the migration's directory.

use std::env;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use common::mounts;
use common::operator::Facts;
use common::session::State;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::{Pid, setsid};

use crate::exits::pidfd_open;
use crate::restore::{Anchor, kill_below, kill_tree};
use crate::uffd::UserFault;

/// A descriptor comes along.
const HOLD: u8 = b'H';
/// A PID comes along, of a process that some descriptor belongs to.
const PROCESS: u8 = b'P';
/// A PID comes along: CRIU's, or that of the init it restores under. Its tree is the copy.
const ANCHOR: u8 = b'A';
/// The same, of one that puts the copy away by itself when what is below it is killed.
const RUNTIME: u8 = b'U';
/// The operator's `--before-restore` command is about to run.
const PREPARED: u8 = b'B';
/// The copy is about to run, and is the only one that may.
const COMMITTED: u8 = b'C';
/// The memory is whole: let go.
const RELEASE: u8 = b'R';
/// The operator's `--on-aborted` command.
const ON_ABORTED_VARIABLE: &str = "POSTCOPY_KEEPER_ON_ABORTED";
/// Time that killed processes have to end.
const BURIAL: Duration = Duration::from_secs(10);
/// Descriptors that are not worth looking through.
const SWEEP_MIN: usize = 32;
/// Bytes of a message: what it is, and a PID.
const MESSAGE_BYTES: usize = 5;

/// `lazy-restorer`'s end. Dropping it before the point of no return lets go.
#[derive(Debug)]
pub struct Keeper {
    socket: UnixStream,
    child: Child,
    committed: bool,
}

impl Keeper {
    /// Starts a keeper that holds nothing yet. Should we be killed early it runs `on_aborted` and removes `directory`.
    pub fn start(directory: &Path, on_aborted: Option<&str>, facts: &Facts) -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let child = Command::new("/proc/self/exe")
            .args(["keeper", "--directory"])
            .arg(directory)
            .env(ON_ABORTED_VARIABLE, on_aborted.unwrap_or_default())
            .envs(facts.variables(State::Aborted))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Keeper {
            socket,
            child,
            committed: false,
        })
    }

    /// Another end of the same keeper, for another thread.
    pub fn hand(&self) -> io::Result<KeeperHand> {
        let socket = self.socket.try_clone()?;
        Ok(KeeperHand { socket })
    }

    /// Tells whose tree the copy is.
    pub fn anchor(&self, anchor: Anchor) -> io::Result<()> {
        let what = if anchor.puts_away { RUNTIME } else { ANCHOR };
        send(&self.socket, what, anchor.pid.as_raw(), None)
    }

    /// The operator's `--before-restore` command is about to run.
    pub fn prepared(&self) -> io::Result<()> {
        send(&self.socket, PREPARED, 0, None)
    }

    /// Tells of a restored process: as long as it lives the keeper does.
    pub fn watch(&self, pid: Pid) -> io::Result<()> {
        send(&self.socket, PROCESS, pid.as_raw(), None)
    }

    /// From here on the copy is not killed any more, and its pages are never given up.
    pub fn commit(&mut self) -> io::Result<()> {
        send(&self.socket, COMMITTED, 0, None)?;
        self.committed = true;
        Ok(())
    }

    /// The memory is whole, or nothing of it is left: the keeper lets go and ends.
    pub fn release(mut self) -> io::Result<()> {
        self.let_go()
    }

    fn let_go(&mut self) -> io::Result<()> {
        let told = send(&self.socket, RELEASE, 0, None);
        self.committed = true;
        self.child.wait()?;
        told
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

/// The keeper's own life.
pub fn run(directory: &Path) -> ExitCode {
    // Signals meant for the group of `lazy-restorer`, as from a terminal, must not end its keeper.
    let _ = setsid();
    // SAFETY: standard input is the socket `start` gave us, and nobody else here uses it.
    let socket = unsafe { OwnedFd::from_raw_fd(libc::STDIN_FILENO) };
    let socket = UnixStream::from(socket);
    let mut held = Held::default();
    match held.collect(&socket) {
        Ok(true) => return ExitCode::SUCCESS,
        // `lazy-restorer` is gone and the memory is not whole: threads wait for as long as there are any.
        Ok(false) | Err(_) if held.committed => held.wait_for_ends(PollTimeout::NONE),
        Ok(false) | Err(_) => held.abort(),
    }
    mounts::detach_below(directory);
    // Nobody reads what we say; a directory that stays is all that can go wrong.
    let _ = fs::remove_dir_all(directory);
    ExitCode::SUCCESS
}

#[derive(Default)]
struct Held {
    uffds: Vec<UserFault>,
    /// Descriptors that lived when it was last looked.
    living: usize,
    processes: Vec<OwnedFd>,
    anchor: Option<Anchor>,
    prepared: bool,
    committed: bool,
}

impl Held {
    /// Takes descriptors until the end; true when told to let go.
    fn collect(&mut self, socket: &UnixStream) -> io::Result<bool> {
        loop {
            let mut message = [0; MESSAGE_BYTES];
            let (length, uffd) = receive(socket, &mut message)?;
            let [what, pid @ ..] = message;
            let pid = Pid::from_raw(i32::from_ne_bytes(pid));
            match what {
                _ if length < MESSAGE_BYTES => return Ok(false),
                HOLD => self.hold(uffd),
                PROCESS => self.watch(pid),
                ANCHOR | RUNTIME => {
                    self.anchor = Some(Anchor {
                        pid,
                        puts_away: what == RUNTIME,
                    });
                    self.watch(pid);
                }
                PREPARED => self.prepared = true,
                COMMITTED => self.committed = true,
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
    fn wait_for_ends(&self, limit: PollTimeout) {
        for process in &self.processes {
            let mut waiting = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
            while poll(&mut waiting, limit) == Err(Errno::EINTR) {}
        }
    }

    /// Nothing has run here yet, and the source lets the workload run on: nothing may be left of the copy.
    fn abort(mut self) {
        match self.anchor {
            Some(anchor) if anchor.puts_away => kill_below(anchor.pid),
            Some(anchor) => kill_tree(anchor.pid),
            None => {}
        }
        // A task in a page fault that nobody answers dies all the same, but what reads its memory would wait.
        self.uffds.clear();
        self.wait_for_ends(PollTimeout::try_from(BURIAL).unwrap_or(PollTimeout::MAX));
        let on_aborted = env::var_os(ON_ABORTED_VARIABLE).filter(|_| self.prepared);
        if let Some(command) = on_aborted {
            // Its failure is the operator's to notice: nobody is left to be told.
            let _ = Command::new("sh").arg("-c").arg(command).status();
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
