//! `bench record`: the order in which a workload touches its memory after a move, for tests of what prefetch makes of it.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use tests::pair::PairPlan;
use tests::pulse::wall_ns;
use tests::rig::Rig;

use crate::workload::{Kind, Plan, Workload};

/// What to record.
#[derive(Debug, Args)]
pub struct RecordOptions {
    /// What is moved.
    #[arg(long, value_name = "NAME", default_value = "redis")]
    workload: Kind,
    /// Its memory.
    #[arg(long, value_name = "MIB", default_value_t = 16)]
    memory: u64,
    /// Commands or touches per second.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    rate: u32,
    /// For how long nothing is pushed.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    seconds: u64,
    /// The record.
    file: PathBuf,
}

/// Moves the workload once.
pub fn run(options: &RecordOptions) -> Result<()> {
    let rig = Rig::new()?;
    let workload = Workload::start(
        &rig,
        Plan {
            kind: options.workload,
            mib: options.memory,
            seed: 1,
            rate: options.rate,
        },
    )?;
    let mut plan = PairPlan::new(&rig)?;
    let seconds = options.seconds.to_string();
    plan.restorer
        .extend(["--record".into(), (&options.file).into()]);
    plan.restorer
        .extend(["--record-for".into(), seconds.into()]);
    workload.settle()?;
    let began = wall_ns();
    plan.migrate(&rig, workload.pid())?;
    workload.end(began).map(drop)
}
