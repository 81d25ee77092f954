//! A mapping and what each of its pages must hold.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use tests::board::{Mismatch, Place};
use tests::random::Random;

use crate::mapping::Mapping;
use crate::pattern::{Stamp, check, fill};

/// Parts of a mapping that are worth moving one by one.
const MAX_PARTS: usize = 100;

/// Why a step failed.
#[derive(Debug)]
pub enum Failure {
    /// Memory does not hold what was written.
    Mismatch(Mismatch),
    /// A system call failed that must not.
    System(io::Error),
}

impl From<Mismatch> for Failure {
    fn from(mismatch: Mismatch) -> Self {
        Self::Mismatch(mismatch)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

/// Pages one thread owns.
#[derive(Debug)]
pub struct Arena<'a> {
    mapping: Mapping,
    stamps: Vec<Stamp>,
    place: Place,
    checked: &'a AtomicU64,
}

impl<'a> Arena<'a> {
    /// Maps `pages` pages of zeros; `checked` counts the pages compared.
    pub fn new(pages: usize, place: Place, checked: &'a AtomicU64) -> io::Result<Self> {
        Ok(Self {
            mapping: Mapping::new(pages)?,
            stamps: vec![0; pages],
            place,
            checked,
        })
    }

    /// How many pages it has at the moment.
    pub fn pages(&self) -> usize {
        self.stamps.len()
    }

    /// Writes a new pattern into one page.
    pub fn write(&mut self, page: usize, random: &mut Random) {
        let stamp = random.next() | 1;
        self.stamps[page] = stamp;
        fill(self.mapping.page_mut(page), stamp);
    }

    /// Writes every page.
    pub fn write_all(&mut self, random: &mut Random) {
        (0..self.pages()).for_each(|page| self.write(page, random));
    }

    /// Compares one page.
    pub fn check(&self, page: usize) -> Result<(), Mismatch> {
        self.checked.fetch_add(1, Ordering::Relaxed);
        check(self.mapping.page(page), self.stamps[page], self.place)
    }

    /// Compares every page.
    pub fn check_all(&self) -> Result<(), Mismatch> {
        (0..self.pages()).try_for_each(|page| self.check(page))
    }

    /// The same pages seen by a forked child.
    pub fn as_child(&mut self) {
        self.place = Place::Child;
    }

    /// Gives pages back to the kernel by `madvise`; the first must read as zeros at once.
    pub fn discard(&mut self, range: Range<usize>) -> Result<(), Failure> {
        self.mapping.discard(range.clone())?;
        self.are_zeros_now(range)
    }

    /// Maps new pages over old ones.
    pub fn replace(&mut self, range: Range<usize>) -> Result<(), Failure> {
        self.mapping.replace(range.clone())?;
        self.are_zeros_now(range)
    }

    fn are_zeros_now(&mut self, range: Range<usize>) -> Result<(), Failure> {
        self.stamps[range.clone()].fill(0);
        Ok(self.check(range.start)?)
    }

    /// Moves all pages to another address; copies them when they lie in too many mappings by now.
    pub fn relocate(&mut self, random: &mut Random) -> Result<(), Failure> {
        if self.mapping.parts() > MAX_PARTS {
            self.mapping.rebuild()?;
        } else {
            self.mapping.relocate()?;
        }
        Ok(self.check(random.index(self.pages()))?)
    }

    /// Grows or shrinks to `pages`.
    pub fn resize(&mut self, pages: usize) -> Result<(), Failure> {
        if pages < self.pages() {
            self.mapping.shrink(pages)?;
        } else {
            self.mapping.grow(pages)?;
        }
        self.stamps.resize(pages, 0);
        Ok(self.check(pages - 1)?)
    }

    /// Moves pages elsewhere, compares one and writes one there, and moves them back.
    pub fn excursion(&mut self, range: Range<usize>, random: &mut Random) -> Result<(), Failure> {
        let (checked, written) = (random.index(range.len()), random.index(range.len()));
        let stamp = random.next() | 1;
        let (expected, place) = (self.stamps[range.start + checked], self.place);
        self.stamps[range.start + written] = stamp;
        self.mapping.excursion(range, |away| {
            check(away.page(checked), expected, place)?;
            fill(away.page_mut(written), stamp);
            Ok::<(), Mismatch>(())
        })??;
        Ok(())
    }

    /// Makes pages read-only or writable.
    pub fn protect(&mut self, range: Range<usize>, writable: bool) -> Result<(), Failure> {
        Ok(self.mapping.protect(range, writable)?)
    }
}
