//! The lazy pages of one dumped process, numbered without gaps.
//!
//! Both ends build this from the same `pagemap-PID.img`, so a *slot* means the same page on both. Dense numbers
//! make every per-page state a bitmap, whatever holes the address space has.

use std::ops::Range;

use crate::limits::MAX_LAZY_PAGES;
use crate::page::{PageIndex, PageRange};

/// Dump-time page ranges in address order, each with the slot of its first page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LazyMap {
    runs: Vec<Run>,
    slots: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    pages: PageRange,
    first_slot: usize,
}

/// Why a list of ranges is no lazy map.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LazyMapError {
    /// Ranges overlap or are not in address order.
    #[error("pagemap entries overlap or are out of order at page {0:?}")]
    OutOfOrder(PageIndex),
    /// A range leaves the address space.
    #[error("pagemap entry at page {0:?} leaves the address space")]
    NotAddressable(PageIndex),
    /// More pages than one process of this program's limits can have.
    #[error("the pagemap lists more than {MAX_LAZY_PAGES} lazy pages")]
    TooManyPages,
}

impl LazyMap {
    /// Builds the map from ranges in ascending address order; adjacent ranges are joined.
    pub fn new(ranges: impl IntoIterator<Item = PageRange>) -> Result<Self, LazyMapError> {
        let mut map = LazyMap::default();
        for pages in ranges {
            map.append(pages)?;
        }
        Ok(map)
    }

    fn append(&mut self, pages: PageRange) -> Result<(), LazyMapError> {
        if pages.count == 0 {
            return Ok(());
        }
        if !pages.is_addressable() {
            return Err(LazyMapError::NotAddressable(pages.start));
        }
        if self.slots as u64 + pages.count > MAX_LAZY_PAGES {
            return Err(LazyMapError::TooManyPages);
        }
        let first_slot = self.slots;
        self.slots += pages.count as usize;
        match self.runs.last_mut() {
            Some(last) if last.pages.end() > pages.start => {
                Err(LazyMapError::OutOfOrder(pages.start))
            }
            Some(last) if last.pages.end() == pages.start => {
                last.pages.count += pages.count;
                Ok(())
            }
            _ => {
                self.runs.push(Run { pages, first_slot });
                Ok(())
            }
        }
    }

    /// How many lazy pages there are.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// The runs of lazy pages in address order.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = PageRange> {
        self.runs.iter().map(|run| run.pages)
    }

    /// The slot of a page, or `None` when the page is not lazy.
    pub fn slot(&self, page: PageIndex) -> Option<usize> {
        let run = self.run_at_or_before(page)?;
        run.pages
            .contains(page)
            .then(|| run.first_slot + page.distance_from(run.pages.start) as usize)
    }

    /// The page of a slot.
    pub fn page(&self, slot: usize) -> PageIndex {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        let index = self.runs.partition_point(|run| run.first_slot <= slot) - 1;
        let run = self.runs[index];
        run.pages.start.forward((slot - run.first_slot) as u64)
    }

    /// The slots of a page range when all of its pages are lazy.
    pub fn slots_of(&self, pages: PageRange) -> Option<Range<usize>> {
        if pages.count == 0 {
            return None;
        }
        let run = self.run_at_or_before(pages.start)?;
        let all_lazy = pages.is_addressable() && run.pages.intersect(pages) == Some(pages);
        all_lazy.then(|| {
            let first = run.first_slot + pages.start.distance_from(run.pages.start) as usize;
            first..first + pages.count as usize
        })
    }

    /// The lazy parts of a page range, in address order, each with its slots.
    pub fn slots_within(
        &self,
        pages: PageRange,
    ) -> impl Iterator<Item = (PageRange, Range<usize>)> {
        let from = self
            .runs
            .partition_point(|run| run.pages.end() <= pages.start);
        self.runs[from..].iter().map_while(move |run| {
            let part = run.pages.intersect(pages)?;
            let first = run.first_slot + part.start.distance_from(run.pages.start) as usize;
            Some((part, first..first + part.count as usize))
        })
    }

    /// The page range that starts at `slot` and holds at most `slots` slots without leaving its run.
    pub fn contiguous(&self, slots: Range<usize>) -> PageRange {
        assert!(slots.start < slots.end && slots.end <= self.slots);
        let index = self
            .runs
            .partition_point(|run| run.first_slot <= slots.start)
            - 1;
        let run = self.runs[index];
        let skip = (slots.start - run.first_slot) as u64;
        PageRange::new(
            run.pages.start.forward(skip),
            (run.pages.count - skip).min(slots.len() as u64),
        )
    }

    fn run_at_or_before(&self, page: PageIndex) -> Option<&Run> {
        let after = self.runs.partition_point(|run| run.pages.start <= page);
        self.runs[..after].last()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex(start), count)
    }

    fn map() -> LazyMap {
        LazyMap::new([range(10, 3), range(13, 2), range(100, 4)]).expect("ranges are in order")
    }

    #[test]
    fn slots_and_pages_are_inverse() {
        let map = map();
        assert_eq!(map.slots(), 9);
        assert_eq!(map.ranges().count(), 2, "adjacent ranges are joined");
        for slot in 0..map.slots() {
            assert_eq!(map.slot(map.page(slot)), Some(slot));
        }
        assert_eq!(map.slot(PageIndex(9)), None);
        assert_eq!(map.slot(PageIndex(15)), None);
        assert_eq!(map.slot(PageIndex(104)), None);
    }

    #[test]
    fn only_wholly_lazy_ranges_have_slots() {
        let map = map();
        assert_eq!(map.slots_of(range(11, 4)), Some(1..5));
        assert_eq!(map.slots_of(range(11, 5)), None);
        assert_eq!(map.slots_of(range(99, 2)), None);
        assert_eq!(map.slots_of(range(11, 0)), None);
        assert_eq!(map.slots_of(range(11, u64::MAX)), None);
    }

    #[test]
    fn parts_within_a_range_skip_the_holes() {
        let parts: Vec<_> = map().slots_within(range(12, 90)).collect();
        assert_eq!(parts, [(range(12, 3), 2..5), (range(100, 2), 5..7)]);
        assert_eq!(map().slots_within(range(15, 85)).count(), 0);
    }

    #[test]
    fn contiguous_stops_at_the_end_of_a_run() {
        assert_eq!(map().contiguous(3..9), range(13, 2));
        assert_eq!(map().contiguous(5..6), range(100, 1));
    }

    #[test]
    fn bad_ranges_are_refused() {
        assert_eq!(
            LazyMap::new([range(5, 2), range(6, 1)]),
            Err(LazyMapError::OutOfOrder(PageIndex(6)))
        );
        assert_eq!(
            LazyMap::new([range(1, u64::MAX)]),
            Err(LazyMapError::NotAddressable(PageIndex(1)))
        );
        assert_eq!(
            LazyMap::new([range(1, MAX_LAZY_PAGES + 1)]),
            Err(LazyMapError::TooManyPages)
        );
    }
}
