//! A set of page slots as a bitmap, with a count that is always right.

use std::ops::Range;

const BITS: usize = u64::BITS as usize;

/// Which of a fixed number of slots are in the set. Slots come from [`LazyMap`](crate::lazy_map::LazyMap).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    slots: usize,
    count: usize,
}

impl PageSet {
    /// The empty set over slots `0..slots`.
    pub fn empty(slots: usize) -> Self {
        PageSet {
            words: vec![0; slots.div_ceil(BITS)],
            slots,
            count: 0,
        }
    }

    /// The set of all slots `0..slots`.
    pub fn full(slots: usize) -> Self {
        let mut set = PageSet::empty(slots);
        set.insert_range(0..slots);
        set
    }

    /// Rebuilds a set from the words of [`words`](Self::words); `None` when they do not fit `slots`.
    pub fn from_words(words: Vec<u64>, slots: usize) -> Option<Self> {
        let used = slots % BITS;
        let stray = used != 0 && words.last().is_some_and(|last| last >> used != 0);
        if words.len() != slots.div_ceil(BITS) || stray {
            return None;
        }
        let count = words.iter().map(|word| word.count_ones() as usize).sum();
        Some(PageSet {
            words,
            slots,
            count,
        })
    }

    /// The bitmap, slot 0 in the lowest bit of the first word.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many slots are in the set.
    pub fn count(&self) -> usize {
        self.count
    }

    /// How many slots there are.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Whether every slot is in the set.
    pub fn is_full(&self) -> bool {
        self.count == self.slots
    }

    /// Whether no slot is in the set.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether `slot` is in the set.
    pub fn contains(&self, slot: usize) -> bool {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        self.words[slot / BITS] >> (slot % BITS) & 1 == 1
    }

    /// Adds `slot`; true when it was not there.
    pub fn insert(&mut self, slot: usize) -> bool {
        let new = !self.contains(slot);
        self.words[slot / BITS] |= 1 << (slot % BITS);
        self.count += usize::from(new);
        new
    }

    /// Takes `slot` out; true when it was there.
    pub fn remove(&mut self, slot: usize) -> bool {
        let old = self.contains(slot);
        self.words[slot / BITS] &= !(1 << (slot % BITS));
        self.count -= usize::from(old);
        old
    }

    /// Adds a range of slots and returns how many of them are new.
    pub fn insert_range(&mut self, range: Range<usize>) -> usize {
        assert!(range.end <= self.slots, "{range:?} of {}", self.slots);
        let before = self.count;
        for (word, mask) in masks(range) {
            self.count += (mask & !self.words[word]).count_ones() as usize;
            self.words[word] |= mask;
        }
        self.count - before
    }

    /// Takes a range of slots out and returns how many of them were in the set.
    pub fn remove_range(&mut self, range: Range<usize>) -> usize {
        assert!(range.end <= self.slots, "{range:?} of {}", self.slots);
        let before = self.count;
        for (word, mask) in masks(range) {
            self.count -= (mask & self.words[word]).count_ones() as usize;
            self.words[word] &= !mask;
        }
        before - self.count
    }

    /// The first slot at or after `from` that is in the set.
    pub fn next_in(&self, from: usize) -> Option<usize> {
        self.next_where(from, |word| word)
    }

    /// The first slot at or after `from` that is not in the set.
    pub fn next_out(&self, from: usize) -> Option<usize> {
        self.next_where(from, |word| !word)
    }

    fn next_where(&self, from: usize, pick: impl Fn(u64) -> u64) -> Option<usize> {
        if from >= self.slots {
            return None;
        }
        let mut index = from / BITS;
        let mut word = pick(self.words[index]) & (u64::MAX << (from % BITS));
        while word == 0 {
            index += 1;
            word = pick(*self.words.get(index)?);
        }
        let slot = index * BITS + word.trailing_zeros() as usize;
        (slot < self.slots).then_some(slot)
    }

    /// The runs of slots within `range` that are in the set.
    pub fn runs_in(&self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut from = range.start;
        std::iter::from_fn(move || {
            let start = self.next_in(from).filter(|slot| *slot < range.end)?;
            from = self.next_out(start).unwrap_or(self.slots).min(range.end);
            Some(start..from)
        })
    }
}

/// Word index and bit mask of each word that `range` touches.
fn masks(range: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let words = if range.is_empty() {
        0..0
    } else {
        range.start / BITS..range.end.div_ceil(BITS)
    };
    words.map(move |word| {
        let low = range.start.saturating_sub(word * BITS);
        let high = (range.end - word * BITS).min(BITS);
        let mask = (u64::MAX << low) & (u64::MAX >> (BITS - high));
        (word, mask)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_numbers(
            slots in 1usize..300,
            steps in prop::collection::vec((any::<bool>(), 0usize..300, 0usize..120), 0..60),
        ) {
            let mut set = PageSet::empty(slots);
            let mut model = BTreeSet::new();
            for (add, start, len) in steps {
                let range = start.min(slots)..(start + len).min(slots);
                let before = model.len();
                if add {
                    model.extend(range.clone());
                    prop_assert_eq!(set.insert_range(range), model.len() - before);
                } else {
                    model.retain(|slot| !range.contains(slot));
                    prop_assert_eq!(set.remove_range(range), before - model.len());
                }
            }
            prop_assert_eq!(set.count(), model.len());
            for slot in 0..slots {
                prop_assert_eq!(set.contains(slot), model.contains(&slot));
                prop_assert_eq!(set.next_in(slot), model.range(slot..).next().copied());
                prop_assert_eq!(set.next_out(slot), (slot..slots).find(|s| !model.contains(s)));
            }
            let listed: Vec<usize> = set.runs_in(0..slots).flatten().collect();
            prop_assert_eq!(listed, model.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(PageSet::from_words(set.words().to_vec(), slots), Some(set));
        }
    }

    #[test]
    fn stray_bits_are_refused() {
        assert!(PageSet::from_words(vec![0b1000], 3).is_none());
        assert!(PageSet::from_words(vec![0b111, 0], 3).is_none());
        assert_eq!(PageSet::from_words(vec![0b111], 3), Some(PageSet::full(3)));
    }
}
