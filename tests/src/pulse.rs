//! A page of counters in a file that several processes map: what a workload says of itself while it runs.
//!
//! The page is shared and backed by a file, so it is there for the observer without a word between them, and CRIU
//! maps it again by its path. Times are of `CLOCK_MONOTONIC`, which all processes of a machine share.

use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::time::{ClockId, clock_gettime};

/// Counters of a workload. Zero is the state before its first tick.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Pulse {
    /// Ticks so far.
    pub ticks: AtomicU64,
    /// When the last tick was.
    pub last_ns: AtomicU64,
    /// The longest time between two ticks.
    pub longest_gap_ns: AtomicU64,
    /// When the longest gap began.
    pub longest_gap_from_ns: AtomicU64,
    /// Set by the observer: forget the longest gap.
    pub forget: AtomicU64,
    /// Set by the observer: the workload is to end.
    pub stop: AtomicU64,
}

impl Pulse {
    /// Maps the file at `path`, which is created when it is missing. It stays mapped to the end of the process.
    pub fn map(path: &Path) -> Result<&'static Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        let length = NonZeroUsize::new(size_of::<Self>()).context("a pulse has a size")?;
        file.set_len(length.get() as u64).context("cannot size the pulse's file")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let address = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, &file, 0) };
        let address = address.context("cannot map the pulse's file")?;
        // SAFETY: the mapping is as long as `Self`, page-aligned, never unmapped, and any bytes are valid counters.
        Ok(unsafe { address.cast::<Self>().as_ref() })
    }

    /// One tick of the workload.
    pub fn tick(&self) {
        let now = monotonic_ns();
        let last = self.last_ns.swap(now, Ordering::Relaxed);
        if self.forget.swap(0, Ordering::Relaxed) != 0 {
            self.longest_gap_ns.store(0, Ordering::Relaxed);
        } else if last != 0 && now - last > self.longest_gap_ns.load(Ordering::Relaxed) {
            self.longest_gap_ns.store(now - last, Ordering::Relaxed);
            self.longest_gap_from_ns.store(last, Ordering::Relaxed);
        }
        self.ticks.fetch_add(1, Ordering::Relaxed);
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock is always there");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_kept_until_it_is_forgotten() {
        let pulse = Pulse::default();
        pulse.tick();
        pulse.last_ns.fetch_sub(1_000_000_000, Ordering::Relaxed);
        pulse.tick();
        pulse.tick();
        assert!(pulse.longest_gap_ns.load(Ordering::Relaxed) >= 1_000_000_000);
        pulse.forget.store(1, Ordering::Relaxed);
        pulse.tick();
        assert_eq!(pulse.longest_gap_ns.load(Ordering::Relaxed), 0);
        assert_eq!(pulse.ticks.load(Ordering::Relaxed), 4);
    }
}
