//! Where one process keeps its lazy pages now: run-time address to dump-time page, split on remap and unmap.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use common::images::DumpedVma;
use common::lazy_map::LazyMap;
use common::page::{PageIndex, PageRange};
use common::page_set::PageSet;

/// Ranges of a `REMAP` whose `UNMAP` has not come yet that are remembered at most.
const MAX_EXPECTED_UNMAPS: usize = 1024;

/// One process's view of its family's pages.
#[derive(Clone, Debug)]
pub struct AddressSpace {
    lazy: Arc<LazyMap>,
    /// By first run-time page. Each lies in one mapping, so that one install never crosses two.
    segments: BTreeMap<PageIndex, Segment>,
    /// First dump-time page of each segment to its first run-time page.
    by_dump: BTreeMap<PageIndex, PageIndex>,
    present: PageSet,
    removed: PageSet,
    expected_unmaps: Vec<PageRange>,
}

/// `count` pages that were dumped from `dump` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    dump: PageIndex,
    count: u64,
}

/// Consecutive slots that belong at consecutive run-time pages of one mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where the pages belong now.
    pub target: PageRange,
    /// The first slot.
    pub slot: usize,
}

impl AddressSpace {
    /// The address space as it was at the freeze: every lazy page missing, at its dump-time address.
    ///
    /// Lazy pages outside every lazy mapping count as removed: nothing can take them.
    pub fn as_dumped(lazy: Arc<LazyMap>, vmas: &[DumpedVma]) -> Self {
        let mut space = AddressSpace {
            segments: BTreeMap::new(),
            by_dump: BTreeMap::new(),
            present: PageSet::empty(lazy.slots()),
            removed: PageSet::full(lazy.slots()),
            expected_unmaps: Vec::new(),
            lazy,
        };
        for vma in vmas.iter().filter(|vma| vma.lazy) {
            let slots: Vec<_> = space.lazy.slots_within(vma.pages).collect();
            for (_, slots) in &slots {
                space.removed.remove_range(slots.clone());
            }
            if !slots.is_empty() {
                space.insert(vma.pages.start, vma.pages);
            }
        }
        space
    }

    fn insert(&mut self, at: PageIndex, dump: PageRange) {
        self.segments.insert(
            at,
            Segment {
                dump: dump.start,
                count: dump.count,
            },
        );
        self.by_dump.insert(dump.start, at);
    }

    /// The slot of the lazy page that belongs at `page` now, unless it was removed.
    pub fn slot_at(&self, page: PageIndex) -> Option<usize> {
        let (at, segment) = self.segments.range(..=page).next_back()?;
        let skip = page.distance_from(*at);
        if skip >= segment.count {
            return None;
        }
        let slot = self.lazy.slot(segment.dump.forward(skip))?;
        (!self.removed.contains(slot)).then_some(slot)
    }

    /// Whether the page is in place.
    pub fn is_present(&self, slot: usize) -> bool {
        self.present.contains(slot)
    }

    /// Whether the process removed the page.
    pub fn is_removed(&self, slot: usize) -> bool {
        self.removed.contains(slot)
    }

    /// Whether the process still needs the page.
    pub fn is_missing(&self, slot: usize) -> bool {
        !self.present.contains(slot) && !self.removed.contains(slot)
    }

    /// Whether no page is missing.
    pub fn is_settled(&self) -> bool {
        self.present.count() + self.removed.count() == self.lazy.slots()
    }

    /// Pages the process removed.
    pub fn removed_pages(&self) -> usize {
        self.removed.count()
    }

    /// Runs of slots that are missing.
    pub fn missing_runs(&self) -> impl Iterator<Item = Range<usize>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = self.next_missing(from)?;
            let end = (start..self.lazy.slots())
                .find(|slot| !self.is_missing(*slot))
                .unwrap_or(self.lazy.slots());
            from = end;
            Some(start..end)
        })
    }

    fn next_missing(&self, mut from: usize) -> Option<usize> {
        loop {
            let slot = self.present.next_out(from)?;
            if !self.removed.contains(slot) {
                return Some(slot);
            }
            from = self.removed.next_out(slot)?;
        }
    }

    /// Where the missing ones of `slots` belong.
    pub fn missing_pieces(&self, slots: Range<usize>) -> impl Iterator<Item = Piece> {
        let runs = split(slots, |slot| self.is_missing(slot));
        runs.flat_map(|run| self.pieces(run))
    }

    /// Where `slots` belong, whatever their state, in runs of one mapping.
    fn pieces(&self, slots: Range<usize>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut rest = slots;
        while !rest.is_empty() {
            let dump = self.lazy.contiguous(rest.clone());
            self.pieces_of_run(dump, rest.start, &mut pieces);
            rest.start += dump.count as usize;
        }
        pieces
    }

    fn pieces_of_run(&self, dump: PageRange, slot: usize, pieces: &mut Vec<Piece>) {
        let first = self.by_dump.range(..=dump.start).next_back();
        let later = self
            .by_dump
            .range(dump.start..dump.end())
            .filter(|(start, _)| **start > dump.start);
        for (_, at) in first.into_iter().chain(later) {
            let segment = self.segments[at];
            let whole = PageRange::new(segment.dump, segment.count);
            if let Some(part) = whole.intersect(dump) {
                let skip = part.start.distance_from(segment.dump);
                pieces.push(Piece {
                    target: PageRange::new(at.forward(skip), part.count),
                    slot: slot + part.start.distance_from(dump.start) as usize,
                });
            }
        }
    }

    /// Records that slots are in place.
    pub fn mark_present(&mut self, slots: Range<usize>) {
        for slot in slots {
            if !self.removed.contains(slot) {
                self.present.insert(slot);
            }
        }
    }

    /// `mremap` moved `from` to `to`. Whatever was noted at the target was unmapped by the same call.
    pub fn remap(&mut self, from: PageRange, to: PageIndex) {
        let moved = self.take(from);
        // The kernel reports the move and, only when the caller runs on, the unmapping of the old place. Meanwhile
        // another thread may have moved other pages there, which that late report must not drop.
        if self.expected_unmaps.len() < MAX_EXPECTED_UNMAPS {
            self.expected_unmaps.push(from);
        }
        let target = PageRange::new(to, from.count);
        self.drop_segments(target);
        for (at, dump) in moved {
            let place = to.forward(at.distance_from(from.start));
            self.insert(place, dump);
        }
    }

    /// The content of `pages` was dropped but they stay mapped; returns the slots that were missing.
    pub fn remove(&mut self, pages: PageRange) -> Vec<Range<usize>> {
        let dumps = self.dumps_within(pages);
        self.remove_dumps(&dumps)
    }

    /// `pages` were unmapped; returns the slots that were missing.
    pub fn unmap(&mut self, pages: PageRange) -> Vec<Range<usize>> {
        let expected = self
            .expected_unmaps
            .iter()
            .position(|range| *range == pages);
        if let Some(index) = expected {
            self.expected_unmaps.swap_remove(index);
            return Vec::new();
        }
        self.drop_segments(pages)
    }

    fn drop_segments(&mut self, pages: PageRange) -> Vec<Range<usize>> {
        let taken = self.take(pages);
        let dumps: Vec<PageRange> = taken.into_iter().map(|(_, dump)| dump).collect();
        self.remove_dumps(&dumps)
    }

    fn remove_dumps(&mut self, dumps: &[PageRange]) -> Vec<Range<usize>> {
        let mut missing = Vec::new();
        for dump in dumps {
            let lazy = Arc::clone(&self.lazy);
            for (_, slots) in lazy.slots_within(*dump) {
                missing.extend(split(slots.clone(), |slot| self.is_missing(slot)));
                self.present.remove_range(slots.clone());
                self.removed.insert_range(slots);
            }
        }
        missing
    }

    /// Dump-time ranges of what belongs within `pages`.
    fn dumps_within(&self, pages: PageRange) -> Vec<PageRange> {
        let mut dumps = Vec::new();
        for (at, segment) in self.overlapping(pages) {
            let whole = PageRange::new(at, segment.count);
            if let Some(part) = whole.intersect(pages) {
                let skip = part.start.distance_from(at);
                dumps.push(PageRange::new(segment.dump.forward(skip), part.count));
            }
        }
        dumps
    }

    fn overlapping(&self, pages: PageRange) -> Vec<(PageIndex, Segment)> {
        let before = self.segments.range(..pages.start).next_back();
        let within = self.segments.range(pages.start..pages.end());
        before
            .into_iter()
            .chain(within)
            .map(|(at, segment)| (*at, *segment))
            .filter(|(at, segment)| {
                PageRange::new(*at, segment.count)
                    .intersect(pages)
                    .is_some()
            })
            .collect()
    }

    /// Takes everything within `pages` out of the map; what sticks out stays.
    fn take(&mut self, pages: PageRange) -> Vec<(PageIndex, PageRange)> {
        let mut taken = Vec::new();
        for (at, segment) in self.overlapping(pages) {
            self.segments.remove(&at);
            self.by_dump.remove(&segment.dump);
            let whole = PageRange::new(at, segment.count);
            let part = whole.intersect(pages).expect("it overlaps");
            let dump_of = |range: PageRange| {
                PageRange::new(
                    segment.dump.forward(range.start.distance_from(at)),
                    range.count,
                )
            };
            taken.push((part.start, dump_of(part)));
            let head = PageRange::new(at, part.start.distance_from(at));
            let tail = PageRange::new(part.end(), whole.end().distance_from(part.end()));
            for stays in [head, tail] {
                if stays.count > 0 {
                    self.insert(stays.start, dump_of(stays));
                }
            }
        }
        taken
    }
}

/// The runs within `slots` whose every member satisfies `keep`.
fn split(slots: Range<usize>, keep: impl Fn(usize) -> bool) -> impl Iterator<Item = Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for slot in slots.filter(|slot| keep(*slot)) {
        match runs.last_mut() {
            Some(run) if run.end == slot => run.end += 1,
            _ => runs.push(slot..slot + 1),
        }
    }
    runs.into_iter()
}
