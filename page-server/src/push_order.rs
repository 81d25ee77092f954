//! In which order owed pages are pushed: pure.
//!
//! 1. eager pages: what each thread touches first when it runs again;
//! 2. wanted pages: what the destination knows will be touched, from a record of an earlier run;
//! 3. around the most recent faults: what follows a faulting page is likely wanted next;
//! 4. hot areas: where faults have been before, the more the earlier; then the mappings that threads point into;
//! 5. the rest in address order, all processes side by side: what related processes share lies at the same
//!    addresses, and equal pages must be close together to be sent once.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::ops::Range;

use common::images::ImagePid;
use common::limits::{MAX_FRAME_PAGES, MAX_WANTED_RUNS};
use common::page::{PageIndex, PageRange};

use crate::pending::{Pending, Run};

/// Recent faults that are followed at the same time.
const MAX_TRAILS: usize = 8;
/// Pages pushed after a fault before the next trail has its turn.
const TRAIL_PAGES: usize = 64;
/// Slots of one area: 2 MiB where memory has no holes.
const AREA_SLOTS: usize = 512;
/// Areas whose faults are counted.
const MAX_AREAS: usize = 64;
/// Faults that make an area hot: one may be an accident.
const HOT_FAULTS: u32 = 2;

/// Walks over owed pages.
#[derive(Debug)]
pub struct PushOrder {
    eager: VecDeque<Stretch>,
    wanted: VecDeque<Stretch>,
    /// Newest first.
    trails: VecDeque<Stretch>,
    areas: Areas,
    hot: VecDeque<Stretch>,
    walk: Walk,
}

/// Slots of one process to look for owed pages in.
#[derive(Clone, Debug)]
struct Stretch {
    pid: ImagePid,
    slots: Range<usize>,
}

impl PushOrder {
    /// An order over everything in `pending` that begins with `eager` pages, lazy or not; `hot` ones come before those
    /// of which nothing is known.
    pub fn new(eager: &[Run], hot: &[Run], pending: &Pending) -> Self {
        PushOrder {
            eager: stretches(eager, pending).collect(),
            wanted: VecDeque::new(),
            trails: VecDeque::new(),
            areas: Areas::default(),
            hot: stretches(hot, pending).collect(),
            walk: Walk::new(pending),
        }
    }

    /// Pages may be owed again that were passed already.
    pub fn rewind(&mut self, pending: &Pending) {
        self.walk = Walk::new(pending);
    }

    /// The destination wants these pages before others, in this order. What is not lazy is passed over, and
    /// what is too much.
    pub fn want(&mut self, pending: &Pending, runs: &[Run]) {
        let room = MAX_WANTED_RUNS - self.wanted.len();
        self.wanted.extend(stretches(runs, pending).take(room));
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
        self.areas.note(pid, served.start);
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
            .or_else(|| first_owed(&mut self.wanted, pending))
            .or_else(|| first_owed(&mut self.trails, pending))
            .or_else(|| self.areas.next(pending))
            .or_else(|| first_owed(&mut self.hot, pending))
            .or_else(|| self.walk.next(pending))
    }
}

/// The lazy parts of runs.
fn stretches(runs: &[Run], pending: &Pending) -> impl Iterator<Item = Stretch> {
    runs.iter().flat_map(|run| {
        let parts = pending.slots_within(run.pid, run.pages).into_iter();
        parts.map(|slots| Stretch {
            pid: run.pid,
            slots,
        })
    })
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

/// Where faults have been.
#[derive(Debug, Default)]
struct Areas(Vec<Area>);

#[derive(Debug)]
struct Area {
    pid: ImagePid,
    number: usize,
    faults: u32,
}

impl Areas {
    fn note(&mut self, pid: ImagePid, slot: usize) {
        let number = slot / AREA_SLOTS;
        let known = self
            .0
            .iter_mut()
            .find(|a| a.pid == pid && a.number == number);
        if let Some(area) = known {
            area.faults += 1;
            return;
        }
        if self.0.len() == MAX_AREAS {
            // The coolest one makes room.
            let coolest = (0..MAX_AREAS).min_by_key(|index| self.0[*index].faults);
            self.0.swap_remove(coolest.unwrap_or(0));
        }
        self.0.push(Area {
            pid,
            number,
            faults: 1,
        });
    }

    /// The next owed run of the hottest area.
    fn next(&mut self, pending: &mut Pending) -> Option<Run> {
        loop {
            let hottest = (0..self.0.len())
                .filter(|index| self.0[*index].faults >= HOT_FAULTS)
                .max_by_key(|index| self.0[*index].faults)?;
            let area = &self.0[hottest];
            let slots = area.number * AREA_SLOTS..(area.number + 1) * AREA_SLOTS;
            let taken = pending.take(area.pid, slots, MAX_FRAME_PAGES);
            if taken.is_some() {
                return taken;
            }
            self.0.swap_remove(hottest);
        }
    }
}

/// All processes side by side, the lowest address first.
#[derive(Debug)]
struct Walk {
    /// Of each process a page at or below its first owed page that was not passed, and its slot.
    heads: BinaryHeap<Reverse<(PageIndex, ImagePid, usize)>>,
}

impl Walk {
    fn new(pending: &Pending) -> Self {
        let pids = pending.pids().into_iter();
        Walk {
            heads: pids.map(|pid| Reverse((PageIndex(0), pid, 0))).collect(),
        }
    }

    fn next(&mut self, pending: &mut Pending) -> Option<Run> {
        while let Some(Reverse((page, pid, slot))) = self.heads.pop() {
            let Some((owed, slot)) = pending.next_owed(pid, slot) else {
                continue;
            };
            if owed != page {
                // Another process may be next.
                self.heads.push(Reverse((owed, pid, slot)));
                continue;
            }
            let run = pending.take(pid, slot..usize::MAX, MAX_FRAME_PAGES)?;
            let behind = slot + run.pages.count as usize;
            self.heads.push(Reverse((run.pages.end(), pid, behind)));
            return Some(run);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use common::lazy_map::LazyMap;

    use super::*;

    const A: ImagePid = ImagePid(1);
    const B: ImagePid = ImagePid(2);

    fn range(start: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex(start), count)
    }

    fn run(pid: ImagePid, start: u64, count: u64) -> Run {
        Run {
            pid,
            pages: range(start, count),
        }
    }

    fn pending() -> Pending {
        let a = LazyMap::new([range(100, 200)]).expect("in order");
        let b = LazyMap::new([range(500, 40), range(600, 3)]).expect("in order");
        Pending::new([(A, a), (B, b)])
    }

    fn fault(order: &mut PushOrder, pending: &mut Pending, pid: ImagePid, page: u64) {
        pending.demand(pid, range(page, 1)).expect("lazy");
        order.steer(pending, pid, range(page, 1));
    }

    fn all(order: &mut PushOrder, pending: &mut Pending) -> Vec<Run> {
        std::iter::from_fn(|| order.next(pending)).collect()
    }

    #[test]
    fn every_owed_page_is_pushed_exactly_once() {
        let mut pending = pending();
        let mut order = PushOrder::new(&[run(B, 510, 100)], &[run(A, 280, 50)], &pending);
        order.want(&pending, &[run(A, 110, 1), run(A, 105, 10), run(B, 0, 9)]);
        for page in [150, 152, 250] {
            fault(&mut order, &mut pending, A, page);
        }
        let runs = all(&mut order, &mut pending);
        let mut pages: Vec<_> = runs
            .iter()
            .flat_map(|run| (0..run.pages.count).map(|n| (run.pid, run.pages.start.forward(n))))
            .collect();
        let sent = pages.len();
        pages.sort();
        pages.dedup();
        assert_eq!(pages.len(), sent, "no page twice");
        assert_eq!(sent, 200 + 43 - 3);
        assert_eq!(pending.owed(), 0);
    }

    #[test]
    fn eager_runs_come_first_whole_and_across_holes() {
        let mut pending = pending();
        let mut order = PushOrder::new(&[run(B, 535, 70)], &[], &pending);
        assert_eq!(order.next_eager(&mut pending), Some(run(B, 535, 5)));
        assert_eq!(order.next_eager(&mut pending), Some(run(B, 600, 3)));
        assert_eq!(order.next_eager(&mut pending), None);
    }

    #[test]
    fn push_goes_on_behind_the_latest_fault() {
        let mut pending = pending();
        let mut order = PushOrder::new(&[], &[], &pending);
        fault(&mut order, &mut pending, A, 200);
        fault(&mut order, &mut pending, B, 505);
        let first = order.next(&mut pending).expect("owed");
        assert_eq!((first.pid, first.pages.start), (B, PageIndex(506)));
        let runs = all(&mut order, &mut pending);
        let after_b = runs.iter().find(|run| run.pid == A).expect("A follows");
        assert_eq!(after_b.pages.start, PageIndex(201));
    }

    #[test]
    fn a_scan_keeps_one_trail() {
        let mut pending = pending();
        let mut order = PushOrder::new(&[], &[], &pending);
        for page in [100, 104, 108] {
            fault(&mut order, &mut pending, A, page);
        }
        assert_eq!(order.trails.len(), 1);
    }

    #[test]
    fn wanted_pages_come_in_their_order_and_before_what_faults_suggest() {
        let mut pending = pending();
        let mut order = PushOrder::new(&[run(A, 100, 1)], &[], &pending);
        order.want(&pending, &[run(A, 290, 1), run(B, 520, 2), run(B, 5, 1)]);
        order.want(&pending, &[run(A, 120, 1)]);
        fault(&mut order, &mut pending, B, 500);
        let runs = all(&mut order, &mut pending);
        let expected = [
            run(A, 100, 1),
            run(A, 290, 1),
            run(B, 520, 2),
            run(A, 120, 1),
        ];
        assert_eq!(runs[..4], expected);
        assert_eq!(runs[4].pages.start, PageIndex(501));
    }

    #[test]
    fn hot_areas_come_before_hot_mappings_and_those_before_the_rest() {
        let a = LazyMap::new([range(0, 4096)]).expect("in order");
        let mut pending = Pending::new([(A, a)]);
        let mut order = PushOrder::new(&[], &[run(A, 3500, 20)], &pending);
        // Three faults in the third area, two in the sixth, one in the fourth; the trails end within them.
        for page in [2600, 2700, 1100, 1200, 1300, 1600] {
            fault(&mut order, &mut pending, A, page);
        }
        let runs = all(&mut order, &mut pending);
        let position = |page| {
            let holds = |run: &Run| run.pages.contains(PageIndex(page));
            runs.iter().position(holds).expect("sent")
        };
        let areas = [1024, 2560, 3500, 0].map(position);
        assert!(areas.is_sorted(), "{areas:?} in {runs:?}");
        assert!(position(2048) > position(3500), "no fault was there");
    }

    #[test]
    fn related_processes_are_pushed_side_by_side() {
        let lazy = || LazyMap::new([range(100, 64), range(900, 8)]).expect("in order");
        let mut pending = Pending::new([(A, lazy()), (B, lazy())]);
        let mut order = PushOrder::new(&[], &[], &pending);
        // What was sent before does not put them out of step.
        pending.demand(A, range(101, 1)).expect("lazy");
        let runs = all(&mut order, &mut pending);
        for (index, run) in runs.iter().enumerate() {
            let twin = runs.iter().enumerate().find(|(_, other)| {
                other.pid != run.pid && other.pages.intersect(run.pages).is_some()
            });
            let (other, _) = twin.expect("both have it");
            assert!(index.abs_diff(other) <= 2, "{runs:?}");
        }
    }
}
