//! What the memory needs of a process's userfault descriptor and of a lock.
//!
//! The real ones are [`UserFault`] and [`PriorityLock`]. Models of the kernel and of the scheduler stand in for them in
//! `tests/simulation`, so that what is simulated and model checked is this very code.

use std::fmt::Debug;
use std::io;
use std::ops::DerefMut;
use std::os::fd::{AsRawFd, RawFd};
use std::thread;
use std::time::Duration;

use common::page::PageRange;
use common::priority_lock::{PriorityGuard, PriorityLock};

use crate::journal::{Inbox, Note};
use crate::resolver::MemberId;
use crate::uffd::{MemoryEvent, Progress, ReadError, UserFault};

/// The kernel's side of one process's memory. What each method means is said at [`UserFault`].
pub trait Descriptor: Debug + Send + Sync + Sized + 'static {
    /// Room for messages.
    type Buffer: Buffer;
    /// What keeps readers of events and installers apart.
    type Lock<T: Send>: Lock<T>;

    /// A room for messages, to be reused between reads.
    fn buffer() -> Self::Buffer;
    /// Reads the messages that wait. Empty when there are none.
    fn read(&self, buffer: &mut Self::Buffer) -> Result<Vec<MemoryEvent<Self>>, ReadError>;
    /// Copies pages to `target` and wakes the threads that wait for them.
    fn copy(&self, target: PageRange, content: &[u8]) -> Progress;
    /// Puts zero pages at `target` and wakes the threads that wait for them.
    fn zero(&self, target: PageRange) -> Progress;
    /// Wakes the threads that wait for pages that are in place.
    fn wake(&self, pages: PageRange);
    /// Wakes all threads that wait: they fault again, and are seen by who reads events from now on.
    fn wake_all(&self);
    /// Whether the kernel has nothing to report but faults.
    fn is_quiet(&self) -> bool;
    /// Whether the process has ended, or runs another program.
    fn is_gone(&self) -> bool;
    /// Its number, as a successor of this program knows it.
    fn number(&self) -> RawFd {
        0
    }
    /// Lets time pass before something is tried again, while the kernel changes the address space.
    fn pause(&self, time: Duration);
}

/// Room for messages, and for what a successor of this program must know of a family.
pub trait Buffer: Debug + Send {
    /// Messages of this member are read next.
    fn begin(&mut self, _member: MemberId) {}
    /// Notes a change that is about to be made.
    fn note(&mut self, _note: Note) {}
    /// Whether a checkpoint is due.
    fn is_full(&self) -> bool {
        false
    }
    /// Everything noted so far is in `state`.
    fn checkpoint(&mut self, _state: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

impl Buffer for () {}

/// A mutual exclusion.
pub trait Lock<T>: Send + Sync {
    /// Holds the lock until it is dropped.
    type Guard<'a>: DerefMut<Target = T>
    where
        Self: 'a,
        T: 'a;

    /// A lock around a value.
    fn new(value: T) -> Self;
    /// Waits for the lock and takes it.
    fn lock(&self) -> Self::Guard<'_>;
}

impl<T: Send> Lock<T> for PriorityLock<T> {
    type Guard<'a>
        = PriorityGuard<'a, T>
    where
        T: 'a;

    fn new(value: T) -> Self {
        PriorityLock::new(value)
    }

    fn lock(&self) -> PriorityGuard<'_, T> {
        // A panic while the lock was held is a bug of ours; the map is still the best there is to go on with.
        PriorityLock::lock(self)
    }
}

impl Descriptor for UserFault {
    type Buffer = Inbox;
    type Lock<T: Send> = PriorityLock<T>;

    fn buffer() -> Inbox {
        Inbox::default()
    }

    fn read(&self, buffer: &mut Inbox) -> Result<Vec<MemoryEvent>, ReadError> {
        buffer.read(self)
    }

    fn number(&self) -> RawFd {
        self.as_raw_fd()
    }

    fn copy(&self, target: PageRange, content: &[u8]) -> Progress {
        UserFault::copy(self, target, content)
    }

    fn zero(&self, target: PageRange) -> Progress {
        UserFault::zero(self, target)
    }

    fn wake(&self, pages: PageRange) {
        UserFault::wake(self, pages);
    }

    fn wake_all(&self) {
        UserFault::wake_all(self);
    }

    fn is_quiet(&self) -> bool {
        UserFault::is_quiet(self)
    }

    fn is_gone(&self) -> bool {
        UserFault::is_gone(self)
    }

    fn pause(&self, time: Duration) {
        thread::sleep(time);
    }
}
