//! One thread that does to its own memory everything a program may do, and compares.

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use tests::board::{Mismatch, Place, Worker};
use tests::pulse::wall_ns;
use tests::random::Random;

use crate::arena::{Arena, Failure};
use crate::fragments::Fragments;
use crate::heap::Heap;
use crate::stack::descend;

/// Arenas of one worker: several, so that some lie still while others move.
const ARENAS: usize = 4;
/// Pages of one discard, replacement or excursion at most.
const MAX_RANGE: usize = 48;
/// An arena neither grows nor shrinks below or above its first size by more than this part.
const ELASTICITY: usize = 4;
/// Calls of one recursion at most: about 1 MiB of stack.
const MAX_DEPTH: u64 = 400;

/// How much memory a worker has.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Pages it writes at the start.
    pub pages: usize,
    /// Pieces of its fragmented mapping.
    pub pieces: usize,
}

/// The memory of one worker.
pub struct Estate<'a> {
    arenas: Vec<Arena<'a>>,
    untouched: Arena<'a>,
    fragments: Fragments<'a>,
    heap: Heap,
    random: Random,
    first_pages: usize,
}

impl<'a> Estate<'a> {
    /// Maps and fills it.
    pub fn new(size: Size, seed: u64, checked: &'a AtomicU64) -> Result<Self, Failure> {
        let mut random = Random::new(seed);
        let first_pages = (size.pages / ARENAS).max(2 * MAX_RANGE);
        let mut arenas = Vec::new();
        for _ in 0..ARENAS {
            let mut arena = Arena::new(first_pages, Place::Arena, checked)?;
            arena.write_all(&mut random);
            arenas.push(arena);
        }
        Ok(Self {
            arenas,
            untouched: Arena::new(first_pages, Place::Arena, checked)?,
            fragments: Fragments::new(size.pieces, &mut random, checked)?,
            heap: Heap::default(),
            random,
            first_pages,
        })
    }

    /// One step, noted in `counters`.
    pub fn step(&mut self, counters: &Worker) -> Result<(), Failure> {
        let started = wall_ns();
        self.act()?;
        counters.note(started);
        Ok(())
    }

    fn act(&mut self) -> Result<(), Failure> {
        let random = &mut self.random;
        let arena = &mut self.arenas[random.index(ARENAS)];
        match random.below(100) {
            0..35 => arena.write(random.index(arena.pages()), random),
            35..75 => arena.check(random.index(arena.pages()))?,
            75..79 => arena.discard(some_range(arena.pages(), random))?,
            79..81 => arena.replace(some_range(arena.pages(), random))?,
            81..84 => arena.excursion(some_range(arena.pages(), random), random)?,
            84 => arena.relocate(random)?,
            85..87 => {
                let slack = self.first_pages / ELASTICITY;
                arena.resize(self.first_pages - slack + random.index(2 * slack))?;
            }
            87..90 => self.untouched.check(random.index(self.untouched.pages()))?,
            90..95 => self.fragments.step(random)?,
            95..97 => descend(random.below(MAX_DEPTH), random.next() | 1)?,
            _ => self.heap.step(random)?,
        }
        Ok(())
    }

    /// Compares everything.
    pub fn check_all(&self) -> Result<(), Mismatch> {
        self.arenas.iter().try_for_each(Arena::check_all)?;
        self.untouched.check_all()?;
        self.fragments.check_all()?;
        self.heap.check_all()
    }
}

fn some_range(pages: usize, random: &mut Random) -> Range<usize> {
    let length = 1 + random.index(MAX_RANGE);
    let start = random.index(pages - length);
    start..start + length
}
