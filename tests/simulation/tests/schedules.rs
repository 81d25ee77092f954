//! Thousands of seeded schedules; the invariants are checked after every step.
//!
//! Each run has seeds of its own. `SIMULATION_RUNS` sets how many; `SIMULATION_SEED` repeats the one that failed.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use simulation::source::Outcome;
use simulation::trouble::{CopyDies, Fate, KINDS, Kind, Record, Trouble, is_of_recovery};
use simulation::world::World;
use tests::random::{fresh_seed, mix};

/// Schedules of each kind in an ordinary run: some seconds.
const RUNS: u64 = 1500;
/// Schedules for each message at which something may happen.
const RUNS_FOR_EACH_MESSAGE: u64 = 24;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs many seeds, or the one that was asked for. Returns whether there were enough to tell whether things happen at all.
fn for_each_seed(runs: u64, run: impl Fn(u64)) -> bool {
    if let Some(seed) = number("SIMULATION_SEED") {
        run(seed);
        return false;
    }
    let base = fresh_seed();
    let factor = number("SIMULATION_RUNS").map_or(1.0, |wanted| wanted as f64 / RUNS as f64);
    for index in 0..(runs as f64 * factor).ceil() as u64 {
        let seed = mix(base.wrapping_add(index));
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(seed))) {
            eprintln!("seed {seed}: run it again with SIMULATION_SEED={seed} and this test's name");
            resume_unwind(panic);
        }
    }
    factor >= 1.0
}

/// Runs one schedule and notes what happened in it.
fn run(seed: u64, trouble: Trouble, all: &RefCell<Tally>) {
    let mut world = World::new(seed, trouble);
    world.run();
    let mut all = all.borrow_mut();
    all.record.add(&world.record);
    all.outcomes.push(world.destination.outcome);
}

/// What happened over many schedules.
#[derive(Debug, Default)]
struct Tally {
    record: Record,
    outcomes: Vec<Option<Outcome>>,
}

impl Tally {
    fn ended(&self, outcome: Outcome) -> usize {
        let is = |its: &&Option<Outcome>| **its == Some(outcome);
        self.outcomes.iter().filter(is).count()
    }
}

#[test]
fn a_good_path() {
    for_each_seed(RUNS, |seed| {
        let mut world = World::new(seed, Trouble::default());
        world.run();
        let outcome = (world.source.outcome, world.destination.outcome);
        let complete = Some(Outcome::Complete);
        assert_eq!(outcome, (complete, complete));
    });
}

#[test]
fn a_path_that_breaks() {
    let all = RefCell::default();
    let many = for_each_seed(RUNS, |seed| {
        let cuts = 1 + seed % 6;
        let trouble = Trouble {
            cuts,
            ..Trouble::default()
        };
        run(seed, trouble, &all);
    });
    let all = all.into_inner();
    if many {
        assert!(all.record.cuts > RUNS, "hardly anything was cut: {all:?}");
        assert!(all.record.recoveries > RUNS / 10, "{:?}", all.record);
        assert!(all.record.told_again > 0, "{:?}", all.record);
        for outcome in [Outcome::Complete, Outcome::Aborted] {
            assert!(all.ended(outcome) > 0, "none was {outcome:?}");
        }
    }
}

#[test]
fn programs_that_are_killed() {
    let all = RefCell::default();
    let many = for_each_seed(RUNS, |seed| {
        let trouble = Trouble {
            cuts: seed % 3,
            kills: 1 + seed / 3 % 4,
            ..Trouble::default()
        };
        run(seed, trouble, &all);
    });
    let all = all.into_inner();
    if many {
        for end in 0..2 {
            assert!(all.record.kills[end] > RUNS / 5, "{:?}", all.record);
            assert!(all.record.successions[end] > RUNS / 10, "{:?}", all.record);
        }
        for outcome in [Outcome::Complete, Outcome::Aborted, Outcome::Unacknowledged] {
            assert!(all.ended(outcome) > 0, "none was {outcome:?}");
        }
    }
}

/// What must have happened before a message can be met.
fn on_the_way_to(kind: Kind, seed: u64) -> Trouble {
    let mut trouble = Trouble::default();
    if is_of_recovery(kind) {
        trouble.at_messages.push_back(("Resumed", Fate::Lost));
    }
    if kind == "Abort" {
        trouble.copy_dies = Some(match seed % 2 {
            0 => CopyDies::Armed,
            _ => CopyDies::AtTheGate,
        });
    }
    trouble
}

#[test]
fn every_step_is_struck_once() {
    for kind in KINDS {
        for fate in Fate::ALL {
            for cuts in [0, 3] {
                strike((kind, fate), cuts);
            }
        }
    }
}

/// Strikes at a message in many schedules, and looks that it was met.
fn strike((kind, fate): (Kind, Fate), cuts: u64) {
    let all = RefCell::default();
    let needed = if is_of_recovery(kind) { 2 } else { 1 };
    let met = RefCell::new(0);
    let many = for_each_seed(RUNS_FOR_EACH_MESSAGE, |seed| {
        let mut trouble = on_the_way_to(kind, seed);
        trouble.cuts = cuts;
        trouble.at_messages.push_back((kind, fate));
        let one = RefCell::default();
        let done = catch_unwind(AssertUnwindSafe(|| run(seed, trouble, &one)));
        if let Err(panic) = done {
            eprintln!("{kind}: {fate:?}, {cuts} more cuts");
            resume_unwind(panic);
        }
        let Tally { record, outcomes } = one.into_inner();
        *met.borrow_mut() += u64::from(record.messages == needed);
        let mut all: std::cell::RefMut<'_, Tally> = all.borrow_mut();
        all.record.add(&record);
        all.outcomes.extend(outcomes);
    });
    let (all, met) = (all.into_inner(), met.into_inner());
    if !many {
        return;
    }
    assert!(
        met > 0,
        "{kind} was never said ({fate:?}, {cuts} more cuts)"
    );
    let killed = all.record.kills.iter().sum::<u64>();
    match fate {
        Fate::Lost | Fate::Delivered => assert!(all.record.cuts > 0, "{kind}: nothing was cut"),
        // The last word is said by a program that ends.
        Fate::SenderDies if kind == "Abort" => {}
        Fate::ReceiverDies if kind == "Complete" => {}
        Fate::SenderDies | Fate::ReceiverDies => {
            assert!(killed > 0, "{kind}: nobody was killed ({fate:?})");
        }
    }
}

#[test]
fn a_seed_says_everything() {
    for_each_seed(40, |seed| {
        let trouble = Trouble {
            cuts: seed % 4,
            kills: seed / 4 % 4,
            ..Trouble::default()
        };
        let [one, other] = [(); 2].map(|()| {
            let mut world = World::new(seed, trouble.clone());
            world.run();
            world.trace
        });
        let differs = one.iter().zip(&other).position(|(one, other)| one != other);
        assert_eq!(differs, None, "two runs part");
        assert_eq!(one.len(), other.len());
    });
}
