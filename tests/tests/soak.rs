//! The same workload moves there and back, again and again, and nothing is left of any move on either host.
//!
//! `REPEAT=N` (or `make soak`) makes it N moves.

use std::process::ExitCode;

use anyhow::Result;
use tests::harness::{self, MIGRATION, Test};
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::shuttle::{Shuttle, moves};
use tests::torture::{Torture, TorturePlan};

fn main() -> ExitCode {
    harness::main([Test {
        name: "there_and_back",
        needs: MIGRATION,
        body: there_and_back,
    }])
}

fn there_and_back(_: &Rig) -> Result<()> {
    let rig = Rig::new()?;
    let torture = Torture::start(
        &rig,
        TorturePlan {
            mib: 24,
            threads: 2,
            children: 1,
            seed: seed_of_this_run(),
            ..TorturePlan::default()
        },
    )?;
    let mut shuttle = Shuttle::new(rig, torture.pid())?;
    let number = moves()?;
    for done in 1..=number {
        shuttle.go(|| torture.wait_for_rounds(50))?;
        println!("move {done} of {number}: {}", shuttle.looks_like());
    }
    shuttle.assert_nothing_grew()?;
    torture.finish()
}
