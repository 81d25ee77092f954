//! Deep recursion: the stack grows, and every frame holds what was written when the calls return.

use std::hint::black_box;

use tests::board::{Mismatch, Place};
use tests::random::mix;

use crate::pattern::{Stamp, check, fill};

/// Half a page of pattern in each frame.
const FRAME_WORDS: usize = 256;

/// Goes `depth` calls deep and compares every frame on the way back.
pub fn descend(depth: u64, stamp: Stamp) -> Result<(), Mismatch> {
    let mut frame = [0; FRAME_WORDS];
    fill(&mut frame, stamp);
    // The frame must be in memory, not in registers or folded away.
    let frame = black_box(&mut frame);
    if depth > 0 {
        descend(depth - 1, mix(stamp))?;
    }
    check(black_box(frame), stamp, Place::Stack)
}
