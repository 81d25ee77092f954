//! What demand and push share: the pages owed, the order of push, and what was sent.

use std::collections::HashMap;

use common::images::{DumpedProcess, ImagePid};
use common::limits::MAX_EAGER_PAGES;
use common::page::{PageIndex, PageRange};
use common::priority_lock::{PriorityGuard, PriorityLock};
use common::proto::control::Tally;

use crate::frame::Contents;
use crate::framer::PushedFrame;
use crate::pending::{PageState, Pending, PendingError, Recovery, Run, Said};
use crate::push_order::PushOrder;
use crate::skeleton::{eager_runs, hot_runs};

/// The one lock between the fault thread and the bulk thread. It is never held while memory is read.
#[derive(Debug)]
pub struct Book {
    pages: PriorityLock<Pages>,
}

#[derive(Debug)]
struct Pages {
    pending: Pending,
    order: PushOrder,
    counts: SentCounts,
    saved: Saved,
}

/// Pages sent, each counted where it was sent first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct SentCounts {
    /// Lazy pages of the workload.
    pub lazy: u64,
    /// By push.
    pub pushed: u64,
    /// On demand.
    pub demanded: u64,
    /// Of both, all zeros and not carried.
    pub zero: u64,
    /// Not sent because the workload removed them.
    pub removed: u64,
    /// Demanded although already sent: the thread would have waited for them in the bulk queue.
    pub resent: u64,
}

/// What pushed pages were and what their frames were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Saved {
    /// Bytes of the pages.
    pub page_bytes: u64,
    /// Bytes of the frames that carried them, before encryption.
    pub frame_bytes: u64,
    /// Frames with compressed pages.
    pub compressed_runs: u64,
    /// Frames in all.
    pub runs: u64,
    /// Pages that were only referred to, because they equal one pushed before.
    pub referred: u64,
}

/// Which pages come before others.
#[derive(Debug)]
pub struct FirstPages {
    /// What threads touch first.
    pub eager: Vec<Run>,
    /// What is likely to be touched before most.
    pub hot: Vec<Run>,
}

/// All lazy pages of `dumped`, and which of them come first.
pub fn owed(dumped: &[DumpedProcess]) -> (Pending, FirstPages) {
    let mut pages = 0;
    let within_limit = |run: &Run| {
        pages += run.pages.count;
        pages <= MAX_EAGER_PAGES
    };
    let eager = dumped
        .iter()
        .flat_map(eager_runs)
        .take_while(within_limit)
        .collect();
    let lazy = dumped
        .iter()
        .map(|process| (process.pid, process.lazy.clone()));
    let hot = hot_runs(dumped);
    (Pending::new(lazy), FirstPages { eager, hot })
}

impl Pages {
    fn sent(&mut self, contents: &Contents) {
        let new = self.pending.count(contents);
        self.counts.zero += u64::from((contents.zero & new).count_ones());
    }
}

impl Book {
    /// Opens the book on the lazy pages of `dumped`; what their threads touch first is pushed first.
    pub fn of(dumped: &[DumpedProcess]) -> Self {
        let (pending, first) = owed(dumped);
        Book::new(pending, &first.eager, &first.hot)
    }

    /// The same for a successor: what was sent is not known, and the destination will say it.
    pub fn of_left(dumped: &[DumpedProcess]) -> Self {
        let (mut pending, first) = owed(dumped);
        pending.forget();
        Book::new(pending, &[], &first.hot)
    }

    /// Opens the book on everything owed; `eager` pages are pushed first, `hot` ones before most.
    pub fn new(pending: Pending, eager: &[Run], hot: &[Run]) -> Self {
        let counts = SentCounts {
            lazy: pending.lazy_pages(),
            ..SentCounts::default()
        };
        Book {
            pages: PriorityLock::new(Pages {
                order: PushOrder::new(eager, hot, &pending),
                pending,
                counts,
                saved: Saved::default(),
            }),
        }
    }

    fn lock(&self) -> PriorityGuard<'_, Pages> {
        self.pages.lock()
    }

    /// A fault wants `pages`, which are to be sent; steers the push behind them.
    pub fn demand(&self, pid: ImagePid, pages: PageRange) -> Result<(), PendingError> {
        let mut book = self.lock();
        let Pages {
            pending,
            order,
            counts,
            ..
        } = &mut *book;
        let first_time = u64::from(pending.demand(pid, pages)?.count_ones());
        counts.demanded += first_time;
        counts.resent += pages.count - first_time;
        order.steer(pending, pid, pages);
        Ok(())
    }

    /// The destination does not need `pages`; returns those that will not be sent.
    pub fn discard(&self, pid: ImagePid, pages: PageRange) -> Result<Vec<PageRange>, PendingError> {
        self.lock().pending.discard(pid, pages)
    }

    /// The destination wants `runs` to be pushed before others, in this order.
    pub fn want(&self, runs: &[Run]) {
        let mut book = self.lock();
        let Pages { pending, order, .. } = &mut *book;
        order.want(pending, runs);
    }

    /// The next run to push. It counts only when it was read, and a fault may overtake it until then.
    pub fn next(&self) -> Option<Run> {
        let mut book = self.lock();
        let Pages {
            pending,
            order,
            counts,
            ..
        } = &mut *book;
        let run = order.next(pending)?;
        counts.pushed += run.pages.count;
        Some(run)
    }

    /// The next eager run to push.
    pub fn next_eager(&self) -> Option<Run> {
        let mut book = self.lock();
        let Pages {
            pending,
            order,
            counts,
            ..
        } = &mut *book;
        let run = order.next_eager(pending)?;
        counts.pushed += run.pages.count;
        Some(run)
    }

    /// Lazy pages of each process.
    pub fn slots(&self) -> HashMap<ImagePid, usize> {
        let pending = &self.lock().pending;
        let pids = pending.pids().into_iter();
        pids.map(|pid| (pid, pending.slots(pid))).collect()
    }

    /// What follows from what the destination says. Nothing is changed. `None` when it cannot be so.
    pub fn recovery(&self, said: Said) -> Option<Recovery> {
        self.lock().pending.recovery(said)
    }

    /// That becomes so: pages with the hashes `lost` did not arrive, such with the hashes `known` did although we did not
    /// send them; the walk over what is owed begins anew.
    pub fn recover(&self, recovery: Recovery, lost: u64, known: u64) {
        let mut book = self.lock();
        let Pages { pending, order, .. } = &mut *book;
        pending.recover(recovery, lost, known);
        order.rewind(pending);
    }

    /// Pages were read, and are about to be sent.
    pub fn sent(&self, contents: &Contents) {
        self.lock().sent(contents);
    }

    /// Pages were framed for the push, and are about to be sent.
    pub fn pushed(&self, pushed: &PushedFrame) {
        let mut book = self.lock();
        book.sent(&pushed.frame.contents);
        let saved = &mut book.saved;
        saved.page_bytes += pushed.page_bytes;
        saved.frame_bytes += pushed.frame.bytes.len() as u64;
        saved.compressed_runs += u64::from(pushed.compressed);
        saved.runs += 1;
        saved.referred += pushed.referred;
    }

    /// What the form of pushed pages has saved so far.
    pub fn saved(&self) -> Saved {
        self.lock().saved
    }

    /// Whether several processes are moved, which may share pages.
    pub fn is_of_many(&self) -> bool {
        self.lock().pending.pids().len() > 1
    }

    /// Pages neither sent nor withheld.
    pub fn owed(&self) -> u64 {
        self.lock().pending.owed()
    }

    /// What became of one lazy page.
    pub fn state_of(&self, pid: ImagePid, page: PageIndex) -> PageState {
        self.lock().pending.state_of(pid, page)
    }

    /// What the destination must have counted too.
    pub fn tally(&self) -> Tally {
        self.lock().pending.tally()
    }

    /// What was sent so far.
    pub fn counts(&self) -> SentCounts {
        let book = self.lock();
        SentCounts {
            removed: book.pending.tally().discarded,
            ..book.counts
        }
    }
}
