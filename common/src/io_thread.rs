//! A thread with a network runtime of its own.
//!
//! Faults and bulk each get one at both ends: a hop between threads costs a fault 15 to 25 us, and bulk on the same
//! thread or socket costs it milliseconds (measured).

use std::io;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use crate::privileges::{self, Capabilities};
use crate::quic::PathProfile;

/// Longer than what threads have that asked for nothing: 0.7 to 2.8 ms, by the number of CPUs (kernel/sched/fair.c:
/// sysctl_sched_base_slice).
const BULK_SLICE: Duration = Duration::from_millis(3);

/// Where frames are large the CPU is what bounds the push, and a thread of the workload that wakes up would often come when
/// what is left of a short slice is no longer than its own, and wait for its end (decision 0018).
const JUMBO_SLICE: Duration = Duration::from_millis(12);

/// How the kernel schedules the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Ahead of everything that is not real-time (`SCHED_FIFO`, lowest level), where permitted.
    Urgent,
    /// Like any other thread, unless urgent threads could not be had: then behind everything (`SCHED_IDLE`).
    Background {
        /// Whether the urgent thread got what it asked for.
        urgent_granted: bool,
        /// How long it would keep the CPU.
        slice: Duration,
    },
}

impl Priority {
    /// Of bulk over `path`, beside an urgent thread that got what it asked for, or did not.
    pub fn bulk(path: PathProfile, urgent_granted: bool) -> Self {
        let slice = match path.has_jumbo_frames() {
            true => JUMBO_SLICE,
            false => BULK_SLICE,
        };
        Self::Background {
            urgent_granted,
            slice,
        }
    }
}

/// A running thread; ends when dropped, after the tasks' current step.
#[derive(Debug)]
pub struct IoThread {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    granted: bool,
}

impl IoThread {
    /// Starts a thread called `name` that keeps no capability but those of `needs`, and never starts a program.
    pub fn start(name: &str, priority: Priority, needs: Capabilities) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let (report, granted) = std::sync::mpsc::channel();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let granted = schedule(priority);
                let dropped = privileges::keep_for_data(needs);
                let failed = dropped.is_err();
                // The starter waits for this report, so it is there to take it.
                let _ = report.send(dropped.map(|()| granted));
                if failed {
                    return;
                }
                // An error means that the handle was dropped, which is what we wait for as well.
                let _ = runtime.block_on(stopped);
                runtime.shutdown_background();
            })?;
        let granted = granted.recv().map_err(io::Error::other)??;
        tracing::debug!(name, ?priority, granted, "thread started");
        Ok(IoThread {
            handle,
            stop: Some(stop),
            thread: Some(thread),
            granted,
        })
    }

    /// Where to spawn tasks that shall run on this thread.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Whether the kernel granted the priority.
    pub fn granted(&self) -> bool {
        self.granted
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("an I/O thread panicked");
        }
    }
}

fn schedule(priority: Priority) -> bool {
    match priority {
        Priority::Urgent => set_policy(libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 1),
        Priority::Background {
            urgent_granted: true,
            slice,
        } => {
            // Without it a woken thread of the workload may wait a little longer; nothing depends on it.
            ask_for_slices_of(slice);
            true
        }
        Priority::Background {
            urgent_granted: false,
            ..
        } => set_policy(libc::SCHED_IDLE, 0),
    }
}

fn set_policy(policy: libc::c_int, level: libc::c_int) -> bool {
    let param = libc::sched_param {
        sched_priority: level,
    };
    // SAFETY: 0 is the calling thread, and `param` lives across the call.
    unsafe { libc::sched_setscheduler(0, policy, &raw const param) == 0 }
}

/// Asks for the CPU in slices longer than others' (Linux 6.12; older kernels ignore it): whoever wakes up with a shorter one
/// preempts this thread at once, as a thread of the workload whose page has come (decision 0018).
fn ask_for_slices_of(slice: Duration) {
    // SAFETY: plain numbers, for which zero is the default.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    attributes.size = size_of::<libc::sched_attr>() as u32;
    attributes.sched_policy = libc::SCHED_OTHER as u32;
    attributes.sched_runtime = slice.as_nanos() as u64;
    // SAFETY: 0 is the calling thread, and the attributes live across the call.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "no slices of our own");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_run_on_the_named_thread() {
        let thread =
            IoThread::start("test-io", Priority::Urgent, Capabilities::empty()).expect("started");
        let (send, receive) = std::sync::mpsc::channel();
        thread.handle().spawn(async move {
            let name = thread::current().name().map(str::to_owned);
            send.send(name).expect("the test waits");
        });
        assert_eq!(
            receive.recv().expect("the task ran").as_deref(),
            Some("test-io")
        );
    }
}
