//! Page arithmetic. Nothing outside this file multiplies or divides by the page size.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Bytes of one page. CRIU images and `userfaultfd` on x86-64 both count in these.
pub const PAGE_SIZE: usize = 4096;
const PAGE_SHIFT: u32 = PAGE_SIZE.trailing_zeros();

/// A virtual address in some process, in bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct VirtAddr(pub u64);

impl VirtAddr {
    /// The page this address lies in.
    pub fn page(self) -> PageIndex {
        PageIndex(self.0 >> PAGE_SHIFT)
    }

    /// Whether the address is the first byte of a page.
    pub fn is_page_aligned(self) -> bool {
        self.0.trailing_zeros() >= PAGE_SHIFT || self.0 == 0
    }
}

impl fmt::Display for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Number of a page in a process's address space: the address divided by [`PAGE_SIZE`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// Address of the page's first byte.
    pub fn addr(self) -> VirtAddr {
        VirtAddr(self.0 << PAGE_SHIFT)
    }

    /// The page `count` pages further on.
    pub fn forward(self, count: u64) -> PageIndex {
        PageIndex(self.0 + count)
    }

    /// Pages from `start` up to this one.
    pub fn distance_from(self, start: PageIndex) -> u64 {
        debug_assert!(self >= start, "{self:?} lies before {start:?}");
        self.0 - start.0
    }
}

/// A run of pages, possibly empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRange {
    /// First page.
    pub start: PageIndex,
    /// Number of pages.
    pub count: u64,
}

impl PageRange {
    /// `count` pages from `start` on.
    pub fn new(start: PageIndex, count: u64) -> Self {
        PageRange { start, count }
    }

    /// The pages that the byte range `start..end` touches; empty when `end <= start`.
    pub fn covering(start: VirtAddr, end: VirtAddr) -> Self {
        let last = VirtAddr(end.0.saturating_add(PAGE_SIZE as u64 - 1)).page();
        PageRange {
            start: start.page(),
            count: last.0.saturating_sub(start.page().0),
        }
    }

    /// First page after the range.
    pub fn end(self) -> PageIndex {
        PageIndex(self.start.0 + self.count)
    }

    /// Whether `page` lies in the range.
    pub fn contains(self, page: PageIndex) -> bool {
        self.start <= page && page < self.end()
    }

    /// The pages both ranges hold, if any.
    pub fn intersect(self, other: PageRange) -> Option<PageRange> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| PageRange::new(start, end.0 - start.0))
    }

    /// Whether the range ends at or below the last page of a 64-bit address space.
    pub fn is_addressable(self) -> bool {
        let pages = u64::MAX >> PAGE_SHIFT;
        self.start.0 <= pages && self.count <= pages - self.start.0
    }

    /// Bytes the range covers.
    pub fn bytes(self) -> u64 {
        self.count << PAGE_SHIFT
    }
}

/// Bytes that `pages` pages cover.
pub const fn pages_to_bytes(pages: u64) -> u64 {
    pages << PAGE_SHIFT
}

/// Whole pages in `bytes`.
pub const fn bytes_to_pages(bytes: u64) -> u64 {
    bytes >> PAGE_SHIFT
}

/// The byte range of page number `index` in a buffer of pages.
pub fn page_in_buffer(index: usize) -> Range<usize> {
    index * PAGE_SIZE..(index + 1) * PAGE_SIZE
}

/// Whether every byte of a buffer is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Two unaligned-safe strides: the compiler turns the inner loop into vector compares.
    bytes
        .chunks(64)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covering_rounds_outwards() {
        let range = PageRange::covering(VirtAddr(0x1fff), VirtAddr(0x3001));
        assert_eq!(range, PageRange::new(PageIndex(1), 3));
        assert_eq!(
            PageRange::covering(VirtAddr(0x2000), VirtAddr(0x2000)).count,
            0
        );
        assert_eq!(
            PageRange::covering(VirtAddr(0x5000), VirtAddr(0x2000)).count,
            0
        );
    }

    #[test]
    fn intersection_is_what_both_hold() {
        let low = PageRange::new(PageIndex(4), 4);
        assert_eq!(
            low.intersect(PageRange::new(PageIndex(6), 10)),
            Some(PageRange::new(PageIndex(6), 2))
        );
        assert_eq!(low.intersect(PageRange::new(PageIndex(8), 1)), None);
    }

    #[test]
    fn a_range_beyond_the_address_space_is_not_addressable() {
        assert!(PageRange::new(PageIndex(7), 9).is_addressable());
        assert!(!PageRange::new(PageIndex(u64::MAX), 1).is_addressable());
        assert!(!PageRange::new(PageIndex(1), u64::MAX).is_addressable());
    }

    #[test]
    fn zero_check_sees_the_last_byte() {
        let mut page = vec![0; PAGE_SIZE];
        assert!(is_zero(&page));
        page[PAGE_SIZE - 1] = 1;
        assert!(!is_zero(&page));
    }
}
