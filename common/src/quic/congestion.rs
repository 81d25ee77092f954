//! Congestion controllers as quinn wants them. That of a source's bulk connection heeds delay, also the delay on the
//! fault connection beside it, whose own controller is quinn's Cubic, watched. The thinking is done in
//! [`crate::pacing`].

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, CubicConfig};
use quinn_proto::RttEstimator;

use super::transport::INITIAL_RTT;
use crate::pacing::{BulkWindow, FaultTrips};

/// Bulk counts as idle when nothing of it was acknowledged for this long.
const BULK_IDLE: Duration = Duration::from_millis(20);
/// Weight of what was known in the idle round trip, against 1 for the latest.
const IDLE_WEIGHT: u32 = 7;

/// Shows the round trips of a fault connection to the bulk connection beside it, and what that carries. Clones show the same.
///
/// Each value has one writer, and a reader that sees an old one for a moment does no harm: no lock, so that a fault
/// never waits for bulk here.
#[derive(Clone, Debug)]
pub struct FaultGauge(Arc<Shown>);

#[derive(Debug)]
struct Shown {
    epoch: Instant,
    idle_ns: AtomicU64,
    recent_ns: AtomicU64,
    seen: AtomicU64,
    /// When bulk was acknowledged last, in nanoseconds since the epoch.
    bulk_ns: AtomicU64,
    /// What bulk was seen to carry, in bytes per second.
    bulk_rate: AtomicU64,
}

impl Default for FaultGauge {
    fn default() -> Self {
        FaultGauge(Arc::new(Shown {
            epoch: Instant::now(),
            idle_ns: AtomicU64::new(0),
            recent_ns: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            bulk_ns: AtomicU64::new(0),
            bulk_rate: AtomicU64::new(0),
        }))
    }
}

impl FaultGauge {
    fn since_epoch(&self, at: Instant) -> Duration {
        at.saturating_duration_since(self.0.epoch)
    }

    fn trips(&self) -> FaultTrips {
        let time = |value: &AtomicU64| Duration::from_nanos(value.load(Ordering::Relaxed));
        FaultTrips {
            idle: time(&self.0.idle_ns),
            recent: time(&self.0.recent_ns),
            seen: self.0.seen.load(Ordering::Relaxed),
        }
    }

    fn note_bulk(&self, now: Duration) {
        self.0.bulk_ns.store(nanos(now), Ordering::Relaxed);
    }

    fn note_fault(&self, now: Instant, recent: Duration) {
        let trips = self.trips();
        let bulk = Duration::from_nanos(self.0.bulk_ns.load(Ordering::Relaxed));
        let quiet = self.since_epoch(now).saturating_sub(bulk) > BULK_IDLE;
        let idle = match trips.idle {
            Duration::ZERO => recent,
            idle if quiet => (idle * IDLE_WEIGHT + recent) / (IDLE_WEIGHT + 1),
            // Whatever it was, without bulk it cannot have been longer than it is beside it.
            idle => idle.min(recent),
        };
        self.0.idle_ns.store(nanos(idle), Ordering::Relaxed);
        self.0.recent_ns.store(nanos(recent), Ordering::Relaxed);
        self.0.seen.fetch_add(1, Ordering::Relaxed);
    }

    /// What the path was seen to carry for bulk, in bytes per second. `None` as long as nothing took long enough to tell.
    pub fn bulk_rate(&self) -> Option<u64> {
        let rate = self.0.bulk_rate.load(Ordering::Relaxed);
        (rate > 0).then_some(rate)
    }

    /// A new connection knows nothing of the path of the one before.
    fn reset(&self) {
        self.0.idle_ns.store(0, Ordering::Relaxed);
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Cubic that shows its round trips.
pub(super) struct WatchedCubic {
    pub(super) config: Arc<CubicConfig>,
    pub(super) gauge: FaultGauge,
}

impl ControllerFactory for WatchedCubic {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        self.gauge.reset();
        Box::new(Watched {
            cubic: self.config.clone().build(now, mtu),
            gauge: self.gauge.clone(),
        })
    }
}

struct Watched {
    cubic: Box<dyn Controller>,
    gauge: FaultGauge,
}

impl Controller for Watched {
    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        // The estimator hears of this packet only afterwards (quinn-proto, Connection::on_ack_received), and says until then
        // what was assumed.
        let assumed = rtt.get() == INITIAL_RTT && rtt.min() == INITIAL_RTT;
        let round_trip = match assumed {
            true => now.saturating_duration_since(sent),
            false => rtt.get(),
        };
        self.gauge.note_fault(now, round_trip);
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost: u64) {
        self.cubic.on_congestion_event(now, sent, persistent, lost);
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.cubic.on_mtu_update(mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Watched {
            cubic: self.cubic.clone_box(),
            gauge: self.gauge.clone(),
        })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Makes [`Paced`] controllers.
pub(super) struct PacedBulk {
    pub(super) initial_window: u64,
    pub(super) gauge: FaultGauge,
}

impl ControllerFactory for PacedBulk {
    fn build(self: Arc<Self>, _now: Instant, mtu: u16) -> Box<dyn Controller> {
        Box::new(Paced {
            window: BulkWindow::new(self.initial_window, mtu.into()),
            initial_window: self.initial_window,
            gauge: self.gauge.clone(),
        })
    }
}

/// A [`BulkWindow`] that is told by quinn and by the gauge.
#[derive(Clone)]
struct Paced {
    window: BulkWindow,
    initial_window: u64,
    gauge: FaultGauge,
}

impl Controller for Paced {
    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        let (now, sent) = (self.gauge.since_epoch(now), self.gauge.since_epoch(sent));
        self.gauge.note_bulk(now);
        self.window.acknowledged(now, sent, bytes, !app_limited);
        self.window.heed(now, self.gauge.trips());
        let rate = self.window.best_rate() as u64;
        self.gauge.0.bulk_rate.store(rate, Ordering::Relaxed);
    }

    fn on_congestion_event(&mut self, _now: Instant, _sent: Instant, persistent: bool, lost: u64) {
        match (persistent, lost) {
            (true, _) => self.window.collapsed(),
            (false, 0) => self.window.marked(),
            (false, lost) => self.window.lost(lost),
        }
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.window.resize_packets(mtu.into());
    }

    fn window(&self) -> u64 {
        self.window.bytes()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.initial_window
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_idle_round_trip_is_learnt_while_bulk_is_idle() {
        let gauge = FaultGauge::default();
        let at = |ms| gauge.0.epoch + ms * MS;
        gauge.note_fault(at(100), 2 * MS);
        assert_eq!(gauge.trips().idle, 2 * MS);
        for ms in 101..200 {
            gauge.note_fault(at(ms), MS);
        }
        let idle = gauge.trips().idle;
        assert!(idle < MS * 11 / 10, "{idle:?}");
        for ms in 200..300 {
            gauge.note_bulk(gauge.since_epoch(at(ms)));
            gauge.note_fault(at(ms), 9 * MS);
        }
        assert_eq!(
            gauge.trips().idle,
            idle,
            "slow beside bulk says nothing of it"
        );
        assert_eq!(gauge.trips().recent, 9 * MS);
        gauge.note_fault(at(300), MS / 2);
        assert_eq!(gauge.trips().idle, MS / 2);
    }
}
