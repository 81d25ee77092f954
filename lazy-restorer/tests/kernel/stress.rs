//! A workload of many threads that does at random whatever a process may do with its memory.

use std::thread;

use common::page::{PageIndex, PageRange};

use crate::frozen::{Frozen, Random, State, mix};
use crate::sys;
use crate::workload::Workload;

const THREADS: u64 = 3;
const CHUNK_PAGES: u64 = 8;
const MAX_CHUNK_PAGES: usize = 24;
/// Addresses of each thread's own for `MREMAP_FIXED`, in pages.
const ARENA_FIRST_PAGE: u64 = 0x3_0000_0000;
const ARENA_SLOTS: u64 = 48;
/// Odd, so that page tables cannot be moved whole: the longer a move takes, the more comes in its way.
const SLOT_PAGES: u64 = 2047;
const STEPS: usize = 400;

/// What a thread may do besides reading and writing.
#[derive(Clone, Copy, Debug, Default)]
struct Allowed {
    remove: bool,
    moves: bool,
    unmap: bool,
    fork: bool,
    split: bool,
    /// One thread moves everything to and fro.
    restless: bool,
}

/// Mapped pages of one thread, and what each must hold.
#[derive(Clone, Debug)]
struct Chunk {
    start: PageIndex,
    pages: Vec<State>,
    /// The slot of the arena it lies in.
    slot: Option<u64>,
    /// It is more than one mapping, which `mremap` refuses.
    split: bool,
}

impl Chunk {
    fn range(&self) -> PageRange {
        PageRange::new(self.start, self.pages.len() as u64)
    }
}

struct Actor<'a> {
    workload: &'a Workload,
    random: Random,
    chunks: Vec<Chunk>,
    arena: PageIndex,
    free: Vec<u64>,
    allowed: Allowed,
}

/// Runs the threads, then lets everything arrive and checks once more.
pub fn run(workload: &mut Workload, name: &str) {
    let allowed = allowed(name);
    let chunks: Vec<Vec<Chunk>> = thread::scope(|scope| {
        let shared = &*workload;
        let start = |index| {
            let mut actor = Actor::new(shared, index, allowed);
            scope.spawn(move || {
                (0..STEPS).for_each(|_| actor.step());
                actor.chunks
            })
        };
        let threads: Vec<_> = (0..allowed.threads()).map(start).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .map(|chunks| chunks.expect("a thread ends well"))
            .collect()
    });
    workload.settle();
    for chunk in chunks.iter().flatten() {
        assert!(chunk.holds(workload), "{chunk:?}");
    }
}

fn allowed(name: &str) -> Allowed {
    let has = |word| name == "all" || name.split(' ').any(|allowed| allowed == word);
    Allowed {
        remove: has("remove"),
        moves: has("move"),
        unmap: has("unmap"),
        fork: has("fork"),
        split: has("protect"),
        restless: name == "restless",
    }
}

impl Allowed {
    fn threads(self) -> u64 {
        if self.restless { 1 } else { THREADS }
    }

    fn chunk_pages(self, pages: u64) -> u64 {
        if self.restless { pages } else { CHUNK_PAGES }
    }
}

impl Chunk {
    fn holds(&self, workload: &Workload) -> bool {
        let mut pages = self.pages.iter().enumerate();
        pages.all(|(index, state)| {
            let page = self.start.forward(index as u64);
            workload.difference(page, *state).is_none()
        })
    }
}

impl<'a> Actor<'a> {
    fn new(workload: &'a Workload, index: u64, allowed: Allowed) -> Self {
        let Frozen { seed, pages, .. } = workload.frozen;
        let length = allowed.chunk_pages(pages);
        let mine = pages / allowed.threads() / length;
        let chunk = |number| {
            let first = (index * mine + number) * length;
            let page = |index| State::Frozen(workload.frozen.page(first + index));
            Chunk {
                start: workload.frozen.page(first),
                pages: (0..length).map(page).collect(),
                slot: None,
                split: false,
            }
        };
        Actor {
            workload,
            random: Random(mix(seed ^ index)),
            chunks: (0..mine).map(chunk).collect(),
            arena: PageIndex(ARENA_FIRST_PAGE + index * ARENA_SLOTS * SLOT_PAGES),
            free: (0..ARENA_SLOTS).collect(),
            allowed,
        }
    }

    fn step(&mut self) {
        if self.chunks.is_empty() {
            return;
        }
        let which = self.random.below(self.chunks.len() as u64) as usize;
        let allowed = self.allowed;
        if allowed.restless {
            return self.move_to_arena(which);
        }
        match self.random.below(40) {
            0..8 => self.read(which),
            8..14 => self.write(which),
            14..20 if allowed.remove => self.remove(which),
            20..24 if allowed.moves => self.move_to_arena(which),
            24..27 if allowed.moves => self.move_anywhere(which),
            27..30 if allowed.moves => self.grow(which),
            30..32 if allowed.moves => self.shrink(which),
            32..34 if allowed.moves => self.tear(which),
            34..36 if allowed.unmap => self.unmap(which),
            36..38 if allowed.split => self.split(which),
            38 if allowed.fork => self.fork(which),
            _ => self.read(which),
        }
    }

    /// A random part of a chunk, by index.
    fn part(&mut self, which: usize) -> (usize, usize) {
        let len = self.chunks[which].pages.len() as u64;
        let start = self.random.below(len);
        let count = 1 + self.random.below(len - start);
        (start as usize, count as usize)
    }

    fn read(&mut self, which: usize) {
        let (index, _) = self.part(which);
        let chunk = &self.chunks[which];
        let page = chunk.start.forward(index as u64);
        self.workload.check(page, chunk.pages[index]);
    }

    fn write(&mut self, which: usize) {
        let (index, _) = self.part(which);
        let state = State::Own(self.random.next());
        let chunk = &mut self.chunks[which];
        chunk.pages[index] = state;
        let page = chunk.start.forward(index as u64);
        sys::store(page, &self.workload.frozen.content(state));
    }

    fn remove(&mut self, which: usize) {
        let (index, count) = self.part(which);
        let chunk = &mut self.chunks[which];
        let pages = PageRange::new(chunk.start.forward(index as u64), count as u64);
        sys::advise(pages, libc::MADV_DONTNEED).expect("it is mapped");
        chunk.pages[index..index + count].fill(State::Zero);
        self.read(which);
    }

    fn slot(&self, number: u64) -> PageIndex {
        self.arena.forward(number * SLOT_PAGES)
    }

    fn moved(&mut self, which: usize, start: PageIndex, slot: Option<u64>) {
        let chunk = &mut self.chunks[which];
        chunk.start = start;
        let left = std::mem::replace(&mut chunk.slot, slot);
        self.free.extend(left);
    }

    fn move_to_arena(&mut self, which: usize) {
        let chunk = &self.chunks[which];
        if chunk.split || self.free.is_empty() {
            return;
        }
        let pick = self.random.below(self.free.len() as u64) as usize;
        let number = self.free.swap_remove(pick);
        let range = self.chunks[which].range();
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let at = sys::remap(range, range.count, flags, self.slot(number)).expect("one mapping");
        self.moved(which, at, Some(number));
        self.read(which);
    }

    /// Leaves the place to the kernel, which likes the hole that was made last.
    fn move_anywhere(&mut self, which: usize) {
        let range = self.chunks[which].range();
        if self.chunks[which].split {
            return;
        }
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
        let at = sys::remap(range, range.count, flags, PageIndex(0)).expect("one mapping");
        if self.random.below(2) == 0 {
            self.workload.check(range.start, State::Zero);
        }
        sys::unmap(range).expect("it is mapped");
        self.moved(which, at, None);
        self.read(which);
    }

    fn grow(&mut self, which: usize) {
        let chunk = &self.chunks[which];
        if chunk.split || chunk.slot.is_some() || chunk.pages.len() >= MAX_CHUNK_PAGES {
            return;
        }
        let range = chunk.range();
        let more = 1 + self.random.below(4);
        let count = range.count + more;
        let at = sys::remap(range, count, libc::MREMAP_MAYMOVE, PageIndex(0));
        let at = at.expect("one mapping");
        let pages = &mut self.chunks[which].pages;
        pages.resize(count as usize, State::Zero);
        self.moved(which, at, None);
        self.read(which);
    }

    fn shrink(&mut self, which: usize) {
        let range = self.chunks[which].range();
        if range.count < 2 {
            return;
        }
        let rest = range.count - 1;
        sys::remap(range, rest, 0, PageIndex(0)).expect("it is mapped");
        self.chunks[which].pages.truncate(rest as usize);
    }

    /// Moves a part of a chunk away, and the rest becomes chunks of their own.
    fn tear(&mut self, which: usize) {
        if self.chunks[which].split || self.chunks[which].slot.is_some() || self.free.is_empty() {
            return;
        }
        let (index, count) = self.part(which);
        let number = self.free.pop().expect("there is one");
        let chunk = self.chunks.swap_remove(which);
        let part = PageRange::new(chunk.start.forward(index as u64), count as u64);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let at = sys::remap(part, part.count, flags, self.slot(number)).expect("one mapping");
        let piece = |start, pages: &[State], slot| Chunk {
            start,
            pages: pages.to_vec(),
            slot,
            split: false,
        };
        let (head, rest) = chunk.pages.split_at(index);
        let (torn, tail) = rest.split_at(count);
        let pieces = [
            piece(chunk.start, head, None),
            piece(at, torn, Some(number)),
            piece(part.end(), tail, None),
        ];
        self.chunks
            .extend(pieces.into_iter().filter(|piece| !piece.pages.is_empty()));
    }

    fn unmap(&mut self, which: usize) {
        if self.chunks.len() > 4 {
            let chunk = self.chunks.swap_remove(which);
            sys::unmap(chunk.range()).expect("it is mapped");
            self.free.extend(chunk.slot);
        }
    }

    fn split(&mut self, which: usize) {
        let (index, count) = self.part(which);
        let chunk = &mut self.chunks[which];
        let pages = PageRange::new(chunk.start.forward(index as u64), count as u64);
        sys::split_mapping(pages).expect("it is mapped");
        chunk.split = true;
    }

    /// Children see what this thread sees, and what they change is theirs.
    fn fork(&mut self, which: usize) {
        let Actor {
            workload, chunks, ..
        } = self;
        let near: Vec<&Chunk> = chunks.iter().skip(which).take(3).collect();
        let as_expected = || near.iter().all(|chunk| chunk.holds(workload));
        let good = sys::in_child(|| {
            let before = sys::in_child(as_expected);
            let page = near[0].start;
            sys::store(page, &workload.frozen.content(State::Own(1)));
            let tail = PageRange::new(page.forward(1), near[0].range().count - 1);
            let removed = tail.count == 0
                || sys::advise(tail, libc::MADV_DONTNEED).is_ok()
                    && workload.difference(tail.start, State::Zero).is_none();
            let own = workload.difference(page, State::Own(1)).is_none();
            let others = near[1..].iter().all(|chunk| chunk.holds(workload));
            before && removed && own && others
        });
        assert!(
            good,
            "seed {}: a child sees otherwise: {near:?}",
            workload.frozen.seed
        );
    }
}
