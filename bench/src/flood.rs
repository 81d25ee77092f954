//! `bench flood`: how much a flood of handshakes by strangers slows a move.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde::{Deserialize, Serialize};
use tests::binaries;
use tests::identity;
use tests::pair::{PORT, PairPlan};
use tests::process::Process;
use tests::rig::Rig;
use tests::touch::{Pattern, TouchPlan, Toucher};

use crate::memory;
use crate::quiet::{self, Disturbance, Use};
use crate::runs::{self, Failure, Recorded, Runs};
use crate::stats::Summary;
use crate::table::Table;
use crate::targets::{Bound, Target};

/// The flood begins within this.
const PATIENCE: Duration = Duration::from_secs(30);

/// What to measure.
#[derive(Debug, Clone, Args)]
pub struct FloodOptions {
    /// Memory that moves.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub memory: u64,
    /// Moves with and without the flood, in turns.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub repeat: usize,
    /// Strangers who knock at the same time, each again as soon as it was refused.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub strangers: usize,
    /// Writes every run to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Directory for runs.jsonl, one record a line, written after each move.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// One move.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Run {
    flooded: bool,
    cutover_ms: f64,
    total_ms: f64,
    /// The part of the machine's CPUs that others used meanwhile.
    used_by_others: f64,
}

impl Recorded for Run {
    const KIND: &'static str = "flood";
}

/// What was measured.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    runs: Vec<Run>,
    /// Moves that did not succeed.
    pub failures: Vec<Failure>,
}

/// Measures, prints and writes. It fails when a move did, after all others were made.
pub fn run(options: &FloodOptions) -> Result<()> {
    let report = measure(options, &Runs::open(options.out.as_deref())?)?;
    print!("{}", report.render(options));
    if let Some(path) = &options.json {
        crate::write_json(path, &report)?;
    }
    runs::judge(&report.failures)
}

/// Measures.
pub fn measure(options: &FloodOptions, runs: &Runs) -> Result<Report> {
    let mut report = Report::default();
    for round in 0..options.repeat {
        // Whoever comes first has the machine in another state: they take turns at that too.
        let first = round % 2 == 0;
        for flooded in [first, !first] {
            let disturbance = |run: &Run| Disturbance {
                by_others: run.used_by_others,
                late: 0.0,
            };
            let run = quiet::measure(|| one(options, flooded, round as u64), disturbance);
            let run = run.with_context(|| format!("a move, flooded: {flooded}"));
            let run = run.inspect(|run| eprintln!("{run:?}"));
            runs.keep(run, false, &mut report.runs, &mut report.failures)?;
        }
    }
    Ok(report)
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
    memory::warm(options.memory + options.memory / 4)?;
    let pair = PairPlan::new(&rig)?;
    let before = Use::now(&rig);
    let mut server = pair.start_server(&rig, toucher.pid())?;
    let flood = flooded
        .then(|| flood(&rig, options.strangers))
        .transpose()?;
    let mut restorer = pair.start_restorer(&rig)?;
    restorer.expect_success()?;
    server.expect_success()?;
    let record = server.record()?;
    // The strangers are on the rig, so they are none of the others.
    let used_by_others = Use::now(&rig).by_others_since(before);
    drop(flood);
    Ok(Run {
        flooded,
        cutover_ms: record.cutover_us as f64 / 1e3,
        // The source counts from its start, and waits while the flood begins.
        total_ms: restorer.record()?.total_us as f64 / 1e3,
        used_by_others,
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

impl Report {
    /// How much the flood slows a move.
    pub fn targets(&self) -> Vec<Target> {
        vec![Target::ratio(
            "total, flooded over quiet",
            self.summary(true, |run| run.total_ms),
            self.summary(false, |run| run.total_ms),
            Bound::AtMost(1.2),
        )]
    }

    fn summary(&self, flooded: bool, value: fn(&Run) -> f64) -> Option<Summary> {
        let chosen = self.runs.iter().filter(|run| run.flooded == flooded);
        Summary::of(&chosen.map(value).collect::<Vec<_>>())
    }

    /// For people.
    pub fn render(&self, options: &FloodOptions) -> String {
        let mut table = Table::default();
        table.row(["", "without", "flooded"]);
        let shown = |flooded, value| {
            let of = self.summary(flooded, value);
            of.map_or("-".to_owned(), |of| of.to_string())
        };
        let mut row = |name, value| table.row([name, &shown(false, value), &shown(true, value)]);
        row("cutover ms", |run| run.cutover_ms);
        row("total ms", |run| run.total_ms);
        let mut text = format!(
            "\n{} MiB, {} strangers; median (smallest to largest) of {} moves each\n{}\n\n{}",
            options.memory,
            options.strangers,
            options.repeat,
            memory::STATEMENT,
            table.render()
        );
        for target in self.targets() {
            text += &format!("{target}\n");
        }
        for failure in &self.failures {
            text += &format!("failed: {}\n", failure.what);
        }
        text
    }
}
