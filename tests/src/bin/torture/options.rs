//! The command line, read by hand: the workload must stay small.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::mapping::PAGE_BYTES;
use crate::worker::Size;

const USAGE: &str = "usage: torture --board FILE --verdict FILE [--mib N] [--threads N] [--children N] [--pieces N] \
                     [--seed N] [--rest-us N] [--no-forks] [--zombie]";

/// What to do.
#[derive(Debug)]
pub struct Options {
    /// The shared counters.
    pub board: PathBuf,
    /// Where the verdict goes in the end.
    pub verdict: PathBuf,
    /// Memory of all processes.
    pub mib: usize,
    /// Workers of each process.
    pub threads: usize,
    /// Processes besides the root.
    pub children: usize,
    /// VMAs of each worker's fragmented mapping.
    pub pieces: usize,
    /// Determines every number.
    pub seed: u64,
    /// What a worker does nothing for after each step.
    pub rest: Duration,
    /// Whether each process forks while it runs.
    pub forks: bool,
    /// Whether the root keeps a zombie.
    pub zombie: bool,
}

impl Options {
    /// Reads the command line.
    pub fn from_arguments() -> Result<Self> {
        Self::parse(std::env::args().skip(1)).context(USAGE)
    }

    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            board: PathBuf::new(),
            verdict: PathBuf::new(),
            mib: 64,
            threads: 2,
            children: 0,
            pieces: 100,
            seed: 1,
            rest: Duration::ZERO,
            forks: true,
            zombie: false,
        };
        while let Some(name) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .with_context(|| format!("{name} wants a value"))
            };
            match name.as_str() {
                "--board" => options.board = value()?.into(),
                "--verdict" => options.verdict = value()?.into(),
                "--mib" => options.mib = number(&value()?)?,
                "--threads" => options.threads = number(&value()?)?,
                "--children" => options.children = number(&value()?)?,
                "--pieces" => options.pieces = number(&value()?)?,
                "--seed" => options.seed = number(&value()?)?,
                "--rest-us" => options.rest = Duration::from_micros(number(&value()?)?),
                "--no-forks" => options.forks = false,
                "--zombie" => options.zombie = true,
                _ => bail!("{name} is unknown"),
            }
        }
        ensure!(options.threads > 0, "a process has at least one worker");
        ensure!(!options.board.as_os_str().is_empty(), "--board is missing");
        ensure!(
            !options.verdict.as_os_str().is_empty(),
            "--verdict is missing"
        );
        Ok(options)
    }

    /// Workers of all processes.
    pub fn workers(&self) -> usize {
        self.threads * (self.children + 1)
    }

    /// Each worker's share of the memory.
    pub fn size_of_worker(&self) -> Size {
        Size {
            pages: (self.mib << 20) / PAGE_BYTES / self.workers(),
            pieces: self.pieces,
        }
    }
}

fn number<T: FromStr>(text: &str) -> Result<T> {
    text.parse()
        .ok()
        .with_context(|| format!("{text:?} is no number"))
}
