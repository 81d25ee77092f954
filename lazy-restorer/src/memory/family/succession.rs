//! A family in its journal, and out of it again.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;

use common::page::PageRange;
use serde::{Deserialize, Serialize};

use super::super::descriptor::{Buffer, Descriptor};
use super::super::{ProcessImage, Sink};
use super::{Arrival, FamilyCounts, LiveFamily, MemoryError, NewPages};
use crate::journal::{Note, Recovered};
use crate::resolver::{Change, Family, FamilyState, MemberId};

/// A family at one moment, and the descriptors of its members.
#[derive(Serialize, Deserialize)]
struct Checkpoint {
    family: FamilyState,
    counts: FamilyCounts,
    descriptors: Vec<(usize, RawFd)>,
}

impl FamilyCounts {
    pub(super) fn add(&mut self, new: NewPages, arrival: Arrival) {
        match arrival {
            Arrival::Demanded => self.demanded += new.pages,
            Arrival::Pushed => self.pushed += new.pages,
        }
        self.zero += new.zero_pages;
        self.digest = self.digest.wrapping_add(new.digest);
    }
}

impl<D: Descriptor> LiveFamily<D> {
    /// Notes a change that is about to be made.
    pub(super) fn note(&mut self, note: impl Into<Note>) -> Result<(), MemoryError> {
        self.make_room()?;
        self.buffer.note(note.into());
        Ok(())
    }

    /// Makes room for a full inbox. Everything noted so far has been done when this is called.
    pub(super) fn make_room(&mut self) -> Result<(), MemoryError> {
        match self.buffer.is_full() {
            true => self.checkpoint(),
            false => Ok(()),
        }
    }

    fn checkpoint(&mut self) -> Result<(), MemoryError> {
        let uffds = self.uffds.iter();
        let checkpoint = Checkpoint {
            family: self.family.state(),
            counts: self.counts,
            descriptors: uffds
                .map(|(member, uffd)| (member.0, uffd.number()))
                .collect(),
        };
        let failed = |error| MemoryError::Journal(self.family.pid(), error);
        let state = postcard::to_extend(&checkpoint, Vec::new());
        let state = state.map_err(|error| failed(std::io::Error::other(error)))?;
        self.buffer.checkpoint(&state).map_err(failed)
    }

    /// Asks for pages that came before and that a member misses nevertheless.
    pub(in super::super) fn demand_missed(&mut self, sink: &Sink<'_, D>) {
        for slot in self.family.received_but_missed() {
            let page = PageRange::new(self.family.lazy().page(slot), 1);
            sink.request(self.family.pid(), page);
        }
    }

    /// How many pages that a program before us did not live to install nobody misses any more.
    pub(in super::super) fn no_longer_missed(&mut self) -> u64 {
        let before = self.missed.len();
        self.missed.retain(|slot| self.family.is_missed(*slot));
        (before - self.missed.len()) as u64
    }

    /// Whether the process handed its memory over.
    pub(in super::super) fn is_attached(&self) -> bool {
        self.family.next_member() != MemberId(0)
    }

    /// From now on everything that changes is noted in `buffer`.
    pub(in super::super) fn keep_notes(&mut self, buffer: D::Buffer) -> Result<(), MemoryError> {
        self.buffer = buffer;
        self.checkpoint()
    }

    pub(in super::super) fn counts(&self) -> FamilyCounts {
        self.counts
    }

    /// Lazy pages in all; of those the ones that are still to come, and the ones that never will.
    pub(in super::super) fn slots(&self) -> (u64, u64, u64) {
        let lazy = self.family.lazy().slots();
        let (received, withheld) = (self.family.received(), self.family.withheld());
        let owed = lazy - received.count() - withheld.count() + self.missed.len();
        (lazy as u64, owed as u64, withheld.count() as u64)
    }

    /// The family that a killed program left: its journal, and the descriptors it had by the numbers they had then.
    pub(in super::super) fn succeed(
        image: ProcessImage,
        left: &Recovered,
        descriptor: &mut impl FnMut(RawFd) -> Option<D>,
    ) -> Result<Self, MemoryError> {
        let pid = image.pid;
        let mut family = LiveFamily::new(image);
        let members = family.replay(left).ok_or_else(|| {
            let error = std::io::Error::other("it does not fit the images");
            MemoryError::Journal(pid, error)
        })?;
        for (member, fd) in members {
            // One that was closed belonged to a process that has ended.
            match descriptor(fd) {
                Some(uffd) => drop(family.uffds.insert(member, Arc::new(uffd))),
                None => drop(family.family.exit(member)),
            }
        }
        family.family.discard_unmissed();
        family.missed = family.family.received_but_missed().into_iter().collect();
        family.restored = true;
        Ok(family)
    }

    /// Does again what was noted; returns the descriptors of the members that live.
    fn replay(&mut self, left: &Recovered) -> Option<BTreeMap<MemberId, RawFd>> {
        let mut members = BTreeMap::new();
        if let Some(bytes) = &left.checkpoint {
            let checkpoint: Checkpoint = postcard::from_bytes(bytes).ok()?;
            let lazy = Arc::new(self.family.lazy().clone());
            self.family = Family::from_state(self.family.pid(), &lazy, checkpoint.family)?;
            self.counts = checkpoint.counts;
            let descriptors = checkpoint.descriptors.into_iter();
            members.extend(descriptors.map(|(member, fd)| (MemberId(member), fd)));
        }
        for note in &left.notes {
            let before = self.family.next_member();
            if !self.family.apply(note.change, &self.vmas) {
                return None;
            }
            match note.change {
                Change::Attach | Change::Fork(_) if self.family.next_member() != before => {
                    members.insert(before, note.descriptor());
                }
                Change::Exit(member) => {
                    members.remove(&member);
                }
                Change::Received(_, mask) => self.count(note, mask),
                _ => {}
            }
        }
        Some(members)
    }

    fn count(&mut self, note: &Note, mask: u16) {
        let new = NewPages {
            pages: u64::from(mask.count_ones()),
            zero_pages: u64::from((note.extra as u16).count_ones()),
            digest: note.detail,
        };
        let arrival = match note.extra >> 16 {
            0 => Arrival::Demanded,
            _ => Arrival::Pushed,
        };
        self.counts.add(new, arrival);
    }

    /// A successor begins: descriptors are watched, threads that waited fault again, and pages that came but are not
    /// everywhere are asked for once more.
    pub(in super::super) fn begin_again(&mut self, sink: &Sink<'_, D>) {
        let pid = self.family.pid();
        let members: Vec<_> = self
            .uffds
            .iter()
            .map(|(m, u)| (*m, Arc::clone(u)))
            .collect();
        for (member, uffd) in members {
            uffd.wake_all();
            sink.watch(pid, member, uffd);
        }
    }
}
