//! How many neighbours to ask for with a fault: trends in the fault history.
//!
//! A *stream* is a run of faults that go one way in small steps; several can be followed at a time (threads that scan
//! side by side). A fault that continues a stream doubles its window up to a whole frame. A fault that continues none
//! begins one, and gets the block it lies in where [`Reach`](super::reach::Reach) says so, else nothing but its page: what
//! comes along is in the way of the next fault, and the source pushes what lies around a fault before anything else.

use std::collections::VecDeque;
use std::ops::Range;

use common::limits::MAX_FRAME_PAGES;

/// Neighbours asked for where faults begin to show a direction: four pages in one answer cost 9 % more than one (measured).
const WINDOW_MIN: usize = 3;
/// Most neighbours: what one answer carries.
const WINDOW_MAX: usize = MAX_FRAME_PAGES;
/// A fault this close to where a stream's last window ended continues it.
const NEAR: usize = 2 * MAX_FRAME_PAGES;
/// Streams followed at the same time.
const MAX_STREAMS: usize = 8;
/// Follows the faults of one family.
#[derive(Clone, Debug)]
pub struct Prefetch {
    /// The most recent first.
    streams: VecDeque<Stream>,
}

/// Faults that go one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stream {
    /// The last fault.
    last: usize,
    /// Neighbours asked for with it.
    window: usize,
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
        }
    }
}

impl Prefetch {
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
                let stream = stream.after(slot);
                (stream, stream.wanted(slots))
            }
            None => (Stream::begun(slot), block(slot, slots, reach)),
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
    fn begun(slot: usize) -> Self {
        Stream {
            last: slot,
            window: 0,
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

    fn after(self, slot: usize) -> Self {
        let direction = match slot > self.last {
            true => Direction::Up,
            false => Direction::Down,
        };
        Stream {
            last: slot,
            window: (self.window * 2).clamp(WINDOW_MIN, WINDOW_MAX),
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
        let mut prefetch = Prefetch::default();
        let mut slot = 100;
        let mut sizes = Vec::new();
        for _ in 0..6 {
            let window = prefetch.window(slot, 10_000, 1);
            sizes.push(window.len());
            slot = window.end.max(slot + 1);
        }
        assert_eq!(sizes, [0, 3, 6, 12, 16, 16]);
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
        assert_eq!(last, [WINDOW_MAX; 3]);
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
