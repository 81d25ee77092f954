//! A mutual exclusion whose holder runs with the priority of whoever waits for it.
//!
//! Fault threads are real-time and bulk threads are not. With a plain mutex a fault waits for a bulk thread that holds the
//! lock for 16 us and meanwhile for the CPU on which the workload was let run instead: 256 us to 1 ms in 3 of 100 faults
//! under a push (decision 0018). The kernel's priority-inheritance futex lends the waiter's priority to the holder.

use std::cell::UnsafeCell;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// Nobody holds it.
const FREE: u32 = 0;

/// The lock. A panic while it is held releases it: what it guards is then whatever it was.
pub struct PriorityLock<T> {
    /// TID of the holder, and the kernel's bits when somebody waits: futex(2), "Priority-inheritance futexes".
    holder: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the value is only reached through a guard, of which there is one at a time.
unsafe impl<T: Send> Send for PriorityLock<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for PriorityLock<T> {}

/// Holds the lock until it is dropped, by the thread that took it.
pub struct PriorityGuard<'a, T> {
    lock: &'a PriorityLock<T>,
    holder: u32,
    /// The kernel lets only the holder release it.
    stays: PhantomData<*const ()>,
}

impl<T> PriorityLock<T> {
    /// A lock around a value.
    pub const fn new(value: T) -> Self {
        PriorityLock {
            holder: AtomicU32::new(FREE),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock and takes it. A thread that has it already waits for ever.
    pub fn lock(&self) -> PriorityGuard<'_, T> {
        let holder = own_id();
        while !self.take(holder) && !self.wait() {}
        PriorityGuard {
            lock: self,
            holder,
            stays: PhantomData,
        }
    }

    fn take(&self, holder: u32) -> bool {
        let taken =
            self.holder
                .compare_exchange(FREE, holder, Ordering::Acquire, Ordering::Relaxed);
        taken.is_ok()
    }

    /// Whether the kernel has given us the lock. If not it is to be tried again.
    fn wait(&self) -> bool {
        if self.futex(libc::FUTEX_LOCK_PI).is_ok() {
            return true;
        }
        // The holder is about to end its wait (EAGAIN), or this kernel has no such futex.
        thread::yield_now();
        false
    }

    fn release(&self, holder: u32) {
        let free = self
            .holder
            .compare_exchange(holder, FREE, Ordering::Release, Ordering::Relaxed);
        if free.is_err()
            && let Err(error) = self.futex(libc::FUTEX_UNLOCK_PI)
        {
            // Cannot be: there are waiters, and we hold it.
            tracing::error!(%error, "a lock cannot be released");
        }
    }

    fn futex(&self, operation: libc::c_int) -> io::Result<()> {
        let none = ptr::null::<libc::timespec>();
        let operation = operation | libc::FUTEX_PRIVATE_FLAG;
        let word = self.holder.as_ptr();
        // SAFETY: the word lives as long as we are borrowed, and the kernel changes it atomically.
        let result = unsafe { libc::syscall(libc::SYS_futex, word, operation, 0, none) };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// The calling thread's TID, asked of the kernel once: a lock is taken several times for each fault. (No thread of these
/// programs forks and goes on with locks in the child.)
fn own_id() -> u32 {
    thread_local! {
        static OWN: u32 = nix::unistd::gettid().as_raw().cast_unsigned();
    }
    OWN.with(|id| *id)
}

impl<T> Deref for PriorityGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: we hold the lock.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for PriorityGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: we hold the lock, and are borrowed alone.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for PriorityGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.release(self.holder);
    }
}

impl<T> fmt::Debug for PriorityLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PriorityLock").finish_non_exhaustive()
    }
}

impl<T: fmt::Debug> fmt::Debug for PriorityGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        T::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn one_thread_at_a_time() {
        const ROUNDS: u64 = 20_000;
        let lock = PriorityLock::new((0_u64, 0_u64));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..ROUNDS {
                        let mut both = lock.lock();
                        both.0 += 1;
                        let seen = both.0;
                        std::hint::black_box(&both);
                        both.1 += 1;
                        assert_eq!((both.0, both.1), (seen, seen));
                    }
                });
            }
        });
        assert_eq!(*lock.lock(), (4 * ROUNDS, 4 * ROUNDS));
    }

    #[test]
    fn a_panic_releases_it() {
        let lock = PriorityLock::new(7);
        let panicked = thread::scope(|scope| {
            let holds = || {
                let _held = lock.lock();
                panic!("on purpose");
            };
            scope.spawn(holds).join()
        });
        assert!(panicked.is_err());
        assert_eq!(*lock.lock(), 7);
    }

    /// Field 18 of `/proc/self/stat` (proc(5)): what the scheduler goes by at the moment; negative for real-time.
    fn own_priority() -> i64 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("proc is there");
        let after_name = stat.rsplit(')').next().expect("a name");
        let field = after_name.split_whitespace().nth(18 - 3);
        field.and_then(|text| text.parse().ok()).expect("a number")
    }

    #[test]
    fn the_holder_has_the_priority_of_who_waits() {
        let lock = PriorityLock::new(());
        let both_are_ready = Barrier::new(2);
        thread::scope(|scope| {
            let held = lock.lock();
            assert!(own_priority() >= 0);
            let waiter = scope.spawn(|| {
                let param = libc::sched_param { sched_priority: 1 };
                // SAFETY: 0 is the calling thread, and `param` lives across the call.
                let urgent =
                    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param) } == 0;
                both_are_ready.wait();
                drop(lock.lock());
                urgent
            });
            both_are_ready.wait();
            let deadline = Instant::now() + Duration::from_secs(5);
            while own_priority() >= 0 && Instant::now() < deadline {
                thread::yield_now();
            }
            let boosted = own_priority() < 0;
            drop(held);
            match waiter.join().expect("it ends") {
                true => assert!(boosted, "the waiter's priority was not lent"),
                false => println!("skipped: real-time priorities are not permitted here"),
            }
            assert!(own_priority() >= 0, "what was lent is given back");
        });
    }
}
