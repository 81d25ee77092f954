//! How much a workload got done when, and how long a move held it back.

use std::time::Duration;

use tests::pulse::wall_ns;

/// The width of one bucket.
const BUCKET: Duration = Duration::from_millis(20);
/// Throughput counts as back when it is so on average for this long, which is half a second.
const WINDOW: usize = 25;
/// The part of the throughput of before that counts as back.
const BACK: f64 = 0.9;

/// Things done in each fiftieth of a second.
#[derive(Debug, Clone)]
pub struct Timeline {
    started_ns: u64,
    buckets: Vec<u32>,
    longest_ns: u64,
    longest_from_ns: u64,
}

impl Default for Timeline {
    fn default() -> Self {
        Self {
            started_ns: wall_ns(),
            buckets: Vec::new(),
            longest_ns: 0,
            longest_from_ns: 0,
        }
    }
}

impl Timeline {
    /// Notes something begun at `from` and done at `to`.
    pub fn note(&mut self, from: u64, to: u64) {
        if to - from > self.longest_ns {
            self.longest_ns = to - from;
            self.longest_from_ns = from;
        }
        let bucket = self.bucket(to);
        if self.buckets.len() <= bucket {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
    }

    /// The longest time one thing took.
    pub fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest_ns)
    }

    /// From the first bad moment after `began`, when the move did, until throughput was back; `None` when it never was.
    ///
    /// The freeze is not taken from the heartbeat: its longest gap may be a wait for a page long after the freeze.
    pub fn brownout(&self, began: u64) -> Option<Duration> {
        let stop = self.bucket(began);
        let wanted = self.usual(stop)? * BACK;
        let is_bad = |count: &u32| f64::from(*count) < wanted / 2.0;
        let after = self.buckets.get(stop..)?;
        let Some(first_bad) = after.iter().position(is_bad) else {
            return Some(Duration::ZERO);
        };
        let sum = |window: &[u32]| f64::from(window.iter().sum::<u32>());
        let mut windows = after[first_bad..].windows(WINDOW).enumerate();
        let (start, window) = windows.find(|(_, window)| sum(window) >= wanted * WINDOW as f64)?;
        // A window that is good on average may begin with a rest of the bad time.
        let rest = window.iter().rposition(is_bad).map_or(0, |last| last + 1);
        Some(BUCKET * u32::try_from(start + rest).ok()?)
    }

    /// The median of the buckets before `stop`, without the first, which is not full.
    fn usual(&self, stop: usize) -> Option<f64> {
        let mut before = self.buckets.get(1..stop)?.to_vec();
        before.sort_unstable();
        before.get(before.len() / 2).copied().map(f64::from)
    }

    fn bucket(&self, at: u64) -> usize {
        let since = Duration::from_nanos(at.saturating_sub(self.started_ns));
        (since.as_micros() / BUCKET.as_micros()) as usize
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// A timeline with as many things in each bucket as given.
    fn timeline(buckets: &[u32]) -> Timeline {
        Timeline {
            started_ns: 0,
            buckets: buckets.to_vec(),
            longest_ns: 0,
            longest_from_ns: 0,
        }
    }

    const AT_20: u64 = 20 * 20_000_000;

    fn with_after(after: &[u32]) -> Timeline {
        let mut buckets = vec![100; 20];
        buckets.extend(after);
        buckets.extend([100; 40]);
        timeline(&buckets)
    }

    #[test]
    fn a_gap_is_a_brownout_of_its_length() {
        let brownout = with_after(&[0; 5]).brownout(AT_20);
        assert_eq!(brownout, Some(Duration::from_millis(100)));
    }

    #[test]
    fn it_begins_with_the_first_bad_moment() {
        let brownout = with_after(&[100, 100, 100, 0, 0]).brownout(AT_20);
        assert_eq!(brownout, Some(Duration::from_millis(40)));
    }

    #[test]
    fn low_throughput_counts_as_well() {
        let brownout = with_after(&[0, 0, 30, 30, 30, 30, 30, 30]).brownout(AT_20);
        assert_eq!(brownout, Some(Duration::from_millis(160)));
    }

    #[test]
    fn nothing_lost_is_no_brownout_and_no_recovery_is_none() {
        assert_eq!(with_after(&[]).brownout(AT_20), Some(Duration::ZERO));
        let mut buckets = vec![100; 20];
        buckets.extend([10; 40]);
        assert_eq!(timeline(&buckets).brownout(AT_20), None);
    }
}
