//! Where one process keeps its lazy pages now: run-time address to dump-time page, split on remap and unmap.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use common::images::DumpedVma;
use common::lazy_map::LazyMap;
use common::page::{PageIndex, PageRange};
use common::page_set::PageSet;
use serde::{Deserialize, Serialize};

use super::departures::{Departures, Displaced, without};

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
    departures: Departures,
    /// Taken over from a parent, perhaps with mappings that were gone by the time of the fork.
    inherited: bool,
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

/// An address space at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SpaceState {
    /// First run-time page, and the pages that were dumped.
    segments: Vec<(PageIndex, PageRange)>,
    present: Vec<u64>,
    removed: Vec<u64>,
    departures: Departures,
    inherited: bool,
}

impl AddressSpace {
    /// The address space at this moment.
    pub fn state(&self) -> SpaceState {
        let segments = self.segments.iter();
        SpaceState {
            segments: segments
                .map(|(at, segment)| (*at, PageRange::new(segment.dump, segment.count)))
                .collect(),
            present: self.present.words().to_vec(),
            removed: self.removed.words().to_vec(),
            departures: self.departures.clone(),
            inherited: self.inherited,
        }
    }

    /// The address space of a state; `None` when it is of another process.
    pub fn from_state(lazy: Arc<LazyMap>, state: SpaceState) -> Option<Self> {
        let mut space = AddressSpace {
            segments: BTreeMap::new(),
            by_dump: BTreeMap::new(),
            present: PageSet::from_words(state.present, lazy.slots())?,
            removed: PageSet::from_words(state.removed, lazy.slots())?,
            departures: state.departures,
            inherited: state.inherited,
            lazy,
        };
        for (at, dump) in state.segments {
            space.insert(at, dump);
        }
        Some(space)
    }

    /// The address space as it was at the freeze: every lazy page missing, at its dump-time address.
    ///
    /// Lazy pages outside every lazy mapping count as removed: nothing can take them.
    pub fn as_dumped(lazy: Arc<LazyMap>, vmas: &[DumpedVma]) -> Self {
        let mut space = AddressSpace {
            segments: BTreeMap::new(),
            by_dump: BTreeMap::new(),
            present: PageSet::empty(lazy.slots()),
            removed: PageSet::full(lazy.slots()),
            departures: Departures::default(),
            inherited: false,
            lazy,
        };
        for vma in vmas.iter().filter(|vma| vma.lazy) {
            for (_, slots) in Arc::clone(&space.lazy).slots_within(vma.pages) {
                space.removed.remove_range(slots);
            }
            // A mapping without lazy pages is noted too: it tells when a late event speaks of what was there before.
            space.insert(vma.pages.start, vma.pages);
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

    /// The address space of a child that was forked just now.
    pub fn forked(&self) -> Self {
        let mut child = self.clone();
        // What threads of the parent have yet to report is never reported of the child, which lost it nonetheless. So
        // nothing is coming, and what is noted at a place proves nothing.
        child.assume_quiet();
        child.inherited = true;
        child
    }

    /// The kernel takes pages, which it does only when it has nothing to report: what was still expected never comes.
    pub fn assume_quiet(&mut self) {
        if !self.departures.is_empty() {
            let lost = self.departures.clear();
            self.remove_dumps(lost.iter().map(|pages| pages.dump));
        }
    }

    /// Whether only an event that is still to come tells where some of `slots` belong.
    pub fn is_displaced(&self, slots: Range<usize>) -> bool {
        let dumps = self.departures.displaced().iter().map(|pages| pages.dump);
        let mut within = dumps.flat_map(|dump| self.lazy.slots_within(dump));
        within.any(|(_, lost)| {
            let mut both = lost.start.max(slots.start)..lost.end.min(slots.end);
            both.any(|slot| self.is_missing(slot))
        })
    }

    /// `mremap` moved `from` to `to`.
    pub fn remap(&mut self, from: PageRange, to: PageIndex) {
        let moved = self.depart(from);
        self.departures.vacate(from, &moved);
        let over = self.take(PageRange::new(to, from.count));
        if self.inherited {
            self.remove_dumps(over.iter().map(|pages| pages.dump));
        } else {
            self.departures.displace(over);
        }
        for pages in moved {
            let place = to.forward(pages.at.distance_from(from.start));
            self.insert(place, pages.dump);
        }
    }

    /// Takes out what an event says has left `pages`: what others were moved over before, else what is there.
    fn depart(&mut self, pages: PageRange) -> Vec<Displaced> {
        let mut left = self.departures.take_displaced(pages);
        let places: Vec<PageRange> = left.iter().map(Displaced::place).collect();
        for rest in without(vec![pages], &places) {
            left.extend(self.take(rest));
        }
        left
    }

    /// The content of `pages` was dropped but they stay mapped; returns the slots that were missing.
    pub fn remove(&mut self, pages: PageRange) -> Vec<Range<usize>> {
        let dumps = self.dumps_within(pages);
        self.remove_dumps(dumps)
    }

    /// `pages` were unmapped; returns the slots that were missing.
    pub fn unmap(&mut self, pages: PageRange) -> Vec<Range<usize>> {
        let unexpected = self.departures.consume_vacated(pages);
        let mut left = Vec::new();
        for part in unexpected {
            left.extend(self.depart(part));
        }
        self.remove_dumps(left.iter().map(|pages| pages.dump))
    }

    fn remove_dumps(&mut self, dumps: impl IntoIterator<Item = PageRange>) -> Vec<Range<usize>> {
        let mut missing = Vec::new();
        for dump in dumps {
            let lazy = Arc::clone(&self.lazy);
            for (_, slots) in lazy.slots_within(dump) {
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
    fn take(&mut self, pages: PageRange) -> Vec<Displaced> {
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
            taken.push(Displaced {
                at: part.start,
                dump: dump_of(part),
            });
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
