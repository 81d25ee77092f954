//! The digest both ends compare before the frozen original is released.
//!
//! A sum of page hashes: it does not depend on the order in which pages travelled. Encryption already protects the
//! wire; this catches our own mistakes (a page at the wrong address, sent twice with different content, or lost).

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::images::ImagePid;
use crate::page::PageIndex;

/// Hash of one page at its place: the same bytes elsewhere hash differently.
pub fn page_hash(pid: ImagePid, page: PageIndex, content: &[u8]) -> u64 {
    xxh3_64_with_seed(content, place(pid, page))
}

/// Hash of an all-zero page at its place, without reading it.
pub fn zero_page_hash(pid: ImagePid, page: PageIndex) -> u64 {
    xxh3_64_with_seed(b"zero", place(pid, page))
}

/// 36 bits of page number and the process, mixed by the hash itself.
fn place(pid: ImagePid, page: PageIndex) -> u64 {
    page.0 ^ u64::from(pid.0).rotate_left(40)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE_SIZE;

    #[test]
    fn place_and_content_both_count() {
        let page = [1; PAGE_SIZE];
        let here = page_hash(ImagePid(1), PageIndex(2), &page);
        assert_ne!(here, page_hash(ImagePid(2), PageIndex(2), &page));
        assert_ne!(here, page_hash(ImagePid(1), PageIndex(3), &page));
        assert_ne!(here, page_hash(ImagePid(1), PageIndex(2), &[2; PAGE_SIZE]));
        assert_ne!(
            zero_page_hash(ImagePid(1), PageIndex(2)),
            zero_page_hash(ImagePid(1), PageIndex(3))
        );
    }
}
