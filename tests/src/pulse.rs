//! A workload's heartbeat, on a page shared with whoever watches it.
//!
//! Times are of the wall clock, the only one that all processes of a machine share: CRIU gives a copy a time namespace
//! of its own, in which the monotonic clocks go on where they stood when the original was dumped. What passes between the
//! dump and the restore has not passed there, and a cutover would look shorter by it.

use std::sync::atomic::{AtomicU64, Ordering};

use nix::time::{ClockId, clock_gettime};

use crate::shared_file::Counters;

/// What is shared. Zero is the state before the first tick.
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
    /// Ticks of a second copy of the workload. Anything but 0 means that two of them ran at some time.
    pub foreign_ticks: AtomicU64,
    /// Set by the observer: forget the longest gap.
    pub forget: AtomicU64,
    /// Set by the observer: the workload is to end.
    pub stop: AtomicU64,
}

// SAFETY: nothing but atomic integers.
unsafe impl Counters for Pulse {}

/// The one that ticks.
///
/// It counts along in private memory, which a migration copies and the shared page it does not: if a copy that should
/// be frozen or dead has ticked in between, the two counts differ.
#[derive(Debug)]
pub struct Ticker<'a> {
    pulse: &'a Pulse,
    ticks: u64,
}

impl<'a> Ticker<'a> {
    /// A ticker that goes on from what `pulse` says.
    pub fn new(pulse: &'a Pulse) -> Self {
        Self {
            pulse,
            ticks: pulse.ticks.load(Ordering::Relaxed),
        }
    }

    /// One tick of the workload.
    pub fn tick(&mut self) {
        let pulse = self.pulse;
        let now = wall_ns();
        let last = pulse.last_ns.swap(now, Ordering::Relaxed);
        if pulse.forget.swap(0, Ordering::Relaxed) != 0 {
            pulse.longest_gap_ns.store(0, Ordering::Relaxed);
        } else if last != 0
            && now.saturating_sub(last) > pulse.longest_gap_ns.load(Ordering::Relaxed)
        {
            pulse.longest_gap_ns.store(now - last, Ordering::Relaxed);
            pulse.longest_gap_from_ns.store(last, Ordering::Relaxed);
        }
        let before = pulse.ticks.fetch_add(1, Ordering::Relaxed);
        let foreign = before.wrapping_sub(self.ticks);
        if foreign != 0 {
            pulse.foreign_ticks.fetch_add(foreign, Ordering::Relaxed);
        }
        self.ticks = before + 1;
    }
}

/// Nanoseconds of the wall clock.
pub fn wall_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).expect("the clock is always there");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_kept_until_it_is_forgotten() {
        let pulse = Pulse::default();
        let mut ticker = Ticker::new(&pulse);
        ticker.tick();
        pulse.last_ns.fetch_sub(1_000_000_000, Ordering::Relaxed);
        ticker.tick();
        ticker.tick();
        assert!(pulse.longest_gap_ns.load(Ordering::Relaxed) >= 1_000_000_000);
        pulse.forget.store(1, Ordering::Relaxed);
        ticker.tick();
        assert_eq!(pulse.longest_gap_ns.load(Ordering::Relaxed), 0);
        assert_eq!(pulse.ticks.load(Ordering::Relaxed), 4);
        assert_eq!(pulse.foreign_ticks.load(Ordering::Relaxed), 0);
    }

    /// As a copy is: there the monotonic clock is a day ahead.
    #[test]
    fn the_time_is_the_same_in_another_time_namespace() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: only root can make a time namespace");
            return;
        }
        let ours = std::env::current_exe().expect("a program");
        let output = std::process::Command::new("unshare")
            .args(["--time", "--fork", "--monotonic", "86400"])
            .arg(ours)
            .args([
                "--ignored",
                "--nocapture",
                "--exact",
                "pulse::tests::says_the_time",
            ])
            .output()
            .expect("unshare runs");
        let text = String::from_utf8(output.stdout).expect("it is text");
        let said = text.lines().find_map(|line| line.strip_prefix("it is "));
        let said: u64 = said
            .unwrap_or_else(|| panic!("{text}"))
            .parse()
            .expect("a number");
        let hour = 3_600_000_000_000;
        assert!(said.abs_diff(wall_ns()) < hour, "{text}");
    }

    #[test]
    #[ignore = "the other half of the test above"]
    fn says_the_time() {
        println!("\nit is {}", wall_ns());
    }

    #[test]
    fn a_second_copy_is_noticed() {
        let pulse = Pulse::default();
        let (mut one, mut copy) = (Ticker::new(&pulse), Ticker::new(&pulse));
        one.tick();
        copy.tick();
        assert_eq!(pulse.foreign_ticks.load(Ordering::Relaxed), 1);
    }
}
