//! Pages that equal one pushed shortly before: found by hash, compared byte by byte, and then only referred to.
//!
//! Nothing is copied here: a recent page is known by its place, and frozen memory can be read again.

use std::collections::HashMap;

use common::images::ImagePid;
use common::limits::{MAX_FRAME_PAGES, RECENT_PAGES};
use common::page::{PageIndex, PageRange, page_in_buffer};
use common::recent::RecentSlots;
use xxhash_rust::xxh3::xxh3_64;

use crate::frame::Loaded;
use crate::memory::{MemoryError, PageSource};

/// Pages looked at before it is judged whether looking pays.
const WATCH_PAGES: u64 = 1024;
/// It pays when one page in so many is a repeat.
const PAYS_ONE_IN: u64 = 64;
/// Pages passed over when it does not pay.
const PASS_PAGES: u64 = 15 * WATCH_PAGES;

/// What of a run equals recent pages.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Repeated {
    /// Bit `n` set: page `n` is one.
    pub referred: u64,
    /// Numbers of the recent pages, in the order of the bits.
    pub slots: Vec<usize>,
    /// The other pages that are not zero have become recent.
    pub kept: bool,
}

/// Where a recent page came from.
#[derive(Clone, Copy, Debug)]
struct Origin {
    hash: u64,
    pid: ImagePid,
    page: PageIndex,
}

/// The recent pages of one bulk stream.
#[derive(Debug)]
pub struct Repeats {
    slots: RecentSlots,
    origins: Vec<Origin>,
    by_hash: HashMap<u64, usize>,
    watch: Watch,
    scratch: Box<[u8]>,
}

impl Repeats {
    /// Nothing is recent yet. `related` processes share pages, so looking for repeats is never given up.
    pub fn new(related: bool) -> Self {
        Repeats {
            slots: RecentSlots::default(),
            origins: Vec::new(),
            by_hash: HashMap::new(),
            watch: Watch {
                always: related,
                ..Watch::default()
            },
            scratch: vec![0; page_in_buffer(MAX_FRAME_PAGES).start].into(),
        }
    }

    /// Looks for recent pages in a run that is about to be sent, and makes the others recent.
    pub fn look(
        &mut self,
        source: &dyn PageSource,
        loaded: &Loaded,
    ) -> Result<Repeated, MemoryError> {
        if self.watch.passes(loaded.contents.run.pages.count) {
            return Ok(Repeated::default());
        }
        let hashes: Vec<(usize, u64)> = loaded
            .pages_besides(loaded.contents.zero)
            .map(|index| (index, xxh3_64(loaded.page(index))))
            .collect();
        let mut repeated = self.compare(source, loaded, &hashes)?;
        self.watch
            .saw(hashes.len() as u64, repeated.slots.len() as u64);
        for (index, hash) in hashes {
            if repeated.referred >> index & 1 == 0 {
                self.keep(Origin {
                    hash,
                    pid: loaded.contents.run.pid,
                    page: loaded.contents.run.pages.start.forward(index as u64),
                });
                repeated.kept = true;
            }
        }
        Ok(repeated)
    }

    /// Which pages really equal the recent page with the same hash.
    fn compare(
        &mut self,
        source: &dyn PageSource,
        loaded: &Loaded,
        hashes: &[(usize, u64)],
    ) -> Result<Repeated, MemoryError> {
        let mut repeated = Repeated::default();
        let mut rest = hashes;
        while let Some((_, hash)) = rest.first() {
            let Some(slot) = self.by_hash.get(hash).copied() else {
                rest = &rest[1..];
                continue;
            };
            let first = self.origins[slot];
            let together = self.neighbours(first, rest);
            let pages = PageRange::new(first.page, together as u64);
            let content = &mut self.scratch[..page_in_buffer(together).start];
            source.read(first.pid, pages, content)?;
            for (nth, (index, hash)) in rest[..together].iter().enumerate() {
                if content[page_in_buffer(nth)] == *loaded.page(*index) {
                    repeated.referred |= 1 << index;
                    repeated.slots.push(self.by_hash[hash]);
                }
            }
            rest = &rest[together..];
        }
        Ok(repeated)
    }

    /// How many pages from here on have candidates that lie one behind the other in one process.
    fn neighbours(&self, first: Origin, hashes: &[(usize, u64)]) -> usize {
        let is_next = |(nth, (_, hash)): (usize, &(usize, u64))| {
            self.by_hash.get(hash).is_some_and(|slot| {
                let origin = self.origins[*slot];
                origin.pid == first.pid && origin.page == first.page.forward(nth as u64)
            })
        };
        let others = hashes.iter().enumerate().skip(1);
        1 + others.take_while(|candidate| is_next(*candidate)).count()
    }

    fn keep(&mut self, origin: Origin) {
        let slot = self.slots.advance();
        match self.origins.get_mut(slot) {
            Some(oldest) => {
                let hash = oldest.hash;
                *oldest = origin;
                if self.by_hash.get(&hash) == Some(&slot) {
                    self.by_hash.remove(&hash);
                }
            }
            None => {
                debug_assert!(slot == self.origins.len() && slot < RECENT_PAGES);
                self.origins.push(origin);
            }
        }
        self.by_hash.insert(origin.hash, slot);
    }
}

/// Whether looking for repeats pays.
#[derive(Debug, Default)]
struct Watch {
    always: bool,
    looked_at: u64,
    found: u64,
    to_pass: u64,
}

impl Watch {
    /// Whether the next `pages` are passed over.
    fn passes(&mut self, pages: u64) -> bool {
        let passes = self.to_pass > 0;
        self.to_pass = self.to_pass.saturating_sub(pages);
        passes
    }

    fn saw(&mut self, pages: u64, repeats: u64) {
        self.looked_at += pages;
        self.found += repeats;
        if self.looked_at < WATCH_PAGES {
            return;
        }
        if !self.always && self.found * PAYS_ONE_IN < self.looked_at {
            self.to_pass = PASS_PAGES;
        }
        self.looked_at = 0;
        self.found = 0;
    }
}
