//! The torture workload from the test's side.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use crate::board::Board;
use crate::process::Process;
use crate::rig::Rig;
use crate::wait::{wait_for, wait_until};
use crate::{binaries, shared_file};

/// After each step: leaves the CPU to the programs, where several migrations are under way at a time.
pub const REST: Duration = Duration::from_millis(1);

/// After each step: a copy for which nothing is pushed still lacks most of its memory long after whatever is done to it then.
pub const LONG_REST: Duration = Duration::from_millis(30);

/// Debug builds on a busy machine are slow; a workload that hangs is slower.
const PATIENCE: Duration = Duration::from_secs(120);

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub struct TorturePlan {
    /// Memory of all processes.
    pub mib: usize,
    /// Workers of each process.
    pub threads: usize,
    /// Processes besides the root.
    pub children: usize,
    /// VMAs of each worker's fragmented mapping.
    pub pieces: usize,
    /// Determines what is done and written.
    pub seed: u64,
    /// What a worker does nothing for after each step, so that others get the CPU.
    pub rest: Duration,
    /// Whether a zombie is part of the tree.
    pub zombie: bool,
}

impl Default for TorturePlan {
    fn default() -> Self {
        Self {
            mib: 64,
            threads: 2,
            children: 0,
            pieces: 100,
            seed: 1,
            rest: Duration::ZERO,
            zombie: false,
        }
    }
}

/// A running torture workload. Killed on the source when dropped; a migrated one goes with the rig.
#[derive(Debug)]
pub struct Torture {
    /// The process on the source.
    pub process: Process,
    /// What it says of itself, wherever it runs.
    pub board: &'static Board,
    workers: usize,
    verdict: PathBuf,
}

impl Torture {
    /// Starts it on the source and waits until all workers have filled their memory.
    pub fn start(rig: &Rig, plan: TorturePlan) -> Result<Self> {
        let folder = rig.make_folder("torture")?;
        let (board, verdict) = (folder.join("board"), folder.join("verdict"));
        let mut command = rig.source.command("setsid");
        command
            .arg(binaries::program("torture")?)
            .arg("--board")
            .arg(&board)
            .arg("--verdict")
            .arg(&verdict);
        let numbers = [
            ("--mib", plan.mib as u64),
            ("--threads", plan.threads as u64),
            ("--children", plan.children as u64),
            ("--pieces", plan.pieces as u64),
            ("--seed", plan.seed),
            ("--rest-us", plan.rest.as_micros() as u64),
        ];
        for (name, number) in numbers {
            command.arg(name).arg(number.to_string());
        }
        command.args(plan.zombie.then_some("--zombie"));
        let process = Process::start_detached("torture", &mut command)?;
        let board: &Board = shared_file::map(&board)?;
        let workers = plan.threads * (plan.children + 1);
        let torture = Self {
            process,
            board,
            workers,
            verdict,
        };
        wait_until(PATIENCE, "the torture workload to fill its memory", || {
            torture.board.ready.load(Ordering::Relaxed) >= workers as u64
        })?;
        torture.wait_for_rounds(100)?;
        Ok(torture)
    }

    /// The root's PID on the source.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Waits until every worker has done `more` steps and the root's heart has beaten as often as there are workers.
    pub fn wait_for_rounds(&self, more: u64) -> Result<()> {
        let board = self.board;
        let ticks = board.pulse.ticks.load(Ordering::Relaxed);
        let before: Vec<u64> = self.rounds();
        wait_until(PATIENCE, "every worker to go on", || {
            let worked = self
                .rounds()
                .iter()
                .zip(&before)
                .all(|(now, before)| *now >= before + more);
            board.is_stopped() || (worked && board.pulse.ticks.load(Ordering::Relaxed) > ticks)
        })?;
        self.assert_unharmed()
    }

    /// The original runs again after its copy did: waits until every worker has done `more` steps. What the copy did in
    /// between is no second workload at the same time.
    pub fn wait_for_original(&self, more: u64) -> Result<()> {
        let pulse = &self.board.pulse;
        let ticks = pulse.ticks.load(Ordering::Relaxed);
        wait_until(PATIENCE, "the original's heart to beat", || {
            pulse.ticks.load(Ordering::Relaxed) > ticks + 1
        })?;
        // The first beat counted those of the copy.
        pulse.foreign_ticks.store(0, Ordering::Relaxed);
        self.wait_for_rounds(more)
    }

    fn rounds(&self) -> Vec<u64> {
        self.board.workers[..self.workers]
            .iter()
            .map(|worker| worker.rounds.load(Ordering::Relaxed))
            .collect()
    }

    /// No byte was wrong so far, and never did two copies run.
    pub fn assert_unharmed(&self) -> Result<()> {
        if let Some(mismatch) = self.board.mismatch() {
            anyhow::bail!("memory was damaged: {mismatch}");
        }
        ensure!(!self.board.is_stopped(), "the workload ended by itself");
        let foreign = self.board.pulse.foreign_ticks.load(Ordering::Relaxed);
        ensure!(
            foreign == 0,
            "two copies of the workload ran at the same time ({foreign} ticks of the other)"
        );
        Ok(())
    }

    /// Ends the workload; every process compares all of its memory first, and the root gives the verdict.
    pub fn finish(&self) -> Result<()> {
        self.assert_unharmed()?;
        self.board.pulse.stop.store(1, Ordering::Release);
        let read = || std::fs::read_to_string(&self.verdict).ok();
        let verdict = wait_for(PATIENCE, "the torture workload's verdict", read)
            .context("it hangs or died")?;
        ensure!(verdict == "ok", "the torture workload says: {verdict}");
        Ok(())
    }
}
