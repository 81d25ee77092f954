//! How many neighbours to ask for with a fault: trends in the fault history.
//!
//! A *stream* is a run of faults that go one way in small steps; several can be followed at a time (threads that scan
//! side by side). A fault that continues a stream doubles its window up to a whole frame. A fault that continues none
//! begins one, and gets neighbours only while such beginnings have lately proved worth it: the pages of a random walk
//! cost both ends as much as the fault itself and are not wanted.

use std::collections::VecDeque;
use std::ops::Range;

use common::limits::MAX_FRAME_PAGES;

/// Neighbours asked for where faults may show a direction: four pages in one answer cost 9 % more than one (measured).
const WINDOW_MIN: usize = 3;
/// Most neighbours: what one answer carries.
const WINDOW_MAX: usize = MAX_FRAME_PAGES;
/// A fault this close to where a stream's last window ended continues it.
const NEAR: usize = 2 * MAX_FRAME_PAGES;
/// Streams followed at the same time.
const MAX_STREAMS: usize = 8;
/// Faults by which the worth of neighbours is judged.
const HISTORY: u32 = 32;
/// Of the last [`HISTORY`] faults this many must have continued a stream before one that continues none gets neighbours.
const WORTH: u32 = 4;

/// Follows the faults of one family.
#[derive(Clone, Debug)]
pub struct Prefetch {
    /// The most recent first.
    streams: VecDeque<Stream>,
    /// One bit for each of the last faults, the latest lowest: whether it continued a stream.
    continued: u32,
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
            // Nothing is known yet: neighbours get the benefit of the doubt.
            continued: (1 << WORTH) - 1,
        }
    }
}

impl Prefetch {
    /// The slots worth asking for besides `slot`, which just faulted; there are `slots` slots.
    pub fn window(&mut self, slot: usize, slots: usize) -> Range<usize> {
        let continued = self
            .streams
            .iter()
            .position(|stream| stream.continues(slot));
        self.continued = self.continued << 1 | u32::from(continued.is_some());
        let stream = match continued.and_then(|index| self.streams.remove(index)) {
            Some(stream) => stream.after(slot),
            None => Stream {
                last: slot,
                window: self.first_window(),
                direction: None,
            },
        };
        self.streams.truncate(MAX_STREAMS - 1);
        self.streams.push_front(stream);
        stream.wanted(slots)
    }

    /// Neighbours of a fault that continues no stream.
    fn first_window(&self) -> usize {
        const { assert!(HISTORY == u32::BITS) }
        match self.continued.count_ones() >= WORTH {
            true => WINDOW_MIN,
            false => 0,
        }
    }
}

impl Stream {
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
        for _ in 0..5 {
            let window = prefetch.window(slot, 10_000);
            assert_eq!(window.start, slot + 1);
            sizes.push(window.len());
            slot = window.end;
        }
        assert_eq!(sizes, [3, 6, 12, 16, 16]);
    }

    #[test]
    fn a_scan_downwards_asks_for_what_lies_below() {
        let mut prefetch = Prefetch::default();
        prefetch.window(500, 1000);
        let window = prefetch.window(499, 1000);
        assert_eq!(window.end, 499);
        assert!(window.len() > WINDOW_MIN);
    }

    #[test]
    fn scans_side_by_side_each_get_their_window() {
        let mut prefetch = Prefetch::default();
        let mut places = [0, 100_000, 200_000];
        let mut last = [0; 3];
        for _ in 0..6 {
            for (place, last) in places.iter_mut().zip(&mut last) {
                let window = prefetch.window(*place, 1_000_000);
                *last = window.len();
                *place = window.end;
            }
        }
        assert_eq!(last, [WINDOW_MAX; 3]);
    }

    #[test]
    fn random_faults_soon_get_no_neighbours() {
        let mut prefetch = Prefetch::default();
        let mut slot = 1;
        let mut asked = 0;
        for _ in 0..1000 {
            // Steps far beyond what any stream reaches.
            slot = (slot + 7_919) % 1_000_000;
            asked += prefetch.window(slot, 1_000_000).len();
        }
        assert!(asked <= HISTORY as usize * WINDOW_MIN, "{asked}");
    }

    #[test]
    fn a_scan_after_random_faults_is_recognised() {
        let mut prefetch = Prefetch::default();
        for step in 0..1000 {
            prefetch.window(step * 7_919 % 1_000_000, 1_000_000);
        }
        let mut slot = 500;
        let mut faults = 0;
        while slot < 700 {
            slot = prefetch.window(slot, 1_000_000).end;
            faults += 1;
        }
        assert!(faults < 20, "{faults}");
    }

    #[test]
    fn the_window_stays_within_the_slots() {
        let mut prefetch = Prefetch::default();
        assert_eq!(prefetch.window(9, 10), 10..10);
        assert_eq!(prefetch.window(8, 10), 2..8);
        assert_eq!(prefetch.window(0, 10).end, 0);
    }
}

#[cfg(test)]
mod traces;
