//! What is written into memory: every word a function of the page's stamp and the word's place.

use tests::board::{Mismatch, Place};
use tests::random::mix;

/// What a page holds. 0 stands for zeros, as the kernel gives them.
pub type Stamp = u64;

/// The word at `index` under `stamp`.
fn word(stamp: Stamp, index: usize) -> u64 {
    if stamp == 0 {
        0
    } else {
        mix(stamp.wrapping_add(index as u64))
    }
}

/// Writes the pattern of `stamp`.
pub fn fill(words: &mut [u64], stamp: Stamp) {
    for (index, slot) in words.iter_mut().enumerate() {
        *slot = word(stamp, index);
    }
}

/// Compares with the pattern of `stamp`.
pub fn check(words: &[u64], stamp: Stamp, place: Place) -> Result<(), Mismatch> {
    for (index, got) in words.iter().enumerate() {
        let expected = word(stamp, index);
        if *got != expected {
            let address = std::ptr::from_ref(got) as u64;
            return Err(Mismatch {
                place,
                address,
                expected,
                got: *got,
            });
        }
    }
    Ok(())
}
