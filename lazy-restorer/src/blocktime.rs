//! How long threads of the workload waited for pages, and how long the kernel took to put pages in place.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Waits longer than this count as this long: an hour.
const LONGEST_MICROS: u64 = 3_600_000_000;

/// A histogram of times: of waits, from reading the fault to the page being in place, or of installs.
#[derive(Clone, Debug)]
pub struct Blocktime {
    micros: Histogram<u64>,
}

/// Figures of the record. Times in microseconds.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct LatencySummary {
    /// Median.
    pub p50: u64,
    /// 90th percentile.
    pub p90: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p999: u64,
    /// Longest.
    pub max: u64,
}

impl Default for Blocktime {
    fn default() -> Self {
        let micros =
            Histogram::new_with_bounds(1, LONGEST_MICROS, 2).expect("the bounds are valid");
        Blocktime { micros }
    }
}

impl Blocktime {
    /// Notes one wait, or one install.
    pub fn record(&mut self, wait: Duration) {
        let micros = u64::try_from(wait.as_micros()).unwrap_or(LONGEST_MICROS);
        self.micros
            .saturating_record(micros.clamp(1, LONGEST_MICROS));
    }

    /// Adds another histogram's times.
    pub fn merge(&mut self, other: &Blocktime) {
        self.micros
            .add(&other.micros)
            .expect("all have the same bounds");
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.micros.len()
    }

    /// The usual figures.
    pub fn summary(&self) -> LatencySummary {
        let at = |quantile| self.micros.value_at_quantile(quantile);
        LatencySummary {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: self.micros.max(),
        }
    }
}
