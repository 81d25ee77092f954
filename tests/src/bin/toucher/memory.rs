//! Memory of which every word is known.

use std::num::NonZeroUsize;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use tests::random::mix;

const PAGE_BYTES: usize = 4096;
const WORDS: u64 = PAGE_BYTES as u64 / 8;

/// One mapping, filled. It stays to the end of the process.
pub struct Memory {
    start: NonNull<u64>,
    pages: u64,
    seed: u64,
}

impl Memory {
    /// `mib` of memory whose words depend on their place and `seed`.
    pub fn filled(mib: usize, seed: u64) -> Result<Self> {
        let bytes = NonZeroUsize::new(mib << 20).context("no memory to touch")?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap_anonymous(None, bytes, access, flags) }.context("no memory")?;
        let memory = Self {
            start: start.cast(),
            pages: (bytes.get() / PAGE_BYTES) as u64,
            seed,
        };
        for word in 0..memory.pages * WORDS {
            // SAFETY: the word lies in the mapping, to which nothing else refers.
            unsafe { memory.word(word).write(memory.expected(word)) };
        }
        Ok(memory)
    }

    /// How many pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Reads one word of `page`, and says whether it is what was written; which one depends on the page.
    pub fn touch(&self, page: u64) -> bool {
        let word = page * WORDS + mix(page) % WORDS;
        self.read(word) == self.expected(word)
    }

    /// Whether `page` holds what was written.
    pub fn is_intact(&self, page: u64) -> bool {
        (page * WORDS..(page + 1) * WORDS).all(|word| self.read(word) == self.expected(word))
    }

    /// Whether `page` reads as if nothing had ever been written.
    pub fn is_zero(&self, page: u64) -> bool {
        (page * WORDS..(page + 1) * WORDS).all(|word| self.read(word) == 0)
    }

    fn read(&self, word: u64) -> u64 {
        // SAFETY: the word lies in the mapping, which nobody writes any more.
        unsafe { self.word(word).read_volatile() }
    }

    fn word(&self, word: u64) -> *mut u64 {
        debug_assert!(word < self.pages * WORDS);
        self.start.as_ptr().wrapping_add(word as usize)
    }

    fn expected(&self, word: u64) -> u64 {
        mix(self.seed ^ word)
    }
}
