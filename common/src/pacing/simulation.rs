//! The window on simulated paths: a rate, a delay, a queue, losses, and faults beside the bulk.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const PACKET: u64 = 1452;
const INITIAL: u64 = 256 << 10;
/// A thread faults this often.
const FAULT_INTERVAL: Duration = Duration::from_millis(1);

/// One direction of a path, and the window that fills it.
struct Simulation {
    window: BulkWindow,
    /// Bytes per second.
    rate: f64,
    round_trip: Duration,
    /// Bytes the queue holds.
    room: u64,
    /// Of a thousand packets so many are lost.
    losses: u64,
    /// The scheduler adds up to this to the round trips of a while.
    noise: Duration,
    /// Whether threads fault.
    faults: Option<FaultTrips>,
    /// What the scheduler adds to each fault beside bulk.
    fault_noise: Duration,
    random: u64,
    now: Duration,
    free_at: Duration,
    on_path: u64,
    /// When a packet's fate is known, when it was sent, and whether it arrived.
    fates: VecDeque<(Duration, Duration, bool)>,
    next_fault: Duration,
    seen: Seen,
}

/// What came of it since it was last reset.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    since: Duration,
    delivered: u64,
    queue_sum: f64,
    packets: u64,
}

impl Simulation {
    fn new(rate: f64, round_trip: Duration, room: u64) -> Self {
        Simulation {
            window: BulkWindow::new(INITIAL, PACKET),
            rate,
            round_trip,
            room,
            losses: 0,
            noise: Duration::ZERO,
            faults: None,
            fault_noise: Duration::ZERO,
            random: 1,
            now: Duration::ZERO,
            free_at: Duration::ZERO,
            on_path: 0,
            fates: VecDeque::new(),
            next_fault: Duration::ZERO,
            seen: Seen::default(),
        }
    }

    fn run(&mut self, time: Duration) -> Seen {
        let end = self.now + time;
        self.seen = Seen {
            since: self.now,
            ..Seen::default()
        };
        while self.now < end {
            while self.on_path + PACKET <= self.window.bytes() {
                self.send();
            }
            let (at, sent, arrived) = self.fates.pop_front().expect("something is on the path");
            self.now = self.now.max(at);
            self.on_path -= PACKET;
            self.fault();
            if arrived {
                self.seen.delivered += PACKET;
                self.window.acknowledged(self.now, sent, PACKET, true);
            } else {
                self.window.lost(PACKET);
            }
        }
        self.seen
    }

    fn send(&mut self) {
        let waits = self.free_at.saturating_sub(self.now);
        let queued = waits.as_secs_f64() * self.rate;
        self.on_path += PACKET;
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let lost = (self.random >> 33) % 1000 < self.losses;
        if queued as u64 + PACKET > self.room {
            let known = self.free_at + self.round_trip;
            self.fates.push_back((known, self.now, false));
            return;
        }
        self.seen.queue_sum += waits.as_secs_f64();
        self.seen.packets += 1;
        let time = Duration::from_secs_f64(PACKET as f64 / self.rate);
        self.free_at = self.free_at.max(self.now) + time;
        let known = self.free_at + self.round_trip + self.noise_now();
        self.fates.push_back((known, self.now, !lost));
    }

    /// Stays the same for half a millisecond: whoever waits for a CPU waits with everything it has.
    fn noise_now(&self) -> Duration {
        let step = self.now.as_micros() as u64 / 500;
        let mixed = step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        self.noise.mul_f64(mixed as f64 / f64::from(1 << 24))
    }

    /// Faults share the queue with bulk.
    fn fault(&mut self) {
        if let Some(trips) = &mut self.faults
            && self.now >= self.next_fault
        {
            self.next_fault = self.now + FAULT_INTERVAL;
            let queued = self.free_at.saturating_sub(self.now);
            let trip = trips.idle + queued + self.fault_noise;
            trips.recent = (trips.recent * 7 + trip) / 8;
            trips.seen += 1;
        }
        self.window.heed(self.now, self.faults.unwrap_or_default());
    }

    /// Of the rate.
    fn share(&self, seen: Seen) -> f64 {
        let time = (self.now - seen.since).as_secs_f64();
        seen.delivered as f64 / time / self.rate
    }
}

impl Seen {
    fn mean_queue(&self) -> Duration {
        Duration::from_secs_f64(self.queue_sum / self.packets.max(1) as f64)
    }
}

const GIGABIT: f64 = 125.0e6;
const MS: Duration = Duration::from_millis(1);

fn faulting(round_trip: Duration) -> Option<FaultTrips> {
    Some(FaultTrips {
        idle: round_trip,
        recent: round_trip,
        seen: 0,
    })
}

#[test]
fn a_gigabit_is_filled_with_hardly_any_queue_while_threads_fault() {
    let mut simulation = Simulation::new(GIGABIT, MS / 5, 4 << 20);
    simulation.faults = faulting(MS / 4);
    simulation.run(200 * MS);
    let seen = simulation.run(500 * MS);
    assert!(simulation.share(seen) > 0.9, "{}", simulation.share(seen));
    assert!(seen.mean_queue() < MS / 10, "{:?}", seen.mean_queue());
}

#[test]
fn round_trips_that_vary_more_than_the_wanted_queue_do_not_melt_the_window_away() {
    let mut simulation = Simulation::new(GIGABIT, MS / 10, 4 << 20);
    simulation.noise = MS / 4;
    simulation.faults = faulting(MS / 4);
    simulation.run(200 * MS);
    // Whatever the queue does, faults are slow.
    simulation.faults = Some(FaultTrips {
        idle: MS / 4,
        recent: 100 * MS,
        seen: 0,
    });
    simulation.run(1000 * MS);
    let seen = simulation.run(3000 * MS);
    assert!(simulation.share(seen) > 0.8, "{}", simulation.share(seen));
    assert!(seen.mean_queue() < MS / 4, "{:?}", seen.mean_queue());
}

#[test]
fn a_long_path_is_filled_within_a_second() {
    let mut simulation = Simulation::new(GIGABIT, 30 * MS, 4 << 20);
    simulation.run(500 * MS);
    let seen = simulation.run(3000 * MS);
    assert!(simulation.share(seen) > 0.9, "{}", simulation.share(seen));
    assert!(seen.mean_queue() < 5 * MS, "{:?}", seen.mean_queue());
}

#[test]
fn a_long_path_that_jitters_is_filled_within_a_second() {
    let mut simulation = Simulation::new(GIGABIT, 30 * MS, 4 << 20);
    simulation.noise = MS;
    simulation.run(1000 * MS);
    let seen = simulation.run(3000 * MS);
    assert!(simulation.share(seen) > 0.9, "{}", simulation.share(seen));
}

#[test]
fn a_long_path_is_filled_again_after_a_bad_moment() {
    let mut simulation = Simulation::new(GIGABIT, 30 * MS, 4 << 20);
    simulation.noise = MS / 2;
    simulation.run(1000 * MS);
    simulation.losses = 200;
    simulation.run(100 * MS);
    simulation.losses = 0;
    simulation.run(2000 * MS);
    let seen = simulation.run(1000 * MS);
    assert!(simulation.share(seen) > 0.9, "{}", simulation.share(seen));
}

#[test]
fn a_slow_start_floods_no_queue() {
    let mut simulation = Simulation::new(GIGABIT, 10 * MS, 8 << 20);
    let seen = simulation.run(300 * MS);
    assert!(
        seen.mean_queue() < 2 * simulation.round_trip,
        "{:?}",
        seen.mean_queue()
    );
}

#[test]
fn losses_without_a_queue_do_not_slow_it_down() {
    let mut simulation = Simulation::new(GIGABIT, 20 * MS, 4 << 20);
    simulation.losses = 10;
    simulation.run(1000 * MS);
    let seen = simulation.run(2000 * MS);
    assert!(simulation.share(seen) > 0.85, "{}", simulation.share(seen));
}

#[test]
fn a_path_that_becomes_slower_and_faster_again_is_followed() {
    let mut simulation = Simulation::new(GIGABIT, MS, 4 << 20);
    simulation.run(300 * MS);
    simulation.rate = GIGABIT / 10.0;
    // The best rate of before has to be forgotten.
    simulation.run(1000 * MS);
    let slow = simulation.run(300 * MS);
    assert!(simulation.share(slow) > 0.85, "{}", simulation.share(slow));
    assert!(slow.mean_queue() < 2 * MS, "{:?}", slow.mean_queue());
    simulation.rate = GIGABIT;
    simulation.run(300 * MS);
    let fast = simulation.run(300 * MS);
    assert!(simulation.share(fast) > 0.85, "{}", simulation.share(fast));
}

/// As measured beside a busy redis: the bulk thread compresses between two packets and hears of them late, and faults
/// wait a little longer for a processor.
#[test]
fn what_others_leave_is_taken_at_once_also_on_a_busy_machine() {
    let mut simulation = Simulation::new(GIGABIT / 4.0, MS / 20, 4 << 20);
    simulation.noise = MS / 2;
    simulation.faults = faulting(MS / 20);
    simulation.fault_noise = MS / 25;
    simulation.run(2000 * MS);
    simulation.rate = GIGABIT;
    simulation.run(TRIAL_PAUSES.0 + 500 * MS);
    let seen = simulation.run(500 * MS);
    assert!(simulation.share(seen) > 0.45, "{}", simulation.share(seen));
}

#[test]
fn a_spike_of_delay_is_forgotten() {
    let mut simulation = Simulation::new(GIGABIT, MS, 4 << 20);
    simulation.faults = faulting(MS);
    simulation.run(300 * MS);
    // Somebody else's traffic stands in the queue for 30 ms.
    simulation.free_at += 30 * MS;
    simulation.run(100 * MS);
    let seen = simulation.run(300 * MS);
    assert!(simulation.share(seen) > 0.85, "{}", simulation.share(seen));
}

#[test]
fn a_path_that_became_longer_is_learnt_again() {
    let mut simulation = Simulation::new(GIGABIT, MS, 8 << 20);
    simulation.run(500 * MS);
    simulation.round_trip = 20 * MS;
    simulation.run(3 * SHORTEST_LIFE);
    let seen = simulation.run(2000 * MS);
    assert!(simulation.share(seen) > 0.85, "{}", simulation.share(seen));
}

#[test]
fn a_queue_target_recovers_when_faults_are_fast_again() {
    let mut window = BulkWindow::new(INITIAL, PACKET);
    let slow = |seen| FaultTrips {
        idle: MS,
        recent: 9 * MS,
        seen,
    };
    (1..100).for_each(|n| window.heed(n * MS, slow(u64::from(n))));
    assert_eq!(window.wanted_queue(), QUEUE_MIN);
    // Nobody faults any more: the same count again and again.
    (100..900).for_each(|n| window.heed(n * MS, slow(99)));
    assert_eq!(window.wanted_queue(), QUEUE_MAX);
}

#[test]
fn lone_packets_that_are_acknowledged_late_say_nothing() {
    let mut window = BulkWindow::new(INITIAL, PACKET);
    window.acknowledged(30 * MS, Duration::ZERO, PACKET, false);
    for n in 1..50 {
        window.acknowledged(n * 60 * MS, n * 60 * MS - 55 * MS, PACKET, false);
    }
    assert_eq!(window.bytes(), INITIAL);
}

#[test]
fn a_window_that_collapsed_starts_again() {
    let mut simulation = Simulation::new(GIGABIT, MS, 4 << 20);
    simulation.run(100 * MS);
    simulation.window.collapsed();
    simulation.run(200 * MS);
    let seen = simulation.run(200 * MS);
    assert!(simulation.share(seen) > 0.9, "{}", simulation.share(seen));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// On any path it neither starves nor lets the queue stand much longer than it wants to.
    #[test]
    fn every_path_is_used_and_not_flooded(
        megabits in 20_u32..5_000,
        round_trip_us in 50_u64..50_000,
        losses in 0_u64..10,
        faults: bool,
    ) {
        let rate = f64::from(megabits) * 125_000.0;
        let round_trip = Duration::from_micros(round_trip_us);
        // Half a product and what a burst needs: an ordinary switch has more.
        let room = (rate * round_trip.as_secs_f64()) as u64 / 2 + (512 << 10);
        let mut simulation = Simulation::new(rate, round_trip, room);
        simulation.losses = losses;
        simulation.faults = faulting(round_trip).filter(|_| faults);
        // What overshot at the start must drain, some times over, on a path this slow.
        let drained = Duration::from_secs_f64(room as f64 / rate);
        simulation.run(40 * round_trip + 300 * MS + 4 * drained);
        let seen = simulation.run(20 * round_trip + 100 * MS);
        let share = simulation.share(seen);
        prop_assert!(share > 0.8, "{share}");
        let least = Duration::from_secs_f64((PACKETS_MIN * PACKET) as f64 / rate);
        let most = QUEUE_MAX * 3 + least + round_trip / START_QUEUE_PART * 2;
        prop_assert!(seen.mean_queue() < most, "{:?} of {most:?}", seen.mean_queue());
    }

    /// Whatever it is told, there is always room for a few packets, and never for more than it can mean.
    #[test]
    fn nothing_starves_it(
        told in prop::collection::vec((0_u8..6, 0_u64..1_000_000_000, 0_u64..100_000_000), 1..300),
    ) {
        let mut window = BulkWindow::new(INITIAL, PACKET);
        let mut now = Duration::ZERO;
        for (what, nanos, bytes) in told {
            let time = Duration::from_nanos(nanos);
            match what {
                0 => now += time / 1000,
                1 => window.lost(bytes),
                2 => window.marked(),
                3 => window.collapsed(),
                4 => window.heed(now, FaultTrips { idle: MS, recent: time, seen: bytes }),
                _ => window.acknowledged(now, now.saturating_sub(time), bytes, nanos % 2 == 0),
            }
            prop_assert!(window.bytes() >= PACKETS_MIN * PACKET);
            prop_assert!(window.bytes() <= WINDOW_MAX);
        }
    }
}
