//! Makes pages huge again that were huge on the source: `UFFDIO_COPY` installs nothing but small ones.
//!
//! The kernel collapses what another process asks it to (`process_madvise(2)` with `MADV_COLLAPSE`, Linux 6.1). It holds the
//! address space for some milliseconds each time, during which all faults of the process wait, so this is done last,
//! when every page is there, and with pauses.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use common::images::ImagePid;
use common::limits::MAX_HUGE_AREAS;
use common::page::{PAGE_SIZE, PageIndex, PageRange};
use common::proto::control::HugeAreas;
use common::session_file::Task;
use nix::errno::Errno;
use nix::unistd::Pid;
use serde::Serialize;
use tokio::time::sleep;

use crate::exits::pidfd_open;

/// Small pages in a huge one.
const HUGE_PAGES: u64 = 512;
/// The workload has its memory for itself for this many times as long as a collapse took.
const PAUSE_FACTOR: u32 = 4;

/// What to make huge again, and in which processes.
#[derive(Debug, Default)]
pub struct Huge {
    areas: Vec<(ImagePid, PageRange)>,
    tasks: HashMap<ImagePid, Task>,
}

/// What became of it, in huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HugeCounts {
    /// Huge on the source.
    pub wanted: u64,
    /// Huge here, too.
    pub made: u64,
}

impl Huge {
    /// The process `image` is `task` here.
    pub fn restored(&mut self, image: ImagePid, task: Task) {
        self.tasks.insert(image, task);
    }

    /// These were huge on the source. False when that is more than any source may say.
    pub fn note(&mut self, told: &HugeAreas) -> bool {
        let areas = told.areas.iter();
        let areas = areas.map(|(start, count)| PageRange::new(PageIndex(*start), *count));
        self.areas.extend(areas.map(|pages| (told.pid, pages)));
        self.areas.len() <= MAX_HUGE_AREAS
            && self.areas.iter().all(|(_, pages)| pages.is_addressable())
    }

    /// Asks the kernel for all of them. May be cancelled.
    pub async fn make(self) -> HugeCounts {
        let mut counts = HugeCounts::default();
        for (image, area) in self.areas {
            let starts = huge_pages(area);
            counts.wanted += starts.len() as u64;
            let Some(task) = self.tasks.get(&image) else {
                continue;
            };
            let Ok(pidfd) = pidfd_open(Pid::from_raw(task.pid)) else {
                continue;
            };
            for start in starts.into_iter().take_while(|_| task.is_alive()) {
                let began = Instant::now();
                match collapse(&pidfd, start) {
                    Ok(()) => counts.made += 1,
                    Err(error) => tracing::debug!(?start, %error, "stays small"),
                }
                sleep(began.elapsed() * PAUSE_FACTOR).await;
            }
        }
        counts
    }
}

/// The huge pages that lie in `area` as a whole, each by its first small page.
fn huge_pages(area: PageRange) -> Vec<PageIndex> {
    let first = area.start.0.next_multiple_of(HUGE_PAGES);
    let end = area.start.0 + area.count;
    let starts = (first..end).step_by(HUGE_PAGES as usize);
    starts
        .filter(|start| start + HUGE_PAGES <= end)
        .map(PageIndex)
        .collect()
}

fn collapse(pidfd: &OwnedFd, start: PageIndex) -> Result<(), Errno> {
    let range = libc::iovec {
        iov_base: start.addr().0 as *mut libc::c_void,
        iov_len: HUGE_PAGES as usize * PAGE_SIZE,
    };
    let (pidfd, range) = (pidfd.as_raw_fd(), &raw const range);
    // SAFETY: one range, read during the call; it is an address in another process and not used here.
    let result = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            pidfd,
            range,
            1,
            libc::MADV_COLLAPSE,
            0,
        )
    };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_huge_pages_count() {
        let starts = |start, count| huge_pages(PageRange::new(PageIndex(start), count));
        assert_eq!(starts(512, 1024), [PageIndex(512), PageIndex(1024)]);
        assert_eq!(starts(513, 1023), [PageIndex(1024)]);
        assert_eq!(starts(513, 1022), []);
        assert_eq!(starts(0, 0), []);
    }

    #[test]
    fn a_source_that_says_too_much_is_found_out() {
        let told = |areas| HugeAreas {
            pid: ImagePid(1),
            areas,
        };
        let mut huge = Huge::default();
        assert!(huge.note(&told(vec![(512, 512)])));
        assert!(!huge.note(&told(vec![(u64::MAX - 1, 512)])));
        let mut huge = Huge::default();
        assert!(!huge.note(&told(vec![(512, 512); MAX_HUGE_AREAS + 1])));
    }

    #[tokio::test]
    async fn processes_that_are_gone_are_passed_over() {
        let mut huge = Huge::default();
        let areas = vec![(512, 1024)];
        let pid = ImagePid(1);
        assert!(huge.note(&HugeAreas { pid, areas }));
        let counts = huge.make().await;
        assert_eq!((counts.wanted, counts.made), (2, 0));
    }
}
