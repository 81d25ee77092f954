//! `bench replay`: a workload moves while the order of its touches is recorded, and moves again with that record.

use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};
use tests::pair::{PATIENCE, PairPlan};
use tests::path::{Path, PathSpec};
use tests::rig::Rig;
use tests::touch::{Pattern, TouchPlan, Toucher};

use crate::memory;
use crate::path::ProbedPath;
use crate::runs::{self, Failure, Recorded, Runs};
use crate::stats::Summary;
use crate::table::Table;
use crate::targets::{Bound, Target};

/// Pages in a MiB.
const PAGES_PER_MIB: u64 = 256;

/// Faults that are served in a second, at least, while the order is recorded: every touch is one then.
const FAULTS_PER_SECOND: u64 = 2000;

/// What to measure.
#[derive(Debug, Clone, Args)]
pub struct ReplayOptions {
    /// Memory of the workload
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub memory: u64,
    /// Pages touched per second
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub rate: u64,
    /// Moves of each kind
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repeat: usize,
    /// The path between the hosts
    #[arg(long, value_name = "PATH", default_value = "1g")]
    pub path: PathSpec,
    /// Directory for runs.jsonl, one record a line, written after each move
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// The kinds of moves, in the order in which they are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Order {
    /// Nothing is pushed, and the order is written down.
    Recorded,
    /// Without a record.
    Unprepared,
    /// With one.
    Replayed,
}

/// One move.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    order: Order,
    path: String,
    memory_mib: u64,
    rate: u64,
    /// Pages touched in all.
    touches: u64,
    /// Faults that went over the network.
    network_faults: u64,
}

impl Recorded for Run {
    const KIND: &'static str = "replay";
}

/// What was measured.
#[derive(Debug, Default)]
pub struct Report {
    /// The path with its probes.
    pub paths: Vec<ProbedPath>,
    runs: Vec<Run>,
    /// Moves that did not succeed.
    pub failures: Vec<Failure>,
}

/// Measures, prints and writes. It fails when a move did, after all others were made.
pub fn run(options: &ReplayOptions) -> Result<()> {
    let report = measure(options, &Runs::open(options.out.as_deref())?)?;
    print!("{}", report.render(options));
    runs::judge(&report.failures)
}

/// Measures.
pub fn measure(options: &ReplayOptions, runs: &Runs) -> Result<Report> {
    let mut report = Report::default();
    let (paths, failures) = (&mut report.paths, &mut report.failures);
    if !ProbedPath::keep(&options.path, runs, paths, failures)? {
        return Ok(report);
    }
    let record = Rig::new()?;
    for round in 0..options.repeat {
        let file = record.folder().join(format!("touches-{round}"));
        for order in [Order::Recorded, Order::Unprepared, Order::Replayed] {
            let run = one(options, order, &file, round as u64);
            let run = run.with_context(|| format!("a move that is {order:?}"));
            let run = run.inspect(|run| eprintln!("{run:?}"));
            runs.keep(run, false, &mut report.runs, &mut report.failures)?;
        }
    }
    Ok(report)
}

fn one(options: &ReplayOptions, order: Order, file: &FilePath, seed: u64) -> Result<Run> {
    let rig = Rig::new()?;
    let _path = Path::lay(&rig, options.path)?;
    let plan = TouchPlan {
        mib: options.memory,
        seed,
        pattern: Pattern::Random,
        rate: options.rate,
    };
    let toucher = Toucher::start_at_fixed_addresses(&rig, plan)?;
    memory::warm(2 * options.memory)?;
    let mut pair = PairPlan::new(&rig)?;
    let touches = options.memory * PAGES_PER_MIB;
    let name = file.to_str().context("a name in ASCII")?.to_owned();
    let told = match order {
        Order::Recorded => {
            ensure!(options.rate > 0, "how long to record follows from the rate");
            let seconds = touches / options.rate + touches / FAULTS_PER_SECOND + 5;
            vec![
                "--record".to_owned(),
                name,
                "--record-for".to_owned(),
                seconds.to_string(),
            ]
        }
        Order::Unprepared => Vec::new(),
        Order::Replayed => vec!["--replay".to_owned(), name],
    };
    pair.restorer.extend(told.into_iter().map(Into::into));
    let migration = pair.migrate(&rig, toucher.pid())?;
    toucher.wait_until_moved(Duration::from_secs(60))?;
    toucher.wait_for_touches(touches, PATIENCE);
    toucher.finish()?;
    Ok(Run {
        order,
        path: options.path.to_string(),
        memory_mib: options.memory,
        rate: options.rate,
        touches,
        network_faults: migration.destination.faults.remote,
    })
}

impl Report {
    /// How many touches of a known order wait for the network.
    pub fn targets(&self) -> Vec<Target> {
        vec![Target::value(
            "network faults with --replay, percent",
            self.percent(Order::Replayed),
            Bound::AtMost(3.0),
        )]
    }

    fn percent(&self, order: Order) -> Option<Summary> {
        let runs = self.runs.iter().filter(|run| run.order == order);
        let percent = |run: &Run| run.network_faults as f64 * 100.0 / run.touches as f64;
        Summary::of(&runs.map(percent).collect::<Vec<_>>())
    }

    /// For people.
    pub fn render(&self, options: &ReplayOptions) -> String {
        let mut table = Table::default();
        table.row(["", "network faults, percent of all touches"]);
        for (name, order) in [
            ("recorded, nothing pushed", Order::Recorded),
            ("pushed without a record", Order::Unprepared),
            ("pushed with --replay", Order::Replayed),
        ] {
            let of = self.percent(order);
            table.row([name, &of.map_or("-".to_owned(), |of| of.to_string())]);
        }
        let mut text = format!(
            "\n{} MiB touched at random, {} per second; median (smallest to largest) of {} moves each\n",
            options.memory, options.rate, options.repeat
        );
        for path in &self.paths {
            text += &format!("{}\n", path.line());
        }
        text += &format!("\n{}", table.render());
        for target in self.targets() {
            text += &format!("{target}\n");
        }
        for failure in &self.failures {
            text += &format!("failed: {}\n", failure.what);
        }
        text
    }
}
