//! A thread with a network runtime of its own.
//!
//! Faults and bulk each get one at both ends: a hop between threads costs a fault 15 to 25 us, and bulk on the same
//! thread or socket costs it milliseconds (measured).

use std::io;
use std::thread::{self, JoinHandle};

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// How the kernel schedules the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Ahead of everything that is not real-time (`SCHED_FIFO`, lowest level), where permitted.
    Urgent,
    /// Like any other thread, unless urgent threads could not be had: then behind everything (`SCHED_IDLE`).
    Background {
        /// Whether the urgent thread got what it asked for.
        urgent_granted: bool,
    },
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
    /// Starts a thread called `name`.
    pub fn start(name: &str, priority: Priority) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let (report, granted) = std::sync::mpsc::channel();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // The starter waits for this report, so it is there to take it.
                let _ = report.send(schedule(priority));
                // An error means that the handle was dropped, which is what we wait for as well.
                let _ = runtime.block_on(stopped);
                runtime.shutdown_background();
            })?;
        let granted = granted.recv().unwrap_or(false);
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
    let (policy, level) = match priority {
        Priority::Urgent => (libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 1),
        Priority::Background {
            urgent_granted: true,
        } => return true,
        Priority::Background {
            urgent_granted: false,
        } => (libc::SCHED_IDLE, 0),
    };
    let param = libc::sched_param {
        sched_priority: level,
    };
    // SAFETY: 0 is the calling thread, and `param` lives across the call.
    unsafe { libc::sched_setscheduler(0, policy, &raw const param) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_run_on_the_named_thread() {
        let thread = IoThread::start("test-io", Priority::Urgent).expect("started");
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
