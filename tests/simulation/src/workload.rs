//! What the restored processes do to their memory.

use common::page::{PageIndex, PageRange};
use lazy_restorer::memory::ProcessImage;
use model_kernel::{ADDRESSES, Cell, Change, Content, Kernel, Kind, Process, pages_of};
use tests::random::Random;

/// Longest run of pages one step is about.
const MAX_RUN: u64 = 9;

/// The kernel as `criu restore` leaves it.
pub fn restored(image: &ProcessImage) -> Kernel {
    let mut kernel = Kernel::default();
    let mut process = Process {
        alive: true,
        born: true,
        ..Process::default()
    };
    for vma in &image.vmas {
        let id = kernel.fresh_vma();
        for page in pages_of(vma.pages) {
            let content = match image.lazy.slot(PageIndex(page)) {
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
    kernel.processes.push(process);
    kernel
}

/// A change of an address space.
pub fn change(random: &mut Random) -> Change {
    let kind = match random.below(14) {
        0..6 => Kind::Remap {
            to: random.below(ADDRESSES),
            into_hole: random.below(2) == 0,
            keep_old: random.below(5) == 0,
        },
        6..9 => Kind::Unmap,
        9 => Kind::MapAnew,
        10..13 => Kind::Remove,
        _ => Kind::Grow,
    };
    Change {
        who: random.index(8),
        at: random.index(1 << 20),
        count: 1 + random.below(MAX_RUN),
        slow: random.below(10) < 3,
        kind,
    }
}

/// One of the processes that live.
pub fn living(kernel: &Kernel, random: &mut Random) -> Option<usize> {
    let lives = |index: &usize| {
        let process = &kernel.processes[*index];
        process.alive && process.born
    };
    let living: Vec<usize> = (0..kernel.processes.len()).filter(lives).collect();
    (!living.is_empty()).then(|| living[random.index(living.len())])
}

/// One step of one process. Returns whether it ended.
pub fn step(kernel: &mut Kernel, process: usize, random: &mut Random) -> bool {
    let at = random.index(1 << 20);
    match random.below(20) {
        0..7 => touch(&mut kernel.processes[process], at),
        7..9 => kernel.processes[process].write(at),
        9..16 => kernel.change(process, &change(random)),
        16..18 => kernel.fork(process),
        18 => kernel.processes[process].release(at),
        _ => {
            // The last of its family may not end: then nothing would be left to check.
            let alive = kernel.processes.iter().filter(|other| other.alive).count();
            if alive > 1 {
                kernel.exit(process);
                return true;
            }
        }
    }
    false
}

/// A thread touches one of the pages.
pub fn touch(process: &mut Process, at: usize) {
    if let Some(page) = process.pick(at, |_| true) {
        process.touch(page);
    }
}

/// A layout and its lazy pages.
pub fn image(pid: common::images::ImagePid, random: &mut Random) -> ProcessImage {
    let (mut vmas, mut lazy) = (Vec::new(), Vec::new());
    let mut start = 16;
    for _ in 0..1 + random.below(4) {
        let pages = PageRange::new(
            PageIndex(start + random.below(3)),
            1 + random.below(MAX_RUN + 2),
        );
        vmas.push(common::images::DumpedVma {
            pages,
            lazy: random.below(8) != 0,
            huge_pages: false,
        });
        let all = random.below(2) == 0;
        for page in pages_of(pages) {
            if all || random.below(2) == 0 {
                lazy.push(PageRange::new(PageIndex(page), 1));
            }
        }
        start = pages.end().0;
    }
    let lazy = common::lazy_map::LazyMap::new(lazy).expect("pages are in order");
    ProcessImage { pid, lazy, vmas }
}
