//! What the torture workload says of itself, on memory all its processes share with the test.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::pulse::{Pulse, wall_ns};
use crate::shared_file::Counters;

/// Workers of all processes together.
pub const MAX_WORKERS: usize = 64;

/// One worker thread's counters.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Worker {
    /// Steps so far.
    pub rounds: AtomicU64,
    /// The longest step.
    pub longest_round_ns: AtomicU64,
}

impl Worker {
    /// Notes that a step begun at `started_ns` is over.
    pub fn note(&self, started_ns: u64) {
        self.longest_round_ns
            .fetch_max(wall_ns().saturating_sub(started_ns), Ordering::Relaxed);
        self.rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// What kind of memory a byte was wrong in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Place {
    /// A private mapping the worker writes, moves, grows and shrinks.
    Arena = 1,
    /// A mapping cut into many by page protections.
    Fragments = 2,
    /// The stack.
    Stack = 3,
    /// Memory from `malloc`.
    Heap = 4,
    /// What a child forked a moment ago has of its parent.
    Child = 5,
}

impl Place {
    const ALL: [Self; 5] = [
        Self::Arena,
        Self::Fragments,
        Self::Stack,
        Self::Heap,
        Self::Child,
    ];
}

/// A word that was not what had been written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// Where it was wrong.
    pub place: Place,
    /// The word's address.
    pub address: u64,
    /// What had been written.
    pub expected: u64,
    /// What was there.
    pub got: u64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            place,
            address,
            expected,
            got,
        } = self;
        write!(
            f,
            "{place:?} at {address:#x} (page {:#x}): expected {expected:#018x}, got {got:#018x}",
            address & !0xfff
        )
    }
}

/// The first mismatch any process found.
#[derive(Debug, Default)]
#[repr(C)]
struct FirstMismatch {
    claimed: AtomicU64,
    place: AtomicU64,
    address: AtomicU64,
    expected: AtomicU64,
    got: AtomicU64,
}

/// The whole board.
#[derive(Debug)]
#[repr(C)]
pub struct Board {
    /// The root's heartbeat, and the flag that ends all processes.
    pub pulse: Pulse,
    /// Children forked and checked while running.
    pub forks: AtomicU64,
    /// Pages compared.
    pub pages_checked: AtomicU64,
    /// Processes that have filled their memory and work.
    pub ready: AtomicU64,
    first: FirstMismatch,
    /// One entry for each worker thread of each process.
    pub workers: [Worker; MAX_WORKERS],
}

// SAFETY: nothing but atomic integers.
unsafe impl Counters for Board {}

impl Board {
    /// Whether the workload is to end.
    pub fn is_stopped(&self) -> bool {
        self.pulse.stop.load(Ordering::Relaxed) != 0
    }

    /// Reports a mismatch and ends the workload. Allocates nothing, so a forked child may call it.
    pub fn report(&self, mismatch: Mismatch) {
        if self.first.claimed.swap(1, Ordering::AcqRel) == 0 {
            self.first
                .address
                .store(mismatch.address, Ordering::Relaxed);
            self.first
                .expected
                .store(mismatch.expected, Ordering::Relaxed);
            self.first.got.store(mismatch.got, Ordering::Relaxed);
            self.first
                .place
                .store(mismatch.place as u64, Ordering::Release);
        }
        self.pulse.stop.store(1, Ordering::Release);
    }

    /// The first mismatch, if there was one.
    pub fn mismatch(&self) -> Option<Mismatch> {
        let place = self.first.place.load(Ordering::Acquire);
        Some(Mismatch {
            place: Place::ALL.into_iter().find(|one| *one as u64 == place)?,
            address: self.first.address.load(Ordering::Relaxed),
            expected: self.first.expected.load(Ordering::Relaxed),
            got: self.first.got.load(Ordering::Relaxed),
        })
    }

    /// Steps of all workers.
    pub fn rounds(&self) -> u64 {
        self.workers
            .iter()
            .map(|worker| worker.rounds.load(Ordering::Relaxed))
            .sum()
    }

    /// Steps of the slowest of the first `workers` workers.
    pub fn least_rounds(&self, workers: usize) -> u64 {
        self.workers[..workers]
            .iter()
            .map(|worker| worker.rounds.load(Ordering::Relaxed))
            .min()
            .unwrap_or(0)
    }
}
