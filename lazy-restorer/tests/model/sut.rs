//! The resolver at work on the naive kernel, driven the way `memory` drives it on the real one.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use common::images::ImagePid;
use common::lazy_map::LazyMap;
use common::page::{PageIndex, PageRange};
use common::proto::demand::DemandFrame;
use lazy_restorer::resolver::{Family, Fault, Install, MemberId};

use crate::source::{Message, Source};
use crate::transition::Dump;
use model_kernel::{Cell, Change, Content, Event, Kernel, Process, Stop, pages_of};

const PID: ImagePid = ImagePid(7);

/// Everything at one moment.
pub struct Migration {
    pub family: Family,
    pub kernel: Kernel,
    pub source: Source,
    pub lazy: LazyMap,
    dump: Dump,
    /// Member of each process that the resolver knows.
    pub members: HashMap<usize, MemberId>,
    early: Vec<Range<usize>>,
    /// Asked for and not here yet, by dump-time page.
    pub outstanding: HashSet<u64>,
    pub received: HashSet<usize>,
    pub withheld: HashSet<usize>,
    disturbance: Option<Change>,
}

impl Migration {
    pub fn new(dump: &Dump) -> Self {
        let lazy = LazyMap::new(dump.lazy.iter().copied()).expect("pages are in order");
        Migration {
            family: Family::new(PID, Arc::new(lazy.clone())),
            kernel: Kernel::default(),
            source: Source::new(&dump.lazy),
            lazy,
            dump: dump.clone(),
            members: HashMap::new(),
            early: Vec::new(),
            outstanding: HashSet::new(),
            received: HashSet::new(),
            withheld: HashSet::new(),
            disturbance: None,
        }
    }

    /// Waits without a pause: enough of them that faults reach as far as they may.
    pub fn wait_only(&mut self) {
        for wait in 0..100 {
            let [since, now] = [wait, wait + 1].map(Duration::from_millis);
            self.family.served(since, now);
        }
    }

    pub fn is_attached(&self) -> bool {
        !self.kernel.processes.is_empty()
    }

    pub fn attach(&mut self) {
        let mut process = Process {
            alive: true,
            born: true,
            ..Process::default()
        };
        for vma in &self.dump.vmas {
            let id = self.kernel.fresh_vma();
            for page in pages_of(vma.pages) {
                let content = match self.lazy.slot(PageIndex(page)) {
                    _ if !vma.lazy => Content::Unwatched,
                    Some(_) => Content::Missing(page),
                    None => Content::ZeroDue,
                };
                let cell = Cell {
                    vma: id,
                    content,
                    grown: false,
                };
                process.cells.insert(page, cell);
            }
        }
        self.kernel.processes.push(process);
        let member = self.family.attach(&self.dump.vmas);
        self.members.insert(0, member);
        for slots in std::mem::take(&mut self.early) {
            self.place(slots);
        }
    }

    pub fn process_of(&self, member: MemberId) -> usize {
        let found = self.members.iter().find(|(_, known)| **known == member);
        *found.expect("every member is a process").0
    }

    /// The process a step is about.
    pub fn pick(&self, who: usize) -> Option<usize> {
        let living = |process: &usize| {
            let process = &self.kernel.processes[*process];
            process.alive && process.born
        };
        let living: Vec<usize> = (0..self.kernel.processes.len()).filter(living).collect();
        (!living.is_empty()).then(|| living[who % living.len()])
    }

    /// Reads and handles what waits on a descriptor.
    pub fn drain(&mut self, process: usize) {
        let Some(member) = self.members.get(&process).copied() else {
            return;
        };
        loop {
            while let Some(event) = self.kernel.processes[process].next_event() {
                self.apply(process, member, event);
            }
            let Some(page) = self.kernel.processes[process].faults.pop() else {
                return;
            };
            if !self.resolve(process, member, page) {
                self.kernel.processes[process].faults.push(page);
                return;
            }
        }
    }

    fn apply(&mut self, process: usize, member: MemberId, event: Event) {
        match event {
            Event::Fork(child) => {
                let id = self.family.fork(member).expect("the parent lives");
                self.kernel.processes[child].born = true;
                self.members.insert(child, id);
            }
            Event::Remap(from, to) => {
                self.family.remap(member, from, to);
                self.kernel.processes[process].wake(from);
            }
            Event::Remove(pages) => {
                let unneeded = self.family.remove(member, pages);
                self.discard(&unneeded);
                self.kernel.processes[process].wake(pages);
            }
            Event::Unmap(pages) => {
                let unneeded = self.family.unmap(member, pages);
                self.discard(&unneeded);
                self.kernel.processes[process].wake(pages);
            }
        }
    }

    fn discard(&mut self, unneeded: &[PageRange]) {
        for pages in unneeded {
            self.check_discard(*pages);
            self.source
                .demands
                .push_back(DemandFrame::Discard(PID, *pages));
        }
    }

    pub fn notice_exit(&mut self, process: usize) {
        if let Some(member) = self.members.get(&process).copied() {
            let unneeded = self.family.exit(member);
            self.discard(&unneeded);
        }
    }

    fn resolve(&mut self, process: usize, member: MemberId, page: u64) -> bool {
        let fault = self.family.fault(member, PageIndex(page));
        self.check_fault(process, page, &fault);
        match fault {
            Fault::Zero | Fault::Present => return self.kernel.processes[process].zero(page),
            Fault::Waiting { .. } => {}
            Fault::Request {
                page, neighbours, ..
            } => {
                let itself = PageRange::new(page, 1);
                for pages in std::iter::once(itself).chain(neighbours) {
                    self.check_request(pages);
                    self.outstanding.extend(pages_of(pages));
                    self.source
                        .demands
                        .push_back(DemandFrame::Request(PID, pages));
                }
            }
        }
        self.kernel.processes[process].waiting.insert(page);
        true
    }

    /// Something arrives.
    pub fn deliver(&mut self, message: Message) {
        match message {
            Message::Withheld(pages) => {
                assert_eq!(
                    self.family.confirm_withheld(pages),
                    Some(pages.count),
                    "{pages:?} was not asked for, or confirmed before"
                );
                let slots = self.family.slots_of(pages).expect("they are lazy");
                self.withheld.extend(slots);
            }
            Message::Data(pages) => {
                let slots = self.family.slots_of(pages).expect("they are lazy");
                for slot in slots.clone() {
                    let new = self.family.receive(slot);
                    assert_eq!(new, self.received.insert(slot), "slot {slot}");
                    self.outstanding.remove(&self.lazy.page(slot).0);
                }
                if self.is_attached() {
                    self.place(slots);
                } else {
                    self.early.push(slots);
                }
            }
        }
    }

    /// The next install is struck by a change of the address space after some pages.
    pub fn disturb(&mut self, after: usize, change: Change) {
        self.kernel.interrupt = Some(after);
        self.disturbance = Some(change);
    }

    pub fn undisturbed(&mut self) {
        self.kernel.interrupt = None;
        self.disturbance = None;
    }

    fn place(&mut self, slots: Range<usize>) {
        'plan: loop {
            for install in self.family.installs(slots.clone()) {
                self.check_install(&install);
                if !self.place_one(install) {
                    continue 'plan;
                }
            }
            let Some(member) = self.family.displaced(slots.clone()) else {
                return;
            };
            let process = self.process_of(member);
            self.wait_for_events(process);
            if self.kernel.processes[process].is_quiet() {
                self.family.assume_quiet(member);
            }
        }
    }

    fn place_one(&mut self, install: Install) -> bool {
        let Install {
            member,
            target,
            slot,
        } = install;
        let process = self.process_of(member);
        let dumps = PageRange::new(self.lazy.page(slot), target.count);
        let (done, stop) = self.kernel.copy(process, target, dumps);
        let done = done as usize;
        self.family.installed(member, slot..slot + done);
        match stop {
            None => return true,
            Some(Stop::Exists) => self.family.installed(member, slot + done..slot + done + 1),
            Some(Stop::Gone) => self.notice_exit(process),
            Some(Stop::NoEntry) if target.count > 1 => {
                for page in 0..target.count {
                    let single = PageRange::new(target.start.forward(page), 1);
                    let slot = slot + page as usize;
                    if !self.place_one(Install {
                        target: single,
                        slot,
                        ..install
                    }) {
                        return false;
                    }
                }
            }
            Some(Stop::NoEntry) => self.family.gone(member, target),
            Some(Stop::Again) => self.wait_for_events(process),
            // What is done then is the affair of the memory around the resolver (`tests/simulation`).
            Some(Stop::NoMemory) => self.kernel.memory = None,
        }
        false
    }

    /// Reads until the kernel takes pages again, however slow the workload's threads are.
    fn wait_for_events(&mut self, process: usize) {
        self.kernel.interrupt = None;
        if let Some(change) = self.disturbance.take() {
            self.kernel.change(process, &change);
        }
        self.drain(process);
        self.kernel.processes[process].release(0);
        self.drain(process);
    }
}
