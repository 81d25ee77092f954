//! A copy that has every page, and whose source does not know it yet.

use serde::{Deserialize, Serialize};

use crate::images::ImagePid;
use crate::limits::MAX_LAZY_PAGES;
use crate::page_set::PageSet;
use crate::proto::control::Tally;

/// What the source is still to be told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whole {
    /// What the source must agree with.
    pub tally: Tally,
    /// What of each process came, and what never will.
    pub processes: Vec<WholeProcess>,
}

/// One process of a whole copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WholeProcess {
    /// The process.
    pub pid: ImagePid,
    /// Pages that came.
    pub received: Runs,
    /// Pages that the source promised never to send.
    pub withheld: Runs,
}

/// The words of a bitmap, short when its bits come in long runs, as those of a whole copy do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runs {
    words: u64,
    /// Where each begins, and how long it is.
    runs: Vec<(u64, u64)>,
}

impl Runs {
    /// The runs of a bitmap.
    pub fn of(words: &[u64]) -> Self {
        let bits = words.len() * u64::BITS as usize;
        let set = PageSet::from_words(words.to_vec(), bits);
        let set = set.unwrap_or_else(|| PageSet::empty(bits));
        let runs = set.runs_in(0..bits);
        Runs {
            words: words.len() as u64,
            runs: runs
                .map(|run| (run.start as u64, run.len() as u64))
                .collect(),
        }
    }

    /// The bitmap. Empty when a file of somebody else's making says what cannot be.
    pub fn words(&self) -> Vec<u64> {
        let bits = self.words.saturating_mul(u64::from(u64::BITS));
        let fits = |(start, length): &(u64, u64)| {
            start.checked_add(*length).is_some_and(|end| end <= bits)
        };
        if bits > MAX_LAZY_PAGES + u64::from(u64::BITS) || !self.runs.iter().all(fits) {
            return Vec::new();
        }
        let mut set = PageSet::empty(bits as usize);
        for (start, length) in &self.runs {
            set.insert_range(*start as usize..(start + length) as usize);
        }
        set.words().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_come_back_as_they_were() {
        for words in [vec![], vec![0], vec![u64::MAX, 0b1011, 0, 1 << 63]] {
            assert_eq!(Runs::of(&words).words(), words);
        }
    }

    #[test]
    fn what_cannot_be_is_nothing() {
        for runs in [
            (1, vec![(60, 5)]),
            (1, vec![(u64::MAX, 2)]),
            (u64::MAX, vec![]),
        ] {
            let (words, runs) = runs;
            assert!(Runs { words, runs }.words().is_empty());
        }
    }
}
