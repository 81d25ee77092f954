//! Which pages are still owed: pure bookkeeping, one slot in exactly one state.
//!
//! A page is *owed* until it is *sent* (by demand or push, whichever takes it first) or *withheld* (the destination
//! does not need it, and it was not sent before that was known). Sent pages may be sent again on demand, also while the
//! push that took them first has yet to read them. What both ends must agree on therefore *counts* each page with the
//! first frame that was read, not with the first that was to be.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use common::images::ImagePid;
use common::lazy_map::LazyMap;
use common::limits::MAX_FRAME_PAGES;
use common::page::{PageIndex, PageRange};
use common::page_set::PageSet;
use common::proto::control::Tally;

use crate::frame::Contents;

/// The lazy pages of every dumped process and what became of them.
#[derive(Debug, Default)]
pub struct Pending {
    processes: BTreeMap<ImagePid, Process>,
    digest: u64,
    /// A program before us sent pages, and what it knew of that is lost: the destination's word is taken for it.
    forgotten: bool,
}

#[derive(Debug)]
struct Process {
    lazy: LazyMap,
    sent: PageSet,
    /// Of those, the ones whose hash is in the digest.
    counted: PageSet,
    withheld: PageSet,
}

/// The destination asked for something it cannot have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PendingError {
    /// A process that was not dumped.
    #[error("the destination asks for pages of {0}, which was not dumped")]
    UnknownProcess(ImagePid),
    /// Pages outside the frozen pagemap.
    #[error("the destination asks for pages {1:?} outside the frozen memory of {0}")]
    OutsidePagemap(ImagePid, PageRange),
    /// Pages it had said it does not need.
    #[error("the destination asks for pages {1:?} of {0} after it discarded them")]
    Withheld(ImagePid, PageRange),
}

/// What became of one lazy page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Neither sent nor withheld.
    Owed,
    /// Sent or about to be, as far as is known without loss.
    Sent,
    /// Never to be sent.
    Withheld,
}

/// Pages to send: one run of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The process.
    pub pid: ImagePid,
    /// Its pages.
    pub pages: PageRange,
}

/// What a destination that came again says of each process: words of bitmaps.
#[derive(Clone, Debug, Default)]
pub struct Said {
    /// Pages that came.
    pub received: HashMap<ImagePid, Vec<u64>>,
    /// Pages that it was promised never to get.
    pub withheld: HashMap<ImagePid, Vec<u64>>,
}

/// What follows from that.
#[derive(Debug, Default)]
pub struct Recovery {
    received: BTreeMap<ImagePid, PageSet>,
    withheld: BTreeMap<ImagePid, PageSet>,
    /// Counted and lost on the way: owed again.
    pub lost: Vec<Run>,
    /// Sent by a program before us.
    pub known: Vec<Run>,
}

impl Pending {
    /// Everything owed.
    pub fn new(images: impl IntoIterator<Item = (ImagePid, LazyMap)>) -> Self {
        let processes = images
            .into_iter()
            .map(|(pid, lazy)| {
                let process = Process {
                    sent: PageSet::empty(lazy.slots()),
                    counted: PageSet::empty(lazy.slots()),
                    withheld: PageSet::empty(lazy.slots()),
                    lazy,
                };
                (pid, process)
            })
            .collect();
        Pending {
            processes,
            digest: 0,
            forgotten: false,
        }
    }

    /// The same for a successor, who has yet to be told what was sent.
    pub fn forget(&mut self) {
        self.forgotten = true;
    }

    /// Processes in the order of their PIDs.
    pub fn pids(&self) -> Vec<ImagePid> {
        self.processes.keys().copied().collect()
    }

    /// Lazy pages of all processes.
    pub fn lazy_pages(&self) -> u64 {
        self.sum(|process| process.lazy.slots())
    }

    /// Pages neither sent nor withheld.
    pub fn owed(&self) -> u64 {
        self.sum(|process| process.lazy.slots() - process.sent.count() - process.withheld.count())
    }

    /// What became of one lazy page. Panics when it is none.
    pub fn state_of(&self, pid: ImagePid, page: PageIndex) -> PageState {
        let process = &self.processes[&pid];
        let slot = process.lazy.slot(page).expect("a lazy page");
        match (process.sent.contains(slot), process.withheld.contains(slot)) {
            (false, false) => PageState::Owed,
            (true, false) => PageState::Sent,
            (false, true) => PageState::Withheld,
            (true, true) => unreachable!("page {page:?} of {pid} was sent although withheld"),
        }
    }

    fn sum(&self, count: impl Fn(&Process) -> usize) -> u64 {
        self.processes.values().map(|p| count(p) as u64).sum()
    }

    /// The destination demands pages. Returns which of them it gets for the first time, as a bitmap over the run.
    pub fn demand(&mut self, pid: ImagePid, pages: PageRange) -> Result<u64, PendingError> {
        let (process, slots) = self.locate(pid, pages)?;
        if slots.clone().any(|slot| process.withheld.contains(slot)) {
            return Err(PendingError::Withheld(pid, pages));
        }
        let mut new = 0;
        for (index, slot) in slots.enumerate() {
            new |= u64::from(process.sent.insert(slot)) << index;
        }
        Ok(new)
    }

    /// The destination will never need pages. Returns those that were not sent and now never will be.
    pub fn discard(
        &mut self,
        pid: ImagePid,
        pages: PageRange,
    ) -> Result<Vec<PageRange>, PendingError> {
        let (process, slots) = self.locate(pid, pages)?;
        let mut withheld: Vec<PageRange> = Vec::new();
        for (index, slot) in slots.enumerate() {
            if process.sent.contains(slot) {
                continue;
            }
            // Confirmed again when asked again: the first confirmation may have been lost with its link.
            process.withheld.insert(slot);
            let page = pages.start.forward(index as u64);
            match withheld.last_mut() {
                Some(last) if last.end() == page => last.count += 1,
                _ => withheld.push(PageRange::new(page, 1)),
            }
        }
        Ok(withheld)
    }

    fn locate(
        &mut self,
        pid: ImagePid,
        pages: PageRange,
    ) -> Result<(&mut Process, Range<usize>), PendingError> {
        let process = self
            .processes
            .get_mut(&pid)
            .ok_or(PendingError::UnknownProcess(pid))?;
        let slots = process
            .lazy
            .slots_of(pages)
            .ok_or(PendingError::OutsidePagemap(pid, pages))?;
        Ok((process, slots))
    }

    /// Takes the first owed run of `pid` within `slots`, at most `limit` pages, and marks it sent.
    pub fn take(&mut self, pid: ImagePid, slots: Range<usize>, limit: usize) -> Option<Run> {
        let process = self.processes.get_mut(&pid)?;
        let end = slots.end.min(process.lazy.slots());
        let start = process.next_owed(slots.start).filter(|slot| *slot < end)?;
        let longest = (start + limit).min(end);
        let stop = (start..longest)
            .find(|slot| !process.is_owed(*slot))
            .unwrap_or(longest);
        let pages = process.lazy.contiguous(start..stop);
        process
            .sent
            .insert_range(start..start + pages.count as usize);
        Some(Run { pid, pages })
    }

    /// The first owed page of `pid` at or behind slot `from`, and its slot.
    pub fn next_owed(&self, pid: ImagePid, from: usize) -> Option<(PageIndex, usize)> {
        let process = self.processes.get(&pid)?;
        let slots = process.lazy.slots();
        let slot = process.next_owed(from).filter(|slot| *slot < slots)?;
        Some((process.lazy.page(slot), slot))
    }

    /// Slots of `pid`.
    pub fn slots(&self, pid: ImagePid) -> usize {
        self.processes.get(&pid).map_or(0, |p| p.lazy.slots())
    }

    /// The slots of lazy pages within `pages`, in order.
    pub fn slots_within(&self, pid: ImagePid, pages: PageRange) -> Vec<Range<usize>> {
        self.processes.get(&pid).map_or_else(Vec::new, |process| {
            let parts = process.lazy.slots_within(pages);
            parts.map(|(_, slots)| slots).collect()
        })
    }

    /// The pages of slots that lie in one run.
    pub fn pages_of(&self, pid: ImagePid, slots: Range<usize>) -> PageRange {
        self.processes
            .get(&pid)
            .map_or_else(PageRange::default, |process| process.lazy.contiguous(slots))
    }

    /// What follows from what the destination says of each process: pages that it has received, and such that it was
    /// promised never to get, in the words of bitmaps. Changes nothing. `None` when it claims what it cannot have.
    pub fn recovery(&self, said: Said) -> Option<Recovery> {
        let mut recovery = Recovery::default();
        for (pid, words) in said.received {
            let process = self.processes.get(&pid)?;
            let received = PageSet::from_words(words, process.lazy.slots())?;
            match self.forgotten {
                true => recovery.known.extend(process.runs(pid, &received)),
                false => recovery.lost.extend(process.lost(pid, &received)?),
            }
            recovery.received.insert(pid, received);
        }
        for (pid, words) in said.withheld {
            let process = self.processes.get(&pid)?;
            let withheld = PageSet::from_words(words, process.lazy.slots())?;
            let came = recovery.received.get(&pid).unwrap_or(&process.sent);
            let mut slots = withheld.runs_in(0..process.lazy.slots()).flatten();
            let is_true = slots.all(|slot| match self.forgotten {
                true => !came.contains(slot),
                false => process.withheld.contains(slot),
            });
            if !is_true {
                return None;
            }
            drop(slots);
            recovery.withheld.insert(pid, withheld);
        }
        Some(recovery)
    }

    /// What follows becomes so: hashes of pages that were lost are `lost`, of such that were sent before us `known`.
    pub fn recover(&mut self, recovery: Recovery, lost: u64, known: u64) {
        for (pid, received) in recovery.received {
            if let Some(process) = self.processes.get_mut(&pid) {
                if self.forgotten {
                    process.withheld = PageSet::empty(process.lazy.slots());
                }
                process.counted = received.clone();
                process.sent = received;
            }
        }
        // Nobody promises anything by coming again: what was promised is known, but for a successor.
        let withheld = recovery.withheld.into_iter();
        for (pid, withheld) in withheld.filter(|_| self.forgotten) {
            if let Some(process) = self.processes.get_mut(&pid) {
                process.withheld = withheld;
            }
        }
        self.forgotten = false;
        self.digest = self.digest.wrapping_sub(lost).wrapping_add(known);
    }

    /// A frame of lazy pages was read and is about to be sent. Counts those that no frame before it carried; returns them
    /// as a bitmap over the run.
    pub fn count(&mut self, contents: &Contents) -> u64 {
        let Run { pid, pages } = contents.run;
        let Ok((process, slots)) = self.locate(pid, pages) else {
            return 0;
        };
        let mut new = 0;
        for (index, slot) in slots.enumerate() {
            new |= u64::from(process.counted.insert(slot)) << index;
        }
        self.digest = self.digest.wrapping_add(contents.digest(new));
        new
    }

    /// What the destination must have counted too.
    pub fn tally(&self) -> Tally {
        Tally {
            pages: self.sum(|process| process.counted.count()),
            digest: self.digest,
            discarded: self.sum(|process| process.withheld.count()),
        }
    }
}

impl Process {
    /// Slots in runs that a frame can carry.
    fn frames(&self, pid: ImagePid, slots: Range<usize>) -> Vec<Run> {
        let mut runs = Vec::new();
        let mut from = slots.start;
        while from < slots.end {
            let longest = (from + MAX_FRAME_PAGES).min(slots.end);
            let pages = self.lazy.contiguous(from..longest);
            from += pages.count as usize;
            runs.push(Run { pid, pages });
        }
        runs
    }

    /// The pages of `slots` in runs that a frame can carry.
    fn runs(&self, pid: ImagePid, slots: &PageSet) -> Vec<Run> {
        let runs = slots.runs_in(0..self.lazy.slots());
        runs.flat_map(|run| self.frames(pid, run)).collect()
    }

    /// What was counted and did not come; `None` when more came than was counted.
    fn lost(&self, pid: ImagePid, received: &PageSet) -> Option<Vec<Run>> {
        let slots = self.lazy.slots();
        let mut came = received.runs_in(0..slots).flatten();
        if came.any(|slot| !self.counted.contains(slot)) {
            return None;
        }
        let mut lost = Vec::new();
        for counted in self.counted.runs_in(0..slots) {
            let mut from = counted.start;
            while let Some(slot) = received.next_out(from).filter(|slot| *slot < counted.end) {
                let end = received.next_in(slot).unwrap_or(slots).min(counted.end);
                lost.extend(self.frames(pid, slot..end));
                from = end;
            }
        }
        Some(lost)
    }

    fn is_owed(&self, slot: usize) -> bool {
        !self.sent.contains(slot) && !self.withheld.contains(slot)
    }

    fn next_owed(&self, mut from: usize) -> Option<usize> {
        loop {
            let slot = self.sent.next_out(from)?;
            if !self.withheld.contains(slot) {
                return Some(slot);
            }
            from = self.withheld.next_out(slot)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame;
    use crate::memory::numbered::Numbered;

    const PID: ImagePid = ImagePid(7);

    fn range(start: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex(start), count)
    }

    fn pending() -> Pending {
        let lazy = LazyMap::new([range(10, 20), range(50, 5)]).expect("in order");
        Pending::new([(PID, lazy)])
    }

    fn came(pid: ImagePid, words: &[u64]) -> Said {
        Said {
            received: HashMap::from([(pid, words.to_vec())]),
            ..Said::default()
        }
    }

    fn withheld(pid: ImagePid, words: &[u64]) -> Said {
        Said {
            withheld: HashMap::from([(pid, words.to_vec())]),
            ..Said::default()
        }
    }

    fn contents(pages: PageRange) -> Contents {
        let run = Run { pid: PID, pages };
        frame::read(&Numbered, run).expect("readable").contents
    }

    fn digest(pages: &[PageRange]) -> u64 {
        let digests = pages.iter().map(|pages| contents(*pages).whole_digest());
        digests.fold(0, u64::wrapping_add)
    }

    fn take_all(pending: &mut Pending) -> u64 {
        let mut pages = 0;
        while let Some(run) = pending.take(PID, 0..usize::MAX, 16) {
            pending.count(&contents(run.pages));
            pages += run.pages.count;
        }
        pages
    }

    fn demand(pending: &mut Pending, pages: PageRange) {
        pending.demand(PID, pages).expect("lazy");
        pending.count(&contents(pages));
    }

    #[test]
    fn push_takes_each_page_once_and_stops_at_holes() {
        let mut pending = pending();
        let first = pending.take(PID, 0..usize::MAX, 16).expect("owed");
        assert_eq!(first.pages, range(10, 16));
        let second = pending.take(PID, 0..usize::MAX, 16).expect("owed");
        assert_eq!(second.pages, range(26, 4), "stops at the hole");
        assert_eq!(take_all(&mut pending), 5);
        assert_eq!(pending.owed(), 0);
    }

    #[test]
    fn a_demanded_page_is_new_once_and_never_pushed() {
        let mut pending = pending();
        assert_eq!(pending.demand(PID, range(12, 2)), Ok(0b11));
        assert_eq!(pending.demand(PID, range(13, 2)), Ok(0b10));
        assert_eq!(take_all(&mut pending), 22);
    }

    #[test]
    fn a_discard_withholds_only_what_was_not_sent() {
        let mut pending = pending();
        demand(&mut pending, range(11, 1));
        let withheld = pending.discard(PID, range(10, 4)).expect("lazy");
        assert_eq!(withheld, [range(10, 1), range(12, 2)]);
        let again = pending.discard(PID, range(10, 4)).expect("lazy");
        assert_eq!(again, withheld, "the confirmation may have been lost");
        assert_eq!(take_all(&mut pending), 21);
        assert!(pending.demand(PID, range(12, 1)).is_err());
        let tally = pending.tally();
        assert_eq!((tally.pages, tally.discarded), (22, 3));
    }

    #[test]
    fn what_was_lost_with_a_link_is_owed_again() {
        let mut pending = pending();
        take_all(&mut pending);
        let mut received = PageSet::full(25);
        received.remove_range(2..5);
        received.remove_range(18..22);
        let before = pending.tally();
        let recovery = pending
            .recovery(came(PID, received.words()))
            .expect("all were sent");
        let pages: Vec<_> = recovery.lost.iter().map(|run| run.pages).collect();
        assert_eq!(pages, [range(12, 3), range(28, 2), range(50, 2)]);
        assert_eq!(pending.tally(), before, "nothing has changed yet");
        pending.recover(recovery, digest(&pages), 0);
        assert_eq!(
            pending.tally().digest,
            digest(&[range(10, 2), range(15, 13), range(52, 3)])
        );
        assert_eq!(pending.owed(), 7);
        assert_eq!(take_all(&mut pending), 7);
        assert_eq!(pending.tally(), before);
    }

    /// The push was to send pages, and before it read them a thread demanded one that is among them.
    #[test]
    fn what_overtakes_the_push_counts_at_once_and_once() {
        let mut pending = pending();
        let run = pending.take(PID, 0..usize::MAX, 16).expect("owed");
        assert_eq!(run.pages, range(10, 16));
        assert_eq!(pending.demand(PID, range(12, 2)), Ok(0), "it was taken");
        assert_eq!(pending.count(&contents(range(12, 2))), 0b11);
        let tally = pending.tally();
        let overtaken = (2, digest(&[range(12, 2)]));
        assert_eq!((tally.pages, tally.digest), overtaken);
        assert_eq!(pending.count(&contents(run.pages)), 0xffff & !0b1100);
        let tally = pending.tally();
        let all = (16, digest(&[run.pages]));
        assert_eq!((tally.pages, tally.digest), all);
    }

    /// Pages that were taken and could not be read were never sent.
    #[test]
    fn what_was_not_read_is_owed_again() {
        let mut pending = pending();
        pending.take(PID, 0..usize::MAX, 16).expect("owed");
        demand(&mut pending, range(50, 1));
        let unread = PageSet::full(25);
        assert!(pending.recovery(came(PID, unread.words())).is_none());
        let recovery = pending.recovery(came(PID, &[1 << 20])).expect("it came");
        assert_eq!(recovery.lost, []);
        pending.recover(recovery, 0, 0);
        assert_eq!(pending.owed(), 24);
        take_all(&mut pending);
        let all = digest(&[range(10, 10), range(20, 10), range(50, 5)]);
        assert_eq!((pending.tally().pages, pending.tally().digest), (25, all));
    }

    #[test]
    fn a_destination_cannot_have_what_was_not_sent() {
        let mut pending = pending();
        demand(&mut pending, range(10, 1));
        let claims = PageSet::full(25);
        assert!(pending.recovery(came(PID, claims.words())).is_none());
        assert!(pending.recovery(came(PID, &[1, 0])).is_none(), "too long");
        let nothing_lost = pending.recovery(came(PID, &[1])).expect("it was sent");
        assert_eq!(nothing_lost.lost, []);
        assert!(pending.recovery(withheld(PID, &[0b10])).is_none());
        assert!(pending.recovery(withheld(PID, &[0])).is_some());
    }

    /// Of two processes the second makes no sense, or cannot be read: the first is as it was.
    #[test]
    fn what_is_refused_in_part_changes_nothing() {
        let other = ImagePid(8);
        let lazy = || LazyMap::new([range(10, 20)]).expect("in order");
        let mut pending = Pending::new([(PID, lazy()), (other, lazy())]);
        demand(&mut pending, range(10, 2));
        let mut said = came(PID, &[0b01]);
        said.received.insert(other, vec![1]);
        assert!(pending.recovery(said).is_none());
        assert_eq!(pending.owed(), 38);
        assert!(pending.recovery(came(PID, &[0b11])).is_some());
    }

    #[test]
    fn a_successor_takes_the_destinations_word() {
        let mut pending = pending();
        pending.forget();
        let mut received = PageSet::empty(25);
        received.insert_range(1..23);
        let mut said = came(PID, received.words());
        said.withheld.insert(PID, vec![0b10]);
        assert!(pending.recovery(said.clone()).is_none(), "it came");
        said.withheld.insert(PID, vec![1]);
        // The link may be lost again before all is settled.
        for _ in 0..2 {
            let recovery = pending.recovery(said.clone()).expect("believed");
            let pages: Vec<_> = recovery.known.iter().map(|run| run.pages).collect();
            assert_eq!(pages, [range(11, 16), range(27, 3), range(50, 3)]);
            assert_eq!(recovery.lost, []);
        }
        let recovery = pending.recovery(said).expect("believed");
        pending.recover(recovery, 0, 5);
        assert_eq!(pending.owed(), 2);
        let all = PageSet::full(25);
        assert!(pending.recovery(came(PID, all.words())).is_none());
        assert_eq!(pending.tally().digest, 5);
        let tally = pending.tally();
        assert_eq!((tally.pages, tally.discarded), (22, 1));
    }

    #[test]
    fn nothing_outside_the_pagemap_can_be_had() {
        let mut pending = pending();
        for pages in [range(9, 1), range(29, 2), range(40, 1), range(54, 2)] {
            assert_eq!(
                pending.demand(PID, pages),
                Err(PendingError::OutsidePagemap(PID, pages))
            );
        }
        assert_eq!(
            pending.demand(ImagePid(8), range(10, 1)),
            Err(PendingError::UnknownProcess(ImagePid(8)))
        );
    }
}
