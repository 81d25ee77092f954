//! Finds the huge pages of frozen tasks: the only file that calls `PAGEMAP_SCAN` (Linux 6.7,
//! `Documentation/admin-guide/mm/pagemap.rst`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use common::page::{PageRange, VirtAddr};
use nix::unistd::Pid;

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `PAGE_IS_FILE` and `PAGE_IS_HUGE` of `linux/fs.h`.
const FILE: u64 = 1 << 2;
const HUGE: u64 = 1 << 6;
/// End of what a task can map without asking for more (`TASK_SIZE`, with four levels of page tables).
const TASK_END: u64 = (1 << 47) - 4096;
/// Regions of one call.
const REGIONS: usize = 512;

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, Scan);

/// Runs of anonymous memory of `task` that lie on huge pages, transparent or not. None where the kernel cannot tell.
pub fn areas(task: Pid) -> Vec<PageRange> {
    match scan(task) {
        Ok(areas) => areas,
        Err(error) => {
            tracing::debug!(%task, %error, "cannot look for huge pages");
            Vec::new()
        }
    }
}

fn scan(task: Pid) -> io::Result<Vec<PageRange>> {
    let pagemap = File::open(format!("/proc/{task}/pagemap"))?;
    let mut regions = vec![Region::default(); REGIONS];
    let mut areas = Vec::new();
    let mut start = 0;
    while start < TASK_END {
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            start,
            end: TASK_END,
            vec: regions.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            category_inverted: FILE,
            category_mask: FILE | HUGE,
            return_mask: HUGE,
            ..Scan::default()
        };
        // SAFETY: the structure says its own size; `regions` has room for `vec_len` regions and outlives the call.
        let found = unsafe { pagemap_scan(pagemap.as_raw_fd(), &raw mut scan) }?;
        let found = usize::try_from(found).unwrap_or_default();
        let ranges = regions.iter().take(found);
        areas.extend(
            ranges.map(|region| PageRange::covering(VirtAddr(region.start), VirtAddr(region.end))),
        );
        if scan.walk_end <= start {
            break;
        }
        start = scan.walk_end;
    }
    Ok(areas)
}

#[cfg(test)]
mod tests {
    use std::ptr::null_mut;

    use nix::libc;

    use super::*;

    const HUGE_PAGE: usize = 2 << 20;

    /// Memory of our own, aligned to huge pages, with or without being asked to be huge.
    fn map(advice: i32) -> *mut u8 {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping that nobody else knows.
        let at = unsafe { libc::mmap(null_mut(), 4 * HUGE_PAGE, rights, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let at = at.cast::<u8>();
        let aligned = at.wrapping_add(at.align_offset(HUGE_PAGE));
        // SAFETY: two huge pages from the first aligned address are within the four mapped.
        unsafe { libc::madvise(aligned.cast(), 2 * HUGE_PAGE, advice) };
        // SAFETY: as above.
        unsafe { aligned.write_bytes(1, 2 * HUGE_PAGE) };
        aligned
    }

    fn is_huge(at: *mut u8) -> bool {
        let page = VirtAddr(at as u64).page();
        areas(Pid::this()).iter().any(|area| area.contains(page))
    }

    #[test]
    fn what_was_asked_to_be_huge_is_found_and_nothing_else() {
        let huge = map(libc::MADV_HUGEPAGE);
        let small = map(libc::MADV_NOHUGEPAGE);
        assert!(!is_huge(small));
        let smaps = std::fs::read_to_string("/proc/self/smaps").expect("readable");
        let has_any = |line: &str| line.starts_with("AnonHugePages:") && !line.ends_with(" 0 kB");
        // A machine may have none to give.
        assert_eq!(is_huge(huge), smaps.lines().any(has_any));
    }
}
