//! The pages pushed lately on one bulk stream, as both ends number them.
//!
//! The source notes where each came from, the destination keeps their content. Both let the oldest go, so a number
//! means the same page at both ends. A new stream begins with none.

use crate::limits::RECENT_PAGES;

/// Numbers of recent pages.
#[derive(Clone, Copy, Debug, Default)]
pub struct RecentSlots {
    next: usize,
    filled: usize,
}

impl RecentSlots {
    /// The number of the next page that becomes recent; the page that had it is forgotten.
    pub fn advance(&mut self) -> usize {
        let slot = self.next;
        self.next = (slot + 1) % RECENT_PAGES;
        self.filled = (self.filled + 1).min(RECENT_PAGES);
        slot
    }

    /// Whether there is a page with this number.
    pub fn holds(&self, slot: usize) -> bool {
        slot < self.filled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_round() {
        let mut slots = RecentSlots::default();
        assert!(!slots.holds(0));
        for expected in 0..RECENT_PAGES {
            assert_eq!(slots.advance(), expected);
        }
        assert!(slots.holds(RECENT_PAGES - 1));
        assert!(!slots.holds(RECENT_PAGES));
        assert_eq!(slots.advance(), 0);
        assert!(slots.holds(1));
    }
}
