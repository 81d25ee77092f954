//! Thousands of seeded schedules; the invariants are checked after every step.
//!
//! `SIMULATION_RUNS` sets how many; `SIMULATION_SEED` repeats the one that failed.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use simulation::world::{Fate, KINDS, Trouble, World};
use tests::random::mix;

/// Schedules of each kind in an ordinary run: some seconds.
const RUNS: u64 = 1500;
/// Schedules for each message at which the path may break.
const RUNS_FOR_EACH_MESSAGE: u64 = 30;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs many seeds, or the one that was asked for.
fn for_each_seed(runs: u64, run: impl Fn(u64)) {
    if let Some(seed) = number("SIMULATION_SEED") {
        return run(seed);
    }
    let factor = number("SIMULATION_RUNS").map_or(1.0, |wanted| wanted as f64 / RUNS as f64);
    for index in 0..(runs as f64 * factor).ceil() as u64 {
        let seed = mix(index);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(seed))) {
            eprintln!("seed {seed}: run it again with SIMULATION_SEED={seed} and this test's name");
            resume_unwind(panic);
        }
    }
}

#[test]
fn a_good_path() {
    for_each_seed(RUNS, |seed| {
        let mut world = World::new(seed, Trouble::default());
        world.run();
        let outcome = (world.source.outcome, world.destination.outcome);
        let complete = Some(simulation::source::Outcome::Complete);
        assert_eq!(outcome, (complete, complete));
    });
}

#[test]
fn a_path_that_breaks() {
    for_each_seed(RUNS, |seed| {
        let cuts = 1 + seed % 6;
        World::new(
            seed,
            Trouble {
                cuts,
                at_message: None,
            },
        )
        .run();
    });
}

#[test]
fn every_step_is_lost_once() {
    for kind in KINDS {
        for fate in [Fate::Lost, Fate::Delivered] {
            for cuts in [0, 3] {
                for_each_seed(RUNS_FOR_EACH_MESSAGE, |seed| {
                    let at_message = Some((kind, fate));
                    let mut world = World::new(seed, Trouble { cuts, at_message });
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| world.run())) {
                        eprintln!("{kind} is {fate:?}, {cuts} more cuts");
                        resume_unwind(panic);
                    }
                });
            }
        }
    }
}
