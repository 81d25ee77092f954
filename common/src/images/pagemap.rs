//! `pagemap-PID.img`: which pages a process had, and which of them are lazy.

use prost::Message;

use super::ImageError;
use super::framing::{Messages, append, header};
use crate::lazy_map::LazyMap;
use crate::page::{PageRange, VirtAddr};

const PAGEMAP_MAGIC: u32 = 0x5608_4025;
/// `PE_LAZY` of `criu/include/pagemap.h`: the page is left to the lazy-pages daemon.
const LAZY: u32 = 2;
/// `PE_PRESENT`: the bytes lie in `pages-N.img`.
const PRESENT: u32 = 4;

#[derive(Clone, PartialEq, Message)]
struct PagemapHead {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, PartialEq, Message)]
struct PagemapEntry {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    /// The count up to CRIU 4.1; 0 since.
    #[prost(uint32, required, tag = "2")]
    compat_nr_pages: u32,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

impl PagemapEntry {
    fn pages(&self) -> PageRange {
        let count = self.nr_pages.unwrap_or(u64::from(self.compat_nr_pages));
        PageRange::new(VirtAddr(self.vaddr).page(), count)
    }

    fn is(&self, flag: u32) -> bool {
        self.flags.unwrap_or(PRESENT) & flag != 0
    }
}

/// What a pagemap image says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pagemap {
    /// The pages that were left out of the skeleton and must be fetched.
    pub lazy: LazyMap,
    /// Pages whose content is in the skeleton.
    pub eager_pages: u64,
}

/// Reads a pagemap image of `criu dump --lazy-pages`.
///
/// Pages that are lazy *and* present, as a full dump marks them, count as lazy: `criu restore --lazy-pages` leaves them
/// out just the same (`criu/mem.c`).
pub fn parse_pagemap(file: &[u8]) -> Result<Pagemap, ImageError> {
    let mut messages = Messages::open(file, PAGEMAP_MAGIC)?;
    messages
        .next::<PagemapHead>()?
        .ok_or(ImageError::Missing("pagemap head"))?;
    let mut lazy = Vec::new();
    let mut eager_pages: u64 = 0;
    while let Some(entry) = messages.next::<PagemapEntry>()? {
        if entry.is(LAZY) {
            lazy.push(entry.pages());
        } else if entry.is(PRESENT) {
            // A number for people; an image that is wrong about it is not worth refusing.
            eager_pages = eager_pages.saturating_add(entry.pages().count);
        }
    }
    Ok(Pagemap {
        lazy: LazyMap::new(lazy)?,
        eager_pages,
    })
}

/// Where a full dump keeps the pages of one process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredPages {
    /// They are in `pages-N.img` of this number.
    pub file: u32,
    /// Runs in address order; each follows the one before in the file.
    pub runs: Vec<StoredRun>,
}

/// A run of pages in a file of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredRun {
    /// Their addresses.
    pub pages: PageRange,
    /// Whether `criu restore --lazy-pages` leaves them to a lazy-pages daemon.
    pub lazy: bool,
}

/// Reads where the pages of a full dump are. A lazy page that is not there is an error: whoever dumped it has it.
pub fn parse_stored_pages(file: &[u8]) -> Result<StoredPages, ImageError> {
    let mut messages = Messages::open(file, PAGEMAP_MAGIC)?;
    let head = messages
        .next::<PagemapHead>()?
        .ok_or(ImageError::Missing("pagemap head"))?;
    let mut stored = StoredPages {
        file: head.pages_id,
        runs: Vec::new(),
    };
    while let Some(entry) = messages.next::<PagemapEntry>()? {
        let lazy = entry.is(LAZY);
        if entry.is(PRESENT) {
            let pages = entry.pages();
            stored.runs.push(StoredRun { pages, lazy });
        } else if lazy {
            return Err(ImageError::Missing(
                "content of its lazy pages (the dump was itself a lazy one)",
            ));
        }
    }
    Ok(stored)
}

/// The pagemap of a full dump as a lazy dump would have written it: lazy pages are not present.
///
/// A field given twice counts as given last, so what else an entry says need not be understood.
pub fn without_lazy_content(file: &[u8]) -> Result<Vec<u8>, ImageError> {
    const FLAGS_FIELD: u8 = 4 << 3;
    let mut messages = Messages::open(file, PAGEMAP_MAGIC)?;
    let mut changed = header(PAGEMAP_MAGIC);
    let head = messages
        .next_bytes()?
        .ok_or(ImageError::Missing("pagemap head"))?;
    append(&mut changed, &[head]);
    while let Some(message) = messages.next_bytes()? {
        let entry = PagemapEntry::decode(message)?;
        match entry.is(LAZY) {
            true => append(&mut changed, &[message, &[FLAGS_FIELD, LAZY as u8]]),
            false => append(&mut changed, &[message]),
        }
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::framing::write;
    use crate::page::PageIndex;

    fn image(entries: &[(u64, u64, u32)]) -> Vec<u8> {
        let mut file = write(PAGEMAP_MAGIC, &[PagemapHead { pages_id: 1 }]);
        let entries: Vec<_> = entries
            .iter()
            .map(|(vaddr, count, flags)| PagemapEntry {
                vaddr: *vaddr,
                compat_nr_pages: 0,
                flags: Some(*flags),
                nr_pages: Some(*count),
            })
            .collect();
        file.extend(&write(0, &entries)[8..]);
        file
    }

    #[test]
    fn lazy_and_eager_pages_are_told_apart() {
        let file = image(&[
            (0x1000, 2, LAZY),
            (0x5000, 3, PRESENT),
            (0x9000, 1, LAZY | PRESENT),
        ]);
        let map = parse_pagemap(&file).expect("a valid image");
        assert_eq!(map.eager_pages, 3);
        assert_eq!(
            map.lazy.ranges().collect::<Vec<_>>(),
            [
                PageRange::new(PageIndex(1), 2),
                PageRange::new(PageIndex(9), 1)
            ]
        );
    }

    #[test]
    fn old_images_keep_the_count_in_field_2() {
        let mut file = write(PAGEMAP_MAGIC, &[PagemapHead { pages_id: 1 }]);
        let old = PagemapEntry {
            vaddr: 0x1000,
            compat_nr_pages: 7,
            flags: Some(LAZY),
            nr_pages: None,
        };
        file.extend(&write(0, &[old])[8..]);
        assert_eq!(parse_pagemap(&file).expect("valid").lazy.slots(), 7);
    }

    #[test]
    fn every_truncation_is_an_error_or_shorter() {
        let file = image(&[(0x1000, 2, LAZY), (0x5000, 3, LAZY)]);
        for end in 0..file.len() {
            if let Ok(map) = parse_pagemap(&file[..end]) {
                assert!(map.lazy.slots() < 5, "cut at {end}");
            }
        }
    }

    #[test]
    fn counts_beyond_counting_are_borne() {
        let endless = (0x1000, u64::MAX, PRESENT);
        let map = parse_pagemap(&image(&[endless, endless])).expect("nothing is lazy");
        assert_eq!(map.eager_pages, u64::MAX);
    }

    #[test]
    fn a_forged_count_is_refused() {
        assert!(parse_pagemap(&image(&[(0x1000, u64::MAX, LAZY)])).is_err());
    }

    #[test]
    fn stored_pages_follow_each_other() {
        let file = image(&[(0x1000, 2, LAZY | PRESENT), (0x5000, 3, PRESENT)]);
        let stored = parse_stored_pages(&file).expect("a full dump");
        assert_eq!(stored.file, 1);
        let run = |page, count, lazy| StoredRun {
            pages: PageRange::new(PageIndex(page), count),
            lazy,
        };
        assert_eq!(stored.runs, [run(1, 2, true), run(5, 3, false)]);
        assert!(
            parse_stored_pages(&image(&[(0x1000, 2, LAZY)])).is_err(),
            "a lazy dump holds no lazy pages"
        );
    }

    #[test]
    fn without_lazy_content_only_that_changes() {
        let file = image(&[(0x1000, 2, LAZY | PRESENT), (0x5000, 3, PRESENT)]);
        let thin = without_lazy_content(&file).expect("a valid image");
        assert_eq!(
            parse_pagemap(&thin).expect("valid"),
            parse_pagemap(&file).expect("valid")
        );
        let error = parse_stored_pages(&thin).expect_err("no content is left");
        assert!(matches!(error, ImageError::Missing(_)), "{error}");
        for end in 0..file.len() {
            // Cut between two messages it is a shorter file.
            let _ = without_lazy_content(&file[..end]);
        }
    }
}
