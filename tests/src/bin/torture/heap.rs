//! Memory from the allocator: small blocks grow the heap by `brk`, large ones are mapped.

use tests::board::{Mismatch, Place};
use tests::random::Random;

use crate::pattern::{Stamp, check, fill};

/// Blocks held at most.
const BLOCKS: usize = 256;
/// Words of most blocks; the allocator takes them from the heap.
const SMALL_WORDS: u64 = 1024;
/// Words of one block in sixteen; the allocator maps them.
const LARGE_WORDS: u64 = 64 * 1024;

/// Blocks and their patterns.
#[derive(Debug, Default)]
pub struct Heap {
    blocks: Vec<(Stamp, Vec<u64>)>,
}

impl Heap {
    /// Takes a block, grows one or gives one back, comparing what it held.
    pub fn step(&mut self, random: &mut Random) -> Result<(), Mismatch> {
        let stamp = random.next() | 1;
        let limit = if random.below(16) == 0 {
            LARGE_WORDS
        } else {
            SMALL_WORDS
        };
        let mut block = vec![0; 1 + random.index(limit as usize)];
        fill(&mut block, stamp);
        self.blocks.push((stamp, block));
        let chosen = random.index(self.blocks.len());
        let (stamp, block) = &mut self.blocks[chosen];
        check(block, *stamp, Place::Heap)?;
        // The allocator may move a grown block, by mremap when it is large.
        block.resize(block.len() + block.len() / 2, 0);
        fill(block, *stamp);
        if self.blocks.len() > BLOCKS {
            self.blocks.swap_remove(chosen);
        }
        Ok(())
    }

    /// Compares every block.
    pub fn check_all(&self) -> Result<(), Mismatch> {
        self.blocks
            .iter()
            .try_for_each(|(stamp, block)| check(block, *stamp, Place::Heap))
    }
}
