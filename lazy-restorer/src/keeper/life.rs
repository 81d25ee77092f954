//! The lives of those that keep, in forks of `lazy-restorer` that share its table of descriptors: closing one here closes
//! it there, so nothing is closed before `lazy-restorer` is gone.

use std::fs;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use common::session_file::{Side, Store, Task};
use common::{address, mounts, open_files};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, setsid};

use super::crew::{Crew, Member};
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
/// Pause between looks whether all of the copy has ended.
const PAUSE: Duration = Duration::from_millis(10);
/// How the kernel names a userfault descriptor.
const UFFD_LINK: &str = "anon_inode:[userfaultfd]";

/// Never returns: what follows in the caller is another process's life.
pub(super) fn run(crew: Crew, member: Member) -> ! {
    let lived = catch_unwind(AssertUnwindSafe(|| live(crew, member)));
    // SAFETY: ends this process at once; nothing of the caller's may be dropped or flushed here.
    unsafe { libc::_exit(i32::from(lived.is_err())) }
}

fn live(crew: Crew, member: Member) {
    // Signals meant for the group of `lazy-restorer`, as from a terminal, must not end its keeper; nor must those that
    // a service manager sends to every process.
    let _ = setsid();
    let _ = SigSet::all().thread_set_mask();
    crew.enter_myself(member);
    if member == Member::Leash {
        let _ = prctl::set_name(c"leash");
        return leash(crew);
    }
    let _ = prctl::set_name(c"keeper");
    // One that may do more than it needs is better than none.
    let _ = privileges::give_up();
    match member {
        Member::First => first(crew),
        _ => second(crew),
    }
}

/// The first keeper: listens until told to let go, or until `lazy-restorer` is gone, and does what is to be done then.
fn first(crew: Crew) {
    loop {
        // Looked at first: one that is gone has nothing more to say.
        let orphaned = crew.is_orphaned();
        let known = Known::of(&crew);
        if known.released {
            break;
        }
        if orphaned {
            known.outlive(crew);
            break;
        }
        crew.replace(Member::Second);
        known.leash(crew);
        crew.wait(&[Member::Second, Member::Leash], &[crew.bell]);
        // What it rang for is looked for in any case.
        let _ = nix::unistd::read(borrowed(crew.bell), &mut [0; 8]);
    }
    crew.finish();
}

/// The second keeper: there is a first one as long as anything is to be kept.
fn second(crew: Crew) {
    while !crew.is_done() {
        crew.replace(Member::First);
        crew.wait(&[Member::First], &[]);
    }
}

/// The leash: when nobody is left who could fill the copy's missing pages, nothing may be left that could read them.
fn leash(crew: Crew) {
    let keepers = [Member::First, Member::Second];
    while !(crew.is_orphaned() && keepers.iter().all(|keeper| crew.is_vacant(*keeper))) {
        crew.wait(&keepers, &[]);
        if crew.is_done() {
            return;
        }
    }
    if crew.is_done() {
        return;
    }
    // All but the namespace's init, which ends when no child is left; then the kernel kills us. Until that our copies of
    // the descriptors make every thread wait.
    loop {
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        sleep(PAUSE);
    }
}

/// What the keepers were told.
#[derive(Default)]
struct Known {
    setup: Setup,
    anchor: Option<(Task, bool)>,
    tasks: Vec<Task>,
    prepared: bool,
    committed: bool,
    gate: Option<RawFd>,
    released: bool,
}

impl Known {
    /// Everything that was said so far.
    fn of(crew: &Crew) -> Self {
        Known::read(&crew.log())
    }

    fn read(log: &fs::File) -> Self {
        let mut known = Known::default();
        let mut at = 0;
        while let Some((message, next)) = read_message(log, at) {
            if let Ok(told) = postcard::from_bytes(&message) {
                known.take(told);
            }
            at = next;
        }
        known
    }

    fn take(&mut self, told: Told) {
        match told {
            Told::Setup(setup) => self.setup = setup,
            Told::Anchor(task, puts_away) => {
                self.anchor = Some((task, puts_away));
                self.tasks.push(task);
            }
            Told::Prepared => self.prepared = true,
            Told::Watch(task) => self.tasks.push(task),
            Told::Commit(gate) => {
                self.committed = true;
                self.gate = gate;
            }
            Told::Opened => self.gate = None,
            Told::Release => self.released = true,
        }
    }

    /// A copy that may run is held by a leash in its PID namespace, if it has one that is begun by our init.
    fn leash(&self, crew: Crew) {
        if let Some((init, false)) = self.anchor.filter(|_| self.committed)
            && is_elsewhere(init)
        {
            crew.leash(init);
        }
    }

    /// `lazy-restorer` is gone: every descriptor it had is ours alone.
    fn outlive(self, crew: Crew) {
        let _ = quiet();
        self.sign();
        if self.committed {
            self.keep(crew);
        } else {
            self.abort();
        }
    }

    /// Who goes on with the session must find us, also when we are not the one it was begun with.
    fn sign(&self) {
        let Some(state) = self.setup.session.parent() else {
            return;
        };
        let store = Store::of_destination(state);
        let (Some(task), Ok(mut file)) = (Task::ourselves(), store.find(&self.setup.id)) else {
            return;
        };
        if let Side::Destination(side) = &mut file.side
            && side.keeper != task
        {
            side.keeper = task;
            // Who does not find us says so.
            let _ = store.write(&file);
        }
    }

    /// Threads wait for as long as there are any, or until a successor comes.
    fn keep(&self, crew: Crew) {
        if let Some(gate) = self.gate {
            // `lazy-restorer` was about to let the copy run, and nothing else may run any more. The gate stays open for
            // a keeper that takes our place, which says so again.
            let _ = nix::unistd::write(borrowed(gate), &[GO]);
        }
        // Closes the door's socket too, which opens the door.
        let held = sort_descriptors();
        address::announce(&self.setup.addresses);
        let listener = self.listen(&crew);
        loop {
            if let Some(Ok((stream, _))) = listener.as_ref().map(|listener| listener.accept())
                && hand_over(&stream, &held)
            {
                return;
            }
            if !held.iter().any(|fd| is_of_living(*fd)) {
                break;
            }
            crew.replace(Member::Second);
            self.leash(crew);
            let door: Vec<RawFd> = listener.iter().map(|door| door.as_raw_fd()).collect();
            crew.wait(&[Member::Second, Member::Leash], &door);
        }
        for file in [&self.setup.socket, &self.setup.session] {
            let _ = fs::remove_file(file);
        }
        if let Some(state) = self.setup.session.parent() {
            // Another session's file keeps it.
            let _ = fs::remove_dir(state);
        }
        self.remove_directory();
    }

    /// Opens the door to a successor, or goes on listening where one before us did.
    fn listen(&self, crew: &Crew) -> Option<ManuallyDrop<UnixListener>> {
        let door = match crew.door() {
            Some(door) => door,
            None => {
                let _ = fs::remove_file(&self.setup.socket);
                let listener = UnixListener::bind(&self.setup.socket).ok()?;
                let _ = listener.set_nonblocking(true);
                let door = listener.into_raw_fd();
                crew.open_door(door);
                door
            }
        };
        // SAFETY: it is open, and nobody closes it.
        Some(ManuallyDrop::new(unsafe {
            UnixListener::from_raw_fd(door)
        }))
    }

    fn remove_directory(&self) {
        if self.setup.directory.is_absolute() {
            mounts::detach_below(&self.setup.directory);
            // Nobody reads what we say; a directory that stays is all that can go wrong.
            let _ = fs::remove_dir_all(&self.setup.directory);
        }
    }

    /// Nothing has run here yet, and the source lets the workload run on: nothing may be left of the copy.
    fn abort(self) {
        let mut dying: Vec<OwnedFd> = self.tasks.iter().filter_map(|task| pidfd(*task)).collect();
        if let Some((task, puts_away)) = self.anchor.filter(|(task, _)| task.is_alive()) {
            let pid = Pid::from_raw(task.pid);
            dying.extend(kill_copy(Anchor { pid, puts_away }));
        }
        // A task in a page fault that nobody answers dies all the same, but what reads its memory would wait.
        for (fd, link) in descriptors() {
            if link == UFFD_LINK {
                close(Some(fd));
            }
        }
        let mut dead = true;
        for process in &dying {
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
        if let Some(command) = self.setup.on_aborted.as_ref().filter(|_| self.prepared) {
            // The command must be able to hear signals.
            let _ = SigSet::empty().thread_set_mask();
            // Its failure is the operator's to notice: nobody is left to be told.
            let _ = open_files::as_found(&mut Command::new("sh"))
                .arg("-c")
                .arg(command)
                .envs(self.setup.variables.iter().cloned())
                .stdin(Stdio::null())
                .status();
        }
        self.remove_directory();
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

/// The message of `lazy-restorer` that begins at `at`, and where the next one does. One that it was killed over is none.
fn read_message(log: &fs::File, at: u64) -> Option<(Vec<u8>, u64)> {
    let mut length = [0; size_of::<u32>()];
    log.read_exact_at(&mut length, at).ok()?;
    let mut message = vec![0; (u32::from_le_bytes(length) as usize).min(MESSAGE_BYTES)];
    let start = at + length.len() as u64;
    log.read_exact_at(&mut message, start).ok()?;
    let end = start + message.len() as u64;
    Some((message, end))
}

fn pidfd(task: Task) -> Option<OwnedFd> {
    let pidfd = pidfd_open(Pid::from_raw(task.pid)).ok()?;
    task.is_alive().then_some(pidfd)
}

/// Whether a process is in another PID namespace than we are.
fn is_elsewhere(task: Task) -> bool {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let theirs = namespace(&task.pid.to_string());
    theirs.is_some() && theirs != namespace("self")
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn framed(told: &Told) -> Vec<u8> {
        let message = postcard::to_extend(told, Vec::new()).expect("memory");
        [&(message.len() as u32).to_le_bytes()[..], &message].concat()
    }

    /// The log of a `lazy-restorer` that was killed.
    fn known_of(bytes: &[u8]) -> Known {
        let mut log = tempfile::tempfile().expect("a file");
        log.write_all(bytes).expect("written");
        Known::read(&log)
    }

    /// What was decided by then.
    fn decisions(known: &Known) -> (String, usize, bool, bool, Option<RawFd>, bool) {
        let Known {
            prepared,
            committed,
            gate,
            released,
            ..
        } = *known;
        let id = known.setup.id.clone();
        (id, known.tasks.len(), prepared, committed, gate, released)
    }

    #[test]
    fn a_message_counts_when_it_is_whole() {
        let task = Task { pid: 7, start: 9 };
        let setup = Setup {
            id: String::from("05"),
            ..Setup::default()
        };
        let told = [
            Told::Setup(setup),
            Told::Anchor(task, false),
            Told::Prepared,
            Told::Watch(task),
            Told::Commit(Some(11)),
            Told::Opened,
            Told::Release,
        ];
        let mut log = Vec::new();
        let mut before = decisions(&Known::default());
        for message in &told {
            let start = log.len();
            log.extend(framed(message));
            for cut in start..log.len() {
                assert_eq!(decisions(&known_of(&log[..cut])), before, "{message:?}");
            }
            let after = decisions(&known_of(&log));
            assert_ne!(after, before, "{message:?}");
            before = after;
        }
    }

    #[test]
    fn no_log_makes_a_keeper_let_go() {
        for length in [0_u32, 1, 0xffff, u32::MAX] {
            let log = [&length.to_le_bytes()[..], &[0xff; 300]].concat();
            assert_eq!(decisions(&known_of(&log)), decisions(&Known::default()));
        }
    }
}
