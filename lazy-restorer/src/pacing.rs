//! How many bulk bytes may be in flight: pure, fed with what was observed.
//!
//! The law behind it (measured): a fault waits for the bulk bytes that are ahead of its answer in a queue both share. So
//! no more is in flight than the path needs to stay busy.

use std::time::Duration;

use common::limits::{BULK_WINDOW_BYTES, MAX_BULK_WINDOW_BYTES};

/// Shortest time over which a rate means anything.
const ROUND_MIN: Duration = Duration::from_millis(5);

/// The credit window of the bulk stream.
#[derive(Clone, Debug)]
pub struct Pacing {
    window: u64,
    round_trip_min: Duration,
    round: Option<Round>,
}

/// One interval over which the rate is measured.
#[derive(Clone, Copy, Debug)]
struct Round {
    began: Duration,
    bytes: u64,
}

impl Default for Pacing {
    fn default() -> Self {
        Pacing {
            window: BULK_WINDOW_BYTES,
            round_trip_min: Duration::MAX,
            round: None,
        }
    }
}

impl Pacing {
    /// Bytes that may be in flight now.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// `bytes` in all have arrived by `now` (since any fixed moment); packets take `round_trip` at present.
    pub fn observe(&mut self, now: Duration, bytes: u64, round_trip: Duration) {
        self.round_trip_min = self.round_trip_min.min(round_trip);
        let Some(round) = self.round else {
            self.round = Some(Round { began: now, bytes });
            return;
        };
        let elapsed = now.saturating_sub(round.began);
        if elapsed < ROUND_MIN.max(self.round_trip_min) {
            return;
        }
        let rate = (bytes - round.bytes) as f64 / elapsed.as_secs_f64();
        let in_flight = rate * self.round_trip_min.as_secs_f64();
        // Twice what the path holds at the present rate: a window that is too small doubles each round trip.
        let wanted = BULK_WINDOW_BYTES + (2.0 * in_flight) as u64;
        self.window = wanted.min(MAX_BULK_WINDOW_BYTES);
        self.round = Some(Round { began: now, bytes });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets a path of `rate` bytes/s and `round_trip` carry one window per round trip, as far as the rate allows.
    fn settle(rate: f64, round_trip: Duration) -> u64 {
        let mut pacing = Pacing::default();
        let (mut now, mut bytes) = (Duration::ZERO, 0);
        for _ in 0..60 {
            pacing.observe(now, bytes, round_trip);
            let step = round_trip.max(ROUND_MIN);
            let most = rate * step.as_secs_f64();
            let windows = step.as_secs_f64() / round_trip.as_secs_f64().max(1e-4);
            bytes += (pacing.window() as f64 * windows).min(most) as u64;
            now += step;
        }
        pacing.window()
    }

    #[test]
    fn a_short_path_keeps_a_short_queue() {
        let window = settle(1.0e9, Duration::from_micros(100));
        assert!(window < 2 * BULK_WINDOW_BYTES, "{window}");
    }

    #[test]
    fn a_long_path_is_filled() {
        let rate = 125.0e6;
        let round_trip = Duration::from_millis(30);
        let product = rate * round_trip.as_secs_f64();
        let window = settle(rate, round_trip) as f64;
        assert!(window >= product, "{window} of {product}");
        assert!(window < 4.0 * product, "{window} of {product}");
    }

    #[test]
    fn no_path_gets_more_than_the_limit() {
        assert!(settle(1.0e11, Duration::from_millis(200)) <= MAX_BULK_WINDOW_BYTES);
    }
}
