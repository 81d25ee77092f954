//! Migrations over a path that drops, delays, reorders, duplicates and corrupts packets, changes ports, and goes dark:
//! every byte of the workload is compared all the while.
//!
//! `POSTCOPY_SEED` repeats a run.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use tests::harness::{self, MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::pair::PairPlan;
use tests::random::{mix, seed_of_this_run};
use tests::relay::{Darkness, Faults, Relay};
use tests::rig::Rig;
use tests::torture::{Torture, TorturePlan};

/// Migrations over bad paths, each with a seed of its own.
const BAD_PATHS: u64 = 3;

/// A link that is silent for so long is given up by both ends, and made anew.
const GIVEN_UP_MS: u64 = 5000;

fn main() -> ExitCode {
    let tests: [(&'static str, harness::Body); 8] = [
        ("packets_are_lost_and_mangled", packets_are_lost_and_mangled),
        ("ports_change", ports_change),
        ("an_outage_of_50_ms", |rig| outage(rig, &[50])),
        ("an_outage_of_5_s", |rig| outage(rig, &[5000])),
        ("an_outage_of_60_s", |rig| outage(rig, &[60_000])),
        ("only_the_fault_port_is_lost", |rig| partial_outage(rig, 0)),
        ("only_the_bulk_port_is_lost", |rig| partial_outage(rig, 1)),
        ("a_flapping_link", |rig| {
            outage(rig, &[300, 100, 5000, 150, 200, 50, 4500, 400, 1000])
        }),
    ];
    let tests = tests.map(|(name, body)| Test {
        name,
        needs: MIGRATION,
        body,
    });
    harness::main(tests)
}

fn bad_path(seed: u64) -> Faults {
    Faults {
        seed,
        drop: 200,
        duplicate: 200,
        corrupt: 100,
        reorder: 500,
        reorder_us: 3000,
        delay_us: 200,
        rebind_every: 0,
    }
}

fn packets_are_lost_and_mangled(rig: &Rig) -> Result<()> {
    let seed = seed_of_this_run();
    for number in 0..BAD_PATHS {
        // Each run's seed is in its error, and the first is that of the whole test.
        let seed = if number == 0 {
            seed
        } else {
            mix(seed ^ number)
        };
        let another = Rig::new()?;
        let rig = if number == 0 { rig } else { &another };
        let relay = Relay::start(rig, bad_path(seed), Darkness::default())?;
        move_through(rig, &PairPlan::new(rig)?, &relay, seed)
            .with_context(|| format!("run {number}, POSTCOPY_SEED={seed}; {}", relay.report()))?;
        let counters = relay.counters;
        assert_happened(&relay, "dropped", &counters.dropped)?;
        assert_happened(&relay, "duplicated", &counters.duplicated)?;
        assert_happened(&relay, "corrupted", &counters.corrupted)?;
        assert_happened(&relay, "reordered", &counters.reordered)?;
    }
    Ok(())
}

/// As behind a NAT that forgets: the source sees its destination come from another port again and again. QUIC goes on with
/// the same connections.
fn ports_change(rig: &Rig) -> Result<()> {
    let seed = seed_of_this_run();
    let faults = Faults {
        seed,
        delay_us: 200,
        rebind_every: 300,
        ..Faults::default()
    };
    let relay = Relay::start(rig, faults, Darkness::default())?;
    move_through(rig, &PairPlan::new(rig)?, &relay, seed).with_context(|| relay.report())?;
    assert_happened(&relay, "rebound", &relay.counters.rebound)?;
    assert_reconnected(rig, false)
}

/// The path goes dark first of all in the moment the workload is let run: its memory has only begun to move.
fn outage(rig: &Rig, stretches_ms: &[u64]) -> Result<()> {
    darkness(rig, Darkness::of(stretches_ms))
}

/// Only one of the two connections is lost: they are given up together.
fn partial_outage(rig: &Rig, port: usize) -> Result<()> {
    let stretches_ms = vec![7000];
    let port = Some(port);
    darkness(rig, Darkness { stretches_ms, port })
}

fn darkness(rig: &Rig, darkness: Darkness) -> Result<()> {
    let lost = darkness
        .stretches_ms
        .iter()
        .any(|length| *length >= GIVEN_UP_MS);
    let seed = seed_of_this_run();
    let faults = Faults {
        delay_us: 200,
        ..bad_path(seed)
    };
    let relay = Relay::start(rig, faults, darkness)?;
    let mut plan = PairPlan::new(rig)?;
    plan.on_resumed = format!("{}; {}", relay.go_dark(), plan.on_resumed);
    move_through(rig, &plan, &relay, seed).with_context(|| relay.report())?;
    assert_happened(&relay, "swallowed", &relay.counters.swallowed)?;
    assert_reconnected(rig, lost)
}

/// Whether the link was given up and made anew.
fn assert_reconnected(rig: &Rig, lost: bool) -> Result<()> {
    let log = std::fs::read_to_string(rig.folder().join("logs/lazy-restorer.err"))
        .context("lazy-restorer has no log")?;
    ensure!(
        log.contains("reconnected") == lost,
        "the link was to be lost: {lost}, but the destination says: {log}"
    );
    Ok(())
}

fn move_through(rig: &Rig, plan: &PairPlan, relay: &Relay, seed: u64) -> Result<()> {
    let torture = Torture::start(
        rig,
        TorturePlan {
            mib: 32,
            threads: 2,
            children: 1,
            seed,
            ..TorturePlan::default()
        },
    )?;
    let plan = PairPlan {
        source_seen_at: Some(relay.address()),
        ..plan.clone()
    };
    let migration = plan.migrate(rig, torture.pid())?;
    torture.wait_for_rounds(300)?;
    assert_moved(rig, migration.pid)?;
    torture.finish()
}

fn assert_happened(relay: &Relay, what: &str, counter: &AtomicU64) -> Result<()> {
    ensure!(
        counter.load(Ordering::Relaxed) > 0,
        "nothing was {what}, so nothing was tested; {}",
        relay.report()
    );
    Ok(())
}
