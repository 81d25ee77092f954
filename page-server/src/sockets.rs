//! The only file that takes descriptors out of other processes (`pidfd_getfd(2)`).

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;
use nix::unistd::Pid;

/// Copies of the sockets `task` has open.
pub fn of(task: Pid) -> Vec<OwnedFd> {
    let Ok(pidfd) = pidfd_open(task) else {
        return Vec::new();
    };
    let entries = fs::read_dir(format!("/proc/{task}/fd"));
    let sockets = entries.into_iter().flatten().flatten().filter(|entry| {
        fs::read_link(entry.path())
            .is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
    });
    sockets
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|fd| pidfd_getfd(&pidfd, fd).ok())
        .collect()
}

/// A descriptor that names a process for good, and is readable once it has ended.
pub fn pidfd_open(task: Pid) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two numbers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, task.as_raw(), 0) };
    new_descriptor(fd)
}

fn pidfd_getfd(pidfd: &OwnedFd, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes three numbers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    new_descriptor(fd)
}

fn new_descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = Errno::result(result)?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use nix::sys::socket::{SockaddrIn, getsockname};

    use super::*;

    #[test]
    fn our_own_sockets_are_found() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let port = listener.local_addr().expect("bound").port();
        let ports = of(Pid::this()).into_iter().filter_map(|socket| {
            let address: SockaddrIn = getsockname(socket.as_raw_fd()).ok()?;
            Some(address.port())
        });
        assert!(ports.into_iter().any(|found| found == port));
    }
}
