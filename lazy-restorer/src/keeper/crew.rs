//! Who keeps: two keepers that replace each other, and a leash. The only file that makes processes which share the
//! table of descriptors.
//!
//! A program with threads cannot safely fork one that goes on in a copy of its memory. A keeper can, for it never has a
//! second thread: so there are two from the beginning, and whichever dies is replaced by a fork of the other, as long as
//! they do not both die at once. A restored copy that has a PID namespace of its own gets a *leash* in there: it shares
//! the table as well, so the copy's missing pages cannot become zeros as long as it lives, and it is what is left to end
//! the copy when nobody lives any more who could fill them.
//!
//! A process is named by the number of its pidfd in the shared table. A number is never closed before the table is: so
//! it never comes to mean another process.

use std::io;
use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use common::session_file::Task;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, getpid};

use super::life;
use crate::exits::pidfd_open;

/// No process.
const NOBODY: RawFd = -1;
/// No process, and none will be.
const NEVER: RawFd = -2;

/// Pause between looks at whatever does not make itself heard.
const LOOK: Duration = Duration::from_secs(1);

/// One of those that keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Member {
    /// Acts when `lazy-restorer` is gone. Replaced by the second.
    First,
    /// Only replaces the first, and is replaced by it.
    Second,
    /// Inside of the copy's PID namespace.
    Leash,
}

/// In memory that all of them share.
struct Board {
    members: [AtomicI32; 3],
    /// The first keeper's PID.
    first: AtomicI32,
    /// Where the first listens for a successor.
    door: AtomicI32,
    /// There is nothing left to keep.
    done: AtomicBool,
}

/// All of them, from the point of view of any of them.
#[derive(Clone, Copy)]
pub(super) struct Crew {
    board: &'static Board,
    /// The pidfd of `lazy-restorer`.
    restorer: RawFd,
    /// What `lazy-restorer` says, from the beginning.
    pub(super) log: RawFd,
    /// Rings when it has said something that is to be heard at once.
    pub(super) bell: RawFd,
}

impl std::fmt::Debug for Crew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Crew").finish_non_exhaustive()
    }
}

impl Crew {
    /// Makes both keepers. The caller must have one thread only: they go on in copies of its memory.
    pub(super) fn gather() -> io::Result<(Self, OwnedFd, EventFd)> {
        let log = memfd_create(c"postcopy-keeper", MFdFlags::MFD_CLOEXEC)?;
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let crew = Crew {
            board: Board::new()?,
            restorer: pidfd_open(getpid())?.into_raw_fd(),
            log: log.as_raw_fd(),
            bell: bell.as_raw_fd(),
        };
        crew.fork(Member::First, 0)?;
        crew.fork(Member::Second, 0)?;
        Ok((crew, log, bell))
    }

    /// Makes a member. In that member it does not return.
    fn fork(&self, member: Member, how: libc::c_int) -> io::Result<()> {
        let flags = libc::CLONE_FILES | libc::CLONE_PIDFD | libc::SIGCHLD | how;
        let mut pidfd: RawFd = NOBODY;
        let (nothing, pidfd_at) = (0, &raw mut pidfd);
        // SAFETY: like fork(2), with the table of descriptors shared; the caller has one thread, so no lock is held.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, nothing, pidfd_at, nothing, 0) };
        match Errno::result(pid)? {
            0 => life::run(*self, member),
            pid => self.enter(member, pidfd, pid as i32),
        }
        Ok(())
    }

    /// A member says who it is: whoever made it may have died before it could.
    pub(super) fn enter_myself(&self, member: Member) {
        if let Ok(pidfd) = pidfd_open(getpid()) {
            self.enter(member, pidfd.into_raw_fd(), getpid().as_raw());
        }
    }

    fn enter(&self, member: Member, pidfd: RawFd, pid: i32) {
        if member == Member::First {
            self.board.first.store(pid, Ordering::Release);
        }
        self.slot(member).store(pidfd, Ordering::Release);
    }

    fn slot(&self, member: Member) -> &AtomicI32 {
        &self.board.members[member as usize]
    }

    fn pidfd(&self, member: Member) -> Option<BorrowedFd<'static>> {
        let number = self.slot(member).load(Ordering::Acquire);
        (number >= 0).then(|| borrowed(number))
    }

    /// The PID of the first keeper.
    pub(super) fn first(&self) -> Pid {
        Pid::from_raw(self.board.first.load(Ordering::Acquire))
    }

    /// Pidfds of both keepers, of our own.
    pub(super) fn keepers(&self) -> [Option<OwnedFd>; 2] {
        [Member::First, Member::Second].map(|member| self.own_pidfd(member))
    }

    /// Pidfds of all there are, of our own.
    pub(super) fn members(&self) -> Vec<OwnedFd> {
        let all = [Member::First, Member::Second, Member::Leash].into_iter();
        all.filter_map(|member| self.own_pidfd(member)).collect()
    }

    fn own_pidfd(&self, member: Member) -> Option<OwnedFd> {
        self.pidfd(member)?.try_clone_to_owned().ok()
    }

    /// Whether a keeper has ended, and nobody has taken its place (yet). The first may look before the second was made.
    pub(super) fn is_vacant(&self, member: Member) -> bool {
        self.pidfd(member).is_some_and(has_ended)
    }

    /// Whether `lazy-restorer` has ended.
    pub(super) fn is_orphaned(&self) -> bool {
        has_ended(borrowed(self.restorer))
    }

    /// There is nothing left to keep.
    pub(super) fn finish(&self) {
        self.board.done.store(true, Ordering::Release);
    }

    /// Whether [`finish`](Self::finish) was called.
    pub(super) fn is_done(&self) -> bool {
        self.board.done.load(Ordering::Acquire)
    }

    /// Makes a keeper anew if it has ended. Called by the other one.
    pub(super) fn replace(&self, member: Member) {
        if self.is_vacant(member) {
            // Whose children we are: it reaps us. A failure shows as a vacancy, and is tried again.
            let _ = self.fork(member, libc::CLONE_PARENT);
        }
    }

    /// Makes the leash, or makes it anew, in the PID namespace that `init` began.
    pub(super) fn leash(&self, init: Task) {
        if let Some(leash) = self.pidfd(Member::Leash)
            && has_ended(leash)
        {
            // Only whose child it was can and must.
            let _ = waitid(
                Id::PIDFd(leash),
                WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
            );
            self.slot(Member::Leash).store(NOBODY, Ordering::Release);
        }
        if self.slot(Member::Leash).load(Ordering::Acquire) == NOBODY
            && let Err(error) = self.fork_into(init)
        {
            tracing::warn!(%error, "the copy is without a leash");
            self.slot(Member::Leash).store(NEVER, Ordering::Release);
        }
    }

    fn fork_into(&self, init: Task) -> io::Result<()> {
        let theirs = pidfd_open(Pid::from_raw(init.pid))?;
        let ours = pidfd_open(getpid())?;
        if !init.is_alive() {
            return Ok(());
        }
        setns(&theirs, CloneFlags::CLONE_NEWPID)?;
        let forked = self.fork(Member::Leash, 0);
        setns(&ours, CloneFlags::CLONE_NEWPID)?;
        forked
    }

    /// Waits until a member or `lazy-restorer` ends, or one of `others` has something to say; a while at most.
    pub(super) fn wait(&self, members: &[Member], others: &[RawFd]) {
        let members = members.iter().filter_map(|member| self.pidfd(*member));
        let processes = members.chain([borrowed(self.restorer)]);
        // Who has ended already is no news.
        let alive = processes.filter(|pidfd| !has_ended(*pidfd));
        let fds: Vec<_> = alive.chain(others.iter().copied().map(borrowed)).collect();
        let mut waiting: Vec<_> = fds
            .iter()
            .map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN))
            .collect();
        let limit = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::MAX);
        let _ = poll(&mut waiting, limit);
    }

    /// The descriptor of the door that somebody before us has opened.
    pub(super) fn door(&self) -> Option<RawFd> {
        let door = self.board.door.load(Ordering::Acquire);
        (door != NOBODY).then_some(door)
    }

    /// The door is open.
    pub(super) fn open_door(&self, door: RawFd) {
        self.board.door.store(door, Ordering::Release);
    }

    /// What `lazy-restorer` says, without owning it.
    pub(super) fn log(&self) -> ManuallyDrop<std::fs::File> {
        // SAFETY: it is open as long as the table is, and not closed by whoever uses it.
        ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(self.log) })
    }
}

impl Board {
    fn new() -> io::Result<&'static Self> {
        let length = NonZeroUsize::new(size_of::<Board>()).expect("it has fields");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: new memory.
        let memory = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_SHARED)? };
        let board = Board {
            members: [NOBODY; 3].map(AtomicI32::new),
            first: AtomicI32::new(0),
            door: AtomicI32::new(NOBODY),
            done: AtomicBool::new(false),
        };
        // SAFETY: a mapping is aligned to pages and as long as asked for.
        unsafe { memory.cast::<Board>().write(board) };
        // SAFETY: it was just written, and stays mapped for good.
        Ok(unsafe { memory.cast::<Board>().as_ref() })
    }
}

/// Whether the process that a pidfd names has ended.
pub(super) fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut now = [PollFd::new(pidfd, PollFlags::POLLIN)];
    matches!(poll(&mut now, PollTimeout::ZERO), Ok(1..))
}

fn borrowed(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: the numbers on the board stay open as long as the table is there.
    unsafe { BorrowedFd::borrow_raw(fd) }
}
