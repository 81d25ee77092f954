//! In which order owed pages are pushed: pure.
//!
//! 1. eager pages: what each thread touches first when it runs again;
//! 2. around the most recent faults: what follows a faulting page is likely wanted next;
//! 3. the rest, in address order, process by process.

use std::collections::VecDeque;
use std::ops::Range;

use common::images::ImagePid;
use common::limits::MAX_FRAME_PAGES;
use common::page::PageRange;

use crate::pending::{Pending, Run};

/// Recent faults that are followed at the same time.
const MAX_TRAILS: usize = 8;
/// Pages pushed after a fault before the next trail has its turn.
const TRAIL_PAGES: usize = 64;

/// Walks over owed pages.
#[derive(Debug)]
pub struct PushOrder {
    eager: VecDeque<Stretch>,
    /// Newest first.
    trails: VecDeque<Stretch>,
    pids: Vec<ImagePid>,
    /// Where the walk in address order stands: index of the process, next slot.
    cursor: (usize, usize),
}

/// Slots of one process to look for owed pages in.
#[derive(Clone, Debug)]
struct Stretch {
    pid: ImagePid,
    slots: Range<usize>,
}

impl PushOrder {
    /// An order over everything in `pending` that begins with `eager` pages, lazy or not.
    pub fn new(eager: &[Run], pending: &Pending) -> Self {
        let stretches = eager.iter().flat_map(|run| {
            let parts = pending.slots_within(run.pid, run.pages).into_iter();
            parts.map(|slots| Stretch {
                pid: run.pid,
                slots,
            })
        });
        PushOrder {
            eager: stretches.collect(),
            trails: VecDeque::new(),
            pids: pending.pids(),
            cursor: (0, 0),
        }
    }

    /// The next eager run that is owed.
    pub fn next_eager(&mut self, pending: &mut Pending) -> Option<Run> {
        first_owed(&mut self.eager, pending)
    }

    /// A fault was served: push on from behind it.
    pub fn steer(&mut self, pending: &Pending, pid: ImagePid, pages: PageRange) {
        let Some(served) = pending.slots_within(pid, pages).pop() else {
            return;
        };
        let slots = served.end..(served.end + TRAIL_PAGES).min(pending.slots(pid));
        let continued = self
            .trails
            .iter()
            .position(|trail| trail.pid == pid && trail.slots.contains(&served.start));
        if let Some(index) = continued {
            self.trails.remove(index);
        }
        self.trails.push_front(Stretch { pid, slots });
        self.trails.truncate(MAX_TRAILS);
    }

    /// The next owed run, or `None` when nothing is owed.
    pub fn next(&mut self, pending: &mut Pending) -> Option<Run> {
        self.next_eager(pending)
            .or_else(|| first_owed(&mut self.trails, pending))
            .or_else(|| self.next_in_order(pending))
    }

    fn next_in_order(&mut self, pending: &mut Pending) -> Option<Run> {
        while let Some(pid) = self.pids.get(self.cursor.0) {
            let slots = self.cursor.1..pending.slots(*pid);
            if let Some(run) = pending.take(*pid, slots, MAX_FRAME_PAGES) {
                let end = pending.slots_within(run.pid, run.pages).pop();
                self.cursor.1 = end.map_or(self.cursor.1, |slots| slots.end);
                return Some(run);
            }
            self.cursor = (self.cursor.0 + 1, 0);
        }
        None
    }
}

/// The next owed run in the first stretch that has one; exhausted stretches are dropped.
fn first_owed(stretches: &mut VecDeque<Stretch>, pending: &mut Pending) -> Option<Run> {
    while let Some(stretch) = stretches.front() {
        let taken = pending.take(stretch.pid, stretch.slots.clone(), MAX_FRAME_PAGES);
        if taken.is_some() {
            return taken;
        }
        stretches.pop_front();
    }
    None
}

#[cfg(test)]
mod tests {
    use common::lazy_map::LazyMap;
    use common::page::PageIndex;

    use super::*;

    const A: ImagePid = ImagePid(1);
    const B: ImagePid = ImagePid(2);

    fn range(start: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex(start), count)
    }

    fn pending() -> Pending {
        let a = LazyMap::new([range(100, 200)]).expect("in order");
        let b = LazyMap::new([range(500, 40), range(600, 3)]).expect("in order");
        Pending::new([(A, a), (B, b)])
    }

    fn all(order: &mut PushOrder, pending: &mut Pending) -> Vec<Run> {
        std::iter::from_fn(|| order.next(pending)).collect()
    }

    #[test]
    fn every_owed_page_is_pushed_exactly_once() {
        let mut pending = pending();
        let eager = Run {
            pid: B,
            pages: range(510, 100),
        };
        let mut order = PushOrder::new(&[eager], &pending);
        pending.demand(A, range(150, 4)).expect("lazy");
        order.steer(&pending, A, range(150, 4));
        let runs = all(&mut order, &mut pending);
        let mut pages: Vec<_> = runs
            .iter()
            .flat_map(|run| (0..run.pages.count).map(|n| (run.pid, run.pages.start.forward(n))))
            .collect();
        let sent = pages.len();
        pages.sort();
        pages.dedup();
        assert_eq!(pages.len(), sent, "no page twice");
        assert_eq!(sent, 200 + 43 - 4);
        assert_eq!(pending.owed(), 0);
    }

    #[test]
    fn eager_runs_come_first_whole_and_across_holes() {
        let mut pending = pending();
        let eager = Run {
            pid: B,
            pages: range(535, 70),
        };
        let mut order = PushOrder::new(&[eager], &pending);
        assert_eq!(
            order.next_eager(&mut pending).map(|r| r.pages),
            Some(range(535, 5))
        );
        assert_eq!(
            order.next_eager(&mut pending).map(|r| r.pages),
            Some(range(600, 3))
        );
        assert_eq!(order.next_eager(&mut pending), None);
    }

    #[test]
    fn push_goes_on_behind_the_latest_fault() {
        let mut pending = pending();
        let mut order = PushOrder::new(&[], &pending);
        pending.demand(A, range(200, 1)).expect("lazy");
        order.steer(&pending, A, range(200, 1));
        pending.demand(B, range(505, 1)).expect("lazy");
        order.steer(&pending, B, range(505, 1));
        let first = order.next(&mut pending).expect("owed");
        assert_eq!((first.pid, first.pages.start), (B, PageIndex(506)));
        let runs = all(&mut order, &mut pending);
        let after_b = runs.iter().find(|run| run.pid == A).expect("A follows");
        assert_eq!(after_b.pages.start, PageIndex(201));
    }

    #[test]
    fn a_scan_keeps_one_trail() {
        let mut pending = pending();
        let mut order = PushOrder::new(&[], &pending);
        for page in [100, 104, 108] {
            pending.demand(A, range(page, 1)).expect("lazy");
            order.steer(&pending, A, range(page, 1));
        }
        assert_eq!(order.trails.len(), 1);
    }
}
