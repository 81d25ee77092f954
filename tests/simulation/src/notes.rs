//! What a killed destination leaves to its successor, and the moment at which it is killed.
//!
//! Stands in for `lazy-restorer/src/journal.rs`: notes and checkpoints outlive the program, and an event is noted by the
//! very read that takes it from the kernel.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lazy_restorer::journal::{Note, Recovered};
use lazy_restorer::memory::descriptor::{Buffer, Descriptor};
use lazy_restorer::resolver::{Change, MemberId};
use lazy_restorer::uffd::MemoryEvent;

use crate::uffd::Uffd;

/// Notes between two checkpoints: few, so that there are some.
const NOTES_PER_CHECKPOINT: usize = 24;

/// Burns down with every system call and note of the program. Once it has burnt nothing the program does has an effect:
/// that is what being killed in the middle of something looks like to everybody else.
#[derive(Clone, Debug)]
pub struct Fuse(Arc<AtomicU64>);

/// Longer than any run.
const FOR_EVER: u64 = u64::MAX;

impl Default for Fuse {
    fn default() -> Self {
        Fuse(Arc::new(AtomicU64::new(FOR_EVER)))
    }
}

impl Fuse {
    /// The program is killed before it has done so many more things.
    pub fn light(&self, left: u64) {
        self.0.store(left, Ordering::Relaxed);
    }

    /// A successor lives.
    pub fn renew(&self) {
        self.light(FOR_EVER);
    }

    /// Whether the program is dead.
    pub fn has_burnt(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }

    /// The program does something; true when it is dead and does not.
    pub fn burn(&self) -> bool {
        let left = self.0.load(Ordering::Relaxed);
        if left != FOR_EVER && left > 0 {
            self.light(left - 1);
        }
        self.has_burnt()
    }
}

/// What was noted of one process.
#[derive(Clone, Debug, Default)]
pub struct Shelf(Arc<Mutex<Noted>>);

#[derive(Debug, Default)]
struct Noted {
    checkpoint: Option<Vec<u8>>,
    notes: Vec<Note>,
}

impl Shelf {
    fn lock(&self) -> MutexGuard<'_, Noted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a successor finds.
    pub fn recovered(&self) -> Recovered {
        let noted = self.lock();
        Recovered {
            checkpoint: noted.checkpoint.clone(),
            notes: noted.notes.clone(),
        }
    }
}

/// A program's way to the shelf; without one nothing is kept.
#[derive(Debug)]
pub struct Notes {
    shelf: Option<(Shelf, Fuse)>,
    member: MemberId,
}

impl Default for Notes {
    fn default() -> Self {
        Notes {
            shelf: None,
            member: MemberId(0),
        }
    }
}

impl Notes {
    /// Notes that are kept on `shelf` until `fuse` has burnt.
    pub fn on(shelf: &Shelf, fuse: &Fuse) -> Self {
        Notes {
            shelf: Some((shelf.clone(), fuse.clone())),
            ..Notes::default()
        }
    }

    /// Events that the kernel has handed out by a call that was made.
    pub fn take(&mut self, events: &[MemoryEvent<Uffd>]) {
        let Some((shelf, _)) = &self.shelf else {
            return;
        };
        let notes = events.iter().filter_map(|event| of(self.member, event));
        shelf.lock().notes.extend(notes);
    }
}

fn of(member: MemberId, event: &MemoryEvent<Uffd>) -> Option<Note> {
    Some(match event {
        MemoryEvent::Fault(_) => return None,
        MemoryEvent::Fork(child) => Note::of_descriptor(Change::Fork(member), child.number()),
        MemoryEvent::Remap(from, to) => Change::Remap(member, *from, *to).into(),
        MemoryEvent::Remove(pages) => Change::Remove(member, *pages).into(),
        MemoryEvent::Unmap(pages) => Change::Unmap(member, *pages).into(),
    })
}

impl Buffer for Notes {
    fn begin(&mut self, member: MemberId) {
        self.member = member;
    }

    fn note(&mut self, note: Note) {
        if let Some((shelf, fuse)) = &self.shelf
            && !fuse.burn()
        {
            shelf.lock().notes.push(note);
        }
    }

    fn is_full(&self) -> bool {
        let Some((shelf, _)) = &self.shelf else {
            return false;
        };
        shelf.lock().notes.len() >= NOTES_PER_CHECKPOINT
    }

    fn checkpoint(&mut self, state: &[u8]) -> io::Result<()> {
        if let Some((shelf, fuse)) = &self.shelf
            && !fuse.burn()
        {
            *shelf.lock() = Noted {
                checkpoint: Some(state.to_vec()),
                notes: Vec::new(),
            };
        }
        Ok(())
    }
}
