//! How many neighbours to ask for with a fault: trends in the fault history.
//!
//! A *stream* is a run of faults that go one way in small steps; several can be followed at a time (threads that scan
//! side by side). A fault that continues a stream doubles its window up to a whole frame, and up to four where windows are
//! used up in no time: who only scans gets on as fast as faults are served, and each costs both ends as much as a dozen
//! pages. A fault that continues none begins one, and gets the block it lies in where [`Reach`](super::reach::Reach) says
//! so, else nothing but its page: what comes along is in the way of the next fault, and the source pushes what lies around
//! a fault before anything else.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use common::limits::MAX_FRAME_PAGES;

/// Neighbours asked for where faults begin to show a direction: four pages in one answer cost 9 % more than one (measured).
const WINDOW_MIN: usize = 3;
/// Most neighbours, as a rule: what one answer carries.
const WINDOW_USUAL: usize = MAX_FRAME_PAGES;
/// Most neighbours of a stream whose windows are used up within [`QUICK`].
const WINDOW_MAX: usize = 4 * MAX_FRAME_PAGES;
/// What a window may take, from one fault of a stream to the next. Another thread's fault may have to wait for it.
const QUICK: Duration = Duration::from_micros(500);
/// A fault this close to where a stream's last window ended continues it.
const NEAR: usize = 2 * MAX_FRAME_PAGES;
/// Streams followed at the same time.
const MAX_STREAMS: usize = 8;
/// Follows the faults of one family.
#[derive(Clone, Debug)]
pub struct Prefetch {
    /// The most recent first.
    streams: VecDeque<Stream>,
    /// When what was asked for last came, since any fixed moment.
    came: Duration,
}

/// Faults that go one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stream {
    /// The last fault.
    last: usize,
    /// Neighbours asked for with it.
    window: usize,
    /// Until when everything that was asked for before had come.
    since: Duration,
    /// Unknown before the second fault.
    direction: Option<Direction>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

impl Default for Prefetch {
    fn default() -> Self {
        Prefetch {
            streams: VecDeque::with_capacity(MAX_STREAMS),
            came: Duration::ZERO,
        }
    }
}

impl Prefetch {
    /// Pages that were asked for are in place at `now`.
    pub fn came(&mut self, now: Duration) {
        self.came = self.came.max(now);
    }

    /// The slots worth asking for around `slot`, which just faulted; there are `slots` slots. `reach` are the pages of the
    /// block that comes with a fault which continues no stream.
    pub fn window(&mut self, slot: usize, slots: usize, reach: usize) -> Range<usize> {
        let continued = self
            .streams
            .iter()
            .position(|stream| stream.continues(slot));
        let before = continued.and_then(|index| self.streams.remove(index));
        let (stream, window) = match before {
            Some(stream) => {
                let stream = stream.after(slot, self.came);
                (stream, stream.wanted(slots))
            }
            None => (Stream::begun(slot, self.came), block(slot, slots, reach)),
        };
        self.streams.truncate(MAX_STREAMS - 1);
        self.streams.push_front(stream);
        window
    }
}

/// The aligned block of `reach` slots around `slot`: aligned, so that what is missing elsewhere stays in whole frames.
fn block(slot: usize, slots: usize, reach: usize) -> Range<usize> {
    if reach <= 1 {
        return slot..slot;
    }
    let start = slot - slot % reach;
    start..(start + reach).min(slots)
}

impl Stream {
    fn begun(slot: usize, came: Duration) -> Self {
        Stream {
            last: slot,
            window: 0,
            since: came,
            direction: None,
        }
    }

    /// Whether a fault at `slot` goes on where this stream is heading; one that goes back on itself has lost its way.
    fn continues(&self, slot: usize) -> bool {
        let reach = self.window + NEAR;
        let up = slot > self.last && slot - self.last <= reach;
        let down = slot < self.last && self.last - slot <= reach;
        match self.direction {
            Some(Direction::Up) => up,
            Some(Direction::Down) => down,
            None => up || down,
        }
    }

    fn after(self, slot: usize, came: Duration) -> Self {
        // Where nothing has come in between, nothing is known of how long that takes.
        let is_quick = came > self.since && came - self.since <= QUICK;
        let most = if is_quick { WINDOW_MAX } else { WINDOW_USUAL };
        let direction = match slot > self.last {
            true => Direction::Up,
            false => Direction::Down,
        };
        Stream {
            last: slot,
            window: (self.window * 2).clamp(WINDOW_MIN, most),
            since: came,
            direction: Some(direction),
        }
    }

    fn wanted(&self, slots: usize) -> Range<usize> {
        match self.direction.unwrap_or(Direction::Up) {
            Direction::Up => {
                let first = (self.last + 1).min(slots);
                first..(first + self.window).min(slots)
            }
            Direction::Down => self.last.saturating_sub(self.window)..self.last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_widens_the_window_to_a_whole_frame() {
        assert_eq!(scan(|_| 2 * QUICK), [0, 3, 6, 12, 16, 16, 16]);
    }

    #[test]
    fn a_scan_that_only_waits_gets_four_frames_at_a_time() {
        assert_eq!(scan(|_| QUICK), [0, 3, 6, 12, 24, 48, 64]);
    }

    #[test]
    fn nothing_is_quick_before_anything_has_come() {
        assert_eq!(scan(|_| Duration::ZERO), [0, 3, 6, 12, 16, 16, 16]);
    }

    #[test]
    fn windows_that_take_long_become_short_again() {
        let page = QUICK / 20;
        assert_eq!(scan(|pages| page * pages), [0, 3, 6, 12, 24, 16, 32]);
    }

    /// The windows of a scan that uses up one of so many pages in this time.
    fn scan(takes: impl Fn(u32) -> Duration) -> Vec<usize> {
        let mut prefetch = Prefetch::default();
        let (mut slot, mut now) = (100, Duration::ZERO);
        let mut sizes = Vec::new();
        for _ in 0..7 {
            let window = prefetch.window(slot, 10_000, 1);
            sizes.push(window.len());
            now += takes(window.len() as u32);
            prefetch.came(now);
            slot = window.end.max(slot + 1);
        }
        sizes
    }

    #[test]
    fn a_scan_downwards_asks_for_what_lies_below() {
        let mut prefetch = Prefetch::default();
        prefetch.window(500, 1000, 1);
        let window = prefetch.window(499, 1000, 1);
        assert_eq!(window, 496..499);
    }

    #[test]
    fn scans_side_by_side_each_get_their_window() {
        let mut prefetch = Prefetch::default();
        let mut places = [0, 100_000, 200_000];
        let mut last = [0; 3];
        for _ in 0..6 {
            for (place, last) in places.iter_mut().zip(&mut last) {
                let window = prefetch.window(*place, 1_000_000, 1);
                *last = window.len();
                *place = window.end.max(*place + 1);
            }
        }
        assert_eq!(last, [WINDOW_USUAL; 3]);
    }

    #[test]
    fn random_faults_get_the_block_around_them_if_any() {
        for (reach, sizes) in [(1, 0..1), (4, 4..5), (32, 32..33)] {
            let mut prefetch = Prefetch::default();
            let mut slot = 1;
            for _ in 0..1000 {
                // Steps far beyond what any stream reaches.
                slot = (slot + 7_919) % 1_000_000;
                let window = prefetch.window(slot, 1_000_000, reach);
                assert!(sizes.contains(&window.len()), "{window:?}");
                assert!(reach == 1 || window.contains(&slot) && window.start % reach == 0);
            }
        }
    }

    #[test]
    fn a_scan_after_random_faults_is_recognised() {
        let mut prefetch = Prefetch::default();
        for step in 0..1000 {
            prefetch.window(step * 7_919 % 1_000_000, 1_000_000, 1);
        }
        let mut slot = 500;
        let mut faults = 0;
        while slot < 700 {
            slot = prefetch.window(slot, 1_000_000, 1).end.max(slot + 1);
            faults += 1;
        }
        assert!(faults < 20, "{faults}");
    }

    #[test]
    fn the_window_stays_within_the_slots() {
        let mut prefetch = Prefetch::default();
        assert_eq!(prefetch.window(9, 10, 4), 8..10);
        assert_eq!(prefetch.window(8, 10, 4), 5..8);
        assert_eq!(prefetch.window(0, 10, 4), 0..0);
        assert_eq!(Prefetch::default().window(2, 3, 32), 0..3);
    }
}

#[cfg(test)]
mod traces;
