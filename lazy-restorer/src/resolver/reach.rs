//! How far around a fault to reach: pure, told how long threads waited.
//!
//! A workload that runs between its faults is served best by its page alone: what comes along is in the way of the next
//! one, and the push brings it anyway. One that does nothing but wait, for page after page, gets on only as fast as
//! faults are served: each of them costs both ends as much as a dozen pages of the push and cuts that into pieces. So
//! there a fault brings the whole block its page lies in, larger blocks as long as that keeps the workload waiting, and
//! none so large that a wait becomes much longer than one for a page alone: on a path that is full the block would take
//! the place of what the push sends.

use std::time::Duration;

/// Waits by which it is judged.
const PERIOD: usize = 16;
/// The largest block: two frames.
const REACH_MAX: usize = 32;
/// The smallest one that is more than the page itself.
const REACH_MIN: usize = 4;
/// Of the pauses before waits so many are longer than the one that counts: one may be an accident.
const ACCIDENTS: usize = 1;
/// A workload does nothing but wait while it pauses for less than this part of a wait for a page alone: a thread that is
/// woken, touches, and faults again is seen after a quarter of that.
const PAUSE_SHORT: f64 = 0.8;
/// One that pauses for more than this part of it is left alone with its pages. (Not of a wait as it is with blocks: those
/// make waits longer, and pauses seem short beside them.)
const PAUSE_LONG: f64 = 1.0;
/// A wait may become this multiple of one for a page alone.
const WORSE_MAX: f64 = 2.5;

/// The blocks of one family. Times are since any fixed moment.
#[derive(Clone, Debug)]
pub struct Reach {
    pages: usize,
    /// Blocks found too large, since the workload began to do nothing but wait, had twice this many pages.
    most: usize,
    /// The usual wait for a page alone.
    alone: Duration,
    /// When what was asked for last came. What comes with a page delays the next fault, which is no pause.
    came: Duration,
    waits: Vec<Duration>,
    /// How long nobody waited and nothing was to come, before each wait.
    pauses: Vec<Duration>,
}

impl Default for Reach {
    fn default() -> Self {
        Reach {
            pages: 1,
            most: REACH_MAX,
            alone: Duration::MAX,
            came: Duration::ZERO,
            waits: Vec::with_capacity(PERIOD),
            pauses: Vec::with_capacity(PERIOD),
        }
    }
}

impl Reach {
    /// Pages of the block that comes with a fault, a power of two; 1 when nothing but the page does.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Pages that were asked for are in place.
    pub fn came(&mut self, now: Duration) {
        self.came = self.came.max(now);
    }

    /// A thread that waited since `since` goes on.
    pub fn served(&mut self, since: Duration, now: Duration) {
        self.pauses.push(since.saturating_sub(self.came));
        self.waits.push(now.saturating_sub(since));
        self.came(now);
        if self.waits.len() == PERIOD {
            self.judge();
        }
    }

    fn judge(&mut self) {
        self.waits.sort_unstable();
        self.pauses.sort_unstable();
        let wait = self.waits[PERIOD / 2].as_secs_f64();
        let pause = self.pauses[PERIOD - 1 - ACCIDENTS].as_secs_f64();
        if self.pages == 1 {
            (self.alone, self.most) = (self.waits[PERIOD / 2], REACH_MAX);
        }
        self.waits.clear();
        self.pauses.clear();
        let alone = self.alone.as_secs_f64();
        if wait > alone * WORSE_MAX {
            self.most = smaller(self.pages);
            self.pages = self.most;
        } else if pause <= alone * PAUSE_SHORT {
            self.pages = (self.pages * 2).max(REACH_MIN).min(self.most);
        } else if pause > alone * PAUSE_LONG {
            self.pages = smaller(self.pages);
        }
    }
}

fn smaller(pages: usize) -> usize {
    match pages / 2 {
        half if half < REACH_MIN => 1,
        half => half,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MICROSECOND: Duration = Duration::from_micros(1);

    /// A thread that works for `work` after each wait, on a path where a wait is made of these, in microseconds.
    struct Walk {
        reach: Reach,
        now: Duration,
        alone: u32,
        /// For each page that came with the one before.
        more: u32,
        /// Until a page that came is seen by who waited, and the next fault is seen here.
        unseen: u32,
    }

    impl Walk {
        fn on(alone: u32, more: u32) -> Self {
            Walk {
                reach: Reach::default(),
                now: Duration::ZERO,
                alone,
                more,
                unseen: 28,
            }
        }

        /// Each fault waits for what came with the one before.
        fn faults(&mut self, count: usize, work: u32) -> usize {
            for _ in 0..count {
                let others = self.reach.pages() as u32 - 1;
                let faulted = self.now;
                self.now += self.alone * MICROSECOND;
                self.reach.served(faulted, self.now);
                let late = (others * self.more) * MICROSECOND;
                self.reach.came(self.now + late);
                let pause = (self.unseen + work) * MICROSECOND;
                self.now += pause.max(late);
            }
            self.reach.pages()
        }

        /// The same where what came with the page before stands in a queue before the next.
        fn faults_on_slow_path(&mut self, count: usize) -> usize {
            for _ in 0..count {
                let others = self.reach.pages() as u32 - 1;
                let faulted = self.now;
                self.now += (self.alone + others * self.more) * MICROSECOND;
                self.reach.served(faulted, self.now);
                self.now += self.unseen * MICROSECOND;
            }
            self.reach.pages()
        }
    }

    #[test]
    fn who_only_waits_gets_blocks_and_loses_them_when_it_works() {
        let mut walk = Walk::on(100, 4);
        assert_eq!(walk.faults(10 * PERIOD, 2), REACH_MAX);
        assert_eq!(walk.faults(10 * PERIOD, 900), 1);
        assert_eq!(walk.faults(10 * PERIOD, 2), REACH_MAX, "and again");
    }

    #[test]
    fn who_works_between_faults_gets_pages_alone() {
        assert_eq!(Walk::on(90, 4).faults(100 * PERIOD, 100), 1);
        assert_eq!(Walk::on(250, 35).faults(100 * PERIOD, 700), 1);
    }

    /// A server whose every command faults a few times in a row, and then waits for the next one.
    #[test]
    fn who_works_now_and_then_gets_pages_alone() {
        let mut walk = Walk::on(90, 4);
        for _ in 0..1000 {
            walk.faults(3, 15);
            assert_eq!(walk.faults(1, 130), 1);
        }
    }

    #[test]
    fn a_slow_path_gets_small_blocks_and_a_long_one_large_ones() {
        // 1 Gbit/s: a page takes 35 us of the path.
        let small = Walk::on(250, 35).faults_on_slow_path(100 * PERIOD);
        assert!(small <= 16, "{small}");
        let large = Walk::on(10_000, 35).faults_on_slow_path(100 * PERIOD);
        assert_eq!(large, REACH_MAX);
    }

    #[test]
    fn a_few_long_waits_change_nothing() {
        let mut walk = Walk::on(100, 4);
        walk.faults(10 * PERIOD, 2);
        for _ in 0..PERIOD {
            let since = walk.now;
            walk.now += Duration::from_millis(5);
            walk.reach.served(since, walk.now);
            assert_eq!(walk.faults(PERIOD - 1, 2), REACH_MAX);
        }
    }

    proptest! {
        #[test]
        fn it_is_a_power_of_two_within_its_bounds(
            waits in proptest::collection::vec((0u64..1_000_000, 0u64..1_000_000), 0..500),
        ) {
            let mut reach = Reach::default();
            let mut now = Duration::ZERO;
            for (since, pause) in waits {
                now += Duration::from_micros(pause);
                reach.came(now);
                reach.served(now.saturating_sub(Duration::from_micros(since)), now);
                let pages = reach.pages();
                prop_assert!(pages == 1 || (REACH_MIN..=REACH_MAX).contains(&pages));
                prop_assert!(pages.is_power_of_two());
            }
        }
    }
}
