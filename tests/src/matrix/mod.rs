//! The fault matrix: every moment of a migration, and everything that can be killed or cut in it.
//!
//! A [`Cell`] brings a real migration of the torture workload to its moment and holds it there (`scene.rs`), does its
//! harm (`harm.rs`), lets the migration go on, and does what an operator would: `resume` for every session that is left
//! orphaned (`aftermath.rs`). Then exactly one host must run the tree, with every byte of it. What each cell must end
//! with is said in `expected.rs`; a harm that does not exist at a moment is looked for there, and its absence is what
//! is verified.

mod aftermath;
mod expected;
mod harm;
mod scene;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Result, anyhow, ensure};

use crate::rig::Rig;

pub use aftermath::host_of;
pub use scene::{fast_link, set_link, shaped_link, slow_link};

/// Where a migration is. The names are those of the states in which both ends then are, if they agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The destination's first message has not arrived.
    Hello,
    /// The source's facts have not arrived.
    Advise,
    /// CRIU holds the tree, its images are complete, and nobody was told.
    Freeze,
    /// The destination has the skeleton and makes room; both CRIUs run.
    Skeleton,
    /// All tasks are rebuilt and none has run.
    Listen,
    /// The source has given the tree away, and the destination does not know it.
    Cutover,
    /// Threads fault and pages are pushed, on a slow link.
    Postcopy,
    /// The link is lost, and both ends know it.
    Paused,
    /// The destination is back, and the source has not heard all of what came.
    Recover,
    /// Everything is there, and the source does not know it.
    Drained,
    /// Both ends agree, and the source is about to release the original.
    Complete,
    /// The original is released, and the destination does not know it.
    Unheard,
}

impl Moment {
    /// All there are, in order.
    pub const ALL: [Self; 12] = [
        Self::Hello,
        Self::Advise,
        Self::Freeze,
        Self::Skeleton,
        Self::Listen,
        Self::Cutover,
        Self::Postcopy,
        Self::Paused,
        Self::Recover,
        Self::Drained,
        Self::Complete,
        Self::Unheard,
    ];
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Hello => "hello",
            Self::Advise => "advise",
            Self::Freeze => "freeze",
            Self::Skeleton => "skeleton",
            Self::Listen => "listen",
            Self::Cutover => "cutover",
            Self::Postcopy => "postcopy",
            Self::Paused => "paused",
            Self::Recover => "recover",
            Self::Drained => "drained",
            Self::Complete => "complete",
            Self::Unheard => "complete, unheard",
        })
    }
}

/// What is done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// The link is cut until it was noticed, and comes back.
    LinkCut,
    /// SIGKILL to `lazy-restorer`.
    RestorerKilled,
    /// SIGKILL to `page-server`.
    ServerKilled,
    /// SIGKILL to the CRIU that holds the original.
    DumpKilled,
    /// SIGKILL to the CRIU that makes the copy.
    RestoreKilled,
}

impl Harm {
    /// All there are.
    pub const ALL: [Self; 5] = [
        Self::LinkCut,
        Self::RestorerKilled,
        Self::ServerKilled,
        Self::DumpKilled,
        Self::RestoreKilled,
    ];
}

impl fmt::Display for Harm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::LinkCut => "link cut",
            Self::RestorerKilled => "lazy-restorer killed",
            Self::ServerKilled => "page-server killed",
            Self::DumpKilled => "source's CRIU killed",
            Self::RestoreKilled => "dest.'s CRIU killed",
        })
    }
}

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// Where the tree was.
    Source,
    /// Where it was to go.
    Destination,
}

/// What a cell ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The tree runs on this host with exactly its memory, and nowhere else.
    Runs(Host),
    /// The same, after `resume`.
    Resumed(Host),
    /// There is nothing of the kind to harm; looked for and not found.
    Absent(&'static str),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Runs(Host::Source) => "source",
            Self::Runs(Host::Destination) => "destination",
            Self::Resumed(Host::Source) => "resume: source",
            Self::Resumed(Host::Destination) => "resume: destination",
            Self::Absent(why) => why,
        };
        f.pad(text)
    }
}

/// One moment and one harm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// When.
    pub moment: Moment,
    /// What.
    pub harm: Harm,
}

impl Cell {
    /// Every one there is, row by row.
    pub fn all() -> impl Iterator<Item = Self> {
        Moment::ALL
            .into_iter()
            .flat_map(|moment| Harm::ALL.map(|harm| Self { moment, harm }))
    }

    /// Performs it and compares its verdict with what it must be.
    fn test(self) -> Result<Verdict> {
        let expected = expected::verdict(self);
        let rig = Rig::new()?;
        let outcome = catch_unwind(AssertUnwindSafe(|| self.perform(&rig, expected)));
        let outcome = outcome.unwrap_or_else(|_| Err(anyhow!("panicked, see above")));
        let judged = outcome.and_then(|verdict| {
            ensure!(
                verdict == expected,
                "ended with {verdict:?}; it must be {expected:?}"
            );
            Ok(verdict)
        });
        if judged.is_err() {
            eprintln!("=== {self} ===");
            crate::harness::show_logs(&rig.folder().join("logs"));
        }
        judged
    }

    fn perform(self, rig: &Rig, expected: Verdict) -> Result<Verdict> {
        let mut scene = scene::Scene::reach(rig, self.moment)?;
        if self.moment == Moment::Unheard && self.harm != Harm::ServerKilled {
            scene.end_the_wait()?;
        }
        if let Verdict::Absent(why) = expected {
            harm::assert_absent(rig, &mut scene, self.harm)?;
            return Ok(Verdict::Absent(why));
        }
        harm::inflict(rig, &mut scene, self.harm)?;
        aftermath::watch(rig, scene)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.moment, self.harm)
    }
}

/// What became of every cell.
#[derive(Debug)]
pub struct Table {
    cells: Vec<(Cell, Result<Verdict>, f64)>,
}

impl Table {
    /// Tests every cell whose name holds `filter`, `side_by_side` at a time.
    pub fn fill(filter: &str, side_by_side: usize) -> Self {
        let wanted = Cell::all().filter(|cell| cell.to_string().contains(filter));
        let waiting = Mutex::new(wanted.collect::<Vec<_>>().into_iter());
        let done = Mutex::new(Vec::new());
        let next = || waiting.lock().ok()?.next();
        thread::scope(|scope| {
            for _ in 0..side_by_side {
                scope.spawn(|| {
                    while let Some(cell) = next() {
                        let started = Instant::now();
                        // A thread of its own, since a rig's mounts are its thread's.
                        let tested = thread::spawn(move || cell.test()).join();
                        let verdict = tested.unwrap_or_else(|_| Err(anyhow!("panicked")));
                        let took = started.elapsed().as_secs_f64();
                        match &verdict {
                            Ok(verdict) => eprintln!("{cell}: {verdict} ({took:.1} s)"),
                            Err(error) => eprintln!("{cell}: FAILED ({took:.1} s): {error:#}"),
                        }
                        if let Ok(mut done) = done.lock() {
                            done.push((cell, verdict, took));
                        }
                    }
                });
            }
        });
        let cells = done.into_inner().unwrap_or_default();
        Self { cells }
    }

    fn text_of(&self, cell: Cell) -> String {
        let found = self.cells.iter().find(|(its, _, _)| *its == cell);
        match found {
            Some((_, Ok(verdict), _)) => verdict.to_string(),
            Some((_, Err(_), _)) => "FAILED".to_owned(),
            None => "NOT TESTED".to_owned(),
        }
    }

    /// An error that names every cell that failed or was left out.
    pub fn assert_whole(&self) -> Result<()> {
        let mut wrong: Vec<String> = Vec::new();
        for cell in Cell::all() {
            match self.cells.iter().find(|(its, _, _)| *its == cell) {
                Some((_, Ok(_), _)) => {}
                Some((_, Err(error), _)) => wrong.push(format!("{cell}: {error:#}")),
                None => wrong.push(format!("{cell}: not tested")),
            }
        }
        ensure!(wrong.is_empty(), "\n{}", wrong.join("\n"));
        Ok(())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "| {:17} ",
            "where the tree runs afterwards"
                .get(..17)
                .unwrap_or_default()
        )?;
        for harm in Harm::ALL {
            write!(f, "| {harm:20} ")?;
        }
        writeln!(f, "|")?;
        writeln!(f, "| --- | --- | --- | --- | --- | --- |")?;
        for moment in Moment::ALL {
            write!(f, "| {moment:17} ")?;
            for harm in Harm::ALL {
                write!(f, "| {:20} ", self.text_of(Cell { moment, harm }))?;
            }
            writeln!(f, "|")?;
        }
        let slowest = self.cells.iter().max_by(|a, b| a.2.total_cmp(&b.2));
        match slowest {
            Some((cell, _, took)) => writeln!(f, "slowest: {cell} ({took:.1} s)"),
            None => Ok(()),
        }
    }
}
