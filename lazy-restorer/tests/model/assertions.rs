//! What must hold, at every step and at the end.

use common::limits::MAX_FRAME_PAGES;
use common::page::{PageIndex, PageRange};
use lazy_restorer::resolver::{Fault, Install};

use crate::sut::Migration;
use model_kernel::{Content, Process, pages_of};

impl Migration {
    /// What a fault is answered with fits what the page must hold.
    pub fn check_fault(&self, process: usize, page: u64, fault: &Fault) {
        let process = &self.kernel.processes[process];
        if let Fault::Waiting { slot } | Fault::Request { slot, .. } = fault {
            let dump = self.lazy.page(*slot).0;
            self.check_frozen(process, page, dump);
            let asked = self.outstanding.contains(&dump) || self.received.contains(slot);
            let waits = matches!(fault, Fault::Waiting { .. });
            assert_eq!(asked, waits, "{fault:?} for page {page}");
        }
        if *fault == Fault::Present && process.is_quiet() {
            let content = process.content(page);
            assert!(
                !content.is_some_and(Content::faults),
                "page {page} is {content:?}, yet called present"
            );
        }
        if *fault == Fault::Zero && process.is_quiet() {
            let content = process.content(page);
            assert!(
                !matches!(content, Some(Content::Missing(_))),
                "zeros for page {page}, which is {content:?}"
            );
        }
    }

    fn check_frozen(&self, process: &Process, page: u64, dump: u64) {
        if !process.is_quiet() {
            // What is unread may change the answer; the kernel takes nothing until then.
            return;
        }
        match process.content(page) {
            Some(content) if content.faults() => {
                assert_eq!(
                    content,
                    Content::Missing(dump),
                    "page {page} waits for {dump}"
                );
            }
            // A stale fault: the thread was woken since.
            _ => {}
        }
    }

    pub fn check_request(&self, pages: PageRange) {
        assert!(pages.count <= MAX_FRAME_PAGES as u64, "{pages:?}");
        for page in pages_of(pages) {
            let slot = self
                .lazy
                .slot(PageIndex(page))
                .expect("only lazy pages are asked for");
            assert!(
                !self.outstanding.contains(&page),
                "page {page} is asked for twice"
            );
            assert!(!self.received.contains(&slot), "page {page} is here");
            assert!(!self.withheld.contains(&slot), "page {page} is withheld");
        }
    }

    /// Nobody could read a page that is given up.
    pub fn check_discard(&self, pages: PageRange) {
        for dump in pages_of(pages) {
            let slot = self
                .lazy
                .slot(PageIndex(dump))
                .expect("only lazy pages are discarded");
            assert!(!self.received.contains(&slot) && !self.outstanding.contains(&dump));
            for process in &self.kernel.processes {
                let needed = process.missing().any(|(_, missing)| missing == dump);
                assert!(!needed, "page {dump} is given up but needed");
            }
        }
    }

    /// An install goes only where the frozen pages are missing.
    pub fn check_install(&self, install: &Install) {
        let process = &self.kernel.processes[self.process_of(install.member)];
        if process.blurred || !process.is_quiet() {
            return;
        }
        for index in 0..install.target.count {
            let page = install.target.start.forward(index).0;
            let dump = self.lazy.page(install.slot + index as usize).0;
            assert_eq!(
                process.content(page),
                Some(Content::Missing(dump)),
                "an install at {page}"
            );
        }
    }

    pub fn check(&self) {
        let slots = self.lazy.slots();
        for slot in 0..slots {
            let received = self.family.received().contains(slot);
            let withheld = self.family.withheld().contains(slot);
            assert_eq!(received, self.received.contains(&slot), "slot {slot}");
            assert_eq!(withheld, self.withheld.contains(&slot), "slot {slot}");
            assert!(!(received && withheld), "slot {slot} came though withheld");
        }
        let settled = self.received.len() + self.withheld.len() == slots;
        assert_eq!(self.family.is_settled(), settled);
        for process in self.members.keys() {
            self.check_process(*process);
        }
    }

    fn check_process(&self, index: usize) {
        let process = &self.kernel.processes[index];
        let Some(space) = self.family.member(self.members[&index]) else {
            assert!(!process.alive, "process {index} lives");
            return;
        };
        if !process.alive || !process.is_quiet() {
            return;
        }
        let mut missing = 0;
        for (page, dump) in process.missing() {
            let slot = self.lazy.slot(PageIndex(dump)).expect("it is lazy");
            assert_eq!(space.slot_at(PageIndex(page)), Some(slot), "page {page}");
            assert!(space.is_missing(slot), "page {page} of slot {slot}");
            missing += 1;
        }
        if !process.blurred {
            let believed: usize = space.missing_runs().map(|run| run.len()).sum();
            assert_eq!(missing, believed, "missing pages of process {index}");
            assert_eq!(space.is_settled(), missing == 0);
        }
    }

    /// Everything that was owed has come or is known never to come, and no thread waits.
    pub fn check_end(&self) {
        assert!(self.family.is_settled());
        assert!(self.outstanding.is_empty());
        for (index, process) in self.kernel.processes.iter().enumerate() {
            assert_eq!(
                process.missing().count(),
                0,
                "pages of process {index} never came"
            );
            let stuck = process
                .waiting
                .iter()
                .filter(|page| process.cells.contains_key(page));
            assert_eq!(stuck.count(), 0, "threads of process {index} wait for ever");
        }
        for member in self.family.members() {
            assert!(self.family.is_member_settled(member), "{member:?}");
        }
    }
}
