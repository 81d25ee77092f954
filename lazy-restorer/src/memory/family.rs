//! A family with its descriptors: applies events to the map and the map to memory. Every method runs under the lock.

mod placement;
mod shortage;
mod succession;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::digest::{page_hash, zero_page_hash};
use common::images::{DumpedVma, ImagePid};
use common::page::{PAGE_SIZE, PageIndex, PageRange};
use common::proto::demand::DemandFrame;
use common::proto::pages::DataHeader;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use self::placement::Placed;
use self::shortage::Shortage;
use super::descriptor::{Buffer, Descriptor};
use super::{MemberKey, Order, PresentMap, ProcessImage, Sink, Want};
use crate::blocktime::Blocktime;
use crate::journal::Note;
use crate::resolver::{Change, Family, Fault, MemberId};
use crate::uffd::{MemoryEvent, ReadError, Stop};

/// Bytes of pages kept for a process that is not restored yet.
const MAX_EARLY_BYTES: usize = 64 << 20;
/// Pause before an install is tried again while the kernel changes the address space under it.
const RETRY_PAUSE: Duration = Duration::from_micros(50);

/// By which way pages came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// As the answer to a fault.
    Demanded,
    /// Unasked.
    Pushed,
}

/// Why memory cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A process nobody dumped.
    #[error("the peer speaks of {0}, which the skeleton does not hold")]
    UnknownProcess(ImagePid),
    /// Pages that are no lazy pages of the process.
    #[error("the peer speaks of pages {1:?}, which {0} did not leave behind")]
    UnknownPages(ImagePid, PageRange),
    /// A process handed over two descriptors.
    #[error("{0} handed its memory over twice")]
    AttachedTwice(ImagePid),
    /// More pages than eager ones came before the process was there to take them.
    #[error("the source pushed more than {MAX_EARLY_BYTES} bytes before {0} was restored")]
    TooEarly(ImagePid),
    /// Events cannot be read.
    #[error("{0}")]
    Read(#[from] ReadError),
    /// What a successor must know cannot be written down.
    #[error("cannot keep the journal of {0}: {1}")]
    Journal(ImagePid, std::io::Error),
    /// The kernel refuses an install.
    #[error("the kernel refuses pages {1:?} of {0}: {2}")]
    Refused(ImagePid, PageRange, Errno),
}

impl MemoryError {
    /// Whether the source speaks of what is not, rather than the kernel refusing.
    pub fn is_of_source(&self) -> bool {
        match self {
            MemoryError::UnknownProcess(_)
            | MemoryError::UnknownPages(..)
            | MemoryError::TooEarly(_) => true,
            MemoryError::AttachedTwice(_)
            | MemoryError::Read(_)
            | MemoryError::Journal(..)
            | MemoryError::Refused(..) => false,
        }
    }
}

/// How a fault was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The thread goes on, or waits for a page.
    Given,
    /// Events must be read first.
    EventsFirst,
    /// The host had no memory.
    NoMemory,
}

/// What of a frame had not come before.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NewPages {
    pub(super) pages: u64,
    pub(super) zero_pages: u64,
    pub(super) digest: u64,
}

#[derive(Debug)]
pub(super) struct LiveFamily<D: Descriptor> {
    family: Family,
    vmas: Vec<DumpedVma>,
    /// A task hands its descriptor over before its mappings are registered with it. Until all are, only pages that
    /// faulted can be installed, and that the kernel knows no mapping for a page means nothing.
    restored: bool,
    /// Descriptors of the members that live.
    uffds: BTreeMap<MemberId, Arc<D>>,
    /// Frames that wait for `restored`.
    early: Vec<(DataHeader, Arc<[u8]>)>,
    early_bytes: usize,
    /// What found no memory.
    shortage: Shortage,
    /// Slots that threads wait for, since when; in order, as they are asked for again.
    waiting: BTreeMap<usize, Instant>,
    /// Slots that came to a program before us, which was killed before it installed them: owed once more.
    missed: BTreeSet<usize>,
    blocktime: Blocktime,
    /// How long each call took that put pages in place.
    installs: Blocktime,
    /// The moment since which the resolver counts.
    began: Instant,
    buffer: D::Buffer,
    counts: FamilyCounts,
}

/// What of a family came, and how.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct FamilyCounts {
    pub(super) demanded: u64,
    pub(super) pushed: u64,
    pub(super) zero: u64,
    pub(super) digest: u64,
}

impl<D: Descriptor> LiveFamily<D> {
    pub(super) fn new(image: ProcessImage) -> Self {
        LiveFamily {
            family: Family::new(image.pid, Arc::new(image.lazy)),
            vmas: image.vmas,
            restored: false,
            uffds: BTreeMap::new(),
            early: Vec::new(),
            early_bytes: 0,
            shortage: Shortage::default(),
            waiting: BTreeMap::new(),
            missed: BTreeSet::new(),
            blocktime: Blocktime::default(),
            installs: Blocktime::default(),
            began: Instant::now(),
            buffer: D::buffer(),
            counts: FamilyCounts::default(),
        }
    }

    pub(super) fn fetch_singly(&mut self) {
        self.family.fetch_singly();
    }

    pub(super) fn waits_since(&self) -> Option<Instant> {
        self.waiting.values().min().copied()
    }

    pub(super) fn blocktime(&self) -> &Blocktime {
        &self.blocktime
    }

    pub(super) fn installs(&self) -> &Blocktime {
        &self.installs
    }

    pub(super) fn attach(&mut self, uffd: D, sink: &Sink<'_, D>) -> Result<MemberKey, MemoryError> {
        if !self.uffds.is_empty() {
            return Err(MemoryError::AttachedTwice(self.family.pid()));
        }
        self.note(Note::of_descriptor(Change::Attach, uffd.number()))?;
        let member = self.family.attach(&self.vmas);
        Ok(self.watch(member, uffd, sink))
    }

    /// All mappings are registered: installs what came before.
    pub(super) fn restored(&mut self, sink: &Sink<'_, D>) -> Result<(), MemoryError> {
        self.restored = true;
        self.early_bytes = 0;
        for (header, payload) in std::mem::take(&mut self.early) {
            // Behind one that found no memory others have to wait: who knows how many.
            if self.is_short() || self.place_frame(&header, &payload, sink)? == Placed::NoMemory {
                self.park(header, payload, sink);
            }
        }
        Ok(())
    }

    fn watch(&mut self, member: MemberId, uffd: D, sink: &Sink<'_, D>) -> MemberKey {
        let key = MemberKey {
            pid: self.family.pid(),
            member,
        };
        let uffd = Arc::new(uffd);
        self.uffds.insert(member, Arc::clone(&uffd));
        sink.order(Order::Watch(key, uffd));
        key
    }

    /// Reads and handles what waits on a member's descriptor, until nothing does.
    pub(super) fn drain(
        &mut self,
        member: MemberId,
        sink: &Sink<'_, D>,
    ) -> Result<bool, MemoryError> {
        let mut faults = Vec::new();
        loop {
            self.read_events(member, &mut faults, sink)?;
            let Some(page) = faults.pop() else {
                return Ok(self.family.member(member).is_some());
            };
            if self.is_deaf(member) {
                // What the event says may be about the page.
                self.starve(member, page);
                continue;
            }
            match self.resolve(member, page, sink)? {
                Answer::Given => {}
                Answer::EventsFirst => {
                    faults.push(page);
                    self.pause(member);
                }
                Answer::NoMemory => {
                    self.starve(member, page);
                    sink.fall_short(Want::Memory);
                }
            }
        }
    }

    /// Applies every event that waits, and collects the faults: the kernel hands faults out before the events that
    /// preceded them, so a fault is looked up only when no event is left.
    fn read_events(
        &mut self,
        member: MemberId,
        faults: &mut Vec<PageIndex>,
        sink: &Sink<'_, D>,
    ) -> Result<(), MemoryError> {
        let Some(uffd) = self.uffds.get(&member).cloned() else {
            return Ok(());
        };
        loop {
            self.make_room()?;
            self.buffer.begin(member);
            let events = match uffd.read(&mut self.buffer) {
                Err(error) if error.is_passing() => {
                    self.deafen(member);
                    sink.fall_short(Want::Descriptor);
                    return Ok(());
                }
                events => events?,
            };
            self.undeafen(member);
            if events.is_empty() {
                return Ok(());
            }
            for event in events {
                self.apply(member, event, faults, sink);
            }
        }
    }

    /// Applies one event. Threads that wait for pages that are not coming to that place any more are woken: they
    /// fault again and find what is there now.
    fn apply(
        &mut self,
        member: MemberId,
        event: MemoryEvent<D>,
        faults: &mut Vec<PageIndex>,
        sink: &Sink<'_, D>,
    ) {
        tracing::trace!(?member, ?event, "event");
        match event {
            MemoryEvent::Fault(page) => faults.push(page),
            MemoryEvent::Fork(uffd) => {
                // A member that ended cannot fork; its queue may still hold the event of a fork before.
                if let Some(child) = self.family.fork(member) {
                    self.watch(child, uffd, sink);
                }
            }
            MemoryEvent::Remap(from, to) => {
                self.family.remap(member, from, to);
                self.wake(member, from);
            }
            MemoryEvent::Remove(pages) => {
                let unneeded = self.family.remove(member, pages);
                self.discard(unneeded, sink);
                self.wake(member, pages);
            }
            MemoryEvent::Unmap(pages) => {
                let unneeded = self.family.unmap(member, pages);
                self.discard(unneeded, sink);
                self.wake(member, pages);
            }
        }
    }

    /// What is settled, for a source that has to know again.
    pub(super) fn present_map(&self) -> PresentMap {
        PresentMap {
            received: self.family.received().words().to_vec(),
            withheld: self.family.withheld().words().to_vec(),
        }
    }

    /// Asks again for what a lost link took with it.
    pub(super) fn reconnect(&mut self, sink: &Sink<'_, D>) {
        let waiting: Vec<usize> = self.waiting.keys().copied().collect();
        let (requests, discards) = self.family.reconnect(waiting);
        for pages in requests {
            let frame = DemandFrame::Request(self.family.pid(), pages);
            sink.order(Order::Demand(frame));
        }
        self.discard(discards, sink);
    }

    /// Lets the kernel's own threads come on before something is tried again.
    fn pause(&self, member: MemberId) {
        if let Some(uffd) = self.uffds.get(&member) {
            uffd.pause(RETRY_PAUSE);
        }
    }

    fn wake(&self, member: MemberId, pages: PageRange) {
        if let Some(uffd) = self.uffds.get(&member) {
            uffd.wake(pages);
        }
    }

    fn discard(&self, unneeded: Vec<PageRange>, sink: &Sink<'_, D>) {
        for pages in unneeded {
            let frame = DemandFrame::Discard(self.family.pid(), pages);
            sink.order(Order::Demand(frame));
        }
    }

    pub(super) fn exited(&mut self, member: MemberId, sink: &Sink<'_, D>) {
        if let Err(error) = self.note(Change::Exit(member)) {
            // A successor finds out by itself that the process is gone.
            tracing::warn!(%error, "a process ended");
        }
        let unneeded = self.family.exit(member);
        self.discard(unneeded, sink);
        self.undeafen(member);
        self.uffds.remove(&member);
    }

    /// Whether no member's process lives any more. Not asked of the map: it knows only ends that were noticed.
    pub(super) fn is_gone(&self) -> bool {
        self.uffds.values().all(|uffd| uffd.is_gone())
    }

    /// Forgets a member whose process has ended without anyone noticing. False when it is not there (any more).
    pub(super) fn check(&mut self, member: MemberId, sink: &Sink<'_, D>) -> bool {
        if self.uffds.get(&member).is_some_and(|uffd| uffd.is_gone()) {
            self.exited(member, sink);
        }
        self.uffds.contains_key(&member)
    }

    /// Answers one fault.
    fn resolve(
        &mut self,
        member: MemberId,
        page: PageIndex,
        sink: &Sink<'_, D>,
    ) -> Result<Answer, MemoryError> {
        match self.family.fault(member, page) {
            // A page that was put in place is there, or the kernel took it without a word (a child of fork whose parent
            // asked for MADV_WIPEONFORK, a guard page that was lifted). Zeros go only where nothing is.
            Fault::Zero | Fault::Present => return self.zero_fault(member, page, sink),
            Fault::Waiting { slot } => {
                self.note_waiting(slot);
                // The restore itself faults, also on pages that came early.
                if self.place_kept(slot, sink)? == Placed::NoMemory {
                    return Ok(Answer::NoMemory);
                }
            }
            Fault::Request {
                slot,
                page,
                neighbours,
            } => {
                self.note_waiting(slot);
                let pid = self.family.pid();
                let itself = PageRange::new(page, 1);
                for pages in std::iter::once(itself).chain(neighbours) {
                    sink.order(Order::Demand(DemandFrame::Request(pid, pages)));
                }
            }
        }
        Ok(Answer::Given)
    }

    /// Installs one slot from the frames that wait for `restored`, if it is in one.
    fn place_kept(&mut self, slot: usize, sink: &Sink<'_, D>) -> Result<Placed, MemoryError> {
        let holding = self.early.iter().position(|(header, _)| {
            let slots = self.family.slots_of(header.pages);
            slots.is_some_and(|slots| slots.contains(&slot))
        });
        let Some(index) = holding else {
            return Ok(Placed::Wholly);
        };
        let (header, payload) = self.early[index].clone();
        self.place_frame(&header, &payload, sink)
    }

    fn note_waiting(&mut self, slot: usize) {
        self.waiting.entry(slot).or_insert_with(Instant::now);
    }

    fn zero_fault(
        &mut self,
        member: MemberId,
        page: PageIndex,
        sink: &Sink<'_, D>,
    ) -> Result<Answer, MemoryError> {
        let target = PageRange::new(page, 1);
        let Some(uffd) = self.uffds.get(&member).cloned() else {
            return Ok(Answer::Given);
        };
        match uffd.zero(target).stop {
            None => {
                sink.zero_faults.fetch_add(1, Ordering::Relaxed);
            }
            Some(Stop::EventsPending) => return Ok(Answer::EventsFirst),
            Some(Stop::NoMemory) => return Ok(Answer::NoMemory),
            // The thread faults again and finds what is there now.
            Some(Stop::AlreadyPresent | Stop::NotMapped) => uffd.wake(target),
            Some(Stop::ProcessGone) => self.exited(member, sink),
            Some(Stop::Refused(errno)) => {
                return Err(MemoryError::Refused(self.family.pid(), target, errno));
            }
        }
        Ok(Answer::Given)
    }

    /// Takes a frame in: into memory, or aside while the process is not restored yet.
    pub(super) fn receive(
        &mut self,
        header: &DataHeader,
        payload: &[u8],
        arrival: Arrival,
        sink: &Sink<'_, D>,
    ) -> Result<NewPages, MemoryError> {
        let slots = self
            .family
            .slots_of(header.pages)
            .ok_or(MemoryError::UnknownPages(header.pid, header.pages))?;
        let new = self.account(header, payload, slots, arrival)?;
        let placed = self.place_frame(header, payload, sink)?;
        if arrival == Arrival::Demanded {
            self.family.came(self.began.elapsed());
        }
        if !self.restored {
            self.keep(header, payload)?;
        }
        if placed == Placed::NoMemory {
            self.park(*header, payload.into(), sink);
        }
        Ok(new)
    }

    fn keep(&mut self, header: &DataHeader, payload: &[u8]) -> Result<(), MemoryError> {
        self.early_bytes += payload.len();
        if self.early_bytes > MAX_EARLY_BYTES {
            return Err(MemoryError::TooEarly(header.pid));
        }
        self.early.push((*header, payload.into()));
        Ok(())
    }

    /// Marks slots received and adds up those that are new.
    fn account(
        &mut self,
        header: &DataHeader,
        payload: &[u8],
        slots: Range<usize>,
        arrival: Arrival,
    ) -> Result<NewPages, MemoryError> {
        let mut new = NewPages::default();
        let (mut mask, mut zeros) = (0_u16, 0_u16);
        let mut stored = payload.chunks_exact(PAGE_SIZE);
        for (index, slot) in slots.clone().enumerate() {
            let page = header.pages.start.forward(index as u64);
            let content = (!header.is_zero(index)).then(|| stored.next()).flatten();
            if self.family.received().contains(slot) {
                continue;
            }
            let hash = match content {
                Some(content) => page_hash(header.pid, page, content),
                None => zero_page_hash(header.pid, page),
            };
            mask |= 1 << index;
            zeros |= u16::from(content.is_none()) << index;
            new.pages += 1;
            new.zero_pages += u64::from(content.is_none());
            new.digest = new.digest.wrapping_add(hash);
        }
        if mask != 0 {
            self.note(Note {
                change: Change::Received(slots.start, mask),
                detail: new.digest,
                extra: u64::from(zeros) | u64::from(arrival == Arrival::Pushed) << 16,
            })?;
        }
        for slot in slots {
            self.family.receive(slot);
        }
        self.counts.add(new, arrival);
        Ok(new)
    }

    /// Returns how many pages were not confirmed before.
    pub(super) fn confirm_withheld(&mut self, pages: PageRange) -> Result<u64, MemoryError> {
        let confirmed = self.family.confirm_withheld(pages);
        let confirmed = confirmed.ok_or(MemoryError::UnknownPages(self.family.pid(), pages))?;
        self.note(Change::Withheld(pages))?;
        Ok(confirmed)
    }
}
