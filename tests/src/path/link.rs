//! One direction of an emulated path, without I/O and without a clock: when does a packet arrive, if it does?

use std::time::Duration;

use crate::random::Random;

use super::spec::PathSpec;

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It arrives at this time.
    Arrives(Duration),
    /// The queue is full.
    Overflows,
    /// It is sent and never arrives.
    Lost,
}

/// A queue of bounded size, a rate behind it, loss, then delay.
#[derive(Debug, Clone)]
pub struct Link {
    /// Nanoseconds a byte takes, or 0.
    ns_per_byte: f64,
    queue_bytes: u64,
    delay: Duration,
    jitter_ns: u64,
    /// A packet is lost when 64 random bits are below this.
    loss_below: u64,
    random: Random,
    /// When everything accepted so far has been sent.
    free_at: Duration,
    /// When the last packet arrives.
    last_arrival: Duration,
}

impl Link {
    /// One direction of `spec`; `seed` decides which packets are lost.
    pub fn new(spec: &PathSpec, seed: u64) -> Self {
        Self {
            ns_per_byte: spec.rate.map_or(0.0, |rate| 8e9 / rate as f64),
            queue_bytes: spec.queue_bytes(),
            delay: spec.rtt / 2,
            jitter_ns: u64::try_from(spec.jitter.as_nanos()).unwrap_or(u64::MAX),
            loss_below: (spec.loss * u64::MAX as f64) as u64,
            random: Random::new(seed),
            free_at: Duration::ZERO,
            last_arrival: Duration::ZERO,
        }
    }

    /// A packet of `bytes` enters at `now`, which never goes back.
    pub fn send(&mut self, now: Duration, bytes: usize) -> Fate {
        let waiting = self.free_at.saturating_sub(now).as_nanos() as f64;
        let time = bytes as f64 * self.ns_per_byte;
        if waiting + time > self.queue_bytes as f64 * self.ns_per_byte {
            return Fate::Overflows;
        }
        self.free_at = self.free_at.max(now) + Duration::from_nanos(time as u64);
        let is_lost = self.random.next() < self.loss_below;
        let jitter = Duration::from_nanos(self.random.next() % (self.jitter_ns + 1));
        if is_lost {
            return Fate::Lost;
        }
        // Packets keep their order: a route that reorders is another matter than one whose delay varies.
        self.last_arrival = self.last_arrival.max(self.free_at + self.delay + jitter);
        Fate::Arrives(self.last_arrival)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(text: &str) -> Link {
        Link::new(&text.parse().expect("a path"), 7)
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn delay_is_half_the_round_trip() {
        let mut link = link("rtt=10ms");
        assert_eq!(link.send(MS, 1500), Fate::Arrives(6 * MS));
    }

    #[test]
    fn packets_follow_each_other_at_the_rate() {
        // 1000 bytes take 1 ms.
        let mut link = link("rtt=2ms,rate=8m");
        assert_eq!(link.send(Duration::ZERO, 1000), Fate::Arrives(2 * MS));
        assert_eq!(link.send(Duration::ZERO, 1000), Fate::Arrives(3 * MS));
        assert_eq!(link.send(10 * MS, 1000), Fate::Arrives(12 * MS));
    }

    #[test]
    fn a_full_queue_drops_the_newcomer() {
        let mut link = link("emulated,rate=8m,queue=2500");
        let fates = [0, 0, 0].map(|_| link.send(Duration::ZERO, 1000));
        assert_eq!(fates[2], Fate::Overflows);
        assert_eq!(link.send(MS, 1000), Fate::Arrives(3 * MS));
    }

    #[test]
    fn the_share_of_lost_packets_is_as_asked() {
        let mut link = link("loss=1%");
        let lost = (0..100_000)
            .filter(|_| link.send(Duration::ZERO, 1500) == Fate::Lost)
            .count();
        assert!((900..1100).contains(&lost), "{lost}");
    }

    #[test]
    fn the_same_seed_loses_the_same_packets() {
        let fates = |seed| {
            let mut link = Link::new(&"loss=10%,jitter=1ms".parse().expect("a path"), seed);
            (0..100).map(|_| link.send(MS, 100)).collect::<Vec<_>>()
        };
        assert_eq!(fates(1), fates(1));
        assert_ne!(fates(1), fates(2));
    }

    #[test]
    fn jitter_never_reorders() {
        let mut link = link("rtt=2ms,jitter=5ms");
        let mut last = Duration::ZERO;
        for number in 0..1000 {
            let Fate::Arrives(at) = link.send(number * MS / 10, 100) else {
                panic!("nothing is lost");
            };
            assert!(at >= last);
            last = at;
        }
    }
}
