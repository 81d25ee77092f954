//! Userfault descriptors of the model kernel, as the real memory uses them.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::images::ImagePid;
use common::page::{PageIndex, PageRange, page_in_buffer};
use common::priority_lock::PriorityLock;
use lazy_restorer::memory::descriptor::Descriptor;
use lazy_restorer::uffd::{MemoryEvent, Progress, ReadError, Stop};
use model_kernel::{ADDRESSES, Change, Content, Event, Kernel, Stop as KernelStop};

use crate::frozen::FrozenMemory;
use crate::notes::{Fuse, Notes};

/// One family's processes, and what they must find in their memory.
#[derive(Debug)]
pub struct Machine {
    /// The processes.
    pub kernel: Kernel,
    /// What the dumped process held.
    pub frozen: Frozen,
    /// Strikes when the kernel's next install is interrupted.
    pub disturbance: Option<Change>,
    /// The program that uses it is killed when this has burnt.
    pub fuse: Fuse,
}

/// The frozen pages of one process.
#[derive(Clone, Copy, Debug)]
pub struct Frozen {
    /// The process.
    pub pid: ImagePid,
    /// All frozen pages.
    pub memory: FrozenMemory,
}

/// A machine that descriptors share.
pub type SharedMachine = Arc<Mutex<Machine>>;

/// Takes a machine's lock.
pub fn lock(machine: &SharedMachine) -> MutexGuard<'_, Machine> {
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}

/// More than one family ever has.
const MOST_PROCESSES: u32 = 1 << 16;

/// The number of a process's descriptor, which its successor knows it by.
fn number(pid: ImagePid, process: usize) -> RawFd {
    (pid.0 * MOST_PROCESSES) as RawFd + process as RawFd
}

/// The descriptor with this number, as it is passed on from one program to the next. Only processes that are born have
/// one; that of one that has ended may have been closed.
pub fn passed_on(machines: &[(ImagePid, SharedMachine)], number: RawFd) -> Option<Uffd> {
    let pid = ImagePid(number as u32 / MOST_PROCESSES);
    let process = (number as u32 % MOST_PROCESSES) as usize;
    let (_, machine) = machines.iter().find(|(its_pid, _)| *its_pid == pid)?;
    let born = lock(machine).kernel.processes[process].born;
    born.then(|| Uffd::new(machine, process))
}

/// One process's descriptor.
#[derive(Clone, Debug)]
pub struct Uffd {
    machine: SharedMachine,
    process: usize,
}

impl Uffd {
    /// The descriptor of a process.
    pub fn new(machine: &SharedMachine, process: usize) -> Self {
        Uffd {
            machine: machine.clone(),
            process,
        }
    }

    /// Which process of its family it is.
    pub fn process(&self) -> usize {
        self.process
    }

    fn put(
        &self,
        target: PageRange,
        becomes: impl Fn(Frozen, u64, Content) -> Content,
    ) -> Progress {
        let mut machine = lock(&self.machine);
        if machine.fuse.burn() {
            return Progress {
                pages: target.count,
                stop: None,
            };
        }
        let frozen = machine.frozen;
        let put = |index, content| becomes(frozen, index, content);
        let (pages, stop) = machine.kernel.put(self.process, target, put);
        if stop == Some(KernelStop::Again) {
            machine.be_disturbed(self.process);
        }
        Progress {
            pages,
            stop: stop.map(|stop| match stop {
                KernelStop::Exists => Stop::AlreadyPresent,
                KernelStop::Again => Stop::EventsPending,
                KernelStop::NoEntry => Stop::NotMapped,
                KernelStop::Gone => Stop::ProcessGone,
                KernelStop::NoMemory => Stop::NoMemory,
            }),
        }
    }
}

impl Machine {
    /// What interrupted an install shows.
    fn be_disturbed(&mut self, process: usize) {
        self.kernel.interrupt = None;
        if let Some(change) = self.disturbance.take() {
            self.kernel.change(process, &change);
        }
    }
}

impl Descriptor for Uffd {
    type Buffer = Notes;
    type Lock<T: Send> = PriorityLock<T>;

    fn buffer() -> Notes {
        Notes::default()
    }

    /// All faults first, then the oldest event, as the kernel does it.
    fn read(&self, notes: &mut Notes) -> Result<Vec<MemoryEvent<Self>>, ReadError> {
        let mut machine = lock(&self.machine);
        if machine.fuse.burn() {
            return Ok(Vec::new());
        }
        let process = &mut machine.kernel.processes[self.process];
        let faults = std::mem::take(&mut process.faults);
        process.waiting.extend(&faults);
        let mut events: Vec<_> = faults
            .into_iter()
            .map(|page| MemoryEvent::Fault(PageIndex(page)))
            .collect();
        events.extend(process.next_event().map(|event| match event {
            Event::Fork(child) => {
                machine.kernel.processes[child].born = true;
                MemoryEvent::Fork(Uffd::new(&self.machine, child))
            }
            Event::Remap(from, to) => MemoryEvent::Remap(from, to),
            Event::Remove(pages) => MemoryEvent::Remove(pages),
            Event::Unmap(pages) => MemoryEvent::Unmap(pages),
        }));
        drop(machine);
        notes.take(&events);
        Ok(events)
    }

    fn copy(&self, target: PageRange, content: &[u8]) -> Progress {
        assert_eq!(target.bytes(), content.len() as u64);
        self.put(target, |frozen, index, before| match before {
            Content::Missing(dump) => {
                let bytes = &content[page_in_buffer(index as usize)];
                assert!(
                    frozen.memory.is(frozen.pid, PageIndex(dump), bytes),
                    "other bytes than those of frozen page {dump} in {target:?}"
                );
                Content::Present(dump)
            }
            other => panic!("a frozen page over {other:?} in {target:?}"),
        })
    }

    fn zero(&self, target: PageRange) -> Progress {
        self.put(target, |frozen, _, before| match before {
            Content::Missing(dump) => {
                let is_zero = frozen.memory.is_zero(frozen.pid, PageIndex(dump));
                assert!(is_zero, "zeros instead of frozen page {dump}");
                Content::Present(dump)
            }
            _ => Content::Zero,
        })
    }

    fn wake(&self, pages: PageRange) {
        let mut machine = lock(&self.machine);
        if !machine.fuse.burn() {
            machine.kernel.processes[self.process].wake(pages);
        }
    }

    fn wake_all(&self) {
        self.wake(PageRange::new(PageIndex(0), 2 * ADDRESSES));
    }

    fn is_quiet(&self) -> bool {
        let machine = lock(&self.machine);
        machine.fuse.has_burnt() || machine.kernel.processes[self.process].is_quiet()
    }

    fn number(&self) -> RawFd {
        number(lock(&self.machine).frozen.pid, self.process)
    }

    fn is_gone(&self) -> bool {
        !lock(&self.machine).kernel.processes[self.process].alive
    }

    /// A thread that lost its processor gets it back.
    fn pause(&self, _: Duration) {
        let mut machine = lock(&self.machine);
        if machine.fuse.has_burnt() {
            return;
        }
        machine.kernel.processes[self.process].release(0);
    }
}
