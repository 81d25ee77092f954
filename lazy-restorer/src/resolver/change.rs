//! Everything that changes a [`Family`], as a value: what is noted of it can be done again by a successor.
//!
//! A family is the sum of its changes, so a successor that applies the same changes in the same order has the same
//! family. What is on its way (requests, prefetch) is not part of it: a successor asks anew.

use std::ops::Range;
use std::sync::Arc;

use common::images::{DumpedVma, ImagePid};
use common::lazy_map::LazyMap;
use common::page::{PageIndex, PageRange};
use common::page_set::PageSet;
use serde::{Deserialize, Serialize};

use super::address_space::SpaceState;
use super::{AddressSpace, Family, MemberId};

/// Words of an encoded change.
pub const CHANGE_WORDS: usize = 4;

/// One change of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The restored process handed its memory over.
    Attach,
    /// A member forked.
    Fork(MemberId),
    /// A member moved pages to a place.
    Remap(MemberId, PageRange, PageIndex),
    /// A member dropped the content of pages.
    Remove(MemberId, PageRange),
    /// A member unmapped pages.
    Unmap(MemberId, PageRange),
    /// A member is gone.
    Exit(MemberId),
    /// Slots are in place in a member: the first, and how many.
    Installed(MemberId, usize, usize),
    /// The kernel says that nothing is mapped there that could take pages.
    Gone(MemberId, PageRange),
    /// The kernel has nothing to report of a member.
    Quiet(MemberId),
    /// Pages came: the first slot, and which of the sixteen from there on.
    Received(usize, u16),
    /// The source promised never to send pages.
    Withheld(PageRange),
}

impl Change {
    /// The change as words; the upper half of the first and what the change does not need are 0.
    pub fn encode(self) -> [u64; CHANGE_WORDS] {
        let of = |kind: u64, member: MemberId| kind | (member.0 as u64) << 16;
        match self {
            Change::Attach => [1, 0, 0, 0],
            Change::Fork(parent) => [of(2, parent), 0, 0, 0],
            Change::Remap(member, from, to) => [of(3, member), from.start.0, from.count, to.0],
            Change::Remove(member, pages) => [of(4, member), pages.start.0, pages.count, 0],
            Change::Unmap(member, pages) => [of(5, member), pages.start.0, pages.count, 0],
            Change::Exit(member) => [of(6, member), 0, 0, 0],
            Change::Installed(member, slot, count) => [of(7, member), slot as u64, count as u64, 0],
            Change::Gone(member, pages) => [of(8, member), pages.start.0, pages.count, 0],
            Change::Quiet(member) => [of(9, member), 0, 0, 0],
            Change::Received(slot, mask) => [10, slot as u64, u64::from(mask), 0],
            Change::Withheld(pages) => [11, pages.start.0, pages.count, 0],
        }
    }

    /// The change of these words; `None` when they are none.
    pub fn decode(words: [u64; CHANGE_WORDS]) -> Option<Self> {
        let [first, a, b, c] = words;
        let member = MemberId(usize::try_from(first >> 16).ok()?);
        let pages = PageRange::new(PageIndex(a), b);
        Some(match first & 0xffff {
            1 => Change::Attach,
            2 => Change::Fork(member),
            3 => Change::Remap(member, pages, PageIndex(c)),
            4 => Change::Remove(member, pages),
            5 => Change::Unmap(member, pages),
            6 => Change::Exit(member),
            7 => Change::Installed(member, a as usize, b as usize),
            8 => Change::Gone(member, pages),
            9 => Change::Quiet(member),
            10 => Change::Received(a as usize, b as u16),
            11 => Change::Withheld(pages),
            _ => return None,
        })
    }
}

/// A family at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FamilyState {
    received: Vec<u64>,
    withheld: Vec<u64>,
    discarding: Vec<u64>,
    members: Vec<Option<SpaceState>>,
}

impl Family {
    /// The family at this moment.
    pub fn state(&self) -> FamilyState {
        let members = self.members.iter();
        FamilyState {
            received: self.received.words().to_vec(),
            withheld: self.withheld.words().to_vec(),
            discarding: self.discarding.words().to_vec(),
            members: members
                .map(|space| space.as_ref().map(AddressSpace::state))
                .collect(),
        }
    }

    /// The family of a state; `None` when it is of another process.
    pub fn from_state(pid: ImagePid, lazy: &Arc<LazyMap>, state: FamilyState) -> Option<Self> {
        let set = |words| PageSet::from_words(words, lazy.slots());
        let members = state.members.into_iter().map(|space| match space {
            Some(space) => AddressSpace::from_state(Arc::clone(lazy), space).map(Some),
            None => Some(None),
        });
        Some(Family {
            received: set(state.received)?,
            withheld: set(state.withheld)?,
            discarding: set(state.discarding)?,
            members: members.collect::<Option<_>>()?,
            ..Family::new(pid, Arc::clone(lazy))
        })
    }

    /// Applies a change that was noted; `vmas` are the mappings the process was dumped with. False when the change
    /// cannot be one of this family.
    pub fn apply(&mut self, change: Change, vmas: &[DumpedVma]) -> bool {
        let within =
            |slots: &Range<usize>| slots.start <= slots.end && slots.end <= self.lazy.slots();
        match change {
            Change::Attach => {
                self.attach(vmas);
            }
            Change::Fork(parent) => {
                self.fork(parent);
            }
            Change::Remap(member, from, to) => self.remap(member, from, to),
            Change::Remove(member, pages) => {
                self.remove(member, pages);
            }
            Change::Unmap(member, pages) => {
                self.unmap(member, pages);
            }
            Change::Exit(member) => {
                self.exit(member);
            }
            Change::Installed(member, slot, count) => {
                let slots = slot..slot.saturating_add(count);
                if !within(&slots) {
                    return false;
                }
                self.installed(member, slots);
            }
            Change::Gone(member, pages) => self.gone(member, pages),
            Change::Quiet(member) => self.assume_quiet(member),
            Change::Received(slot, mask) => {
                let last = u16::BITS - mask.leading_zeros();
                if !within(&(slot..slot.saturating_add(last as usize))) {
                    return false;
                }
                for bit in (0..16).filter(|bit| mask >> bit & 1 == 1) {
                    self.receive(slot + bit);
                }
            }
            // Noted after it was done: it may be in the checkpoint, too.
            Change::Withheld(pages) => return self.confirm_withheld(pages).is_some(),
        }
        true
    }

    /// Slots that came and that a member misses nevertheless: whoever was to install them was killed before.
    pub fn received_but_missed(&self) -> Vec<usize> {
        let all = self.received.runs_in(0..self.lazy.slots()).flatten();
        all.filter(|slot| self.is_missed(*slot)).collect()
    }

    /// Every page that nobody misses, and that neither came nor was promised never to come, is to be discarded; what was
    /// asked for before is not known any more.
    pub fn discard_unmissed(&mut self) {
        for slot in 0..self.lazy.slots() {
            let settled = self.received.contains(slot) || self.withheld.contains(slot);
            if !settled && !self.members.is_empty() && !self.is_missed(slot) {
                self.discarding.insert(slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PID: ImagePid = ImagePid(7);

    fn range(start: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex(start), count)
    }

    fn changes() -> Vec<Change> {
        let (root, child) = (MemberId(0), MemberId(1));
        vec![
            Change::Attach,
            Change::Received(3, 0b1011),
            Change::Installed(root, 3, 2),
            Change::Remap(root, range(100, 4), PageIndex(500)),
            Change::Fork(root),
            Change::Remove(child, range(500, 2)),
            Change::Unmap(root, range(104, 2)),
            Change::Gone(child, range(106, 1)),
            Change::Quiet(root),
            Change::Exit(root),
            Change::Exit(child),
            Change::Withheld(range(109, 1)),
        ]
    }

    fn vmas() -> Vec<DumpedVma> {
        vec![DumpedVma {
            pages: range(100, 12),
            lazy: true,
            huge_pages: false,
        }]
    }

    fn lazy() -> Arc<LazyMap> {
        Arc::new(LazyMap::new([range(100, 10)]).expect("in order"))
    }

    #[test]
    fn a_change_is_read_back() {
        for change in changes() {
            assert_eq!(Change::decode(change.encode()), Some(change));
        }
        assert_eq!(Change::decode([0, 1, 2, 3]), None);
    }

    #[test]
    fn the_same_changes_make_the_same_family_from_any_moment_on() {
        let mut family = Family::new(PID, lazy());
        let mut moments = vec![family.state()];
        for change in changes() {
            assert!(family.apply(change, &vmas()), "{change:?}");
            moments.push(family.state());
        }
        let end = format!("{:?}", family.state());
        for (index, moment) in moments.into_iter().enumerate() {
            let mut again = Family::from_state(PID, &lazy(), moment).expect("of this process");
            for change in &changes()[index..] {
                assert!(again.apply(*change, &vmas()));
            }
            assert_eq!(
                format!("{:?}", again.state()),
                end,
                "from change {index} on"
            );
        }
    }

    #[test]
    fn what_cannot_be_of_this_family_is_refused() {
        let mut family = Family::new(PID, lazy());
        assert!(!family.apply(Change::Received(9, 0b10), &vmas()));
        assert!(!family.apply(Change::Installed(MemberId(0), usize::MAX, 2), &vmas()));
        assert!(!family.apply(Change::Withheld(range(0, 1)), &vmas()));
        let other = Arc::new(LazyMap::new([range(1, 100)]).expect("in order"));
        assert!(Family::from_state(PID, &other, family.state()).is_none());
    }
}
