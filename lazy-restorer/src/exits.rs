//! Notices the end of restored processes: userfaultfd does not report it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::memory::{MemberKey, Memory};

/// Tells `memory` when `pid` has ended. Runs on the current runtime.
pub fn watch(pid: Pid, key: MemberKey, memory: Arc<Memory>) {
    tokio::spawn(async move {
        match ended(pid).await {
            Ok(()) => {
                tracing::debug!(%pid, "ended");
                memory.exited(key);
            }
            // The process is then found out when a page is installed in it.
            Err(error) => tracing::warn!(%pid, %error, "cannot watch a process for its end"),
        }
    });
}

async fn ended(pid: Pid) -> io::Result<()> {
    match pidfd_open(pid) {
        Err(Errno::ESRCH) => Ok(()),
        opened => end_of(opened?).await,
    }
}

/// Waits for the end of killed processes, each named by a pidfd. The first process of a PID namespace ends after all others.
pub async fn bury(dying: Vec<OwnedFd>) {
    for process in dying {
        if let Err(error) = end_of(process).await {
            tracing::warn!(%error, "waiting for the end of a killed process");
        }
    }
}

/// Waits for the end of the process that a pidfd names.
pub(crate) async fn end_of(fd: OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor is owned and goes into the `AsyncFd`.
    let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }
        .map_err(|error| io::Error::other(error.to_string()))?;
    // A pidfd is readable once its process has ended (pidfd_open(2)).
    fd.readable().await.map(drop)
}

/// A descriptor that names a process for good, and is readable once it has ended.
pub fn pidfd_open(pid: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes two numbers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = Errno::result(fd)?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether the process that `pidfd` names has ended.
pub fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut looked_at = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut looked_at, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Sends a signal to the process that `pidfd` names; one that has ended already needs none.
pub fn pidfd_send(pidfd: &OwnedFd, signal: Signal) {
    let (pidfd, signal) = (pidfd.as_raw_fd(), signal as libc::c_int);
    // SAFETY: the call takes numbers and no signal information.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, signal, 0, 0) };
}

/// Kills the process that `pidfd` names; one that has ended already is as good.
pub fn pidfd_kill(pidfd: &OwnedFd) {
    pidfd_send(pidfd, Signal::SIGKILL);
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn an_end_is_noticed() {
        let mut child = Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("cat runs");
        let pid = Pid::from_raw(child.id() as i32);
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(async {
                let end = tokio::spawn(ended(pid));
                drop(child.stdin.take());
                end.await.expect("not cancelled").expect("watched");
            });
        child.wait().expect("our child");
    }
}
