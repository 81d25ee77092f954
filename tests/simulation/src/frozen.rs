//! What the frozen pages hold: a function of process and page, so that any copy can be checked.

use common::images::ImagePid;
use common::page::{PAGE_SIZE, PageIndex, PageRange};
use page_server::memory::{MemoryError, PageSource};
use tests::random::mix;

/// One page in so many is all zeros.
const ZERO_EVERY: u64 = 5;

/// The frozen memory of all processes.
#[derive(Clone, Copy, Debug)]
pub struct FrozenMemory {
    /// Determines all content.
    pub seed: u64,
}

impl FrozenMemory {
    /// Whether a page is all zeros.
    pub fn is_zero(self, pid: ImagePid, page: PageIndex) -> bool {
        self.word(pid, page).is_multiple_of(ZERO_EVERY)
    }

    /// Whether `content` is that of a page.
    pub fn is(self, pid: ImagePid, page: PageIndex, content: &[u8]) -> bool {
        let mut expected = [0; PAGE_SIZE];
        self.fill(pid, page, &mut expected);
        content == expected
    }

    fn fill(self, pid: ImagePid, page: PageIndex, buffer: &mut [u8]) {
        if self.is_zero(pid, page) {
            buffer.fill(0);
            return;
        }
        let word = self.word(pid, page).to_le_bytes();
        for chunk in buffer.chunks_exact_mut(word.len()) {
            chunk.copy_from_slice(&word);
        }
    }

    fn word(self, pid: ImagePid, page: PageIndex) -> u64 {
        mix(self.seed ^ mix(page.0 << 32 | u64::from(pid.0)))
    }
}

impl PageSource for FrozenMemory {
    fn read(&self, pid: ImagePid, pages: PageRange, buffer: &mut [u8]) -> Result<(), MemoryError> {
        for (index, buffer) in buffer.chunks_exact_mut(PAGE_SIZE).enumerate() {
            self.fill(pid, pages.start.forward(index as u64), buffer);
        }
        Ok(())
    }
}
