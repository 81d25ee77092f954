//! What can happen, and how to draw it at random.

use common::images::DumpedVma;
use common::page::{PageIndex, PageRange};
use model_kernel::{ADDRESSES, Change, Kind};
use proptest::prelude::*;

/// First page of the first mapping.
const FIRST_PAGE: u64 = 16;
const MAX_RUN: u64 = 9;

/// One dumped process.
#[derive(Clone, Debug)]
pub struct Dump {
    pub vmas: Vec<DumpedVma>,
    /// Ascending; at most one range per page and gap.
    pub lazy: Vec<PageRange>,
}

/// A whole run.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub dump: Dump,
    /// The process hands its memory over before this step.
    pub attach_at: usize,
    pub steps: Vec<Step>,
    /// Threads have lately done nothing but wait: faults reach as far as they may.
    pub waits_only: bool,
}

/// `who` picks among live processes, `at` among what is there to pick from.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    Touch {
        who: usize,
        at: usize,
    },
    /// A thread touched the page just before it came: its fault is stale when read.
    StaleFault {
        who: usize,
        at: usize,
    },
    Write {
        who: usize,
        at: usize,
    },
    Change(Change),
    Fork {
        who: usize,
    },
    Exit {
        who: usize,
        noticed: bool,
    },
    Release {
        who: usize,
        which: usize,
    },
    /// Whoever watches the descriptor reads all there is.
    Drain {
        who: usize,
    },
    /// The source handles the oldest frame of the demand stream.
    Serve,
    /// The source pushes a run that it has not sent, or sends one again.
    Push {
        at: usize,
        count: u64,
        again: bool,
    },
    /// Something on the wire arrives; after some pages the address space changes under the install.
    Deliver {
        which: usize,
        disturb: Option<(usize, Change)>,
    },
}

pub fn scenario() -> impl Strategy<Value = Scenario> {
    let steps = prop::collection::vec(step(), 1..90);
    // What is drawn last leaves what seeds of old failures draw before as it was.
    let drawn = (dump(), 0usize..8, steps, any::<bool>());
    drawn.prop_map(|(dump, attach_at, steps, waits_only)| Scenario {
        dump,
        attach_at,
        steps,
        waits_only,
    })
}

fn dump() -> impl Strategy<Value = Dump> {
    // Gap before it, length, which of its pages are lazy, and whether the mapping is (mostly).
    let holes = prop_oneof![Just(u16::MAX), any::<u16>(), Just(0)];
    let vma = (0u64..3, 1u64..12, holes, 0u8..8);
    prop::collection::vec(vma, 1..5).prop_map(|drawn| {
        let mut dump = Dump {
            vmas: Vec::new(),
            lazy: Vec::new(),
        };
        let mut start = FIRST_PAGE;
        for (gap, count, holes, chance) in drawn {
            let pages = PageRange::new(PageIndex(start + gap), count);
            dump.vmas.push(DumpedVma {
                pages,
                lazy: chance != 0,
                huge_pages: false,
            });
            let lazy = (0..count).filter(|page| holes >> page & 1 == 1);
            let single = |page| PageRange::new(pages.start.forward(page), 1);
            dump.lazy.extend(lazy.map(single));
            start = pages.end().0;
        }
        dump
    })
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0usize..8;
    let at = any::<usize>();
    prop_oneof![
        6 => (who.clone(), at).prop_map(|(who, at)| Step::Touch { who, at }),
        1 => (who.clone(), at).prop_map(|(who, at)| Step::StaleFault { who, at }),
        2 => (who.clone(), at).prop_map(|(who, at)| Step::Write { who, at }),
        8 => change().prop_map(Step::Change),
        2 => who.clone().prop_map(|who| Step::Fork { who }),
        1 => (who.clone(), any::<bool>()).prop_map(|(who, noticed)| Step::Exit { who, noticed }),
        2 => (who.clone(), at).prop_map(|(who, which)| Step::Release { who, which }),
        4 => who.prop_map(|who| Step::Drain { who }),
        4 => Just(Step::Serve),
        3 => (at, 1..MAX_RUN, prop::bool::weighted(0.2))
            .prop_map(|(at, count, again)| Step::Push { at, count, again }),
        6 => (at, prop::option::weighted(0.4, (0usize..6, change())))
            .prop_map(|(which, disturb)| Step::Deliver { which, disturb }),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    let kind = prop_oneof![
        6 => (0..ADDRESSES, any::<bool>(), prop::bool::weighted(0.2))
            .prop_map(|(to, into_hole, keep_old)| Kind::Remap { to, into_hole, keep_old }),
        3 => Just(Kind::Unmap),
        1 => Just(Kind::MapAnew),
        3 => Just(Kind::Remove),
        1 => Just(Kind::Grow),
    ];
    let slow = prop::bool::weighted(0.3);
    (0usize..8, any::<usize>(), 1..MAX_RUN, slow, kind).prop_map(|(who, at, count, slow, kind)| {
        Change {
            who,
            at,
            count,
            slow,
            kind,
        }
    })
}
