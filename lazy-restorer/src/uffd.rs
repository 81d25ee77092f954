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
use userfaultfd::{Error, Event, EventBuffer, Uffd};

/// The last page below the end of a 47-bit address space, where no stack or mapping of the kernel's choice ends up:
/// the kernel has to look at the process before it can say that nothing is registered there.
const UNUSED: PageRange = PageRange {
    start: PageIndex(0x7_ffff_fffe),
    count: 1,
};

/// Messages read with one system call.
const EVENTS_PER_READ: usize = 64;

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
pub struct ReadError(Error);

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

    /// A room for messages, to be reused between reads.
    pub fn event_buffer() -> EventBuffer {
        EventBuffer::new(EVENTS_PER_READ)
    }

    /// Reads the messages that wait, at most one buffer full. Empty when there are none.
    pub fn read(&self, buffer: &mut EventBuffer) -> Result<Vec<MemoryEvent>, ReadError> {
        let events = self.uffd.read_events(buffer).map_err(ReadError)?;
        events
            .map(|event| event.map(MemoryEvent::from).map_err(ReadError))
            .collect()
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

impl From<Event> for MemoryEvent {
    fn from(event: Event) -> Self {
        let addr = |pointer: *mut libc::c_void| VirtAddr(pointer as u64);
        match event {
            Event::Pagefault { addr: at, .. } => MemoryEvent::Fault(addr(at).page()),
            Event::Fork { uffd } => MemoryEvent::Fork(UserFault { uffd }),
            Event::Remap { from, to, len } => {
                let end = VirtAddr(addr(from).0.saturating_add(len as u64));
                MemoryEvent::Remap(PageRange::covering(addr(from), end), addr(to).page())
            }
            Event::Remove { start, end } => {
                MemoryEvent::Remove(PageRange::covering(addr(start), addr(end)))
            }
            Event::Unmap { start, end } => {
                MemoryEvent::Unmap(PageRange::covering(addr(start), addr(end)))
            }
        }
    }
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
        // ENOSPC is what kernels before 4.13 said of a process that is gone.
        Errno::ESRCH | Errno::ENOSPC => Stop::ProcessGone,
        Errno::ENOMEM => Stop::NoMemory,
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
    fn a_short_copy_reports_what_is_in_place() {
        let half = progress(TARGET, TARGET.bytes() as i64 / 2);
        assert_eq!(half.pages, 2);
        assert_eq!(half.stop, Some(Stop::EventsPending));
        assert_eq!(progress(TARGET, TARGET.bytes() as i64).stop, None);
    }
}
