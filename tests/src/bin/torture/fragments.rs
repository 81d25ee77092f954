//! A few hundred VMAs: one mapping cut into pieces by alternating protections.

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use tests::board::{Mismatch, Place};
use tests::random::Random;

use crate::arena::{Arena, Failure};

/// Pages of one piece.
const PIECE: usize = 3;

/// The mapping; its even pieces are read-only.
#[derive(Debug)]
pub struct Fragments<'a> {
    arena: Arena<'a>,
    pieces: usize,
}

impl<'a> Fragments<'a> {
    /// Makes a mapping of `pieces` VMAs, half of its pages written.
    pub fn new(
        pieces: usize,
        random: &mut Random,
        checked: &'a AtomicU64,
    ) -> Result<Self, Failure> {
        let mut arena = Arena::new(pieces * PIECE, Place::Fragments, checked)?;
        for page in (0..pieces * PIECE)
            .filter(|_| random.below(2) == 0)
            .collect::<Vec<_>>()
        {
            arena.write(page, random);
        }
        for piece in (0..pieces).step_by(2) {
            arena.protect(pages_of(piece), false)?;
        }
        Ok(Self { arena, pieces })
    }

    /// Compares a piece and writes one of its pages, through a change of protection where it is read-only.
    pub fn step(&mut self, random: &mut Random) -> Result<(), Failure> {
        if self.pieces == 0 {
            return Ok(());
        }
        let piece = random.index(self.pieces);
        pages_of(piece).try_for_each(|page| self.arena.check(page))?;
        let read_only = piece.is_multiple_of(2);
        if read_only {
            self.arena.protect(pages_of(piece), true)?;
        }
        self.arena
            .write(piece * PIECE + random.index(PIECE), random);
        if read_only {
            self.arena.protect(pages_of(piece), false)?;
        }
        Ok(())
    }

    /// Compares every page.
    pub fn check_all(&self) -> Result<(), Mismatch> {
        self.arena.check_all()
    }
}

fn pages_of(piece: usize) -> Range<usize> {
    piece * PIECE..(piece + 1) * PIECE
}
