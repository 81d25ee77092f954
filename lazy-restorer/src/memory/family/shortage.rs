//! What found no memory on this host, and is tried again: pages that came, and faults on pages without content. And events
//! that could not be read, because there was no descriptor for a forked child.
//!
//! Nobody waits for memory under a family's lock, nor on a thread that drives a connection: what could not be done is kept
//! here, and `Order::Relieve` asks for it to be tried again. It stays small: who brings pages brings no more meanwhile
//! ([`Memory::relieved`](super::super::Memory::relieved)), and a thread waits for one page.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::page::{PageIndex, PageRange};
use common::proto::pages::DataHeader;

use super::super::descriptor::Descriptor;
use super::super::{Sink, Want};
use super::placement::Placed;
use super::{Answer, LiveFamily, MemoryError};
use crate::resolver::MemberId;

/// What found no memory.
#[derive(Debug, Default)]
pub(super) struct Shortage {
    frames: Vec<(DataHeader, Arc<[u8]>)>,
    /// Pages that threads wait for, in no order that matters.
    faults: BTreeSet<(usize, PageIndex)>,
    /// Members whose events cannot be read.
    deaf: BTreeSet<usize>,
}

impl<D: Descriptor> LiveFamily<D> {
    /// Whether something found no memory.
    pub(in super::super) fn is_short(&self) -> bool {
        let Shortage {
            frames,
            faults,
            deaf,
        } = &self.shortage;
        !frames.is_empty() || !faults.is_empty() || !deaf.is_empty()
    }

    /// Whether events of a member wait that cannot be read.
    pub(super) fn is_deaf(&self, member: MemberId) -> bool {
        self.shortage.deaf.contains(&member.0)
    }

    pub(super) fn deafen(&mut self, member: MemberId) {
        self.shortage.deaf.insert(member.0);
    }

    pub(super) fn undeafen(&mut self, member: MemberId) {
        self.shortage.deaf.remove(&member.0);
    }

    /// Keeps a frame that found no memory. A new link may bring one again.
    pub(super) fn park(&mut self, header: DataHeader, payload: Arc<[u8]>, sink: &Sink<'_, D>) {
        let frames = &mut self.shortage.frames;
        if !frames.iter().any(|(parked, _)| *parked == header) {
            sink.parked.fetch_add(header.pages.count, Ordering::AcqRel);
            frames.push((header, payload));
        }
        sink.fall_short(Want::Memory);
    }

    /// Keeps in mind that a fault could not be answered.
    pub(super) fn starve(&mut self, member: MemberId, page: PageIndex) {
        self.shortage.faults.insert((member.0, page));
    }

    /// Tries again. True when nothing is left that found no memory.
    pub(in super::super) fn relieve(&mut self, sink: &Sink<'_, D>) -> Result<bool, MemoryError> {
        for member in self.shortage.deaf.clone() {
            self.drain(MemberId(member), sink)?;
            if self.is_deaf(MemberId(member)) {
                return Ok(false);
            }
        }
        while let Some((header, payload)) = self.shortage.frames.first().cloned() {
            if self.place_frame(&header, &payload, sink)? == Placed::NoMemory {
                return Ok(false);
            }
            self.shortage.frames.remove(0);
            sink.parked.fetch_sub(header.pages.count, Ordering::AcqRel);
        }
        while let Some((member, page)) = self.shortage.faults.pop_first() {
            match self.resolve(MemberId(member), page, sink)? {
                Answer::Given => {}
                // The thread faults again when they were read.
                Answer::EventsFirst => self.wake(MemberId(member), PageRange::new(page, 1)),
                Answer::NoMemory => {
                    self.shortage.faults.insert((member, page));
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}
