//! What happens to every lazy page: pure, without I/O, clock or threads.
//!
//! A [`Family`] is one dumped process and every process forked from it since it runs here. The dumped process fixes
//! which pages there are (slots of its [`LazyMap`]); each member has an [`AddressSpace`] that says where they belong
//! now. A page crosses the wire once and is installed in every member that still misses it.
//!
//! For each slot exactly one of these holds at any time:
//!
//! * *owed*: it has not come, and no member removed it everywhere;
//! * *received*: it came (and is present in, or was removed by, each member);
//! * *withheld*: every member removed it before it came, and the source has confirmed that it will never send it.

mod address_space;
mod change;
mod departures;
mod prefetch;
mod reach;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use common::images::{DumpedVma, ImagePid};
use common::lazy_map::LazyMap;
use common::limits::MAX_FRAME_PAGES;
use common::page::{PageIndex, PageRange};
use common::page_set::PageSet;

pub use self::address_space::{AddressSpace, Piece};
pub use self::change::{CHANGE_WORDS, Change, FamilyState};
use self::prefetch::Prefetch;
use self::reach::Reach;

/// Runs of neighbours that come with one fault: in more pieces they cost both ends more than they are worth.
const MAX_NEIGHBOUR_RUNS: usize = 4;

/// A member of a family, numbered in the order they appeared; 0 is the restored process itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberId(pub usize);

/// What a page fault asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The page never had content, or the workload removed it: a zero page belongs there.
    Zero,
    /// The page was put in place: it is there, or the kernel took it since and left zeros.
    Present,
    /// The page is already on its way; its arrival wakes the thread.
    Waiting {
        /// The slot the thread waits for.
        slot: usize,
    },
    /// Ask the source, first for the page itself.
    Request {
        /// The slot the thread waits for.
        slot: usize,
        /// The page, by its dump-time address.
        page: PageIndex,
        /// Runs of neighbours worth having, without the page itself.
        neighbours: Vec<PageRange>,
    },
}

/// A run of pages to install in one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Install {
    /// Into which address space.
    pub member: MemberId,
    /// Where, in that address space.
    pub target: PageRange,
    /// First of the slots it carries; they are consecutive.
    pub slot: usize,
}

/// State of one dumped process's memory on this host.
#[derive(Debug)]
pub struct Family {
    pid: ImagePid,
    lazy: Arc<LazyMap>,
    received: PageSet,
    withheld: PageSet,
    /// Asked for on the demand stream and not here yet.
    requested: PageSet,
    /// Told to the source as not needed, not yet confirmed.
    discarding: PageSet,
    members: Vec<Option<AddressSpace>>,
    /// `None`: neighbours are not asked for.
    prefetch: Option<Prefetch>,
    reach: Reach,
}

impl Family {
    /// The family of process `pid` before its address space is known.
    pub fn new(pid: ImagePid, lazy: Arc<LazyMap>) -> Self {
        let slots = lazy.slots();
        Family {
            pid,
            received: PageSet::empty(slots),
            withheld: PageSet::empty(slots),
            requested: PageSet::empty(slots),
            discarding: PageSet::empty(slots),
            members: Vec::new(),
            prefetch: Some(Prefetch::default()),
            reach: Reach::default(),
            lazy,
        }
    }

    /// From now on every page is asked for by itself: a touch of a page that came along would not be seen.
    pub fn fetch_singly(&mut self) {
        self.prefetch = None;
    }

    /// The dumped process.
    pub fn pid(&self) -> ImagePid {
        self.pid
    }

    /// The dumped process's lazy pages.
    pub fn lazy(&self) -> &LazyMap {
        &self.lazy
    }

    /// Pages that crossed the wire.
    pub fn received(&self) -> &PageSet {
        &self.received
    }

    /// Pages that will never cross.
    pub fn withheld(&self) -> &PageSet {
        &self.withheld
    }

    /// A member's address space, while it lives.
    pub fn member(&self, member: MemberId) -> Option<&AddressSpace> {
        self.members.get(member.0)?.as_ref()
    }

    /// Members that live.
    pub fn members(&self) -> impl Iterator<Item = MemberId> {
        let alive = self.members.iter().enumerate();
        alive.filter_map(|(index, space)| space.as_ref().map(|_| MemberId(index)))
    }

    /// The number the next member gets.
    pub fn next_member(&self) -> MemberId {
        MemberId(self.members.len())
    }

    /// Whether nothing is owed: every page was received or withheld.
    pub fn is_settled(&self) -> bool {
        self.received.count() + self.withheld.count() == self.lazy.slots()
    }

    /// Whether a member has every page it will ever get from here.
    pub fn is_member_settled(&self, member: MemberId) -> bool {
        self.member(member).is_none_or(AddressSpace::is_settled)
    }

    /// The restored process handed over its memory, laid out as it was dumped.
    pub fn attach(&mut self, vmas: &[DumpedVma]) -> MemberId {
        let space = AddressSpace::as_dumped(Arc::clone(&self.lazy), vmas);
        self.add(space)
    }

    /// `parent` forked; the child sees memory as the parent does at this moment.
    pub fn fork(&mut self, parent: MemberId) -> Option<MemberId> {
        let child = self.member(parent)?.forked();
        Some(self.add(child))
    }

    fn add(&mut self, space: AddressSpace) -> MemberId {
        self.members.push(Some(space));
        MemberId(self.members.len() - 1)
    }

    /// A thread of `member` touched `page`.
    pub fn fault(&mut self, member: MemberId, page: PageIndex) -> Fault {
        let Some(space) = self.members.get(member.0).and_then(Option::as_ref) else {
            return Fault::Zero;
        };
        let Some(slot) = space.slot_at(page) else {
            return Fault::Zero;
        };
        if space.is_present(slot) {
            return Fault::Present;
        }
        // Whoever misses the page needs it: a discard on the way is answered with the page or crosses a request.
        debug_assert!(!self.withheld.contains(slot) && !self.discarding.contains(slot));
        if self.requested.contains(slot) || self.received.contains(slot) {
            return Fault::Waiting { slot };
        }
        self.requested.insert(slot);
        let neighbours = self.neighbours(slot);
        Fault::Request {
            slot,
            page: self.lazy.page(slot),
            neighbours,
        }
    }

    /// A thread that waited for a page since `since` goes on at `now`; both since any fixed moment.
    pub fn served(&mut self, since: Duration, now: Duration) {
        self.reach.served(since, now);
    }

    /// Pages that were asked for are in place at `now`.
    pub fn came(&mut self, now: Duration) {
        self.reach.came(now);
        if let Some(prefetch) = &mut self.prefetch {
            prefetch.came(now);
        }
    }

    /// Pages around a faulting slot that nobody asked for yet, marked as requested, in runs that a frame can carry.
    fn neighbours(&mut self, slot: usize) -> Vec<PageRange> {
        let slots = self.lazy.slots();
        let Some(prefetch) = self.prefetch.as_mut() else {
            return Vec::new();
        };
        let mut window = prefetch.window(slot, slots, self.reach.pages());
        let mut neighbours = Vec::new();
        while neighbours.len() < MAX_NEIGHBOUR_RUNS
            && let Some(run) = self.wanted_run(window.clone())
        {
            window.start = run.end;
            self.requested.insert_range(run.clone());
            neighbours.push(self.lazy.contiguous(run));
        }
        neighbours
    }

    /// The first run of owed, unrequested slots in `window` that lies in one piece of the dumped address space.
    fn wanted_run(&self, window: Range<usize>) -> Option<Range<usize>> {
        let wanted = |slot: &usize| {
            !self.requested.contains(*slot)
                && !self.received.contains(*slot)
                && !self.withheld.contains(*slot)
                && !self.discarding.contains(*slot)
        };
        let start = window.clone().find(wanted)?;
        let longest = window.end.min(start + MAX_FRAME_PAGES);
        let end = (start..longest)
            .find(|slot| !wanted(slot))
            .unwrap_or(longest);
        let contiguous = self.lazy.contiguous(start..end).count as usize;
        Some(start..start + contiguous)
    }

    /// `member` moved pages with `mremap`.
    pub fn remap(&mut self, member: MemberId, from: PageRange, to: PageIndex) {
        if let Some(Some(space)) = self.members.get_mut(member.0) {
            space.remap(from, to);
        }
    }

    /// `member` dropped the content of pages (`madvise`); returns what the source need not send any more.
    pub fn remove(&mut self, member: MemberId, pages: PageRange) -> Vec<PageRange> {
        self.drop_pages(member, |space| space.remove(pages))
    }

    /// `member` unmapped pages; returns what the source need not send any more.
    pub fn unmap(&mut self, member: MemberId, pages: PageRange) -> Vec<PageRange> {
        self.drop_pages(member, |space| space.unmap(pages))
    }

    /// `member` is gone; returns what the source need not send any more.
    pub fn exit(&mut self, member: MemberId) -> Vec<PageRange> {
        let Some(space) = self.members.get_mut(member.0).and_then(Option::take) else {
            return Vec::new();
        };
        let missing = space.missing_runs().collect();
        self.discard(missing)
    }

    fn drop_pages(
        &mut self,
        member: MemberId,
        how: impl FnOnce(&mut AddressSpace) -> Vec<Range<usize>>,
    ) -> Vec<PageRange> {
        match self.members.get_mut(member.0) {
            Some(Some(space)) => {
                let dropped = how(space);
                self.discard(dropped)
            }
            _ => Vec::new(),
        }
    }

    /// Of slots that one member stopped missing, those that nobody misses and that were not asked for.
    fn discard(&mut self, dropped: Vec<Range<usize>>) -> Vec<PageRange> {
        let mut ranges = Vec::new();
        for slot in dropped.into_iter().flatten() {
            let settled = self.received.contains(slot) || self.withheld.contains(slot);
            let pending = self.requested.contains(slot) || self.discarding.contains(slot);
            if settled || pending || self.is_missed(slot) {
                continue;
            }
            self.discarding.insert(slot);
            append(&mut ranges, self.lazy.page(slot));
        }
        ranges
    }

    /// Whether a member lacks a page.
    pub fn is_missed(&self, slot: usize) -> bool {
        let mut alive = self.members.iter().flatten();
        alive.any(|space| space.is_missing(slot))
    }

    /// A new link replaces one that took requests and answers with it. Threads wait for the `waiting` slots; returns
    /// what to ask for again, and what to discard again.
    pub fn reconnect(
        &mut self,
        waiting: impl IntoIterator<Item = usize>,
    ) -> (Vec<PageRange>, Vec<PageRange>) {
        self.requested = PageSet::empty(self.lazy.slots());
        let mut requests = Vec::new();
        for slot in waiting {
            if !self.received.contains(slot) && self.requested.insert(slot) {
                requests.push(PageRange::new(self.lazy.page(slot), 1));
            }
        }
        let mut discards = Vec::new();
        for slot in self.discarding.runs_in(0..self.lazy.slots()).flatten() {
            append(&mut discards, self.lazy.page(slot));
        }
        (requests, discards)
    }

    /// The source confirms that it will never send these pages. Returns how many it had not confirmed before: a discard
    /// that crossed the loss of a link is sent twice, and answered twice. `None` when nobody asked for it.
    pub fn confirm_withheld(&mut self, pages: PageRange) -> Option<u64> {
        let slots = self.lazy.slots_of(pages)?;
        let asked = |slot| self.discarding.contains(slot) || self.withheld.contains(slot);
        if !slots.clone().all(asked) {
            return None;
        }
        self.discarding.remove_range(slots.clone());
        Some(self.withheld.insert_range(slots) as u64)
    }

    /// The slots of pages that came, or `None` when they are not wholly lazy pages of this process.
    pub fn slots_of(&self, pages: PageRange) -> Option<Range<usize>> {
        self.lazy.slots_of(pages)
    }

    /// Records that a page came. True the first time; later copies carry the same bytes.
    pub fn receive(&mut self, slot: usize) -> bool {
        self.requested.remove(slot);
        self.discarding.remove(slot);
        self.received.insert(slot)
    }

    /// Where pages that came belong: every member that misses them, in runs that do not cross a mapping.
    pub fn installs(&self, slots: Range<usize>) -> Vec<Install> {
        let mut installs = Vec::new();
        for member in self.members() {
            if let Some(space) = self.member(member) {
                let pieces = space.missing_pieces(slots.clone());
                installs.extend(pieces.map(|piece| Install {
                    member,
                    target: piece.target,
                    slot: piece.slot,
                }));
            }
        }
        installs
    }

    /// A member that misses some of `slots` but of which an event that is still to come must say where they belong.
    pub fn displaced(&self, slots: Range<usize>) -> Option<MemberId> {
        self.members().find(|member| {
            let space = self.member(*member);
            space.is_some_and(|space| space.is_displaced(slots.clone()))
        })
    }

    /// The kernel has nothing to report of `member`: every event was read and its thread runs on.
    pub fn assume_quiet(&mut self, member: MemberId) {
        if let Some(Some(space)) = self.members.get_mut(member.0) {
            space.assume_quiet();
        }
    }

    /// Pages were installed in `member`, or were found to be there already. The kernel says so only when it has
    /// nothing to report.
    pub fn installed(&mut self, member: MemberId, slots: Range<usize>) {
        if slots.is_empty() {
            return;
        }
        if let Some(Some(space)) = self.members.get_mut(member.0) {
            space.assume_quiet();
            space.mark_present(slots);
        }
    }

    /// The kernel says that nothing is mapped there (any more) that could take a page.
    pub fn gone(&mut self, member: MemberId, target: PageRange) {
        if let Some(Some(space)) = self.members.get_mut(member.0) {
            space.remove(target);
        }
    }
}

/// Extends the last range by `page` when it follows it, else begins a new one.
fn append(ranges: &mut Vec<PageRange>, page: PageIndex) {
    match ranges.last_mut() {
        Some(last) if last.end() == page => last.count += 1,
        _ => ranges.push(PageRange::new(page, 1)),
    }
}
