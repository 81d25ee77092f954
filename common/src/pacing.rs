//! How many bulk bytes may be on the path: pure, told of acknowledgements, losses and the round trips of faults.
//!
//! The law behind it (measured): a fault waits for the bulk bytes that are ahead of its answer in a queue both share. A
//! sender that only heeds losses fills that queue; this one heeds delay. It keeps the path busy with a standing queue
//! of a fraction of a millisecond, and shrinks even that while the round trips of faults lie above what they are when
//! nothing is pushed. Losses without a queue (a radio, a bad cable) do not slow it down unless there are many.
//!
//! Once a round trip: `window = window * (shortest round trip + wanted queue) / this round trip`, which is where a
//! window settles that keeps exactly the wanted queue (the law of FAST TCP, without its smoothing constants).
//!
//! On a short path the scheduler adds more to a round trip than the queue that is wanted, and by that law alone the
//! window would melt away. So most of the best rate of the last second is kept: a window of `rate * round trip` carries
//! that rate whatever the round trip is made of, and as long as the rate is below what the path can do, none of it is
//! our queue. What the path can do is tried again every few seconds.

use std::time::Duration;

/// The standing queue, as the time it takes to drain, while faults wait no longer for it.
const QUEUE_MAX: Duration = Duration::from_millis(1);
/// What it is at first, and may be for the sake of the rate that is kept.
const QUEUE_BEGIN: Duration = Duration::from_micros(250);
/// The standing queue that is kept however long faults wait: without any the path would run dry between two rounds.
const QUEUE_MIN: Duration = Duration::from_micros(30);
/// On a long path at least this part of the shortest round trip: it matters to nobody there, and less cannot be told from
/// jitter.
const QUEUE_PART: u32 = 16;
/// A queue of this part of the shortest round trip ends the start: less is jitter on a long path.
const START_QUEUE_PART: u32 = 8;

/// Faults wait too long when their round trip is above the idle one by this part of it,
const FAULT_EXCESS_PART: u32 = 5;
/// and by this much: less is the scheduler, which adds it to every round trip on a busy machine.
const FAULT_EXCESS_MIN: Duration = Duration::from_micros(50);
/// The wanted queue is changed this often,
const QUEUE_INTERVAL: Duration = Duration::from_millis(1);
/// to this part of it while faults wait too long,
const QUEUE_SHRINK: f64 = 0.7;
/// and to this multiple otherwise: from the smallest to the largest in less than a second.
const QUEUE_GROW: f64 = 1.005;

/// The shortest round; shorter ones say more about the scheduler than about the path.
const ROUND_MIN: Duration = Duration::from_micros(250);
/// For how long a shortest round trip is believed before the queue is drained to look for the present one.
const SHORTEST_LIFE: Duration = Duration::from_secs(5);
/// Rounds for which the window is held down to drain the queue.
const DRAIN_ROUNDS: u32 = 2;

/// After this many rounds without a queue the window grows faster,
const EMPTY_ROUNDS: u32 = 3;
/// namely half way to this multiple each round.
const EMPTY_GROW: f64 = 1.125;

/// This part of the best rate is kept however long round trips seem.
const RATE_KEPT: f64 = 0.95;
/// A path that is tried out gets this multiple of the best rate so far,
const RATE_TRIED: f64 = 1.2;
/// for one interval,
const RATE_INTERVAL: Duration = Duration::from_millis(20);
/// so often at first, half as often after each trial that found nothing, and at least so often. The best rate is that of
/// the last two such times. (An interval is long enough that what a token bucket lets through at once does not count for
/// much, and the slowest percent of faults is not all made in trials.)
const TRIAL_PAUSES: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(4));
/// A trial that carried this multiple of the best rate so far is followed by another at once: the path has become faster,
/// or somebody else has left it.
const RATE_RISEN: f64 = 1.05;
/// Less than this part of the best rate in each of
const RATE_FALLEN: f64 = 0.6;
/// so many intervals: the path has become slower, and what it could do before is forgotten.
const FALLEN_INTERVALS: u32 = 10;

/// More than this part of a round's bytes lost: the path cannot take this much, whatever its delay says.
const LOSS_MAX: f64 = 0.03;
/// The window after such a round.
const LOSS_SHRINK: f64 = 0.7;

/// Packets that may always be on the path, so that it never starves.
const PACKETS_MIN: u64 = 4;
/// The largest window: beyond what any receiver of ours grants.
const WINDOW_MAX: u64 = 1 << 30;

/// Round trips of faults, as a gauge beside the bulk connection shows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultTrips {
    /// While nothing was pushed; zero when that was never seen.
    pub idle: Duration,
    /// Lately.
    pub recent: Duration,
    /// How many were seen; the same number again means that no thread has faulted since.
    pub seen: u64,
}

/// The window of one bulk connection. Times are since any fixed moment.
#[derive(Clone, Debug)]
pub struct BulkWindow {
    window: f64,
    packet: u64,
    starting: bool,
    draining: u32,
    empty_rounds: u32,
    shortest: Shortest,
    round: Round,
    queue: QueueTarget,
    rate: Rate,
}

/// From the first packet sent until it is acknowledged.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    began: Duration,
    acked: u64,
    lost: u64,
    shortest: Option<Duration>,
    /// Of all acknowledged bytes, the sum of their round trips in byte seconds.
    byte_seconds: f64,
    /// Whether there was more to send than the window allowed.
    filled: bool,
}

/// The shortest round trip of the last two lives.
#[derive(Clone, Copy, Debug)]
struct Shortest {
    before: Duration,
    now: Duration,
    since: Duration,
}

/// What the path was seen to carry, in bytes per second.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    best_before: f64,
    best_now: f64,
    /// When the last trial began; one is under way while this is when the present interval began.
    tried: Duration,
    began: Duration,
    acked: u64,
    filled: bool,
    /// What round trips are like, in seconds.
    round_trip: f64,
    /// Until the next trial, from the last one on.
    pause: Duration,
    /// Intervals in a row that carried far less than the best rate, and the best of them.
    fallen: (u32, f64),
}

/// The queue worth having.
#[derive(Clone, Copy, Debug)]
struct QueueTarget {
    time: Duration,
    changed: Duration,
    seen: u64,
}

impl BulkWindow {
    /// A window that begins with `initial` bytes, on a path with packets of `packet` bytes.
    pub fn new(initial: u64, packet: u64) -> Self {
        BulkWindow {
            window: initial as f64,
            packet,
            starting: true,
            draining: 0,
            empty_rounds: 0,
            shortest: Shortest {
                before: Duration::MAX,
                now: Duration::MAX,
                since: Duration::ZERO,
            },
            round: Round::default(),
            queue: QueueTarget {
                time: QUEUE_BEGIN,
                changed: Duration::ZERO,
                seen: 0,
            },
            rate: Rate::default(),
        }
    }

    /// Bytes that may be on the path.
    pub fn bytes(&self) -> u64 {
        (self.window as u64).clamp(PACKETS_MIN * self.packet, WINDOW_MAX)
    }

    /// The best rate of the last times between trials, in bytes per second; zero when none was seen yet.
    pub fn best_rate(&self) -> f64 {
        self.rate.best()
    }

    /// The queue that is wanted at present.
    pub fn wanted_queue(&self) -> Duration {
        self.queue.time
    }

    /// Packets have this many bytes now.
    pub fn resize_packets(&mut self, packet: u64) {
        self.packet = packet;
    }

    /// A packet of `bytes` sent at `sent` was acknowledged at `now`. `filled`: there is more to send than the window
    /// allows.
    pub fn acknowledged(&mut self, now: Duration, sent: Duration, bytes: u64, filled: bool) {
        let round_trip = now.saturating_sub(sent);
        self.shortest.now = self.shortest.now.min(round_trip);
        let round = &mut self.round;
        round.acked += bytes;
        round.byte_seconds += bytes as f64 * round_trip.as_secs_f64();
        round.filled |= filled;
        round.shortest = Some(
            round
                .shortest
                .map_or(round_trip, |so_far| so_far.min(round_trip)),
        );
        if sent >= round.began && now.saturating_sub(round.began) >= ROUND_MIN {
            self.end_round(now);
        }
    }

    /// Packets of `bytes` were lost.
    pub fn lost(&mut self, bytes: u64) {
        self.round.lost += bytes;
    }

    /// A router marked packets rather than to drop them: its queue is too long.
    pub fn marked(&mut self) {
        self.starting = false;
        self.shrink(LOSS_SHRINK);
    }

    /// Nothing came through for several round trips: whatever was known of the path is void.
    pub fn collapsed(&mut self) {
        *self = BulkWindow::new(PACKETS_MIN * self.packet, self.packet);
    }

    /// What the round trips of faults are like.
    pub fn heed(&mut self, now: Duration, faults: FaultTrips) {
        let queue = &mut self.queue;
        if now.saturating_sub(queue.changed) < QUEUE_INTERVAL {
            return;
        }
        queue.changed = now;
        let excess = faults.recent.saturating_sub(faults.idle);
        let allowed = (faults.idle / FAULT_EXCESS_PART).max(FAULT_EXCESS_MIN);
        let late = faults.seen != queue.seen && !faults.idle.is_zero() && excess > allowed;
        queue.seen = faults.seen;
        let time = queue
            .time
            .mul_f64(if late { QUEUE_SHRINK } else { QUEUE_GROW });
        queue.time = time.clamp(QUEUE_MIN, QUEUE_MAX);
    }

    fn end_round(&mut self, now: Duration) {
        let round = std::mem::take(&mut self.round);
        self.round.began = now;
        let shortest = self.shortest();
        let Some(round_trip) = round.shortest else {
            return;
        };
        self.rate.note(now, &round, round_trip);
        if self.draining > 0 {
            self.draining -= 1;
            if self.draining == 0 {
                self.window *= 2.0;
            }
            return;
        }
        if !round.filled && round.lost == 0 {
            // Lone packets, acknowledged late because nothing followed them: they say nothing of a window they never filled.
            return;
        }
        let queued = round_trip.saturating_sub(shortest);
        let lost = round.lost as f64 / (round.lost + round.acked) as f64;
        if lost > LOSS_MAX || (round.lost > 0 && queued > self.start_queue()) {
            self.starting = false;
            self.shrink(LOSS_SHRINK);
        } else if self.starting && queued <= self.start_queue() {
            self.window = (self.window * 2.0).min(WINDOW_MAX as f64);
        } else if self.starting {
            self.starting = false;
            // What was sent meanwhile overshot by far; what arrived in this round is what the path can carry.
            let took = now.saturating_sub(round.began).as_secs_f64();
            let rate = round.acked as f64 / took.max(1e-9);
            let fits = rate * (shortest + self.queue.time).as_secs_f64();
            self.window = self.window.min(fits);
            self.bound();
        } else {
            self.settle(round_trip, shortest);
        }
        self.drain(now, round_trip, shortest);
    }

    fn start_queue(&self) -> Duration {
        self.queue.time.max(self.shortest() / START_QUEUE_PART)
    }

    /// Goes half of the way to the window that would keep the wanted queue.
    fn settle(&mut self, round_trip: Duration, shortest: Duration) {
        let queue = self.queue.time.max(shortest / QUEUE_PART);
        let wanted = (shortest + queue).as_secs_f64();
        let mut factor = wanted / round_trip.as_secs_f64().max(1e-9);
        // On a long path the wanted queue is next to nothing beside the round trip, and so is this factor: a path that
        // shows no queue round after round has become faster.
        let empty = round_trip.saturating_sub(shortest) < queue / 4;
        self.empty_rounds = if empty { self.empty_rounds + 1 } else { 0 };
        if self.empty_rounds > EMPTY_ROUNDS {
            factor = factor.max(EMPTY_GROW);
        }
        self.window *= f64::midpoint(1.0, factor.clamp(0.5, 2.0));
        let carried = self.rate.best() * self.rate.kept() * self.rate.round_trip;
        // While faults are on time, what round trips hold beyond the shortest is not in their way.
        let limit = self.rate.best() * (shortest + self.queue.time.max(QUEUE_BEGIN)).as_secs_f64();
        self.window = self.window.max(carried.min(limit));
        self.bound();
    }

    /// From time to time empties the queue to see the path's own round trip.
    fn drain(&mut self, now: Duration, round_trip: Duration, shortest: Duration) {
        if self.starting || now.saturating_sub(self.shortest.since) <= SHORTEST_LIFE {
            return;
        }
        self.shortest = Shortest {
            before: self.shortest.now,
            now: round_trip,
            since: now,
        };
        if self.shortest() > shortest + shortest / START_QUEUE_PART {
            // The path has become longer, and the window far too small for it.
            self.starting = true;
            return;
        }
        let empty = shortest.as_secs_f64() / round_trip.as_secs_f64().max(1e-9);
        self.window *= empty / 2.0;
        self.draining = DRAIN_ROUNDS;
    }

    fn shortest(&self) -> Duration {
        self.shortest.before.min(self.shortest.now)
    }

    fn shrink(&mut self, factor: f64) {
        self.window *= factor;
        self.bound();
    }

    fn bound(&mut self) {
        let least = (PACKETS_MIN * self.packet) as f64;
        self.window = self.window.clamp(least, WINDOW_MAX as f64);
    }
}

impl Rate {
    fn note(&mut self, now: Duration, round: &Round, shortest: Duration) {
        let mean = round.byte_seconds / round.acked.max(1) as f64;
        self.round_trip = match self.round_trip {
            0.0 => mean,
            before => before + (mean - before) / 8.0,
        };
        self.acked += round.acked;
        self.filled |= round.filled;
        let time = now.saturating_sub(self.began);
        if time < RATE_INTERVAL.max(2 * shortest) {
            return;
        }
        let mut risen = false;
        if self.filled {
            let carried = self.acked as f64 / time.as_secs_f64();
            risen = self.is_trying() && carried > RATE_RISEN * self.best();
            self.best_now = self.best_now.max(carried);
            self.forget_if_fallen(carried);
        }
        (self.began, self.acked, self.filled) = (now, 0, false);
        if risen {
            (self.tried, self.pause) = (now, TRIAL_PAUSES.0);
        } else if now.saturating_sub(self.tried) > self.pause.max(40 * shortest) {
            self.best_before = std::mem::take(&mut self.best_now);
            self.tried = now;
            self.pause = (self.pause * 2).clamp(TRIAL_PAUSES.0, TRIAL_PAUSES.1);
        }
    }

    fn forget_if_fallen(&mut self, carried: f64) {
        let (intervals, best) = self.fallen;
        self.fallen = match carried < RATE_FALLEN * self.best() {
            true => (intervals + 1, best.max(carried)),
            false => (0, 0.0),
        };
        if self.fallen.0 >= FALLEN_INTERVALS {
            (self.best_before, self.best_now) = (0.0, self.fallen.1);
            self.fallen = (0, 0.0);
            self.pause = TRIAL_PAUSES.0;
        }
    }

    fn best(&self) -> f64 {
        self.best_before.max(self.best_now)
    }

    /// The part of the best rate that is kept at present.
    fn kept(&self) -> f64 {
        match self.is_trying() {
            true => RATE_TRIED,
            false => RATE_KEPT,
        }
    }

    fn is_trying(&self) -> bool {
        self.began == self.tried
    }
}

#[cfg(test)]
mod simulation;
