//! The toucher from the bench's side: a process that touches pages of its memory after it was moved, and takes the time.

mod board;
pub mod order;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::personality::{self, Persona};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::latency::Latencies;
use crate::process::Process;
use crate::rig::Rig;
use crate::wait::wait_until;
use crate::{binaries, shared_file};

pub use board::{Stage, TouchBoard};

/// Filling a few GiB takes a few seconds, or many on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Which pages come in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// None: memory arrives undisturbed.
    Still,
    /// Each once, in an order nobody can guess.
    Random,
    /// Each once, from the first to the last.
    Scan,
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Still => "still",
            Self::Random => "random",
            Self::Scan => "scan",
        })
    }
}

/// What the toucher is to do.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct TouchPlan {
    /// Memory it fills.
    pub mib: u64,
    /// Determines contents and order.
    pub seed: u64,
    /// The order.
    pub pattern: Pattern,
    /// Touches per second; 0 for one after the other.
    pub rate: u64,
}

/// A running toucher. Killed on the source when dropped; a migrated one goes with the rig.
#[derive(Debug)]
pub struct Toucher {
    process: Process,
    /// What it says of itself.
    pub board: &'static TouchBoard,
    plan: TouchPlan,
}

/// What the toucher saw after its move.
#[derive(Debug, Clone)]
pub struct Touched {
    /// Without an instruction of it.
    pub cutover: Duration,
    /// Pages touched.
    pub touches: u64,
    /// Of these, waited for.
    pub faults: u64,
    /// Pages touched until the last one that was waited for.
    pub touches_while_missing: u64,
    /// From the move to the last page that was waited for.
    pub missing_for: Duration,
    /// How long it waited for each.
    pub waits: Latencies,
}

impl Toucher {
    /// Starts it on the source and returns when its memory is filled.
    pub fn start(rig: &Rig, plan: TouchPlan) -> Result<Self> {
        let file = rig.make_folder("toucher")?.join("board");
        let board: &TouchBoard = shared_file::map(&file)?;
        let mut command = rig.source.command("setsid");
        command.arg(binaries::program("toucher")?).arg(&file);
        command.arg(plan.pattern.to_string());
        command.args([plan.mib, plan.rate, plan.seed].map(|number| number.to_string()));
        let process = Process::start_detached("toucher", &mut command)?;
        wait_until(PATIENCE, "the toucher to fill its memory", || {
            board.stage() >= Stage::Waiting
        })?;
        Ok(Self {
            process,
            board,
            plan,
        })
    }

    /// The same with its memory at the same addresses each time, as `--replay` needs it of a workload whose addresses are
    /// random.
    pub fn start_at_fixed_addresses(rig: &Rig, plan: TouchPlan) -> Result<Self> {
        let before = personality::get()?;
        personality::set(before | Persona::ADDR_NO_RANDOMIZE)?;
        let started = Self::start(rig, plan);
        personality::set(before)?;
        started
    }

    /// Its PID on the source.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Waits until it has been moved.
    pub fn wait_until_moved(&self, limit: Duration) -> Result<()> {
        wait_until(limit, "the toucher to be moved", || {
            self.board.stage() >= Stage::Touching
        })
    }

    /// Waits until it has touched `pages` pages, or all it has; whether it did so within `limit`.
    pub fn wait_for_touches(&self, pages: u64, limit: Duration) -> bool {
        let touched = || self.board.touches.load(Ordering::Relaxed) >= pages;
        wait_until(limit, "touches", || {
            touched() || self.board.stage() == Stage::Done
        })
        .is_ok()
    }

    /// Lets it end before it has touched everything. Missing pages would read as zeros once nobody serves them.
    pub fn stop(&self) -> Result<()> {
        self.board.pulse.stop.store(1, Ordering::Release);
        wait_until(PATIENCE, "the toucher to stop", || {
            self.board.stage() == Stage::Done
        })
    }

    /// It runs somewhere, alone, and no page was damaged.
    pub fn assert_unharmed(&self) -> Result<()> {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let damaged = load(&self.board.damaged);
        ensure!(damaged == 0, "{damaged} pages were damaged");
        ensure!(
            load(&self.board.pulse.foreign_ticks) == 0,
            "two copies of the workload ran at the same time"
        );
        Ok(())
    }

    /// Everything it saw, which must be undamaged memory.
    pub fn report(&self) -> Result<Touched> {
        self.assert_unharmed()?;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let board = self.board;
        let moved = load(&board.moved_ns);
        let last = load(&board.last_fault_ns).max(moved);
        Ok(Touched {
            cutover: Duration::from_nanos(load(&board.cutover_ns)),
            touches: load(&board.touches),
            faults: load(&board.faults),
            touches_while_missing: load(&board.touches_at_last_fault),
            missing_for: Duration::from_nanos(last - moved),
            waits: board.waits.read(),
        })
    }

    /// Lets it touch everything it has not touched yet and end; every page has been compared then.
    pub fn finish(&self) -> Result<()> {
        if self.plan.pattern != Pattern::Still {
            wait_until(PATIENCE, "the toucher to touch every page", || {
                self.board.stage() == Stage::Done
            })?;
        }
        self.assert_unharmed()?;
        self.board.pulse.stop.store(1, Ordering::Release);
        Ok(())
    }
}
