//! Every state of a migration, and everything that can be killed or cut in it: which host runs the tree afterwards.
//!
//! The table is printed at the end. `POSTCOPY_CELLS=TEXT` tests only cells whose name (`postcopy: link cut`) holds it;
//! then the others are "not tested", which is a failure.

use std::process::ExitCode;

use anyhow::Result;
use tests::harness::{self, MIGRATION, Test};
use tests::matrix::Table;
use tests::rig::Rig;

/// Most cells wait for a link to be given up most of the time.
const SIDE_BY_SIDE: usize = 6;

fn main() -> ExitCode {
    harness::main([Test {
        name: "every_state_and_every_fault",
        needs: MIGRATION,
        body: every_state_and_every_fault,
    }])
}

fn every_state_and_every_fault(_: &Rig) -> Result<()> {
    let filter = std::env::var("POSTCOPY_CELLS").unwrap_or_default();
    let table = Table::fill(&filter, SIDE_BY_SIDE);
    println!("{table}");
    table.assert_whole()
}
