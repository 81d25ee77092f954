//! The system calls on private anonymous mappings; the only file of the workload with unsafe memory access.

use std::collections::BTreeSet;
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
    /// Where it may consist of two VMAs: first pages of parts that were mapped or moved by themselves.
    cuts: BTreeSet<usize>,
}

// SAFETY: the mapping belongs to its owner alone, wherever that one runs.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `pages` pages of zeros.
    pub fn new(pages: usize) -> io::Result<Self> {
        Ok(Self {
            base: map(pages)?,
            pages,
            cuts: BTreeSet::new(),
        })
    }

    /// How many parts it may consist of.
    pub fn parts(&self) -> usize {
        self.cuts.len() + 1
    }

    fn cut(&mut self, range: &Range<usize>) {
        self.cuts.extend([range.start, range.end]);
        self.cuts.retain(|page| (1..self.pages).contains(page));
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
        self.cut(&range);
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
            return Err(io::Error::last_os_error());
        }
        self.cut(&range);
        Ok(())
    }

    /// Moves the whole mapping to a new address.
    pub fn relocate(&mut self) -> io::Result<()> {
        let target = map(self.pages)?;
        self.move_pages(0..self.pages, target)?;
        self.base = target;
        Ok(())
    }

    /// Copies all pages to a mapping in one part, which replaces this one.
    pub fn rebuild(&mut self) -> io::Result<()> {
        let mut whole = Self::new(self.pages)?;
        for page in 0..self.pages {
            whole.page_mut(page).copy_from_slice(self.page(page));
        }
        *self = whole;
        Ok(())
    }

    /// Unmaps the tail, so that `pages` are left.
    pub fn shrink(&mut self, pages: usize) -> io::Result<()> {
        // SAFETY: inside our own mapping, and no reference to its pages is held.
        checked(unsafe { libc::munmap(self.address(pages), (self.pages - pages) * PAGE_BYTES) })?;
        self.pages = pages;
        self.cuts.retain(|page| *page < pages);
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
            self.pages = pages;
            return Ok(());
        }
        // `mremap` lengthens one VMA only, and says so before it does anything.
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EFAULT) {
            return Err(error);
        }
        let target = map(pages)?;
        let old = 0..self.pages;
        self.move_pages(old.clone(), target)?;
        self.base = target;
        self.pages = pages;
        self.cut(&old);
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
        self.cut(&range);
        let mut away = Self::new(range.len())?;
        away.cuts = self
            .cuts_within(&range)
            .map(|cut| cut - range.start)
            .collect();
        self.move_pages(range.clone(), away.base)?;
        let result = visit(&mut away);
        let mut whole = Self::new(self.pages)?;
        whole.cuts = self.cuts.clone();
        self.move_pages(0..range.start, whole.base)?;
        away.move_pages(0..range.len(), whole.part(range.start))?;
        self.move_pages(range.end..self.pages, whole.part(range.end))?;
        std::mem::forget(away);
        // Nothing is left of the old mapping, and its addresses may be someone else's by now.
        std::mem::forget(std::mem::replace(self, whole));
        Ok(result)
    }

    fn cuts_within(&self, range: &Range<usize>) -> impl Iterator<Item = usize> {
        // The first page of the range is no cut in it.
        let within = (range.start + 1).min(range.end)..range.end;
        self.cuts.range(within).copied()
    }

    /// Moves pages onto a mapping of the same length, which is replaced: one part after the other.
    ///
    /// Newer kernels move several VMAs with one call, but not those with a userfault descriptor; then they stop
    /// halfway, and nobody can tell afterwards which of the old addresses are someone else's mapping by now.
    fn move_pages(&self, range: Range<usize>, to: NonNull<u8>) -> io::Result<()> {
        let mut start = range.start;
        for end in self.cuts_within(&range).chain([range.end]) {
            if start < end {
                // SAFETY: inside the target, which is as long as the range.
                let to = unsafe { to.add((start - range.start) * PAGE_BYTES) };
                move_part(self.part(start), end - start, to)?;
            }
            start = end;
        }
        Ok(())
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

/// Moves pages of one VMA onto a mapping of the same length, which is replaced.
fn move_part(from: NonNull<u8>, pages: usize, to: NonNull<u8>) -> io::Result<()> {
    let (bytes, flags) = (
        pages * PAGE_BYTES,
        libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
    );
    // SAFETY: both are mappings of ours of this length, and no reference to their pages is held.
    let moved = unsafe { libc::mremap(from.as_ptr().cast(), bytes, bytes, flags, to.as_ptr()) };
    if moved == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.pages * PAGE_BYTES) };
    }
}
