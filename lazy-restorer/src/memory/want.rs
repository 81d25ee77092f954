//! What this host lacks for the memory of the workload, and that the operator is told of it once.
//!
//! Close to a limit there may be room for one page and none for the next, many times a second: what is wanting is over, and
//! said to be, only when nothing was wanting for a while.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What this host lacks.
#[derive(Clone, Copy, Debug)]
pub enum Want {
    /// A page's worth of memory.
    Memory,
    /// A free descriptor.
    Descriptor,
}

/// Whether something is wanting.
#[derive(Debug, Default)]
pub struct Wants {
    /// Somebody tries again.
    short: AtomicBool,
    /// How often something began to be wanting.
    falls: AtomicU64,
    /// The operator was told, and not yet that it is over.
    told: AtomicBool,
}

impl Wants {
    /// Something is wanting. True for who is to see to it that it is tried again.
    pub fn fall_short(&self, want: Want) -> bool {
        if self.short.swap(true, Ordering::AcqRel) {
            return false;
        }
        self.falls.fetch_add(1, Ordering::AcqRel);
        if !self.told.swap(true, Ordering::AcqRel) {
            tell(want);
        }
        true
    }

    /// Nothing is wanting any more. True when `is_short` finds otherwise and the caller is who tries again.
    pub fn rise(&self, is_short: impl FnOnce() -> bool) -> bool {
        self.short.store(false, Ordering::Release);
        // Who fell short in between found that somebody tries already.
        is_short() && !self.short.swap(true, Ordering::AcqRel)
    }

    /// How often something began to be wanting, for [`settle`](Self::settle).
    pub fn falls(&self) -> u64 {
        self.falls.load(Ordering::Acquire)
    }

    /// Says that it is over, if it was said that something is wanting and nothing has been since `falls` were counted.
    pub fn settle(&self, falls: u64) -> bool {
        let is_over = self.falls() == falls && !self.short.load(Ordering::Acquire);
        let says = is_over && self.told.swap(false, Ordering::AcqRel);
        if says {
            tracing::warn!("there is all that the memory of the workload needs again");
        }
        says
    }
}

fn tell(want: Want) {
    match want {
        Want::Memory => tracing::warn!(
            "this host has no memory for a page of the workload; threads that need it wait, trying again"
        ),
        Want::Descriptor => tracing::warn!(
            "there is no descriptor for a forked child of the workload, whose parent waits, trying again; see \
             RLIMIT_NOFILE"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_and_goes_is_one_shortage() {
        let wants = Wants::default();
        assert!(!wants.settle(0), "nothing was said");
        assert!(wants.fall_short(Want::Memory), "the first sees to it");
        assert!(!wants.fall_short(Want::Memory), "somebody does");
        assert!(!wants.settle(wants.falls()), "it is still wanting");
        assert!(!wants.rise(|| false));
        let first = wants.falls();
        assert!(wants.fall_short(Want::Descriptor));
        assert!(!wants.rise(|| false));
        assert!(!wants.settle(first), "something was wanting since");
        assert!(wants.settle(wants.falls()));
        assert!(!wants.settle(wants.falls()), "said once");
        assert!(wants.fall_short(Want::Memory));
        assert_eq!(wants.falls(), 3);
    }

    #[test]
    fn who_fell_short_while_another_rose_is_seen_to() {
        let wants = Wants::default();
        assert!(wants.fall_short(Want::Memory));
        assert!(wants.rise(|| true), "the one that rose tries on");
        assert!(!wants.fall_short(Want::Memory));
        assert!(!wants.rise(|| {
            assert!(wants.fall_short(Want::Memory), "another one tries");
            true
        }));
    }
}
