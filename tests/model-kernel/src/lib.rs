//! What must be true: a deliberately naive kernel, page by page, for every process of one family.
//!
//! The kernel knows what each page holds and which events nobody has read yet. The resolver only learns of changes by
//! those events, so the two may differ exactly as much as the real kernel lets them differ.

mod changes;

use std::collections::{HashMap, HashSet, VecDeque};

use common::page::{PageIndex, PageRange};

/// What one mapped page holds. Numbers are dump-time pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing yet; the frozen page belongs here.
    Missing(u64),
    /// The frozen page.
    Present(u64),
    /// Nothing; zeros belong here.
    ZeroDue,
    /// Zeros.
    Zero,
    /// What the process wrote itself.
    Own,
    /// Memory that no descriptor watches.
    Unwatched,
}

impl Content {
    /// Whether touching the page raises a fault.
    pub fn faults(self) -> bool {
        matches!(self, Content::Missing(_) | Content::ZeroDue)
    }
}

/// One mapped page and the mapping it lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// The mapping.
    pub vma: usize,
    /// What it holds.
    pub content: Content,
    /// Came into being when a mapping grew, which no event tells.
    pub grown: bool,
}

/// A message of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A child was made, which is this process.
    Fork(usize),
    /// Pages moved.
    Remap(PageRange, PageIndex),
    /// Pages lost their content.
    Remove(PageRange),
    /// Pages are not mapped any more.
    Unmap(PageRange),
}

/// A system call whose thread waits until its events are read, one after the other.
#[derive(Clone, Debug)]
pub struct Call {
    /// What is still to be reported.
    pub events: VecDeque<Event>,
    /// The thread loses its processor before it queues each of its events.
    pub slow: bool,
    /// Pages only the caller may use until the call returns.
    pub owned: Vec<PageRange>,
    /// Pages that are free for any mapping already.
    pub freed: Vec<PageRange>,
}

/// One process.
#[derive(Clone, Debug, Default)]
pub struct Process {
    /// It has not ended.
    pub alive: bool,
    /// Born only when the event of its fork is read.
    pub born: bool,
    /// Its mapped pages.
    pub cells: HashMap<u64, Cell>,
    /// Calls whose event waits to be read.
    pub queue: VecDeque<Call>,
    /// Calls whose thread has not queued its event yet.
    pub held: Vec<Call>,
    /// Pages whose faults nobody has read.
    pub faults: Vec<u64>,
    /// Pages whose faults were read and left waiting for content.
    pub waiting: HashSet<u64>,
    /// Events came out of order once, so the map may name pages that are no more. It must still not lose any.
    pub blurred: bool,
    /// It came from a fork.
    pub forked: bool,
}

/// Why a copy stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `EEXIST`.
    Exists,
    /// `EAGAIN`.
    Again,
    /// `ENOENT`.
    NoEntry,
    /// `ESRCH`.
    Gone,
    /// `ENOMEM`.
    NoMemory,
}

/// All processes, in the order of their forks.
#[derive(Debug, Default)]
pub struct Kernel {
    /// The processes.
    pub processes: Vec<Process>,
    next_vma: usize,
    /// After so many more copied pages a removal or move strikes.
    pub interrupt: Option<usize>,
    /// Pages there is memory for; `None` when there is enough.
    pub memory: Option<usize>,
}

impl Kernel {
    /// A number for a mapping.
    pub fn fresh_vma(&mut self) -> usize {
        self.next_vma += 1;
        self.next_vma
    }

    /// `UFFDIO_COPY` of the frozen pages `dumps` to `target`: how many, and why not more.
    pub fn copy(
        &mut self,
        process: usize,
        target: PageRange,
        dumps: PageRange,
    ) -> (u64, Option<Stop>) {
        self.put(process, target, |index, content| {
            let dump = dumps.start.forward(index).0;
            let page = target.start.forward(index).0;
            assert_eq!(
                content,
                Content::Missing(dump),
                "page {page} takes frozen page {dump}"
            );
            Content::Present(dump)
        })
    }

    /// Puts pages at `target`: how many, and why not more. `becomes` says what the page with this index in the range
    /// turns into.
    pub fn put(
        &mut self,
        process: usize,
        target: PageRange,
        becomes: impl Fn(u64, Content) -> Content,
    ) -> (u64, Option<Stop>) {
        for index in 0..target.count {
            let page = target.start.forward(index).0;
            if self.interrupt == Some(0) {
                return (index, Some(Stop::Again));
            }
            let mut stop = self.processes[process].refuses(page, target);
            // Memory is taken before the place is looked at.
            if matches!(stop, None | Some(Stop::Exists)) && self.memory == Some(0) {
                stop = Some(Stop::NoMemory);
            }
            if stop.is_some() {
                return (index, stop.filter(|_| index == 0).or(Some(Stop::Again)));
            }
            self.processes[process].fill(page, |content| becomes(index, content));
            self.interrupt = self.interrupt.map(|left| left - 1);
            self.memory = self.memory.map(|left| left - 1);
        }
        (target.count, None)
    }
}

impl Process {
    /// Whether no event is on its way: then the map must agree with memory.
    pub fn is_quiet(&self) -> bool {
        self.queue.is_empty() && self.held.is_empty()
    }

    /// What a page holds; `None` when nothing is mapped there.
    pub fn content(&self, page: u64) -> Option<Content> {
        self.cells.get(&page).map(|cell| cell.content)
    }

    fn refuses(&self, page: u64, target: PageRange) -> Option<Stop> {
        if !self.alive {
            return Some(Stop::Gone);
        }
        if !self.is_quiet() {
            return Some(Stop::Again);
        }
        let vmas: HashSet<Option<usize>> =
            pages_of(target).map(|page| self.watched(page)).collect();
        if vmas.len() != 1 || vmas.contains(&None) {
            assert!(vmas.contains(&None), "install {target:?} crosses mappings");
            return Some(Stop::NoEntry);
        }
        let content = self.cells[&page].content;
        (!content.faults()).then_some(Stop::Exists)
    }

    fn watched(&self, page: u64) -> Option<usize> {
        let cell = self.cells.get(&page)?;
        (cell.content != Content::Unwatched).then_some(cell.vma)
    }

    fn fill(&mut self, page: u64, becomes: impl Fn(Content) -> Content) {
        let cell = self.cells.get_mut(&page).expect("it was checked");
        cell.content = becomes(cell.content);
        self.waiting.remove(&page);
    }

    /// `UFFDIO_ZEROPAGE` of one page, which wakes whoever waits. False when events must be read first.
    pub fn zero(&mut self, page: u64) -> bool {
        if !self.is_quiet() {
            return false;
        }
        if let Some(cell) = self.cells.get_mut(&page) {
            match cell.content {
                Content::ZeroDue => cell.content = Content::Zero,
                Content::Missing(dump) => panic!("zeros at {page} instead of frozen page {dump}"),
                _ => {}
            }
        }
        self.waiting.remove(&page);
        true
    }

    /// Wakes threads; those that still find nothing fault again.
    pub fn wake(&mut self, pages: PageRange) {
        for page in pages_of(pages) {
            if self.waiting.remove(&page) {
                self.touch(page);
            }
        }
    }

    /// A thread reads a page.
    pub fn touch(&mut self, page: u64) {
        if self.content(page).is_some_and(Content::faults) {
            self.faults.push(page);
        }
    }

    /// A thread writes to a page that is there, or faults.
    pub fn write(&mut self, at: usize) {
        let Some(page) = self.pick(at, |content| content != Content::Unwatched) else {
            return;
        };
        self.touch(page);
        let cell = self.cells.get_mut(&page).expect("it was picked");
        if !cell.content.faults() {
            cell.content = Content::Own;
        }
    }

    /// Pages that still lack their frozen content.
    pub fn missing(&self) -> impl Iterator<Item = (u64, u64)> {
        self.cells
            .iter()
            .filter_map(|(page, cell)| match cell.content {
                Content::Missing(dump) => Some((*page, dump)),
                _ => None,
            })
    }

    /// Takes the next event that waits to be read. Its thread runs on to its next one.
    pub fn next_event(&mut self) -> Option<Event> {
        let mut call = self.queue.pop_front()?;
        let event = call
            .events
            .pop_front()
            .expect("calls in the queue have one");
        if !call.events.is_empty() {
            self.enter(call);
        } else if let Event::Remove(pages) = event {
            self.zap(pages);
        }
        Some(event)
    }

    /// A call's next event enters the queue, or soon will.
    pub fn enter(&mut self, call: Call) {
        if call.slow {
            self.held.push(call);
        } else {
            self.queue.push_back(call);
        }
    }

    /// The thread of a held call queues its event.
    pub fn release(&mut self, pick: usize) {
        if !self.held.is_empty() {
            let call = self.held.remove(pick % self.held.len());
            self.queue.push_back(call);
        }
    }

    fn zap(&mut self, pages: PageRange) {
        for page in pages_of(pages) {
            if let Some(cell) = self.cells.get_mut(&page)
                && cell.content != Content::Unwatched
            {
                cell.content = Content::ZeroDue;
            }
        }
    }
}

/// The numbers of a range's pages.
pub fn pages_of(range: PageRange) -> std::ops::Range<u64> {
    range.start.0..range.end().0
}

/// Addresses that anything may be moved to: few, so that formerly used ones come up often.
pub const ADDRESSES: u64 = 112;

/// A change of an address space.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// Picks among live processes.
    pub who: usize,
    /// Picks among mapped pages.
    pub at: usize,
    /// Pages it is about, at most.
    pub count: u64,
    /// The thread loses its processor in the middle of it.
    pub slow: bool,
    /// What is changed.
    pub kind: Kind,
}

/// What a change does.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// `mremap`.
    Remap {
        /// Where to.
        to: u64,
        /// The kernel finds a place by itself, and takes one that was just left.
        into_hole: bool,
        /// `MREMAP_DONTUNMAP`.
        keep_old: bool,
    },
    /// `munmap`.
    Unmap,
    /// `mmap` over what is there.
    MapAnew,
    /// `madvise(MADV_DONTNEED)`.
    Remove,
    /// `mremap` that makes a mapping longer.
    Grow,
}
