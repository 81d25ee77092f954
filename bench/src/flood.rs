//! `bench flood`: how much a flood of handshakes by strangers slows a move.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use tests::binaries;
use tests::identity;
use tests::pair::{PORT, PairPlan};
use tests::process::Process;
use tests::rig::Rig;
use tests::touch::{Pattern, TouchPlan, Toucher};

use crate::stats::Summary;
use crate::table::Table;

/// The flood begins within this.
const PATIENCE: Duration = Duration::from_secs(30);

/// What to measure.
#[derive(Debug, Clone, Args)]
pub struct FloodOptions {
    /// Memory that moves.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    memory: u64,
    /// Moves with and without the flood, in turns.
    #[arg(long, value_name = "N", default_value_t = 4)]
    repeat: usize,
    /// Strangers who knock at the same time, each again as soon as it was refused.
    #[arg(long, value_name = "N", default_value_t = 8)]
    strangers: usize,
    /// Writes every run to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One move.
#[derive(Debug, Clone, Copy, Serialize)]
struct Run {
    flooded: bool,
    cutover_ms: f64,
    total_ms: f64,
}

/// Measures, prints and writes.
pub fn run(options: &FloodOptions) -> Result<()> {
    let mut runs = Vec::new();
    for round in 0..options.repeat {
        // Whoever comes first has the machine in another state: they take turns at that too.
        let first = round % 2 == 0;
        for flooded in [first, !first] {
            let run = one(options, flooded, round as u64)?;
            eprintln!("{run:?}");
            runs.push(run);
        }
    }
    print!("{}", render(options, &runs));
    options
        .json
        .as_ref()
        .map_or(Ok(()), |path| crate::write_json(path, &runs))
}

fn one(options: &FloodOptions, flooded: bool, seed: u64) -> Result<Run> {
    let rig = Rig::new()?;
    let plan = TouchPlan {
        mib: options.memory,
        seed,
        pattern: Pattern::Still,
        rate: 0,
    };
    let toucher = Toucher::start(&rig, plan)?;
    let pair = PairPlan::new(&rig)?;
    let mut server = pair.start_server(&rig, toucher.pid())?;
    let flood = flooded
        .then(|| flood(&rig, options.strangers))
        .transpose()?;
    let mut restorer = pair.start_restorer(&rig)?;
    restorer.expect_success()?;
    server.expect_success()?;
    let record = server.record()?;
    drop(flood);
    Ok(Run {
        flooded,
        cutover_ms: record.cutover_us as f64 / 1e3,
        // The source counts from its start, and waits while the flood begins.
        total_ms: restorer.record()?.total_us as f64 / 1e3,
    })
}

/// Strangers on the client machine. Its processors are ours too, so they get what the move leaves over.
fn flood(rig: &Rig, strangers: usize) -> Result<Process> {
    let foreign = rig.folder().join("foreign");
    identity::init(&foreign, &[])?;
    let mut command = rig.client.command("nice");
    command
        .args(["-n", "19"])
        .arg(binaries::program("handshake-flood")?)
        .arg(&foreign)
        .arg(format!("{}:{PORT}", rig.source.address()))
        .arg(strangers.to_string());
    let mut process = Process::start("handshake-flood", &rig.make_folder("logs")?, &mut command)?;
    let begun = process.wait_for_output(PATIENCE, "flooding");
    begun.context("the flood did not begin")?;
    Ok(process)
}

fn render(options: &FloodOptions, runs: &[Run]) -> String {
    let mut table = Table::default();
    table.row(["", "without", "flooded", "ratio of medians"]);
    for (name, value) in [
        (
            "cutover ms",
            (|run: &Run| run.cutover_ms) as fn(&Run) -> f64,
        ),
        ("total ms", |run| run.total_ms),
    ] {
        let of = |flooded: bool| {
            let chosen = runs.iter().filter(|run| run.flooded == flooded);
            Summary::of(&chosen.map(value).collect::<Vec<_>>())
        };
        if let (Some(without), Some(flooded)) = (of(false), of(true)) {
            table.row([
                name,
                &without.to_string(),
                &flooded.to_string(),
                &format!("{:.2}", flooded.median / without.median),
            ]);
        }
    }
    format!(
        "\n{} MiB, {} strangers; median (smallest to largest) of {} moves each\n\n{}",
        options.memory,
        options.strangers,
        options.repeat,
        table.render()
    )
}
