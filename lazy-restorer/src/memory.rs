//! The restored workload's memory: one lock per family, held across "look at the map" and "change the memory".
//!
//! Whoever reads events of a descriptor holds its family's lock from before the `read` until the map is updated;
//! whoever installs pages holds it across the check and the ioctl. So no page is installed that a removal already
//! read has outlawed (`docs/architecture.md`, "The rule of one lock").

pub mod descriptor;
mod family;
mod want;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::ops::DerefMut;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use common::images::{DumpedVma, ImagePid};
use common::lazy_map::LazyMap;
use common::page::PageRange;
use common::proto::control::Tally;
use common::proto::demand::DemandFrame;
use common::proto::pages::DataHeader;
use common::session_file::{Runs, Whole, WholeProcess};
use tokio::sync::{Notify, mpsc};

use self::descriptor::{Descriptor, Lock};
use self::family::LiveFamily;
pub use self::family::{Arrival, MemoryError};
use self::want::{Want, Wants};
use crate::blocktime::Blocktime;
use crate::journal::{Inbox, Journal, Recovered};
use crate::resolver::MemberId;
use crate::uffd::UserFault;

/// What the memory asks of the rest of the program.
#[derive(Debug)]
pub enum Order<D = UserFault> {
    /// Send this to the source.
    Demand(DemandFrame),
    /// Watch this descriptor for events.
    Watch(MemberKey, Arc<D>),
    /// Something found no memory: call [`Memory::relieve`] every now and then until it says that nothing is left.
    Relieve,
}

/// Names one member of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemberKey {
    /// The dumped process it stems from.
    pub pid: ImagePid,
    /// Which member.
    pub member: MemberId,
}

/// One dumped process, as its images describe it.
#[derive(Clone, Debug)]
pub struct ProcessImage {
    /// The process.
    pub pid: ImagePid,
    /// Its lazy pages.
    pub lazy: LazyMap,
    /// Its mappings.
    pub vmas: Vec<DumpedVma>,
}

/// What of one process is settled: words of bitmaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresentMap {
    /// Pages that came.
    pub received: Vec<u64>,
    /// Pages that never will.
    pub withheld: Vec<u64>,
}

/// The memory of all restored processes.
pub struct Memory<D: Descriptor = UserFault> {
    /// In order: what leaves this host does not depend on how a process hashes.
    families: BTreeMap<ImagePid, D::Lock<LiveFamily<D>>>,
    orders: mpsc::UnboundedSender<Order<D>>,
    totals: Totals,
    restored: AtomicBool,
    /// Signalled when the last owed page has come, or the processes are restored.
    settled: Notify,
    /// Pages that came and found no memory.
    parked: AtomicU64,
    wants: Wants,
    relief: Notify,
}

/// Counts over all families.
#[derive(Debug, Default)]
pub struct Totals {
    lazy: AtomicU64,
    owed: AtomicU64,
    demanded: AtomicU64,
    pushed: AtomicU64,
    zero: AtomicU64,
    withheld: AtomicU64,
    digest: AtomicU64,
    zero_faults: AtomicU64,
}

impl Totals {
    fn add<D: Descriptor>(&self, family: &LiveFamily<D>) {
        let counts = family.counts();
        let (lazy, owed, withheld) = family.slots();
        let add = |counter: &AtomicU64, count| {
            counter.fetch_add(count, Ordering::Relaxed);
        };
        add(&self.lazy, lazy);
        add(&self.owed, owed);
        add(&self.demanded, counts.demanded);
        add(&self.pushed, counts.pushed);
        add(&self.zero, counts.zero);
        add(&self.withheld, withheld);
        add(&self.digest, counts.digest);
    }
}

/// What a killed program left of the memory.
#[derive(Debug)]
pub struct Left<'a> {
    /// The journal of each process.
    pub journals: HashMap<ImagePid, OwnedFd>,
    /// Userfault descriptors by the numbers they had. What is left in it belongs to processes that have ended.
    pub uffds: &'a mut HashMap<RawFd, OwnedFd>,
}

/// [`Totals`] at one moment.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct PageCounts {
    /// Lazy pages of the workload.
    pub lazy: u64,
    /// Of those, not here yet, or not in place for want of memory or because a program before us was killed.
    pub owed: u64,
    /// Came as answers to faults.
    pub demanded: u64,
    /// Came by push.
    pub pushed: u64,
    /// Of both, all zeros and not carried.
    pub zero: u64,
    /// Removed by the workload before they came.
    pub removed: u64,
}

impl<D: Descriptor> Memory<D> {
    /// The memory of `images`, all of it owed. Orders come out of the returned receiver.
    pub fn new(images: Vec<ProcessImage>) -> (Arc<Self>, mpsc::UnboundedReceiver<Order<D>>) {
        let (orders, receiver) = mpsc::unbounded_channel();
        let lazy = images.iter().map(|image| image.lazy.slots() as u64).sum();
        let families = images
            .into_iter()
            .map(|image| (image.pid, Lock::new(LiveFamily::new(image))))
            .collect();
        let memory = Memory {
            families,
            orders,
            totals: Totals {
                lazy: AtomicU64::new(lazy),
                owed: AtomicU64::new(lazy),
                ..Totals::default()
            },
            restored: AtomicBool::new(false),
            settled: Notify::new(),
            parked: AtomicU64::new(0),
            wants: Wants::default(),
            relief: Notify::new(),
        };
        (Arc::new(memory), receiver)
    }

    /// Whether every process has handed its memory over.
    pub fn is_attached(&self) -> bool {
        let mut pids = self.families.keys();
        pids.all(|pid| self.family(*pid).is_some_and(|family| family.is_attached()))
    }

    fn family(&self, pid: ImagePid) -> Option<impl DerefMut<Target = LiveFamily<D>>> {
        Some(self.families.get(&pid)?.lock())
    }

    /// Every page that is touched is asked for by itself, so that touches can be recorded.
    pub fn fetch_singly(&self) {
        for pid in self.families.keys() {
            if let Some(mut family) = self.family(*pid) {
                family.fetch_singly();
            }
        }
    }

    /// A process being restored handed its descriptor over. Until [`restored`](Self::restored) only faults are answered.
    pub fn attach(&self, pid: ImagePid, uffd: D) -> Result<MemberKey, MemoryError> {
        let mut family = self.family(pid).ok_or(MemoryError::UnknownProcess(pid))?;
        let key = family.attach(uffd, &self.sink())?;
        Ok(key)
    }

    /// All processes are restored: pages that came early are installed, and from here on as they come.
    pub fn restored(&self) -> Result<(), MemoryError> {
        for pid in self.families.keys() {
            if let Some(mut family) = self.family(*pid) {
                family.restored(&self.sink())?;
            }
        }
        self.restored.store(true, Ordering::Release);
        self.settled.notify_one();
        Ok(())
    }

    /// Handles everything that waits on a member's descriptor. False when there is nothing more to watch.
    pub fn drain(&self, key: MemberKey) -> Result<bool, MemoryError> {
        let Some(mut family) = self.family(key.pid) else {
            return Ok(false);
        };
        let lives = family.drain(key.member, &self.sink());
        let unneeded = family.no_longer_missed();
        drop(family);
        self.settle(unneeded);
        lives
    }

    /// Installs pages that came.
    pub fn receive(
        &self,
        header: &DataHeader,
        payload: &[u8],
        arrival: Arrival,
    ) -> Result<(), MemoryError> {
        let pid = header.pid;
        let mut family = self.family(pid).ok_or(MemoryError::UnknownProcess(pid))?;
        let new = family.receive(header, payload, arrival, &self.sink())?;
        let missed = family.no_longer_missed();
        drop(family);
        let counter = match arrival {
            Arrival::Demanded => &self.totals.demanded,
            Arrival::Pushed => &self.totals.pushed,
        };
        counter.fetch_add(new.pages, Ordering::Relaxed);
        self.totals
            .zero
            .fetch_add(new.zero_pages, Ordering::Relaxed);
        self.totals.digest.fetch_add(new.digest, Ordering::Relaxed);
        self.settle(new.pages + missed);
        Ok(())
    }

    /// The source confirms that it will not send pages the workload removed.
    pub fn withheld(&self, pid: ImagePid, pages: PageRange) -> Result<(), MemoryError> {
        let mut family = self.family(pid).ok_or(MemoryError::UnknownProcess(pid))?;
        let new = family.confirm_withheld(pages)?;
        drop(family);
        self.totals.withheld.fetch_add(new, Ordering::Relaxed);
        self.settle(new);
        Ok(())
    }

    /// What every process has received, and was promised never to get.
    pub fn present_map(&self) -> Vec<(ImagePid, PresentMap)> {
        let pids = self.families.keys();
        pids.filter_map(|pid| Some((*pid, self.family(*pid)?.present_map())))
            .collect()
    }

    /// What the source is still to be told when every page is here.
    pub fn whole(&self) -> Whole {
        let processes = self.present_map().into_iter();
        let processes = processes.map(|(pid, map)| WholeProcess {
            pid,
            received: Runs::of(&map.received),
            withheld: Runs::of(&map.withheld),
        });
        Whole {
            tally: self.tally(),
            processes: processes.collect(),
        }
    }

    /// Orders again what a lost link took with it.
    pub fn reconnect(&self) {
        for pid in self.families.keys() {
            if let Some(mut family) = self.family(*pid) {
                family.reconnect(&self.sink());
                family.demand_missed(&self.sink());
            }
        }
    }

    /// Looks whether a member's process still lives. False when there is nothing more to watch.
    pub fn check(&self, key: MemberKey) -> bool {
        let Some(mut family) = self.family(key.pid) else {
            return false;
        };
        let lives = family.check(key.member, &self.sink());
        let unneeded = family.no_longer_missed();
        drop(family);
        self.settle(unneeded);
        lives
    }

    /// Whether no process has any of this memory any more: all have ended, or run other programs.
    pub fn is_gone(&self) -> bool {
        let mut pids = self.families.keys();
        pids.all(|pid| self.family(*pid).is_none_or(|family| family.is_gone()))
    }

    /// A process ended; what only it still missed is not needed any more.
    pub fn exited(&self, key: MemberKey) {
        if let Some(mut family) = self.family(key.pid) {
            family.exited(key.member, &self.sink());
            let unneeded = family.no_longer_missed();
            drop(family);
            self.settle(unneeded);
        }
    }

    fn settle(&self, pages: u64) {
        let owed = self.totals.owed.fetch_sub(pages, Ordering::AcqRel) - pages;
        if owed == 0 && pages > 0 {
            self.settled.notify_one();
        }
    }

    /// Waits until all processes are restored and nothing is owed to them any more.
    pub async fn settled(&self) {
        let is_settled = || {
            self.restored.load(Ordering::Acquire)
                && self.totals.owed.load(Ordering::Acquire) == 0
                && self.parked.load(Ordering::Acquire) == 0
        };
        while !is_settled() {
            self.settled.notified().await;
        }
        self.wants.settle(self.wants.falls());
    }

    /// Tries again what found no memory. True when nothing is left of it.
    pub fn relieve(&self) -> Result<bool, MemoryError> {
        if !self.relieve_all()? {
            return Ok(false);
        }
        if self.wants.rise(|| self.is_short()) {
            return Ok(false);
        }
        self.relief.notify_waiters();
        self.settled.notify_one();
        Ok(true)
    }

    /// What is wanting in this host.
    pub fn wants(&self) -> &Wants {
        &self.wants
    }

    fn relieve_all(&self) -> Result<bool, MemoryError> {
        let mut all = true;
        for pid in self.families.keys() {
            if let Some(mut family) = self.family(*pid) {
                let relieved = family.relieve(&self.sink());
                let in_place = family.no_longer_missed();
                drop(family);
                self.settle(in_place);
                all &= relieved?;
            }
        }
        Ok(all)
    }

    /// Whether something found no memory, or no descriptor, and is to be tried again.
    pub fn is_short(&self) -> bool {
        let mut pids = self.families.keys();
        pids.any(|pid| self.family(*pid).is_some_and(|family| family.is_short()))
    }

    /// Waits until every page that came has found memory. Who brings pages does before it brings more.
    pub async fn relieved(&self) {
        loop {
            let relief = self.relief.notified();
            if self.parked.load(Ordering::Acquire) == 0 {
                return;
            }
            relief.await;
        }
    }

    /// What the source must agree with at the end.
    pub fn tally(&self) -> Tally {
        let counts = self.counts();
        Tally {
            pages: counts.demanded + counts.pushed,
            digest: self.totals.digest.load(Ordering::Relaxed),
            discarded: counts.removed,
        }
    }

    /// Page counts at this moment.
    pub fn counts(&self) -> PageCounts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let lazy = load(&self.totals.lazy);
        PageCounts {
            lazy,
            // Some of the parked may have come twice.
            owed: (load(&self.totals.owed) + load(&self.parked)).min(lazy),
            demanded: load(&self.totals.demanded),
            pushed: load(&self.totals.pushed),
            zero: load(&self.totals.zero),
            removed: load(&self.totals.withheld),
        }
    }

    /// Faults on pages without content so far.
    pub fn zero_faults(&self) -> u64 {
        self.totals.zero_faults.load(Ordering::Relaxed)
    }

    /// Since when the thread waits that waits longest.
    pub fn waits_since(&self) -> Option<Instant> {
        let pids = self.families.keys();
        pids.filter_map(|pid| self.family(*pid)?.waits_since())
            .min()
    }

    /// How long threads waited for pages, over all families.
    pub fn blocktime(&self) -> Blocktime {
        self.all_times(LiveFamily::blocktime)
    }

    /// How long the kernel took each time to put pages in place, over all families.
    pub fn installs(&self) -> Blocktime {
        self.all_times(LiveFamily::installs)
    }

    fn all_times(&self, of: fn(&LiveFamily<D>) -> &Blocktime) -> Blocktime {
        let mut all = Blocktime::default();
        for pid in self.families.keys() {
            if let Some(family) = self.family(*pid) {
                all.merge(of(&family));
            }
        }
        all
    }

    fn sink(&self) -> Sink<'_, D> {
        Sink {
            orders: &self.orders,
            zero_faults: &self.totals.zero_faults,
            parked: &self.parked,
            wants: &self.wants,
        }
    }
}

impl<D: Descriptor> Memory<D> {
    /// From now on what changes is noted in what `buffer` makes for each process.
    pub fn keep_notes(
        &self,
        buffer: impl Fn(ImagePid) -> io::Result<D::Buffer>,
    ) -> Result<(), MemoryError> {
        for pid in self.families.keys() {
            let buffer = buffer(*pid).map_err(|error| MemoryError::Journal(*pid, error))?;
            if let Some(mut family) = self.family(*pid) {
                family.keep_notes(buffer)?;
            }
        }
        Ok(())
    }

    /// The memory that a killed program left, by what it noted of each process, and its descriptors by the numbers they
    /// had.
    pub fn of_notes(
        images: Vec<ProcessImage>,
        mut notes: impl FnMut(ImagePid) -> io::Result<Recovered>,
        mut uffd: impl FnMut(RawFd) -> Option<D>,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Order<D>>), MemoryError> {
        let (orders, receiver) = mpsc::unbounded_channel();
        let mut families = BTreeMap::new();
        let totals = Totals::default();
        for image in images {
            let pid = image.pid;
            let recovered = notes(pid).map_err(|error| MemoryError::Journal(pid, error))?;
            let family = LiveFamily::succeed(image, &recovered, &mut uffd)?;
            totals.add(&family);
            families.insert(pid, Lock::new(family));
        }
        let memory = Memory {
            families,
            orders,
            totals,
            restored: AtomicBool::new(true),
            settled: Notify::new(),
            parked: AtomicU64::new(0),
            wants: Wants::default(),
            relief: Notify::new(),
        };
        Ok((memory, receiver))
    }

    /// A successor begins to resolve faults.
    pub fn begin_again(&self) {
        for pid in self.families.keys() {
            if let Some(mut family) = self.family(*pid) {
                family.begin_again(&self.sink());
            }
        }
    }
}

impl Memory {
    /// From now on what changes is noted in memory that outlives this program.
    pub fn keep_journals(&self) -> Result<(), MemoryError> {
        self.keep_notes(|pid| Ok(Inbox::Kept(Box::new(Journal::new(pid)?))))
    }

    /// The memory that a killed program left, by its journals and descriptors.
    pub fn succeed(
        images: Vec<ProcessImage>,
        mut inheritance: Left<'_>,
    ) -> Result<(Arc<Self>, mpsc::UnboundedReceiver<Order>), MemoryError> {
        let missing = || io::Error::other("the keeper does not have it");
        let notes = |pid| {
            let journal = inheritance.journals.remove(&pid).ok_or_else(missing)?;
            Journal::recover(journal)
        };
        let uffd = |number| inheritance.uffds.remove(&number).map(UserFault::from_fd);
        let (memory, orders) = Memory::of_notes(images, notes, uffd)?;
        memory.keep_journals()?;
        Ok((Arc::new(memory), orders))
    }
}

impl<D: Descriptor> fmt::Debug for Memory<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut memory = f.debug_struct("Memory");
        memory.field("totals", &self.totals).finish_non_exhaustive()
    }
}

/// Where a family's orders go.
struct Sink<'a, D> {
    orders: &'a mpsc::UnboundedSender<Order<D>>,
    zero_faults: &'a AtomicU64,
    parked: &'a AtomicU64,
    wants: &'a Wants,
}

impl<D> Sink<'_, D> {
    fn watch(&self, pid: ImagePid, member: MemberId, uffd: Arc<D>) {
        self.order(Order::Watch(MemberKey { pid, member }, uffd));
    }

    fn request(&self, pid: ImagePid, pages: PageRange) {
        self.order(Order::Demand(DemandFrame::Request(pid, pages)));
    }

    /// Something is wanting, and is to be tried again.
    fn fall_short(&self, want: Want) {
        if self.wants.fall_short(want) {
            self.order(Order::Relieve);
        }
    }

    fn order(&self, order: Order<D>) {
        // The receiver lives until the session ends; orders after that have no one to matter to.
        let _ = self.orders.send(order);
    }
}
