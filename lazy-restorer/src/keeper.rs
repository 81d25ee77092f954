//! Tiny processes that outlive a killed `lazy-restorer`, and hold every descriptor it had.
//!
//! When the last copy of a userfault descriptor closes, the kernel makes every missing page of its process read as
//! zeros, silently (`userfaultfd_release` in `fs/userfaultfd.c`). A keeper is a fork that *shares the table of
//! descriptors*: whatever `lazy-restorer` has open the keeper has open in the same instant, also the descriptor of a
//! child forked a moment ago, which the kernel puts into that table itself. So a killed `lazy-restorer` only makes
//! threads wait, for a successor that the keeper hands everything to (`keeper/inheritance.rs`). There are two, which
//! replace each other (`keeper/crew.rs`).
//!
//! Before the point of no return there is nothing to keep: then it does what `lazy-restorer` would have done, kills the
//! half-restored copy, runs the operator's `--on-aborted` command and removes the migration's directory.
//!
//! What they must know is written into memory that is in that table too, and read when it is needed: nobody who has
//! died can have missed anything, and nobody waits for a reader.

mod crew;
mod inheritance;
mod life;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, IntoRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::address::MovingAddress;
use common::host;
use common::session_file::Task;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use self::crew::{Crew, Member};
use crate::exits::end_of;
use crate::restore::Anchor;

pub use self::inheritance::{Inheritance, inherit};

/// Bytes of a message at most.
const MESSAGE_BYTES: usize = 64 << 10;
/// Time the keepers have to end when they are told to.
const ENDING: Duration = Duration::from_secs(10);
/// Time the one keeper has to replace the other.
const REPLACING: Duration = Duration::from_secs(5);
/// Pause between looks whether it has.
const PAUSE: Duration = Duration::from_millis(5);

/// What the keeper must know to clean up, or to be found by a successor.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Setup {
    /// The session.
    pub id: String,
    /// The migration's directory.
    pub directory: PathBuf,
    /// The operator's `--on-aborted` command.
    pub on_aborted: Option<String>,
    /// Its environment.
    pub variables: Vec<(String, String)>,
    /// Where to listen for a successor.
    pub socket: PathBuf,
    /// The session's file.
    pub session: PathBuf,
    /// Service addresses of the copy.
    pub addresses: Vec<MovingAddress>,
}

/// What the keeper is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Told {
    /// What it must know.
    Setup(Setup),
    /// CRIU, or the init it restores under. Its tree is the copy.
    ///
    /// The flag says that it puts the copy away by itself when what is below it is killed.
    Anchor(Task, bool),
    /// The operator's `--before-restore` command is about to run.
    Prepared,
    /// A restored process.
    Watch(Task),
    /// The copy is about to run, and is the only one that may: opening its gate is all that is missing. A copy of the
    /// gate's descriptor is for the keeper alone.
    Commit(Option<RawFd>),
    /// The gate is open.
    Opened,
    /// The memory is whole: let go.
    Release,
}

/// `lazy-restorer`'s end. Dropping it before the point of no return lets go.
#[derive(Debug)]
pub struct Keeper {
    crew: Crew,
    log: File,
    bell: EventFd,
    gate: Option<RawFd>,
    committed: bool,
    watching: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Forks the keepers. This process must have one thread only: they go on in a copy of its memory.
    pub fn start() -> io::Result<Self> {
        let (crew, log, bell) = Crew::gather()?;
        Ok(Keeper {
            crew,
            log: File::from(log),
            bell,
            gate: None,
            committed: false,
            watching: None,
        })
    }

    /// The process that acts should we be killed. Another one's, when the one before was killed.
    pub fn pid(&self) -> Pid {
        self.crew.first()
    }

    /// Tells what it must know. Should we be killed it cleans up from here on. Called on a runtime, on which the keepers
    /// are watched.
    pub fn set_up(&mut self, setup: Setup) -> io::Result<()> {
        let watched = self
            .watching
            .get_or_insert_with(|| tokio::spawn(watch(self.crew)));
        debug_assert!(!watched.is_finished());
        self.tell(&Told::Setup(setup))
    }

    /// Tells whose tree the copy is. One that has ended has none.
    pub fn anchor(&mut self, anchor: Anchor) -> io::Result<()> {
        match Task::find(anchor.pid.as_raw()) {
            Some(task) => {
                self.tell(&Told::Anchor(task, anchor.puts_away))?;
                self.ring()
            }
            None => Ok(()),
        }
    }

    /// The operator's `--before-restore` command is about to run.
    pub fn prepared(&mut self) -> io::Result<()> {
        self.tell(&Told::Prepared)
    }

    /// Tells of a restored process.
    pub fn watch(&mut self, pid: Pid) -> io::Result<()> {
        match Task::find(pid.as_raw()) {
            Some(task) => self.tell(&Told::Watch(task)),
            None => Ok(()),
        }
    }

    /// From here on the copy is not killed any more, and its pages are never given up. Should we be killed before the
    /// gate is open, the keeper opens it.
    pub fn commit(&mut self, gate: Option<OwnedFd>) -> io::Result<()> {
        self.committed = true;
        self.gate = gate.map(IntoRawFd::into_raw_fd);
        self.tell(&Told::Commit(self.gate))?;
        // The copy is to get its leash.
        self.ring()
    }

    /// The gate is open.
    pub fn opened(&mut self) -> io::Result<()> {
        // Told first: nobody may write to what has this number afterwards.
        self.tell(&Told::Opened)?;
        if let Some(gate) = self.gate.take() {
            nix::unistd::close(gate)?;
        }
        Ok(())
    }

    /// The memory is whole, or nothing of it is left: the keepers let go and end.
    pub fn release(mut self) -> io::Result<()> {
        self.let_go()
    }

    fn let_go(&mut self) -> io::Result<()> {
        self.committed = true;
        if let Some(watching) = self.watching.take() {
            watching.abort();
        }
        let told = self.tell(&Told::Release);
        // Whoever of them lives must not think that all others were killed.
        self.crew.finish();
        self.ring()?;
        let deadline = Instant::now() + ENDING;
        for pidfd in self.crew.members() {
            let left = deadline.saturating_duration_since(Instant::now());
            let limit = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut waiting = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
            poll(&mut waiting, limit)?;
            reap(&pidfd);
        }
        told
    }

    fn ring(&self) -> io::Result<()> {
        self.bell.write(1)?;
        Ok(())
    }

    fn tell(&mut self, told: &Told) -> io::Result<()> {
        let message = postcard::to_extend(told, Vec::new()).map_err(io::Error::other)?;
        if message.len() > MESSAGE_BYTES {
            return Err(io::Error::other("too much to tell the keeper"));
        }
        let mut framed = (message.len() as u32).to_le_bytes().to_vec();
        framed.extend(message);
        self.log.write_all(&framed)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if !self.committed
            && let Err(error) = self.let_go()
        {
            tracing::warn!(%error, "the keeper");
        }
    }
}

/// Buries a child of ours that has ended; the leash is the first keeper's.
fn reap(pidfd: &OwnedFd) {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
    let _ = waitid(Id::PIDFd(pidfd.as_fd()), flags);
}

/// Says loudly that a keeper was killed, and whether the other one has replaced it.
async fn watch(crew: Crew) {
    loop {
        let ([Some(first), Some(second)], mine) = (crew.keepers(), crew.keepers()) else {
            return;
        };
        let (member, ended) = tokio::select! {
            ended = end_of(first) => (Member::First, ended),
            ended = end_of(second) => (Member::Second, ended),
        };
        if let Err(error) = ended {
            tracing::warn!(%error, "cannot watch the keepers");
            return;
        }
        mine.iter().flatten().for_each(reap);
        eprintln!(
            "lazy-restorer: warning: destination host {}: one of its two keepers was killed",
            host::name()
        );
        if !is_replaced(crew, member).await {
            eprintln!(
                "lazy-restorer: warning: destination host {}: both keepers were killed: should lazy-restorer be killed as \
                 well, pages that are missing then would read as zeros, or, with --pidns, the copy be killed",
                host::name()
            );
            return;
        }
    }
}

async fn is_replaced(crew: Crew, member: Member) -> bool {
    let deadline = Instant::now() + REPLACING;
    while crew.is_vacant(member) {
        if Instant::now() > deadline {
            return false;
        }
        sleep(PAUSE).await;
    }
    true
}

/// Where a descriptor of this process leads.
fn link_of(fd: RawFd) -> Option<String> {
    let link = std::fs::read_link(Path::new("/proc/self/fd").join(fd.to_string())).ok()?;
    link.into_os_string().into_string().ok()
}
