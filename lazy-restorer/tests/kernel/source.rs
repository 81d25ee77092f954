//! The other end of the migration, played in this process: answers what the memory orders and pushes what it likes.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use common::page::{PageIndex, PageRange};
use common::proto::demand::DemandFrame;
use common::proto::pages::DataHeader;
use lazy_restorer::memory::{Arrival, MemberKey, Memory, Order};
use lazy_restorer::uffd::UserFault;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::frozen::{Frozen, PID, Random};

const POLL_MILLIS: u16 = 10;

/// What the source did with each page.
#[derive(Debug, Default)]
pub struct Sent {
    pub sent: Vec<bool>,
    pub withheld: Vec<bool>,
    /// Requests that are answered only later.
    pub put_off: Vec<PageRange>,
    pub puts_off: bool,
}

pub struct Shared {
    pub frozen: Frozen,
    pub memory: Arc<Memory>,
    pub sent: Mutex<Sent>,
    pub requested: Condvar,
    pub stop: AtomicBool,
    /// Whether anyone reads events.
    pub reading: AtomicBool,
    pub errors: Mutex<Vec<String>>,
}

impl Shared {
    pub fn sent(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().expect("nobody panics with the lock")
    }

    fn note(&self, error: &impl ToString) {
        let mut errors = self.errors.lock().expect("nobody panics with the lock");
        errors.push(error.to_string());
    }

    fn index(&self, page: PageIndex) -> usize {
        page.distance_from(self.frozen.whole().start) as usize
    }

    pub fn send(&self, pages: PageRange, arrival: Arrival) {
        let mut sent = self.sent();
        for page in (0..pages.count).map(|index| pages.start.forward(index)) {
            let index = self.index(page);
            assert!(!sent.withheld[index], "{page:?} is asked for after all");
            sent.sent[index] = true;
        }
        drop(sent);
        let (zero, payload) = self.frozen.frame(pages);
        let header = DataHeader::raw(PID, pages, zero);
        if let Err(error) = self.memory.receive(&header, &payload, arrival) {
            self.note(&error);
        }
    }

    pub fn push(&self, random: &mut Random) {
        let start = self.frozen.page(random.below(self.frozen.pages));
        let count = 1 + random.below(16);
        self.push_run(start, count, random.below(8) == 0);
    }

    /// Pushes the pages from `start` on that may be sent in one frame.
    pub fn push_run(&self, start: PageIndex, count: u64, again: bool) {
        let sent = self.sent();
        let end = self.frozen.whole().end();
        let may = |page: &PageIndex| {
            let index = self.index(*page);
            self.frozen.is_lazy(*page) && !sent.withheld[index] && (again || !sent.sent[index])
        };
        let pages = (start.0..end.0.min(start.0 + count)).map(PageIndex);
        let count = pages.take_while(may).count() as u64;
        drop(sent);
        if count > 0 {
            self.push_unless_withheld(PageRange::new(start, count));
        }
    }

    fn push_unless_withheld(&self, pages: PageRange) {
        let mut sent = self.sent();
        let first = self.index(pages.start);
        let range = first..first + pages.count as usize;
        if sent.withheld[range.clone()].contains(&true) {
            return;
        }
        sent.sent[range].fill(true);
        drop(sent);
        self.send(pages, Arrival::Pushed);
    }

    fn discard(&self, pages: PageRange) {
        for page in (0..pages.count).map(|index| pages.start.forward(index)) {
            let index = self.index(page);
            let mut sent = self.sent();
            if sent.sent[index] {
                continue;
            }
            sent.withheld[index] = true;
            drop(sent);
            if let Err(error) = self.memory.withheld(PID, PageRange::new(page, 1)) {
                self.note(&error);
            }
        }
    }

    fn demand(&self, frame: DemandFrame) {
        match frame {
            DemandFrame::Discard(_, pages) => self.discard(pages),
            DemandFrame::Request(_, pages) => {
                let mut sent = self.sent();
                if sent.puts_off {
                    sent.put_off.push(pages);
                    self.requested.notify_all();
                } else {
                    drop(sent);
                    self.send(pages, Arrival::Demanded);
                }
            }
        }
    }
}

/// Carries out the memory's orders until the test ends.
pub fn follow(shared: &Arc<Shared>, mut orders: UnboundedReceiver<Order>) {
    let mut watchers = Vec::new();
    let mut short = false;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    let runtime = runtime.expect("a runtime");
    let pause = Duration::from_millis(POLL_MILLIS.into());
    while !shared.stop.load(Ordering::Relaxed) {
        let next = async { tokio::time::timeout(pause, orders.recv()).await };
        match runtime.block_on(next) {
            Ok(Some(Order::Demand(frame))) => shared.demand(frame),
            Ok(Some(Order::Watch(key, uffd))) => {
                let shared = Arc::clone(shared);
                watchers.push(thread::spawn(move || watch(&shared, key, &uffd)));
            }
            Ok(Some(Order::Relieve)) => short = true,
            Ok(None) | Err(_) => {}
        }
        if short {
            short = !shared.memory.relieve().expect("the kernel refuses nothing");
        }
    }
    for watcher in watchers {
        watcher.join().expect("watching does not panic");
    }
}

fn watch(shared: &Shared, key: MemberKey, uffd: &UserFault) {
    // SAFETY: `uffd` outlives the borrow.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(uffd)) };
    while !shared.stop.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::from(POLL_MILLIS));
        if !shared.reading.load(Ordering::Acquire) {
            thread::yield_now();
            continue;
        }
        match shared.memory.drain(key) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return shared.note(&error),
        }
    }
}
