//! The order of first touches, recorded in one migration, spares the next one its faults.

use std::path::Path as FilePath;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::harness::{self, Need, Test};
use tests::pair::{PATIENCE, PairPlan};
use tests::path::Path;
use tests::rig::Rig;
use tests::touch::{Pattern, TouchPlan, Toucher};

const SHAPED_MIGRATION: &[Need] = &[Need::Namespaces, Need::Criu, Need::Program("tc")];

/// So slow that it takes many seconds to push everything.
const PATH: &str = "20m";
/// Half of what the path carries, so a push in the right order is ahead as soon as it has begun. What is touched between
/// the resume and its beginning faults: a busy machine takes a few hundred milliseconds for that.
const TOUCHES_PER_SECOND: u64 = 300;
const MIB: u64 = 16;
const PAGES: u64 = (MIB << 20) / 4096;

fn main() -> ExitCode {
    harness::main([Test {
        name: "a_recorded_order_spares_faults",
        needs: SHAPED_MIGRATION,
        body: a_recorded_order_spares_faults,
    }])
}

fn a_recorded_order_spares_faults(rig: &Rig) -> Result<()> {
    let file = rig.folder().join("touches");
    let file = file.to_str().context("a path in ASCII")?;
    let recorded = faults(&["--record", file, "--record-for", "16"])?;
    ensure!(
        recorded > PAGES / 2,
        "only {recorded} of {PAGES} touches were faults while nothing was pushed"
    );
    ensure!(FilePath::new(file).exists(), "nothing was recorded");
    let unprepared = faults(&[])?;
    let replayed = faults(&["--replay", file])?;
    eprintln!("network faults of {PAGES} touches: {unprepared} without, {replayed} with a record");
    ensure!(
        unprepared > PAGES * 3 / 100,
        "{unprepared} faults: the path is too good to show anything"
    );
    ensure!(
        replayed <= PAGES * 3 / 100,
        "{replayed} of {PAGES} touches were network faults although their order was known"
    );
    Ok(())
}

/// Moves the same workload, always the same one, and counts its network faults.
fn faults(options: &[&str]) -> Result<u64> {
    let rig = Rig::new()?;
    let _path = Path::lay(&rig, PATH.parse()?)?;
    let toucher = Toucher::start_at_fixed_addresses(
        &rig,
        TouchPlan {
            mib: MIB,
            seed: 5,
            pattern: Pattern::Random,
            rate: TOUCHES_PER_SECOND,
        },
    )?;
    let mut plan = PairPlan::new(&rig)?;
    // Else the path would be as good as one of several times the rate.
    plan.server.extend(["--compress", "never"].map(Into::into));
    plan.restorer.extend(options.iter().map(Into::into));
    let migration = plan.migrate(&rig, toucher.pid())?;
    toucher.wait_until_moved(Duration::from_secs(60))?;
    toucher.wait_for_touches(PAGES, PATIENCE);
    toucher.finish()?;
    Ok(migration.destination.faults.remote)
}
