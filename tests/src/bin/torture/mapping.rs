//! The system calls on private anonymous mappings; the only file of the workload with unsafe memory access.

use std::io;
use std::ops::Range;
use std::ptr::{NonNull, null_mut};

/// The size of a page on the machines this runs on.
pub const PAGE_BYTES: usize = 4096;
const WORDS_PER_PAGE: usize = PAGE_BYTES / size_of::<u64>();

/// A private anonymous mapping; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    pages: usize,
}

// SAFETY: the mapping belongs to its owner alone, wherever that one runs.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `pages` pages of zeros.
    pub fn new(pages: usize) -> io::Result<Self> {
        Ok(Self {
            base: map(pages)?,
            pages,
        })
    }

    fn address(&self, page: usize) -> *mut libc::c_void {
        assert!(page <= self.pages, "page {page} of {}", self.pages);
        // SAFETY: at most one past the end of the mapping.
        unsafe { self.base.as_ptr().add(page * PAGE_BYTES) }.cast()
    }

    /// The words of one page.
    pub fn page(&self, page: usize) -> &[u64] {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        // SAFETY: inside the mapping, aligned to a page, readable, and any bytes are words.
        unsafe { std::slice::from_raw_parts(self.address(page).cast(), WORDS_PER_PAGE) }
    }

    /// The words of one page, which must be writable.
    pub fn page_mut(&mut self, page: usize) -> &mut [u64] {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        // SAFETY: inside the mapping, aligned to a page, any bytes are words, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address(page).cast(), WORDS_PER_PAGE) }
    }

    /// `madvise(MADV_DONTNEED)`: the pages read as zeros from now on.
    pub fn discard(&mut self, range: Range<usize>) -> io::Result<()> {
        let length = range.len() * PAGE_BYTES;
        // SAFETY: inside our own mapping, and no reference to its pages is held.
        checked(unsafe { libc::madvise(self.address(range.start), length, libc::MADV_DONTNEED) })
    }

    /// Makes pages read-only, or writable again.
    pub fn protect(&mut self, range: Range<usize>, writable: bool) -> io::Result<()> {
        let access = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: inside our own mapping, and no reference to its pages is held.
        checked(unsafe {
            libc::mprotect(self.address(range.start), range.len() * PAGE_BYTES, access)
        })
    }

    /// Maps new pages over some in the middle, which unmaps the old ones; they read as zeros.
    pub fn replace(&mut self, range: Range<usize>) -> io::Result<()> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: inside our own mapping, and no reference to its pages is held.
        let base = unsafe {
            libc::mmap(
                self.address(range.start),
                range.len() * PAGE_BYTES,
                access,
                flags,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Moves the whole mapping to a new address.
    pub fn relocate(&mut self) -> io::Result<()> {
        let target = map(self.pages)?;
        move_pages(self.base, self.pages, target)?;
        self.base = target;
        Ok(())
    }

    /// Unmaps the tail, so that `pages` are left.
    pub fn shrink(&mut self, pages: usize) -> io::Result<()> {
        // SAFETY: inside our own mapping, and no reference to its pages is held.
        checked(unsafe { libc::munmap(self.address(pages), (self.pages - pages) * PAGE_BYTES) })?;
        self.pages = pages;
        Ok(())
    }

    /// Makes the mapping longer; new pages read as zeros.
    pub fn grow(&mut self, pages: usize) -> io::Result<()> {
        let (old, new) = (self.pages * PAGE_BYTES, pages * PAGE_BYTES);
        // SAFETY: our own mapping, no reference to its pages is held, and the new address is kept below.
        let base = unsafe { libc::mremap(self.address(0), old, new, libc::MREMAP_MAYMOVE) };
        if base != libc::MAP_FAILED {
            self.base = NonNull::new(base.cast())
                .ok_or_else(|| io::Error::other("mremap returned address 0"))?;
        } else if is_several_vmas(&io::Error::last_os_error()) {
            let target = map(pages)?;
            move_pages(self.base, self.pages, target)?;
            self.base = target;
        } else {
            return Err(io::Error::last_os_error());
        }
        self.pages = pages;
        Ok(())
    }

    /// Takes pages out of the middle, lets `visit` have them elsewhere, and puts the mapping together at a new address.
    ///
    /// The old place cannot be kept: any thread's new mapping may take the hole.
    pub fn excursion<T>(
        &mut self,
        range: Range<usize>,
        visit: impl FnOnce(&mut Self) -> T,
    ) -> io::Result<T> {
        let mut away = Self {
            base: map(range.len())?,
            pages: range.len(),
        };
        move_pages(self.part(range.start), range.len(), away.base)?;
        let result = visit(&mut away);
        let whole = Self {
            base: map(self.pages)?,
            pages: self.pages,
        };
        move_pages(self.base, range.start, whole.base)?;
        move_pages(away.base, range.len(), whole.part(range.start))?;
        move_pages(
            self.part(range.end),
            self.pages - range.end,
            whole.part(range.end),
        )?;
        std::mem::forget(away);
        // Nothing is left of the old mapping, and its addresses may be someone else's by now.
        std::mem::forget(std::mem::replace(self, whole));
        Ok(result)
    }

    fn part(&self, page: usize) -> NonNull<u8> {
        NonNull::new(self.address(page).cast()).expect("inside the mapping")
    }
}

fn map(pages: usize) -> io::Result<NonNull<u8>> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses an address nobody uses.
    let base = unsafe { libc::mmap(null_mut(), pages * PAGE_BYTES, access, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned address 0"))
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `mremap` takes one VMA at a time, and a mapping of which pages were replaced consists of several.
fn is_several_vmas(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EFAULT)
}

/// Moves pages onto a mapping of the same length, which is replaced; in halves where they lie in several VMAs.
fn move_pages(from: NonNull<u8>, pages: usize, to: NonNull<u8>) -> io::Result<()> {
    if pages == 0 {
        return Ok(());
    }
    let (bytes, flags) = (
        pages * PAGE_BYTES,
        libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
    );
    // SAFETY: both are mappings of ours of this length, and no reference to their pages is held.
    let moved = unsafe { libc::mremap(from.as_ptr().cast(), bytes, bytes, flags, to.as_ptr()) };
    if moved != libc::MAP_FAILED {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if !is_several_vmas(&error) {
        return Err(error);
    }
    if pages == 1 {
        // Newer kernels move several VMAs in one call and may stop halfway: this page is there already. If it were
        // not, its content would be missed.
        return Ok(());
    }
    let half = pages / 2;
    move_pages(from, half, to)?;
    // SAFETY: inside the mapping, for a half is less than the whole.
    let from = unsafe { from.add(half * PAGE_BYTES) };
    // SAFETY: as above.
    let to = unsafe { to.add(half * PAGE_BYTES) };
    move_pages(from, pages - half, to)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.pages * PAGE_BYTES) };
    }
}
