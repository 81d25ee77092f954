//! The rule of one lock, model checked: the real memory under a scheduler that tries interleavings.
//!
//! Threads of the workload change memory, others read events, others install pages, and the scheduler switches between
//! them at each system call and at the family's lock. No page that was removed may come back, and no thread may be left
//! waiting. `SHUTTLE_RUNS` sets the number of schedules; a failing one is printed and can be replayed with
//! `shuttle::replay`.

use std::ops::{Deref, DerefMut};
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::images::{DumpedVma, ImagePid};
use common::lazy_map::LazyMap;
use common::page::{PAGE_SIZE, PageIndex, PageRange};
use common::proto::pages::DataHeader;
use lazy_restorer::memory::descriptor::{Descriptor, Lock};
use lazy_restorer::memory::{Arrival, MemberKey, Memory, ProcessImage};
use lazy_restorer::uffd::{MemoryEvent, Progress, ReadError};
use model_kernel::{Change, Kind};
use page_server::memory::PageSource;
use shuttle::thread;
use simulation::frozen::FrozenMemory;
use simulation::notes::{Fuse, Notes};
use simulation::uffd::{Frozen, Machine, SharedMachine, Uffd, lock};
use simulation::workload;

const PID: ImagePid = ImagePid(7);
/// The first lazy page; they lie in one mapping.
const FIRST: u64 = 16;
const PAGES: u64 = 4;
/// Schedules in an ordinary run: some seconds.
const RUNS: usize = 2000;
/// Longest schedule; the workload's threads spin while they wait.
const MAX_STEPS: usize = 20_000;

/// A descriptor whose every call is a point where another thread may come in.
#[derive(Debug)]
struct Scheduled {
    uffd: Uffd,
    /// Events that were read and not handed out: only for the check of the check.
    late: Option<Mutex<Vec<MemoryEvent<Uffd>>>>,
}

impl Scheduled {
    fn new(uffd: Uffd) -> Self {
        Scheduled { uffd, late: None }
    }

    /// Hands events out one reading later than the kernel does, as one would who reads them without the lock.
    fn late(uffd: Uffd) -> Self {
        let late = Some(Mutex::default());
        Scheduled { uffd, late }
    }
}

impl Descriptor for Scheduled {
    type Buffer = Notes;
    type Lock<T: Send> = ScheduledLock<T>;

    fn buffer() -> Notes {
        Notes::default()
    }

    fn read(&self, notes: &mut Notes) -> Result<Vec<MemoryEvent<Self>>, ReadError> {
        thread::yield_now();
        let mut events = Descriptor::read(&self.uffd, notes)?;
        if let Some(late) = &self.late {
            let mut late = late.lock().expect("nobody panicked");
            std::mem::swap(&mut *late, &mut events);
        }
        Ok(events.into_iter().map(scheduled).collect())
    }

    fn copy(&self, target: PageRange, content: &[u8]) -> Progress {
        thread::yield_now();
        Descriptor::copy(&self.uffd, target, content)
    }

    fn zero(&self, target: PageRange) -> Progress {
        thread::yield_now();
        Descriptor::zero(&self.uffd, target)
    }

    fn wake(&self, pages: PageRange) {
        thread::yield_now();
        Descriptor::wake(&self.uffd, pages);
    }

    fn wake_all(&self) {
        thread::yield_now();
        self.uffd.wake_all();
    }

    fn number(&self) -> RawFd {
        self.uffd.number()
    }

    fn is_quiet(&self) -> bool {
        thread::yield_now();
        Descriptor::is_quiet(&self.uffd)
    }

    fn is_gone(&self) -> bool {
        Descriptor::is_gone(&self.uffd)
    }

    fn pause(&self, time: Duration) {
        Descriptor::pause(&self.uffd, time);
        thread::yield_now();
    }
}

fn scheduled(event: MemoryEvent<Uffd>) -> MemoryEvent<Scheduled> {
    match event {
        MemoryEvent::Fork(child) => MemoryEvent::Fork(Scheduled::new(child)),
        MemoryEvent::Fault(page) => MemoryEvent::Fault(page),
        MemoryEvent::Remap(from, to) => MemoryEvent::Remap(from, to),
        MemoryEvent::Remove(pages) => MemoryEvent::Remove(pages),
        MemoryEvent::Unmap(pages) => MemoryEvent::Unmap(pages),
    }
}

/// The family's lock, under the scheduler.
struct ScheduledLock<T>(shuttle::sync::Mutex<T>);

struct Guard<'a, T>(shuttle::sync::MutexGuard<'a, T>);

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: Send> Lock<T> for ScheduledLock<T> {
    type Guard<'a>
        = Guard<'a, T>
    where
        T: 'a;

    fn new(value: T) -> Self {
        ScheduledLock(shuttle::sync::Mutex::new(value))
    }

    fn lock(&self) -> Guard<'_, T> {
        Guard(self.0.lock().expect("nobody panicked"))
    }
}

/// One restored process with all its pages missing.
struct Scene {
    memory: Arc<Memory<Scheduled>>,
    machine: SharedMachine,
    key: MemberKey,
    frozen: FrozenMemory,
}

impl Scene {
    fn new(descriptor: fn(Uffd) -> Scheduled) -> Self {
        let pages = PageRange::new(PageIndex(FIRST), PAGES);
        let image = ProcessImage {
            pid: PID,
            lazy: LazyMap::new([pages]).expect("one range"),
            vmas: vec![DumpedVma {
                pages,
                lazy: true,
                huge_pages: false,
            }],
        };
        let frozen = FrozenMemory { seed: 3 };
        let machine = Arc::new(Mutex::new(Machine {
            kernel: workload::restored(&image),
            frozen: Frozen {
                pid: PID,
                memory: frozen,
            },
            disturbance: None,
            fuse: Fuse::default(),
        }));
        let (memory, _orders) = Memory::new(vec![image]);
        let key = memory
            .attach(PID, descriptor(Uffd::new(&machine, 0)))
            .expect("once");
        memory.restored().expect("nothing came early");
        Scene {
            memory,
            machine,
            key,
            frozen,
        }
    }

    /// The source's pages come in two frames, one after the other.
    fn install(&self, first: u64, count: u64) {
        let pages = PageRange::new(PageIndex(FIRST + first), count);
        let mut content = vec![0; PAGE_SIZE * count as usize];
        self.frozen
            .read(PID, pages, &mut content)
            .expect("readable");
        let header = DataHeader::raw(PID, pages, 0);
        let received = self.memory.receive(&header, &content, Arrival::Pushed);
        received.expect("the pages are lazy");
    }

    fn change(&self, at: usize, count: u64, kind: Kind) {
        let change = Change {
            who: 0,
            at,
            count,
            slow: false,
            kind,
        };
        lock(&self.machine).kernel.change(0, &change);
    }

    /// Reads events until the kernel has none, as whoever watches the descriptor does.
    fn watch(&self) {
        loop {
            self.memory
                .drain(self.key)
                .expect("the kernel refuses nothing");
            let quiet = {
                let process = &lock(&self.machine).kernel.processes[0];
                process.is_quiet() && process.faults.is_empty()
            };
            if quiet {
                return;
            }
            thread::yield_now();
        }
    }

    /// There is memory for so many more pages.
    fn limit_memory(&self, pages: Option<usize>) {
        lock(&self.machine).kernel.memory = pages;
    }

    fn relieve(&self) -> bool {
        self.memory.relieve().expect("the kernel refuses nothing")
    }

    /// Everything has come: nothing is missing, and nobody waits.
    fn assert_whole(&self) {
        self.limit_memory(None);
        self.watch();
        assert!(self.relieve(), "there is memory for everything");
        self.watch();
        for process in &lock(&self.machine).kernel.processes {
            assert_eq!(process.missing().count(), 0, "pages never came");
            assert!(process.waiting.is_empty(), "a thread waits for ever");
        }
    }
}

/// Lets `threads` run in every order the scheduler thinks of. Each gets the scene.
fn explore(threads: &'static [fn(&Scene)]) {
    explore_with(Scheduled::new, threads);
}

fn explore_with(descriptor: fn(Uffd) -> Scheduled, threads: &'static [fn(&Scene)]) {
    let runs = std::env::var("SHUTTLE_RUNS").ok();
    let runs = runs.and_then(|runs| runs.parse().ok()).unwrap_or(RUNS);
    let mut config = shuttle::Config::new();
    config.max_steps = shuttle::MaxSteps::FailAfter(MAX_STEPS);
    let scheduler = shuttle::scheduler::PctScheduler::new(4, runs);
    let runner = shuttle::Runner::new(scheduler, config);
    runner.run(move || {
        let scene = Arc::new(Scene::new(descriptor));
        let running: Vec<_> = threads
            .iter()
            .map(|act| {
                let scene = scene.clone();
                thread::spawn(move || act(&scene))
            })
            .collect();
        for thread in running {
            thread.join().expect("no thread fails");
        }
        scene.assert_whole();
    });
}

fn touch(scene: &Scene, page: u64) {
    lock(&scene.machine).kernel.processes[0].touch(FIRST + page);
    thread::yield_now();
}

#[test]
fn pages_come_while_others_are_removed() {
    explore(&[
        |scene| scene.install(0, PAGES),
        |scene| {
            scene.change(1, 2, Kind::Remove);
            thread::yield_now();
            touch(scene, 1);
        },
        Scene::watch,
        Scene::watch,
    ]);
}

#[test]
fn pages_come_while_their_place_moves() {
    fn remap(scene: &Scene) {
        let kind = Kind::Remap {
            to: 64,
            into_hole: false,
            keep_old: false,
        };
        scene.change(1, 2, kind);
    }
    explore(&[
        |scene| scene.install(0, PAGES),
        |scene| scene.install(1, 2),
        remap,
        |scene| touch(scene, 2),
        Scene::watch,
    ]);
}

#[test]
fn two_threads_bring_the_same_page() {
    explore(&[
        |scene| scene.install(0, PAGES),
        |scene| scene.install(2, 1),
        |scene| touch(scene, 2),
        |scene| scene.change(3, 1, Kind::Unmap),
        Scene::watch,
    ]);
}

#[test]
fn a_child_is_born_while_pages_come() {
    explore(&[
        |scene| scene.install(0, 2),
        |scene| scene.install(2, 2),
        |scene| lock(&scene.machine).kernel.fork(0),
        |scene| scene.change(0, 3, Kind::Remove),
        Scene::watch,
    ]);
}

#[test]
fn memory_runs_out_while_pages_come() {
    explore(&[
        |scene| {
            scene.limit_memory(Some(1));
            scene.install(0, PAGES);
        },
        |scene| {
            scene.change(1, 2, Kind::Remove);
            thread::yield_now();
            touch(scene, 1);
            touch(scene, 3);
        },
        |scene| {
            scene.relieve();
            thread::yield_now();
            scene.limit_memory(None);
            scene.relieve();
        },
        Scene::watch,
        Scene::watch,
    ]);
}

/// What the rule forbids must be found, or the tests above find nothing.
#[test]
#[should_panic(expected = "a frozen page over")]
fn events_that_are_applied_late_are_found() {
    explore_with(
        Scheduled::late,
        &[
            |scene| scene.install(0, PAGES),
            |scene| scene.change(1, 2, Kind::Remove),
            Scene::watch,
            Scene::watch,
        ],
    );
}
