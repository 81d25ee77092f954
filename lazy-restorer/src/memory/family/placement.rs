//! Pages that came, put in place wherever a member misses them.

use std::ops::Range;
use std::time::Instant;

use common::page::{PAGE_SIZE, PageRange, page_in_buffer};
use common::proto::pages::DataHeader;

use super::super::Sink;
use super::super::descriptor::Descriptor;
use super::{LiveFamily, MemoryError};
use crate::resolver::{Change, Install, MemberId};
use crate::uffd::{Progress, Stop};

/// How an attempt to put pages in place ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placed {
    /// They are in place, wherever they were missed.
    Wholly,
    /// The host lacked memory for one of them, or a descriptor for a child: to be tried again later, not under the lock.
    NoMemory,
}

/// How one install ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// All in place.
    Done,
    /// Something happened, and the plan may have changed.
    Surprise,
    /// The host had no memory.
    NoMemory,
}

/// A run of slots and what belongs in them.
#[derive(Clone, Copy)]
enum Content<'a> {
    Zero,
    Pages(&'a [u8]),
}

impl<D: Descriptor> LiveFamily<D> {
    pub(super) fn place_frame(
        &mut self,
        header: &DataHeader,
        payload: &[u8],
        sink: &Sink<'_, D>,
    ) -> Result<Placed, MemoryError> {
        let Some(slots) = self.family.slots_of(header.pages) else {
            return Ok(Placed::Wholly);
        };
        let mut index = 0;
        let mut rest = payload;
        while index < slots.len() {
            let zero = header.is_zero(index);
            let end = (index..slots.len())
                .find(|page| header.is_zero(*page) != zero)
                .unwrap_or(slots.len());
            let run = slots.start + index..slots.start + end;
            let stored = if zero { 0 } else { run.len() * PAGE_SIZE };
            let (pages, later) = rest.split_at(stored);
            rest = later;
            let content = if zero {
                Content::Zero
            } else {
                Content::Pages(pages)
            };
            let placed = match self.restored {
                true => self.place(run, content, sink)?,
                false => self.place_faulted(run, content, sink)?,
            };
            if placed == Placed::NoMemory {
                return Ok(placed);
            }
            index = end;
        }
        Ok(Placed::Wholly)
    }

    /// Installs only the slots of a run that threads wait for.
    fn place_faulted(
        &mut self,
        slots: Range<usize>,
        content: Content<'_>,
        sink: &Sink<'_, D>,
    ) -> Result<Placed, MemoryError> {
        for (index, slot) in slots.enumerate() {
            if !self.waiting.contains_key(&slot) {
                continue;
            }
            let content = match content {
                Content::Zero => Content::Zero,
                Content::Pages(bytes) => Content::Pages(&bytes[page_in_buffer(index)]),
            };
            if self.place(slot..slot + 1, content, sink)? == Placed::NoMemory {
                return Ok(Placed::NoMemory);
            }
        }
        Ok(Placed::Wholly)
    }

    /// Installs a run of slots wherever a member misses it. The plan is made anew after every surprise.
    fn place(
        &mut self,
        slots: Range<usize>,
        content: Content<'_>,
        sink: &Sink<'_, D>,
    ) -> Result<Placed, MemoryError> {
        'plan: loop {
            for install in self.family.installs(slots.clone()) {
                match self.place_one(install, slots.start, content, sink)? {
                    Outcome::Done => {}
                    Outcome::Surprise => continue 'plan,
                    Outcome::NoMemory => return Ok(Placed::NoMemory),
                }
            }
            match self.family.displaced(slots.clone()) {
                Some(member) => {
                    self.await_departures(member, sink)?;
                    if self.is_deaf(member) {
                        return Ok(Placed::NoMemory);
                    }
                }
                None => break,
            }
        }
        self.release_waiting(slots);
        Ok(Placed::Wholly)
    }

    /// Reads the events that tell where pages went which something else was moved over.
    fn await_departures(
        &mut self,
        member: MemberId,
        sink: &Sink<'_, D>,
    ) -> Result<(), MemoryError> {
        self.drain(member, sink)?;
        if self.is_deaf(member) {
            return Ok(());
        }
        if self.uffds.get(&member).is_none_or(|uffd| uffd.is_quiet()) {
            self.note(Change::Quiet(member))?;
            self.family.assume_quiet(member);
        } else {
            self.pause(member);
        }
        Ok(())
    }

    /// Performs one install.
    fn place_one(
        &mut self,
        install: Install,
        first_slot: usize,
        content: Content<'_>,
        sink: &Sink<'_, D>,
    ) -> Result<Outcome, MemoryError> {
        let Install {
            member,
            target,
            slot,
        } = install;
        let skip = slot - first_slot;
        let Some(uffd) = self.uffds.get(&member).cloned() else {
            return Ok(Outcome::Surprise);
        };
        let fill = || match content {
            Content::Zero => uffd.zero(target),
            Content::Pages(bytes) => {
                let from = skip * PAGE_SIZE;
                uffd.copy(target, &bytes[from..from + target.bytes() as usize])
            }
        };
        let began = Instant::now();
        let Progress { pages, stop } = match fill() {
            // The kernel looks for events first and for the mapping then. In between the mapping may have been moved
            // away; in that case there is an event now. Only without one is the mapping really gone.
            progress if progress.stop == Some(Stop::NotMapped) => fill(),
            progress => progress,
        };
        self.installs.record(began.elapsed());
        let done = pages as usize;
        self.installed(member, slot..slot + done)?;
        let Some(stop) = stop else {
            return Ok(Outcome::Done);
        };
        let failed = PageRange::new(target.start.forward(pages), 1);
        match stop {
            Stop::AlreadyPresent => {
                // Of a longer run the first page is the one that is there.
                self.installed(member, slot + done..slot + done + 1)?;
                uffd.wake(failed);
            }
            Stop::EventsPending => {
                self.drain(member, sink)?;
                if self.is_deaf(member) {
                    return Ok(Outcome::NoMemory);
                }
                if done == 0 {
                    self.pause(member);
                }
            }
            // The range may only have been split by mprotect, which nobody reports: try each page by itself.
            Stop::NotMapped if target.count > 1 => {
                return self.place_singly(install, first_slot, content, sink);
            }
            Stop::NotMapped => {
                self.note(Change::Gone(member, target))?;
                self.family.gone(member, target);
                uffd.wake(target);
            }
            Stop::ProcessGone => self.exited(member, sink),
            Stop::NoMemory => return Ok(Outcome::NoMemory),
            Stop::Refused(errno) => {
                return Err(MemoryError::Refused(self.family.pid(), target, errno));
            }
        }
        Ok(Outcome::Surprise)
    }

    fn installed(&mut self, member: MemberId, slots: Range<usize>) -> Result<(), MemoryError> {
        if !slots.is_empty() {
            self.note(Change::Installed(member, slots.start, slots.len()))?;
            self.family.installed(member, slots);
        }
        Ok(())
    }

    fn place_singly(
        &mut self,
        install: Install,
        first_slot: usize,
        content: Content<'_>,
        sink: &Sink<'_, D>,
    ) -> Result<Outcome, MemoryError> {
        for page in 0..install.target.count {
            let single = Install {
                target: PageRange::new(install.target.start.forward(page), 1),
                slot: install.slot + page as usize,
                ..install
            };
            let outcome = self.place_one(single, first_slot, content, sink)?;
            if outcome != Outcome::Done {
                return Ok(outcome);
            }
        }
        // What the one piece was taken for is not true any more.
        Ok(Outcome::Surprise)
    }

    fn release_waiting(&mut self, slots: Range<usize>) {
        if self.waiting.is_empty() {
            return;
        }
        for slot in slots {
            if let Some(since) = self.waiting.remove(&slot) {
                let (waited, now) = (since.elapsed(), self.began.elapsed());
                self.blocktime.record(waited);
                self.family.served(now.saturating_sub(waited), now);
            }
        }
    }
}
