//! What left its place although the event that says so has not been read.
//!
//! The kernel changes an address space first and reports it a moment later, thread by thread. So while one thread has
//! yet to report that pages were unmapped or moved away, another may report that it moved its own pages to that very
//! place: a `realloc` takes the first hole there is. Until the first report comes, both belong to the same addresses.
//! Whoever arrives there while another is noted there proves that the other has left: its report is on the way, and it
//! is the one the next departure from there speaks of.

use common::page::{PageIndex, PageRange};
use serde::{Deserialize, Serialize};

/// Old places of moves that are remembered at most, should the kernel never say that it takes pages again.
const MAX_VACATED: usize = 1024;

/// Reports that are still to come.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Departures {
    /// Old places of moves: each is reported as unmapped once more.
    vacated: Vec<PageRange>,
    /// Pages that others were moved over, oldest first.
    displaced: Vec<Displaced>,
}

/// Dump-time pages that were at `at` when others came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Displaced {
    /// Their first run-time page then.
    pub at: PageIndex,
    /// Themselves.
    pub dump: PageRange,
}

impl Displaced {
    /// Where they were.
    pub fn place(&self) -> PageRange {
        PageRange::new(self.at, self.dump.count)
    }

    /// The part that was in `place`, which must lie within.
    fn part(&self, place: PageRange) -> Displaced {
        let skip = place.start.distance_from(self.at);
        Displaced {
            at: place.start,
            dump: PageRange::new(self.dump.start.forward(skip), place.count),
        }
    }
}

impl Departures {
    /// Whether no report is to come.
    pub fn is_empty(&self) -> bool {
        self.vacated.is_empty() && self.displaced.is_empty()
    }

    /// Pages whose whereabouts a report has yet to tell.
    pub fn displaced(&self) -> &[Displaced] {
        &self.displaced
    }

    /// Everything is forgotten; returns the pages whose whereabouts nothing told.
    pub fn clear(&mut self) -> Vec<Displaced> {
        self.vacated.clear();
        std::mem::take(&mut self.displaced)
    }

    /// `from` was moved away, `moved` being what was noted there. The unmapping of `from` is reported next.
    pub fn vacate(&mut self, from: PageRange, moved: &[Displaced]) {
        let places: Vec<PageRange> = moved.iter().map(Displaced::place).collect();
        // Nothing was noted at the rest: either nothing was there, or what a move with MREMAP_DONTUNMAP left behind,
        // whose unmapping is expected already.
        let rest = without(vec![from], &places);
        let news = without(rest, &self.vacated);
        self.vacated.extend(places);
        self.vacated.extend(news);
        let excess = self.vacated.len().saturating_sub(MAX_VACATED);
        self.vacated.drain(..excess);
    }

    /// Notes pages that others were moved over.
    pub fn displace(&mut self, pages: Vec<Displaced>) {
        self.displaced.extend(pages);
    }

    /// `pages` are reported as unmapped; returns those of which that was not expected.
    pub fn consume_vacated(&mut self, pages: PageRange) -> Vec<PageRange> {
        let mut rest = vec![pages];
        let mut kept = Vec::new();
        for vacated in std::mem::take(&mut self.vacated) {
            kept.extend(without(vec![vacated], &rest));
            rest = without(rest, &[vacated]);
        }
        self.vacated = kept;
        rest
    }

    /// Takes out what `pages` held before others were moved over it: of each page the oldest.
    pub fn take_displaced(&mut self, pages: PageRange) -> Vec<Displaced> {
        let mut rest = vec![pages];
        let mut kept = Vec::new();
        let mut taken = Vec::new();
        for displaced in std::mem::take(&mut self.displaced) {
            let place = displaced.place();
            let stays = without(vec![place], &rest);
            let leaves = without(vec![place], &stays);
            taken.extend(leaves.iter().map(|part| displaced.part(*part)));
            kept.extend(stays.into_iter().map(|part| displaced.part(part)));
            rest = without(rest, &[place]);
        }
        self.displaced = kept;
        taken
    }
}

/// The parts of `ranges` that none of `holes` covers.
pub fn without(ranges: Vec<PageRange>, holes: &[PageRange]) -> Vec<PageRange> {
    holes.iter().fold(ranges, |ranges, hole| {
        let parts = ranges.into_iter().flat_map(|range| cut(range, *hole));
        parts.filter(|part| part.count > 0).collect()
    })
}

/// What is left of a range before and after a hole.
fn cut(range: PageRange, hole: PageRange) -> [PageRange; 2] {
    let Some(both) = range.intersect(hole) else {
        return [range, PageRange::default()];
    };
    let before = both.start.distance_from(range.start);
    let after = range.end().distance_from(both.end());
    [
        PageRange::new(range.start, before),
        PageRange::new(both.end(), after),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex(start), count)
    }

    fn pages(at: u64, dump: u64, count: u64) -> Displaced {
        Displaced {
            at: PageIndex(at),
            dump: range(dump, count),
        }
    }

    #[test]
    fn holes_are_cut_out() {
        let rest = without(
            vec![range(0, 10), range(20, 2)],
            &[range(2, 3), range(9, 12)],
        );
        assert_eq!(rest, [range(0, 2), range(5, 4), range(21, 1)]);
        assert_eq!(without(rest, &[range(0, 30)]), []);
    }

    #[test]
    fn an_expected_report_counts_once() {
        let mut departures = Departures::default();
        departures.vacate(range(10, 4), &[pages(10, 100, 4)]);
        assert_eq!(departures.consume_vacated(range(8, 4)), [range(8, 2)]);
        assert_eq!(departures.consume_vacated(range(10, 4)), [range(10, 2)]);
        assert!(departures.is_empty());
    }

    #[test]
    fn what_a_move_left_mapped_is_expected_once() {
        let mut departures = Departures::default();
        departures.vacate(range(10, 4), &[pages(10, 100, 4)]);
        departures.vacate(range(10, 4), &[]);
        assert_eq!(departures.consume_vacated(range(10, 4)), []);
        assert!(departures.is_empty());
    }

    #[test]
    fn the_oldest_layer_leaves_first() {
        let mut departures = Departures::default();
        departures.displace(vec![pages(10, 100, 4)]);
        departures.displace(vec![pages(11, 200, 1)]);
        let first = departures.take_displaced(range(11, 2));
        assert_eq!(first, [pages(11, 101, 2)]);
        assert_eq!(departures.take_displaced(range(11, 1)), [pages(11, 200, 1)]);
        assert_eq!(departures.clear(), [pages(10, 100, 1), pages(13, 103, 1)]);
    }
}
