//! Installing pages into memory of this process that is registered with a userfault descriptor.

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use common::images::{DumpedVma, ImagePid};
use common::lazy_map::LazyMap;
use common::page::{PAGE_SIZE, PageRange, VirtAddr};
use common::proto::pages::DataHeader;
use lazy_restorer::memory::{Arrival, Memory, ProcessImage};
use lazy_restorer::uffd::{Progress, UserFault};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use userfaultfd::UffdBuilder;

use super::{FRAME, PAGES, Piece, SAMPLES, piece};

/// Copies and zero pages, one page and a full frame at a time.
pub(super) fn pieces() -> Result<Vec<Piece>> {
    let room = Room::new()?;
    let content = vec![0x5a; FRAME * PAGE_SIZE];
    let frame = room.frames(&content)?;
    let mut pieces = [1, FRAME]
        .into_iter()
        .flat_map(|count| {
            let content = &content[..count * PAGE_SIZE];
            let copy = room.time("copy", count, |pages| room.fault.copy(pages, content));
            let zero = room.time("zero", count, |pages| room.fault.zero(pages));
            [copy, zero]
        })
        .collect::<Result<Vec<Piece>>>()?;
    pieces.push(frame);
    Ok(pieces)
}

/// Registered memory.
struct Room {
    pages: PageRange,
    fault: UserFault,
    /// The same descriptor.
    fd: OwnedFd,
}

impl Room {
    fn new() -> Result<Self> {
        let bytes = NonZeroUsize::new(PAGES * PAGE_SIZE).context("no room")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap_anonymous(None, bytes, access, MapFlags::MAP_PRIVATE) }?;
        let uffd = UffdBuilder::new()
            .create()
            .context("no userfault descriptor")?;
        uffd.register(start.as_ptr(), bytes.get())?;
        // SAFETY: the descriptor is open for as long as `uffd` lives, which is longer than this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) }.try_clone_to_owned()?;
        let first = VirtAddr(start.as_ptr() as u64).page();
        Ok(Room {
            pages: PageRange::new(first, PAGES as u64),
            fault: UserFault::from_fd(fd.try_clone()?),
            fd,
        })
    }

    /// All of what becomes of a pushed frame: its pages are hashed and counted, noted in the journal, and installed.
    fn frames(&self, content: &[u8]) -> Result<Piece> {
        let mut samples = Vec::new();
        // The first round warms the memory and does not count.
        for round in 0..=SAMPLES {
            let pid = ImagePid(1);
            let image = ProcessImage {
                pid,
                lazy: LazyMap::new([self.pages])?,
                vmas: vec![DumpedVma {
                    pages: self.pages,
                    lazy: true,
                    huge_pages: false,
                }],
            };
            let (memory, _orders) = Memory::new(vec![image]);
            memory.keep_journals()?;
            memory.attach(pid, UserFault::from_fd(self.fd.try_clone()?))?;
            memory.restored()?;
            let began = Instant::now();
            for first in (0..PAGES).step_by(FRAME) {
                let start = self.pages.start.forward(first as u64);
                let header = DataHeader::raw(pid, PageRange::new(start, FRAME as u64), 0);
                memory.receive(&header, content, Arrival::Pushed)?;
            }
            if round > 0 {
                let steps = (PAGES / FRAME) as f64;
                samples.push(began.elapsed().as_nanos() as f64 / steps);
            }
            self.empty()?;
        }
        let name = format!("memory: receive {FRAME} pushed pages");
        Ok(piece(&name, FRAME * PAGE_SIZE, &samples))
    }

    fn time(
        &self,
        what: &str,
        count: usize,
        fill: impl Fn(PageRange) -> Progress,
    ) -> Result<Piece> {
        let mut samples = Vec::new();
        // The first round warms the memory and does not count.
        for round in 0..=SAMPLES {
            let began = Instant::now();
            for first in (0..PAGES).step_by(count) {
                let start = self.pages.start.forward(first as u64);
                let progress = fill(PageRange::new(start, count as u64));
                ensure!(progress.stop.is_none(), "an install stopped: {progress:?}");
            }
            if round > 0 {
                let steps = (PAGES / count) as f64;
                samples.push(began.elapsed().as_nanos() as f64 / steps);
            }
            self.empty()?;
        }
        let name = format!("install: {what} {count} page(s)");
        Ok(piece(&name, count * PAGE_SIZE, &samples))
    }

    fn start(&self) -> Result<std::ptr::NonNull<libc::c_void>> {
        let start = self.pages.start.addr().0 as *mut libc::c_void;
        std::ptr::NonNull::new(start).context("no memory")
    }

    fn empty(&self) -> Result<()> {
        let bytes = self.pages.bytes() as usize;
        // SAFETY: the mapping is ours, and nothing refers to its content.
        unsafe { madvise(self.start()?, bytes, MmapAdvise::MADV_DONTNEED) }
            .context("cannot empty the memory")
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Ok(start) = self.start() {
            // SAFETY: the mapping is ours, and nothing refers to it any more.
            let _ = unsafe { munmap(start, self.pages.bytes() as usize) };
        }
    }
}
