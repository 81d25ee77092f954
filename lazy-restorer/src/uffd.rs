//! The only file that calls `userfaultfd` ioctls: errno becomes meaning here, once.
//!
//! Facts: `ioctl_userfaultfd(2)`, `fs/userfaultfd.c`, `mm/userfaultfd.c` of Linux 6.18.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use common::page::{PageIndex, PageRange, VirtAddr, bytes_to_pages};
use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use userfaultfd::{Error, Uffd};

/// The last page below the end of a 47-bit address space, where no stack or mapping of the kernel's choice ends up:
/// the kernel has to look at the process before it can say that nothing is registered there.
const UNUSED: PageRange = PageRange {
    start: PageIndex(0x7_ffff_fffe),
    count: 1,
};

/// The lowest page a process may map by default (`vm.mmap_min_addr`).
const LOWEST: PageIndex = PageIndex(16);

/// Messages read with one system call.
pub const MESSAGES_PER_READ: usize = 64;
/// 64-bit words of a message.
pub const MESSAGE_WORDS: usize = 4;
const _: () = assert!(size_of::<Message>() == 32, "struct uffd_msg has 32 bytes");

/// One process's userfault descriptor, registered by CRIU or born in a fork.
#[derive(Debug)]
pub struct UserFault {
    uffd: Uffd,
}

/// Something the kernel reports about an address space.
#[derive(Debug)]
pub enum MemoryEvent<D = UserFault> {
    /// A thread waits for this page.
    Fault(PageIndex),
    /// The process forked; the child's memory is behind a descriptor of its own.
    Fork(D),
    /// `mremap` moved pages.
    Remap(PageRange, PageIndex),
    /// `madvise` dropped the content of pages.
    Remove(PageRange),
    /// Pages were unmapped.
    Unmap(PageRange),
}

/// How far an install came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Pages in place.
    pub pages: u64,
    /// Why it went no further; `None` when all are in place.
    pub stop: Option<Stop>,
}

/// Why a page was not installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A page is there already.
    AlreadyPresent,
    /// Events wait to be read; what they say may forbid this install.
    EventsPending,
    /// No one registered mapping holds the whole range.
    NotMapped,
    /// The process is gone or runs another program.
    ProcessGone,
    /// The host is out of memory.
    NoMemory,
    /// The kernel refuses for a reason that only a mistake of ours can have.
    Refused(Errno),
}

/// The descriptor cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read page fault events: {0}")]
pub struct ReadError(Errno);

impl ReadError {
    /// Whether the kernel only lacks what it needs to make the descriptor of a forked child, and keeps the event until it is
    /// read again (`userfaultfd_ctx_read` in `fs/userfaultfd.c`).
    pub fn is_passing(&self) -> bool {
        matches!(self.0, Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
    }
}

impl UserFault {
    /// Takes over a descriptor received from a restoring task.
    pub fn from_fd(fd: OwnedFd) -> Self {
        // SAFETY: the descriptor is owned, and ownership passes on.
        let uffd = unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) };
        UserFault { uffd }
    }

    /// Lets the current runtime say when messages wait.
    pub fn watched(self: Arc<Self>) -> io::Result<AsyncFd<Arc<Self>>> {
        // SAFETY: the descriptor stays open and the same for as long as the `Arc` lives, which goes into the `AsyncFd`.
        let watched = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) };
        watched.map_err(|error| io::Error::other(error.to_string()))
    }

    /// Reads messages that wait into `messages`, at most `count`, and returns how many there were.
    ///
    /// # Safety
    /// `messages` must be writable for `count` messages, and nobody else may use it meanwhile.
    pub unsafe fn read_to(&self, messages: *mut Message, count: usize) -> Result<usize, ReadError> {
        let bytes = count * size_of::<Message>();
        // SAFETY: the caller's promise.
        let read = unsafe { libc::read(self.as_raw_fd(), messages.cast(), bytes) };
        match Errno::result(read) {
            Ok(bytes) => Ok(bytes.unsigned_abs() / size_of::<Message>()),
            Err(Errno::EAGAIN) => Ok(0),
            Err(error) => Err(ReadError(error)),
        }
    }

    /// Wakes every thread of the process that waits for a page: it faults again.
    pub fn wake_all(&self) {
        let end = UNUSED.start.0;
        self.wake(PageRange::new(
            PageIndex(LOWEST.0),
            end.saturating_sub(LOWEST.0),
        ));
    }

    /// Copies pages to `target` and wakes the threads that wait for them.
    pub fn copy(&self, target: PageRange, content: &[u8]) -> Progress {
        assert_eq!(target.bytes(), content.len() as u64);
        let from = content.as_ptr().cast();
        let to = target.start.addr().0 as *mut _;
        // SAFETY: `content` is readable for its length; the kernel checks the target, which is not our memory.
        let result = unsafe { self.uffd.copy(from, to, content.len(), true) };
        match result {
            Ok(bytes) => progress(target, bytes as i64),
            // The crate hands the kernel's `copy` field on as unsigned: bytes done, or a negative errno.
            Err(Error::PartiallyCopied(done)) => progress(target, done as i64),
            Err(Error::CopyFailed(errno)) => stopped(Errno::from_raw(errno as i32)),
            Err(_) => stopped(Errno::EINVAL),
        }
    }

    /// Puts zero pages at `target` and wakes the threads that wait for them.
    pub fn zero(&self, target: PageRange) -> Progress {
        let start = target.start.addr().0 as *mut _;
        // SAFETY: the kernel checks the target, which is not our memory.
        let result = unsafe { self.uffd.zeropage(start, target.bytes() as usize, true) };
        match result {
            Ok(bytes) => progress(target, bytes as i64),
            // A partial result comes as EAGAIN too, without its length: doing the same again finds out.
            Err(Error::ZeropageFailed(errno)) => stopped(Errno::from_raw(errno as i32)),
            Err(_) => stopped(Errno::EINVAL),
        }
    }

    /// Whether the kernel has nothing to report but faults: every other event was read, and its thread runs on.
    pub fn is_quiet(&self) -> bool {
        // SAFETY: a copy of no bytes touches no memory. The kernel looks for events first, then refuses the length.
        let result = unsafe {
            self.uffd
                .copy(std::ptr::null(), std::ptr::null_mut(), 0, false)
        };
        matches!(result, Err(Error::CopyFailed(errno)) if errno as i32 == libc::EINVAL)
    }

    /// Whether the process has ended, or runs another program.
    pub fn is_gone(&self) -> bool {
        self.zero(UNUSED).stop == Some(Stop::ProcessGone)
    }

    /// Wakes the threads that wait for pages that are in place.
    pub fn wake(&self, pages: PageRange) {
        let start = pages.start.addr().0 as *mut _;
        if let Err(error) = self.uffd.wake(start, pages.bytes() as usize) {
            tracing::debug!(%error, ?pages, "wake");
        }
    }
}

impl AsRawFd for UserFault {
    fn as_raw_fd(&self) -> RawFd {
        self.uffd.as_raw_fd()
    }
}

/// A message of the kernel as it is (`struct uffd_msg` of `linux/userfaultfd.h`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message(pub [u64; MESSAGE_WORDS]);

/// What a message says, without owning what comes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// As [`MemoryEvent::Fault`].
    Fault(PageIndex),
    /// As [`MemoryEvent::Fork`], with the number of the new descriptor.
    Fork(RawFd),
    /// As [`MemoryEvent::Remap`].
    Remap(PageRange, PageIndex),
    /// As [`MemoryEvent::Remove`].
    Remove(PageRange),
    /// As [`MemoryEvent::Unmap`].
    Unmap(PageRange),
}

impl Message {
    /// What it says; `None` when it says nothing, or nothing that CRIU asked the kernel to report.
    pub fn said(&self) -> Option<Said> {
        let [head, first, second, third] = self.0;
        let addr = VirtAddr;
        let range = |start, end| PageRange::covering(addr(start), addr(end));
        Some(match head as u8 {
            // The flags come first.
            event::PAGEFAULT => Said::Fault(addr(second).page()),
            event::FORK => Said::Fork(first as u32 as RawFd),
            event::REMAP => {
                let from = range(first, first.saturating_add(third));
                Said::Remap(from, addr(second).page())
            }
            event::REMOVE => Said::Remove(range(first, second)),
            event::UNMAP => Said::Unmap(range(first, second)),
            _ => return None,
        })
    }

    /// What it says, with what comes with it.
    ///
    /// # Safety
    /// The kernel has written the message to us, and it is taken once: a new descriptor is ours then.
    pub unsafe fn take(&self) -> Option<MemoryEvent> {
        Some(match self.said()? {
            Said::Fault(page) => MemoryEvent::Fault(page),
            Said::Fork(fd) => {
                // SAFETY: the caller's promise.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                MemoryEvent::Fork(UserFault::from_fd(fd))
            }
            Said::Remap(from, to) => MemoryEvent::Remap(from, to),
            Said::Remove(pages) => MemoryEvent::Remove(pages),
            Said::Unmap(pages) => MemoryEvent::Unmap(pages),
        })
    }
}

/// Event numbers of `linux/userfaultfd.h`.
mod event {
    pub const PAGEFAULT: u8 = 0x12;
    pub const FORK: u8 = 0x13;
    pub const REMAP: u8 = 0x14;
    pub const REMOVE: u8 = 0x15;
    pub const UNMAP: u8 = 0x16;
}

/// Reads a result field of the kernel: bytes done when positive, else a negative errno.
fn progress(target: PageRange, done: i64) -> Progress {
    if done < 0 {
        return stopped(Errno::from_raw((-done) as i32));
    }
    let pages = bytes_to_pages(done as u64);
    // The kernel stops early without saying why; the next call's first page tells.
    let stop = (pages < target.count).then_some(Stop::EventsPending);
    Progress { pages, stop }
}

fn stopped(errno: Errno) -> Progress {
    let stop = match errno {
        Errno::EEXIST => Stop::AlreadyPresent,
        Errno::EAGAIN => Stop::EventsPending,
        Errno::ENOENT => Stop::NotMapped,
        Errno::ESRCH => Stop::ProcessGone,
        // Kernels before 4.13 said ENOSPC of a process that is gone, but we need 5.3. Who takes a process for gone closes
        // its descriptor, and its missing pages would be zeros.
        Errno::ENOMEM | Errno::ENOSPC => Stop::NoMemory,
        other => Stop::Refused(other),
    };
    Progress {
        pages: 0,
        stop: Some(stop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: PageRange = PageRange {
        start: PageIndex(16),
        count: 4,
    };

    #[test]
    fn a_negative_length_is_an_errno_and_not_a_huge_count() {
        let eagain = progress(TARGET, -i64::from(libc::EAGAIN) as usize as i64);
        assert_eq!(eagain, stopped(Errno::EAGAIN));
        assert_eq!(eagain.pages, 0);
    }

    #[test]
    fn only_a_process_that_is_not_there_is_gone() {
        let stop = |errno| stopped(errno).stop;
        assert_eq!(stop(Errno::ESRCH), Some(Stop::ProcessGone));
        for errno in [Errno::ENOSPC, Errno::ENOMEM] {
            assert_eq!(stop(errno), Some(Stop::NoMemory));
        }
    }

    #[test]
    fn a_short_copy_reports_what_is_in_place() {
        let half = progress(TARGET, TARGET.bytes() as i64 / 2);
        assert_eq!(half.pages, 2);
        assert_eq!(half.stop, Some(Stop::EventsPending));
        assert_eq!(progress(TARGET, TARGET.bytes() as i64).stop, None);
    }
}
