//! What a client's user feels: the longest silence, and how much was done in each tenth of a second.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};

/// The width of one entry of [`ClientTimes::per_bucket`].
const BUCKET: Duration = Duration::from_millis(100);

/// When replies came.
#[derive(Debug, Clone, Serialize)]
pub struct ClientTimes {
    #[serde(skip)]
    started: Instant,
    /// The wall clock at the start.
    pub started_unix_us: u64,
    /// The longest time between two replies, less the pause the client made itself.
    #[serde(rename = "longest_gap_us", serialize_with = "micros")]
    pub longest_gap: Duration,
    /// When the longest gap began, from the start.
    #[serde(rename = "longest_gap_at_us", serialize_with = "micros")]
    pub longest_gap_at: Duration,
    /// Replies in each tenth of a second from the start.
    pub per_bucket: Vec<u32>,
}

impl ClientTimes {
    /// Starts the clock.
    pub fn start() -> Self {
        let now = Instant::now();
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            started: now,
            started_unix_us: wall.as_micros() as u64,
            longest_gap: Duration::ZERO,
            longest_gap_at: Duration::ZERO,
            per_bucket: Vec::new(),
        }
    }

    /// When the clock was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Notes a command sent at `sent` and answered at `answered`.
    pub fn note(&mut self, sent: Instant, answered: Instant) {
        let gap = answered - sent;
        if gap > self.longest_gap {
            self.longest_gap = gap;
            self.longest_gap_at = sent - self.started;
        }
        let bucket = ((answered - self.started).as_millis() / BUCKET.as_millis()) as usize;
        if self.per_bucket.len() <= bucket {
            self.per_bucket.resize(bucket + 1, 0);
        }
        self.per_bucket[bucket] += 1;
    }
}

fn micros<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(duration.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_longest_gap_and_counts_by_tenths() {
        let mut times = ClientTimes::start();
        let at = |ms| times.started + Duration::from_millis(ms);
        let notes =
            [(0, 1), (1, 2), (2, 152), (152, 153)].map(|(sent, answered)| (at(sent), at(answered)));
        for (sent, answered) in notes {
            times.note(sent, answered);
        }
        assert_eq!(times.longest_gap, Duration::from_millis(150));
        assert_eq!(times.longest_gap_at, Duration::from_millis(2));
        assert_eq!(times.per_bucket, [2, 2]);
    }
}
