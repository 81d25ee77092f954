//! A family in its journal, and out of it again.

use std::collections::HashMap;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

use common::page::PageRange;
use serde::{Deserialize, Serialize};

use super::super::descriptor::{Buffer, Descriptor};
use super::super::{ProcessImage, Sink};
use super::{Arrival, FamilyCounts, LiveFamily, MemoryError, NewPages};
use crate::journal::{Inbox, Journal, Note, Recovered};
use crate::resolver::{Change, Family, FamilyState, MemberId};
use crate::uffd::UserFault;

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

    /// Whether the process handed its memory over.
    pub(in super::super) fn is_attached(&self) -> bool {
        self.family.next_member() != MemberId(0)
    }
}

impl LiveFamily<UserFault> {
    /// From now on everything that changes is noted in `journal`.
    pub(in super::super) fn keep_journal(&mut self, journal: Journal) -> Result<(), MemoryError> {
        self.buffer = Inbox::Kept(Box::new(journal));
        self.checkpoint()
    }

    pub(in super::super) fn counts(&self) -> FamilyCounts {
        self.counts
    }

    /// Lazy pages in all, and of those the ones that came or never will.
    pub(in super::super) fn settled_slots(&self) -> (u64, u64, u64) {
        (
            self.family.lazy().slots() as u64,
            self.family.received().count() as u64,
            self.family.withheld().count() as u64,
        )
    }

    /// The family that a killed program left: its journal, and the descriptors it had by the numbers they had then.
    pub(in super::super) fn succeed(
        image: ProcessImage,
        left: &Recovered,
        descriptors: &mut HashMap<RawFd, OwnedFd>,
    ) -> Result<Self, MemoryError> {
        let pid = image.pid;
        let mut family = LiveFamily::new(image);
        let members = family.replay(left).ok_or_else(|| {
            let error = std::io::Error::other("it does not fit the images");
            MemoryError::Journal(pid, error)
        })?;
        for (member, fd) in members {
            // One that was closed belonged to a process that has ended.
            match descriptors.remove(&fd) {
                Some(fd) => {
                    let uffd = Arc::new(UserFault::from_fd(fd));
                    family.uffds.insert(member, uffd);
                }
                None => drop(family.family.exit(member)),
            }
        }
        family.family.discard_unmissed();
        family.restored = true;
        Ok(family)
    }

    /// Does again what was noted; returns the descriptors of the members that live.
    fn replay(&mut self, left: &Recovered) -> Option<HashMap<MemberId, RawFd>> {
        let mut members = HashMap::new();
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
    pub(in super::super) fn begin_again(&mut self, sink: &Sink<'_, UserFault>) {
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
