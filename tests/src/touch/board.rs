//! What the toucher says of itself, on a page shared with the bench.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::latency::SharedHistogram;
use crate::pulse::Pulse;
use crate::shared_file::Counters;

/// How far the toucher is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u64)]
pub enum Stage {
    /// It fills its memory.
    Filling = 0,
    /// It is filled and waits to be moved.
    Waiting = 1,
    /// It was moved and touches.
    Touching = 2,
    /// It has touched every page.
    Done = 3,
}

/// The board.
#[derive(Debug, Default)]
#[repr(C)]
pub struct TouchBoard {
    /// Its heartbeat while it waits, and the flag that ends it.
    pub pulse: Pulse,
    stage: AtomicU64,
    /// From its last sign of life before the move to the first after it.
    pub cutover_ns: AtomicU64,
    /// When it found itself on another host (`wall_ns`).
    pub moved_ns: AtomicU64,
    /// When it last waited for a page.
    pub last_fault_ns: AtomicU64,
    /// Pages touched since the move.
    pub touches: AtomicU64,
    /// Of these, touches the kernel had to wait for someone's help with.
    pub faults: AtomicU64,
    /// Pages touched up to the last such touch.
    pub touches_at_last_fault: AtomicU64,
    /// Pages that did not hold what was written.
    pub damaged: AtomicU64,
    /// Of these, pages of zeros.
    pub zeroed: AtomicU64,
    /// Times of touches that waited.
    pub waits: SharedHistogram,
}

// SAFETY: nothing but atomic integers.
unsafe impl Counters for TouchBoard {}

impl TouchBoard {
    /// How far it is.
    pub fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Filling,
            1 => Stage::Waiting,
            2 => Stage::Touching,
            _ => Stage::Done,
        }
    }

    /// Goes on to `stage`.
    pub fn enter(&self, stage: Stage) {
        self.stage.store(stage as u64, Ordering::Release);
    }

    /// Whether it is to end.
    pub fn is_stopped(&self) -> bool {
        self.pulse.stop.load(Ordering::Relaxed) != 0
    }
}
