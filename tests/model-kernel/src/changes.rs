//! System calls that change an address space, as the kernel carries them out and reports them.

use common::page::{PageIndex, PageRange};

use crate::{ADDRESSES, Call, Cell, Change, Content, Event, Kernel, Kind, Process, pages_of};

impl Kernel {
    /// Carries a change out, unless no sane program would ask for it now.
    pub fn change(&mut self, process: usize, change: &Change) {
        let vma = self.fresh_vma();
        let target = &mut self.processes[process];
        if !target.alive || !target.born || target.cells.is_empty() {
            return;
        }
        let start = target.pick(change.at, |_| true).expect("it has pages");
        target.blurred |= !target.held.is_empty();
        let range = PageRange::new(PageIndex(start), change.count);
        match change.kind {
            Kind::Remap {
                to,
                into_hole,
                keep_old,
            } => {
                let from = target.run(range);
                let hole = target.hole(change.at).filter(|_| into_hole);
                let to = hole.unwrap_or(PageIndex(to));
                target.remap(from, to, keep_old, vma, change.slow);
            }
            Kind::Unmap => target.unmap(range, None, change.slow),
            Kind::MapAnew => target.unmap(range, Some(vma), change.slow),
            Kind::Remove => target.remove(target.run(range)),
            Kind::Grow => target.grow(range),
        }
    }

    /// A copy of a process, which is born when its parent's event is read.
    pub fn fork(&mut self, parent: usize) {
        let process = &mut self.processes[parent];
        let moving = |call: &Call| !call.only_unmaps_left();
        if !process.born || process.held.iter().chain(&process.queue).any(moving) {
            return;
        }
        let blurred = process.blurred || !process.is_quiet();
        let child = Process {
            alive: true,
            cells: process.cells.clone(),
            blurred,
            forked: true,
            ..Process::default()
        };
        self.processes.push(child);
        let event = Event::Fork(self.processes.len() - 1);
        self.processes[parent].enter(Call {
            events: [event].into(),
            slow: false,
            owned: Vec::new(),
            freed: Vec::new(),
        });
    }

    /// A process ends, with every call of its threads.
    pub fn exit(&mut self, process: usize) {
        let queue = std::mem::take(&mut self.processes[process].queue);
        for event in queue.into_iter().flat_map(|call| call.events) {
            if let Event::Fork(child) = event {
                self.processes[child] = Process::default();
            }
        }
        self.processes[process] = Process {
            born: true,
            blurred: true,
            ..Process::default()
        };
    }
}

impl Call {
    fn only_unmaps_left(&self) -> bool {
        self.events
            .iter()
            .all(|event| matches!(event, Event::Unmap(_) | Event::Fork(_)))
    }

    /// Whether all that is left is to report that the old place of a move is gone.
    fn has_moved(&self) -> bool {
        !self.owned.is_empty() && self.only_unmaps_left()
    }
}

impl Process {
    /// One of the mapped pages with suitable content.
    pub fn pick(&self, at: usize, suits: impl Fn(Content) -> bool) -> Option<u64> {
        let cells = self.cells.iter();
        let mut pages: Vec<u64> = cells
            .filter(|(_, cell)| suits(cell.content))
            .map(|(page, _)| *page)
            .collect();
        pages.sort_unstable();
        (!pages.is_empty()).then(|| pages[at % pages.len()])
    }

    /// As much of a range as one watched mapping holds from its start on.
    fn run(&self, range: PageRange) -> PageRange {
        let vma = self.cells.get(&range.start.0).map(|cell| cell.vma);
        let same = |page: &u64| {
            let cell = self.cells.get(page);
            cell.is_some_and(|cell| Some(cell.vma) == vma && cell.content != Content::Unwatched)
        };
        let count = pages_of(range).take_while(same).count();
        PageRange::new(range.start, count as u64)
    }

    fn pending(&self) -> impl Iterator<Item = &Call> {
        self.held.iter().chain(&self.queue)
    }

    /// A place that a call on its way has freed.
    fn hole(&self, at: usize) -> Option<PageIndex> {
        let freed: Vec<&PageRange> = self.pending().flat_map(|call| &call.freed).collect();
        (!freed.is_empty()).then(|| freed[at % freed.len()].start)
    }

    /// Whether a program may name these addresses while other calls are on their way.
    fn may_touch(&self, range: PageRange) -> bool {
        let overlaps = |other: &PageRange| other.intersect(range).is_some();
        let mapped = pages_of(range).all(|page| self.cells.contains_key(&page));
        self.pending().all(|call| {
            let taken_over = mapped && call.has_moved();
            !call.owned.iter().any(overlaps) && (taken_over || !call.freed.iter().any(overlaps))
        })
    }

    /// Whether the kernel or a program may put a mapping there.
    fn may_place(&self, range: PageRange) -> bool {
        if range.end().0 > ADDRESSES {
            return false;
        }
        if pages_of(range).any(|page| self.cells.contains_key(&page)) {
            return self.may_touch(range);
        }
        self.pending()
            .flat_map(|call| &call.owned)
            .all(|owned| owned.intersect(range).is_none())
    }

    fn has(&self, range: PageRange, which: impl Fn(&Cell) -> bool) -> bool {
        pages_of(range).any(|page| self.cells.get(&page).is_some_and(&which))
    }

    fn is_watched(&self, range: PageRange) -> bool {
        self.has(range, |cell| cell.content != Content::Unwatched)
    }

    /// Whether events told of all these pages. Of those that appeared when a mapping grew, or that a move left behind,
    /// nobody can know.
    fn is_noted(&self, range: PageRange) -> bool {
        let noted = |cell: &Cell| !cell.grown && cell.content != Content::Unwatched;
        pages_of(range).all(|page| self.cells.get(&page).is_some_and(noted))
    }

    /// Whether events on the way may overtake each other. That can be told only by what is noted, and a child has no
    /// sure past. (Holes count as well: a program that unmaps what it does not own is lost anyway.)
    fn may_be_slow(&self, range: PageRange) -> bool {
        !self.forked && self.is_noted(range)
    }

    fn is_freed(&self, range: PageRange) -> bool {
        let mut freed = self.pending().flat_map(|call| &call.freed);
        freed.any(|freed| freed.intersect(range).is_some())
    }

    fn take(&mut self, range: PageRange) -> Vec<(u64, Cell)> {
        pages_of(range)
            .filter_map(|page| Some((page, self.cells.remove(&page)?)))
            .collect()
    }

    fn remap(&mut self, from: PageRange, to: PageIndex, keep_old: bool, vma: usize, slow: bool) {
        let target = PageRange::new(to, from.count);
        let sane = from.count > 0 && from.intersect(target).is_none();
        if !sane || !self.may_touch(from) || !self.may_place(target) {
            return;
        }
        if self.is_freed(target) && !self.is_noted(from) {
            return;
        }
        let free = !pages_of(target).any(|page| self.cells.contains_key(&page));
        let slow = slow && self.may_be_slow(from) && (free || self.may_be_slow(target));
        let known = self.may_be_slow(from);
        let mut events = Vec::new();
        if self.is_watched(target) {
            events.push(Event::Unmap(target));
        }
        events.push(Event::Remap(from, to));
        self.take(target);
        for (page, cell) in self.take(from) {
            let place = to.0 + (page - from.start.0);
            self.cells.insert(place, Cell { vma, ..cell });
            if keep_old {
                let content = Content::ZeroDue;
                let grown = true;
                self.cells.insert(
                    page,
                    Cell {
                        vma: cell.vma,
                        content,
                        grown,
                    },
                );
            }
        }
        if !keep_old {
            events.push(Event::Unmap(from));
        }
        // The limit of what can be told: when others move to the old place of pages nobody knew of, before the event.
        let blind = !known && events.len() > 2;
        let (owned, freed) = if keep_old || blind {
            (vec![target, from], Vec::new())
        } else {
            (vec![target], vec![from])
        };
        let events = events.into();
        self.enter(Call {
            events,
            slow,
            owned,
            freed,
        });
    }

    fn unmap(&mut self, range: PageRange, anew: Option<usize>, slow: bool) {
        if !self.may_touch(range) {
            return;
        }
        let slow = slow && self.may_be_slow(range);
        let watched = self.is_watched(range);
        self.take(range);
        for page in pages_of(range) {
            if let Some(vma) = anew {
                let content = Content::Unwatched;
                self.cells.insert(
                    page,
                    Cell {
                        vma,
                        content,
                        grown: false,
                    },
                );
            }
        }
        if watched {
            self.enter(Call {
                events: [Event::Unmap(range)].into(),
                slow,
                owned: anew.map(|_| range).into_iter().collect(),
                freed: vec![range],
            });
        }
    }

    fn remove(&mut self, range: PageRange) {
        if range.count > 0 && self.may_touch(range) {
            self.enter(Call {
                events: [Event::Remove(range)].into(),
                slow: false,
                owned: vec![range],
                freed: Vec::new(),
            });
        }
    }

    /// `mremap` makes a mapping longer where it is; nothing reports it.
    fn grow(&mut self, range: PageRange) {
        let whole = self.run(PageRange::new(range.start, ADDRESSES));
        let more = PageRange::new(whole.end(), range.count);
        let free = pages_of(more).all(|page| !self.cells.contains_key(&page));
        let place = free && self.may_place(more) && !self.is_freed(more);
        if self.blurred || whole.count == 0 || !place {
            return;
        }
        let vma = self.cells[&whole.start.0].vma;
        for page in pages_of(more) {
            let content = Content::ZeroDue;
            self.cells.insert(
                page,
                Cell {
                    vma,
                    content,
                    grown: true,
                },
            );
        }
    }
}
