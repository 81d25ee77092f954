//! A workload that does to its memory all that a program can, moved while it does so; every byte is compared.

use std::process::ExitCode;

use anyhow::Result;
use tests::harness::{self, MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::pair::PairPlan;
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::torture::{Torture, TorturePlan};

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "one_thread",
            needs: MIGRATION,
            body: one_thread,
        },
        Test {
            name: "several_threads",
            needs: MIGRATION,
            body: several_threads,
        },
        Test {
            name: "several_processes",
            needs: MIGRATION,
            body: several_processes,
        },
        Test {
            name: "there_and_nowhere_else",
            needs: MIGRATION,
            body: there_and_nowhere_else,
        },
    ])
}

fn one_thread(rig: &Rig) -> Result<()> {
    move_torture(
        rig,
        TorturePlan {
            mib: 32,
            threads: 1,
            ..TorturePlan::default()
        },
    )
}

fn several_threads(rig: &Rig) -> Result<()> {
    move_torture(
        rig,
        TorturePlan {
            mib: 96,
            threads: 4,
            ..TorturePlan::default()
        },
    )
}

fn several_processes(rig: &Rig) -> Result<()> {
    move_torture(
        rig,
        TorturePlan {
            mib: 96,
            threads: 2,
            children: 2,
            ..TorturePlan::default()
        },
    )
}

fn there_and_nowhere_else(rig: &Rig) -> Result<()> {
    let plan = TorturePlan {
        mib: 16,
        threads: 1,
        seed: seed_of_this_run(),
        ..TorturePlan::default()
    };
    let torture = Torture::start(rig, plan)?;
    let migration = PairPlan::new(rig)?.migrate(rig, torture.pid())?;
    torture.wait_for_rounds(100)?;
    assert_moved(rig, migration.pid)?;
    torture.finish()
}

fn move_torture(rig: &Rig, plan: TorturePlan) -> Result<()> {
    let torture = Torture::start(
        rig,
        TorturePlan {
            seed: seed_of_this_run(),
            ..plan
        },
    )?;
    PairPlan::new(rig)?.migrate(rig, torture.pid())?;
    torture.wait_for_rounds(500)?;
    torture.finish()
}
