//! The keeper's own life, in a fork of `lazy-restorer` that shares its table of descriptors: closing one here closes it
//! there, so nothing is closed before `lazy-restorer` is gone.

use std::fs;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::session_file::{Side, Store};
use common::{address, mounts};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::socket::{MsgFlags, getsockopt, recv, sockopt};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, setsid};

use super::inheritance::hand_over;
use super::{MESSAGE_BYTES, Setup, Told, link_of};
use crate::exits::{has_ended, pidfd_open};
use crate::gate::GO;
use crate::journal::Journal;
use crate::privileges;
use crate::restore::{Anchor, kill_copy};
use crate::uffd::UserFault;

/// Time that killed processes have to end.
const BURIAL: Duration = Duration::from_secs(10);
/// Pause between looks whether the copy still lives.
const LOOK: Duration = Duration::from_secs(1);
/// How the kernel names a userfault descriptor.
const UFFD_LINK: &str = "anon_inode:[userfaultfd]";

/// Never returns: what follows in the caller is `lazy-restorer`'s life.
pub(super) fn run(socket: RawFd, parent: Pid) -> ! {
    let lived = catch_unwind(AssertUnwindSafe(|| live(socket, parent)));
    // SAFETY: ends this process at once; nothing of the caller's may be dropped or flushed here.
    unsafe { libc::_exit(i32::from(lived.is_err())) }
}

fn live(socket: RawFd, parent: Pid) {
    // Signals meant for the group of `lazy-restorer`, as from a terminal, must not end its keeper.
    let _ = setsid();
    let _ = prctl::set_name(c"keeper");
    // One that may do more than it needs is better than none.
    let _ = privileges::give_up();
    let mut known = Known::default();
    if known.listen(socket, parent) {
        return;
    }
    known.outlive();
}

/// What the keeper was told.
#[derive(Default)]
struct Known {
    setup: Setup,
    /// With a descriptor that tells whether its PID is still its own.
    anchor: Option<(Anchor, OwnedFd)>,
    processes: Vec<OwnedFd>,
    prepared: bool,
    committed: bool,
    gate: Option<RawFd>,
}

impl Known {
    /// Listens until told to let go (true), or until `lazy-restorer` is gone.
    fn listen(&mut self, socket: RawFd, parent: Pid) -> bool {
        // One that is gone already has left everything it said in the socket.
        let parent = pidfd_open(parent).map(ManuallyDrop::new).ok();
        let mut buffer = vec![0; MESSAGE_BYTES];
        loop {
            match recv(socket, &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) if length > 0 => {
                    let told = postcard::from_bytes(&buffer[..length]);
                    if told.is_ok_and(|told| self.take(told)) {
                        return true;
                    }
                }
                Err(Errno::EAGAIN) => match &parent {
                    Some(parent) if !is_over(parent.as_fd(), socket) => {}
                    _ => return false,
                },
                Err(Errno::EINTR) => {}
                _ => return false,
            }
        }
    }

    /// True when it is the end.
    fn take(&mut self, told: Told) -> bool {
        match told {
            Told::Setup(setup) => self.setup = setup,
            Told::Anchor(pid, puts_away) => {
                let anchor = Anchor {
                    pid: Pid::from_raw(pid),
                    puts_away,
                };
                self.anchor = pidfd_open(anchor.pid).ok().map(|fd| (anchor, fd));
                self.watch(pid);
            }
            Told::Prepared => self.prepared = true,
            Told::Watch(pid) => self.watch(pid),
            Told::Commit(gate) => {
                self.committed = true;
                self.gate = gate;
            }
            Told::Opened => close(self.gate.take()),
            Told::Release => return true,
        }
        false
    }

    fn watch(&mut self, pid: i32) {
        // One that has ended already needs no keeper.
        self.processes.extend(pidfd_open(Pid::from_raw(pid)).ok());
    }

    /// `lazy-restorer` is gone: every descriptor it had is ours alone.
    fn outlive(mut self) {
        let _ = quiet();
        if self.committed {
            self.keep();
        } else {
            self.abort();
        }
    }

    /// Threads wait for as long as there are any, or until a successor comes.
    fn keep(&mut self) {
        if let Some(gate) = self.gate.take() {
            // `lazy-restorer` was about to let the copy run, and nothing else may run any more.
            let _ = nix::unistd::write(borrowed(gate), &[GO]);
            close(Some(gate));
        }
        // Closes the door's socket too, which opens the door.
        let held = sort_descriptors();
        address::announce(&self.setup.addresses);
        let _ = fs::remove_file(&self.setup.socket);
        let listener = UnixListener::bind(&self.setup.socket).ok();
        if let Some(listener) = &listener {
            let _ = listener.set_nonblocking(true);
        }
        loop {
            if let Some(Ok((stream, _))) = listener.as_ref().map(UnixListener::accept)
                && hand_over(&stream, &held)
            {
                return;
            }
            if !held.iter().any(|fd| is_of_living(*fd)) {
                break;
            }
            wait(listener.as_ref());
        }
        for file in [&self.setup.socket, &self.setup.session] {
            let _ = fs::remove_file(file);
        }
        if let Some(state) = self.setup.session.parent() {
            // Another session's file keeps it.
            let _ = fs::remove_dir(state);
        }
        mounts::detach_below(&self.setup.directory);
        // Nobody reads what we say; a directory that stays is all that can go wrong.
        let _ = fs::remove_dir_all(&self.setup.directory);
    }

    /// Nothing has run here yet, and the source lets the workload run on: nothing may be left of the copy.
    fn abort(mut self) {
        if let Some((anchor, pidfd)) = self.anchor
            && !has_ended(&pidfd)
        {
            self.processes.extend(kill_copy(anchor));
        }
        // A task in a page fault that nobody answers dies all the same, but what reads its memory would wait.
        for (fd, link) in descriptors() {
            if link == UFFD_LINK {
                close(Some(fd));
            }
        }
        let mut dead = true;
        for process in &self.processes {
            let limit = PollTimeout::try_from(BURIAL).unwrap_or(PollTimeout::MAX);
            let mut waiting = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
            while poll(&mut waiting, limit) == Err(Errno::EINTR) {}
            dead &= has_ended(process);
        }
        if dead {
            // `lazy-restorer` may have been killed when it had written that the copy may run, and had not told us.
            note_death(&self.setup.session);
        }
        if self.prepared {
            let _ = address::remove(&self.setup.addresses);
        }
        if let Some(command) = self.setup.on_aborted.filter(|_| self.prepared) {
            // Its failure is the operator's to notice: nobody is left to be told.
            let _ = Command::new("sh")
                .arg("-c")
                .arg(command)
                .envs(self.setup.variables)
                .stdin(Stdio::null())
                .status();
        }
        if self.setup.directory.is_absolute() {
            mounts::detach_below(&self.setup.directory);
            let _ = fs::remove_dir_all(&self.setup.directory);
        }
    }
}

/// Whoever resumes the session tells the source that the copy is dead. Before the cutover was asked for there is no file.
fn note_death(session: &Path) {
    let Some(directory) = session.parent() else {
        return;
    };
    // Nobody reads what we say; the source then waits for its operator.
    let _ = Store::of_destination(directory).change(session, |file| {
        if let Side::Destination(side) = &mut file.side {
            side.may_run = false;
        }
    });
}

/// Waits until there is something to hear; true when `lazy-restorer` is gone and has nothing left to say.
fn is_over(parent: BorrowedFd<'_>, socket: RawFd) -> bool {
    let mut waiting = [
        PollFd::new(borrowed(socket), PollFlags::POLLIN),
        PollFd::new(parent, PollFlags::POLLIN),
    ];
    let _ = poll(&mut waiting, PollTimeout::NONE);
    let heard = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
    heard(&waiting[1]) && !heard(&waiting[0])
}

fn wait(listener: Option<&UnixListener>) {
    let limit = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::MAX);
    let mut waiting: Vec<PollFd<'_>> = listener
        .map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN))
        .into_iter()
        .collect();
    let _ = poll(&mut waiting, limit);
}

/// Whoever started `lazy-restorer` waits for the end of its output.
fn quiet() -> std::io::Result<()> {
    let nowhere = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    dup2_stdin(&nowhere)?;
    dup2_stdout(&nowhere)?;
    dup2_stderr(&nowhere)?;
    Ok(())
}

/// Closes what nobody needs any more; returns the descriptors that a successor needs.
fn sort_descriptors() -> Vec<RawFd> {
    let mut held = Vec::new();
    for (fd, link) in descriptors() {
        if link == UFFD_LINK || Journal::named_by(&link).is_some() {
            held.push(fd);
        } else if link.starts_with("socket:") && !is_local(fd) {
            // The source is to notice that nobody is there. CRIU, which may still be at work, is not.
            close(Some(fd));
        }
    }
    held
}

fn is_local(fd: RawFd) -> bool {
    getsockopt(&borrowed(fd), sockopt::SockType).is_ok()
        && nix::sys::socket::getsockname::<nix::sys::socket::UnixAddr>(fd).is_ok()
}

/// All descriptors of this process and where they lead.
fn descriptors() -> Vec<(RawFd, String)> {
    let entries = fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten();
    let numbers: Vec<RawFd> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > libc::STDERR_FILENO)
        .collect();
    numbers
        .into_iter()
        .filter_map(|fd| Some((fd, link_of(fd)?)))
        .collect()
}

/// Whether a userfault descriptor belongs to a process that has not ended.
fn is_of_living(fd: RawFd) -> bool {
    if link_of(fd).as_deref() != Some(UFFD_LINK) {
        return false;
    }
    // SAFETY: it is open, and forgotten again below before anything could close it.
    let uffd = UserFault::from_fd(unsafe { OwnedFd::from_raw_fd(fd) });
    !ManuallyDrop::new(uffd).is_gone()
}

fn borrowed(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: for one call, by whoever knows that it is open.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

fn close(fd: Option<RawFd>) {
    if let Some(fd) = fd {
        // SAFETY: nobody else in this process owns it.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}
