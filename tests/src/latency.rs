//! A histogram of times that one process fills and another reads.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Buckets to a power of two: a value is known to 1/64 of itself.
const STEPS: u64 = 64;
const STEP_BITS: u32 = STEPS.trailing_zeros();
/// Up to 2^40 ns, which is 18 minutes.
const BUCKETS: usize = (40 - STEP_BITS as usize + 1) * STEPS as usize;

/// The histogram in shared memory.
#[derive(Debug)]
#[repr(C)]
pub struct SharedHistogram {
    counts: [AtomicU64; BUCKETS],
    max_ns: AtomicU64,
    sum_ns: AtomicU64,
}

impl Default for SharedHistogram {
    fn default() -> Self {
        Self {
            counts: [const { AtomicU64::new(0) }; BUCKETS],
            max_ns: AtomicU64::new(0),
            sum_ns: AtomicU64::new(0),
        }
    }
}

impl SharedHistogram {
    /// Notes one time.
    pub fn note(&self, ns: u64) {
        self.counts[bucket_of(ns)].fetch_add(1, Ordering::Relaxed);
        self.max_ns.fetch_max(ns, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// What was noted so far.
    pub fn read(&self) -> Latencies {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Latencies {
            counts: self.counts.iter().map(load).collect(),
            max_ns: load(&self.max_ns),
            sum_ns: load(&self.sum_ns),
        }
    }
}

/// Times that were noted; of several runs, when merged.
#[derive(Debug, Clone)]
pub struct Latencies {
    counts: Vec<u64>,
    max_ns: u64,
    sum_ns: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            max_ns: 0,
            sum_ns: 0,
        }
    }
}

/// The figures that are usually asked for, in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Percentiles {
    /// How many times were noted.
    pub count: u64,
    /// Their mean.
    pub mean_us: f64,
    /// Half are no longer.
    pub p50_us: f64,
    /// Nine in ten are no longer.
    pub p90_us: f64,
    /// 99 in 100 are no longer.
    pub p99_us: f64,
    /// 999 in 1000 are no longer.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl Latencies {
    /// Adds another run's.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.max_ns = self.max_ns.max(other.max_ns);
        self.sum_ns += other.sum_ns;
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The middle of the bucket that holds the time `part` of all are no longer than, in microseconds.
    pub fn quantile_us(&self, part: f64) -> f64 {
        let wanted = (self.count() as f64 * part).ceil().max(1.0) as u64;
        let mut seen = 0;
        let found = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        found.map_or(0.0, |bucket| {
            (middle_of(bucket) / 1e3).min(self.max_ns as f64 / 1e3)
        })
    }

    /// The usual figures.
    pub fn percentiles(&self) -> Percentiles {
        let count = self.count();
        Percentiles {
            count,
            mean_us: self.sum_ns as f64 / 1e3 / count.max(1) as f64,
            p50_us: self.quantile_us(0.5),
            p90_us: self.quantile_us(0.9),
            p99_us: self.quantile_us(0.99),
            p999_us: self.quantile_us(0.999),
            max_us: self.max_ns as f64 / 1e3,
        }
    }

    /// Counts by power of two: entry `n` counts times from 2^n up to 2^(n+1) nanoseconds.
    pub fn by_power_of_two(&self) -> Vec<u64> {
        let mut powers = vec![0; 41];
        for (bucket, count) in self.counts.iter().enumerate() {
            powers[middle_of(bucket).max(1.0).log2() as usize] += count;
        }
        let used = powers.iter().rposition(|count| *count > 0);
        powers.truncate(used.map_or(0, |last| last + 1));
        powers
    }
}

fn bucket_of(ns: u64) -> usize {
    if ns < STEPS {
        return ns as usize;
    }
    let power = ns.ilog2();
    let step = (ns >> (power - STEP_BITS)) & (STEPS - 1);
    let bucket = u64::from(power - STEP_BITS + 1) * STEPS + step;
    (bucket as usize).min(BUCKETS - 1)
}

fn middle_of(bucket: usize) -> f64 {
    let bucket = bucket as u64;
    if bucket < STEPS {
        return bucket as f64;
    }
    let power = (bucket / STEPS - 1) as u32;
    let width = 2_f64.powf(f64::from(power));
    ((STEPS + bucket % STEPS) as f64 + 0.5) * width
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_known_to_a_64th() {
        for ns in (0..36).flat_map(|power| [1_u64 << power, (1 << power) + (1 << power) / 3]) {
            let middle = middle_of(bucket_of(ns));
            let off = (middle - ns as f64).abs() / ns as f64;
            assert!(off <= 1.0 / 64.0, "{ns}: {middle}");
        }
    }

    #[test]
    fn quantiles_are_of_what_was_noted() {
        let shared = SharedHistogram::default();
        for us in 1..=1000_u64 {
            shared.note(us * 1000);
        }
        let figures = shared.read().percentiles();
        assert_eq!(figures.count, 1000);
        assert!(
            (figures.p50_us / 500.0 - 1.0).abs() < 0.07,
            "{}",
            figures.p50_us
        );
        assert!(
            (figures.p99_us / 990.0 - 1.0).abs() < 0.07,
            "{}",
            figures.p99_us
        );
        assert!((figures.max_us - 1000.0).abs() < 1e-9);
    }

    #[test]
    fn powers_of_two_hold_everything() {
        let shared = SharedHistogram::default();
        for ns in [1, 2, 3, 1024, 2047, 2048] {
            shared.note(ns);
        }
        let powers = shared.read().by_power_of_two();
        assert_eq!((powers[0], powers[1], powers[10], powers[11]), (1, 2, 2, 1));
        assert_eq!(powers.len(), 12);
    }
}
