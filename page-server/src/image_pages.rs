//! Page content from the files of a full dump.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::images::{
    DumpedProcess, ImagePid, ReadImagesError, StoredPages, StoredRun, parse_stored_pages,
};
use common::page::{PageRange, page_in_buffer};

use crate::memory::{MemoryError, PageSource};

/// The lazy pages of a dump that lies on disk.
#[derive(Debug)]
pub struct ImagePages {
    processes: HashMap<ImagePid, ProcessPages>,
}

#[derive(Debug)]
struct ProcessPages {
    file: File,
    /// Runs of lazy pages in address order.
    runs: Vec<LazyRun>,
}

#[derive(Clone, Copy, Debug)]
struct LazyRun {
    pages: PageRange,
    /// Where they begin in the file.
    offset: u64,
}

impl ImagePages {
    /// Opens the pages of `processes` in `directory`, all of which must be there.
    pub fn open(directory: &Path, processes: &[DumpedProcess]) -> Result<Self, ReadImagesError> {
        let opened = processes.iter().map(|process| {
            let stored = stored_pages(directory, process.pid)?;
            Ok((process.pid, ProcessPages::open(directory, &stored)?))
        });
        Ok(ImagePages {
            processes: opened.collect::<Result<_, ReadImagesError>>()?,
        })
    }
}

/// Where `directory` has the pages of `pid`.
pub fn stored_pages(directory: &Path, pid: ImagePid) -> Result<StoredPages, ReadImagesError> {
    let name = format!("pagemap-{}.img", pid.0);
    let file = fs::read(directory.join(&name)).map_err(|error| ReadImagesError::Read {
        name: name.clone(),
        error,
    })?;
    parse_stored_pages(&file).map_err(|error| ReadImagesError::Image { name, error })
}

impl ProcessPages {
    fn open(directory: &Path, stored: &StoredPages) -> Result<Self, ReadImagesError> {
        let name = format!("pages-{}.img", stored.file);
        let read = |error| ReadImagesError::Read {
            name: name.clone(),
            error,
        };
        let file = File::open(directory.join(&name)).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        let runs = lazy_runs(&stored.runs, length)
            .ok_or_else(|| read(io::ErrorKind::UnexpectedEof.into()))?;
        Ok(ProcessPages { file, runs })
    }
}

/// The lazy ones of `runs`, which must fit into `length` bytes.
fn lazy_runs(runs: &[StoredRun], length: u64) -> Option<Vec<LazyRun>> {
    let mut offset = 0_u64;
    let mut lazy = Vec::new();
    for run in runs.iter().filter(|run| run.pages.count > 0) {
        let next = run
            .pages
            .is_addressable()
            .then(|| offset.checked_add(run.pages.bytes()))
            .flatten()
            .filter(|end| *end <= length)?;
        if run.lazy {
            let pages = run.pages;
            lazy.push(LazyRun { pages, offset });
        }
        offset = next;
    }
    Some(lazy)
}

impl PageSource for ImagePages {
    fn read(&self, pid: ImagePid, pages: PageRange, buffer: &mut [u8]) -> Result<(), MemoryError> {
        assert_eq!(pages.bytes(), buffer.len() as u64);
        let process = self
            .processes
            .get(&pid)
            .ok_or(MemoryError::UnknownProcess(pid))?;
        let missing = || {
            let error = io::Error::new(io::ErrorKind::NotFound, "not in the images");
            MemoryError::Read(pid, pages, error)
        };
        let mut done = 0;
        while done < pages.count {
            let page = pages.start.forward(done);
            let at = process.runs.partition_point(|run| run.pages.end() <= page);
            let run = process.runs.get(at).ok_or_else(missing)?;
            let skipped = page.0.checked_sub(run.pages.start.0).ok_or_else(missing)?;
            let count = (pages.count - done).min(run.pages.count - skipped);
            let part =
                page_in_buffer(done as usize).start..page_in_buffer((done + count) as usize).start;
            let offset = run.offset + PageRange::new(run.pages.start, skipped).bytes();
            process
                .file
                .read_exact_at(&mut buffer[part], offset)
                .map_err(|error| MemoryError::Read(pid, pages, error))?;
            done += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use common::page::{PAGE_SIZE, PageIndex};

    use super::*;

    fn run(page: u64, count: u64, lazy: bool) -> StoredRun {
        StoredRun {
            pages: PageRange::new(PageIndex(page), count),
            lazy,
        }
    }

    /// Pages 1 and 2 lazy, 3 eager, 4 lazy, 9 lazy; page *n* is filled with its place in the file.
    fn pages() -> ImagePages {
        let runs = [
            run(1, 2, true),
            run(3, 1, false),
            run(4, 1, true),
            run(9, 1, true),
        ];
        let mut file = tempfile::tempfile().expect("a file");
        for fill in 0..5 {
            file.write_all(&[fill; PAGE_SIZE]).expect("written");
        }
        let runs = lazy_runs(&runs, 5 * PAGE_SIZE as u64).expect("they fit");
        ImagePages {
            processes: HashMap::from([(ImagePid(1), ProcessPages { file, runs })]),
        }
    }

    fn read(page: u64, count: u64) -> Result<Vec<u8>, MemoryError> {
        let range = PageRange::new(PageIndex(page), count);
        let mut buffer = vec![0xff; range.bytes() as usize];
        pages().read(ImagePid(1), range, &mut buffer)?;
        Ok(buffer.iter().copied().step_by(PAGE_SIZE).collect())
    }

    #[test]
    fn pages_are_found_behind_others() {
        assert_eq!(read(1, 2).expect("there"), [0, 1]);
        assert_eq!(read(2, 1).expect("there"), [1]);
        assert_eq!(read(4, 1).expect("there"), [3]);
        assert_eq!(read(9, 1).expect("there"), [4]);
    }

    #[test]
    fn what_is_not_lazy_is_not_there() {
        for (page, count) in [(0, 1), (2, 2), (3, 1), (5, 1), (9, 2), (10, 1)] {
            assert!(read(page, count).is_err(), "{count} from {page}");
        }
    }

    #[test]
    fn a_short_file_is_refused() {
        assert!(lazy_runs(&[run(1, 2, true)], 2 * PAGE_SIZE as u64 - 1).is_none());
        assert!(lazy_runs(&[run(1, u64::MAX, false), run(9, 1, true)], 1 << 20).is_none());
    }
}
