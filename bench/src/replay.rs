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
use crate::peer::Peer;
use crate::runs::{self, Failure, Recorded, Runs};
use crate::section::{Block, Plot, Section, cell};
use crate::stats::Summary;
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

/// What is the same for all three kinds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Setting {
    path: String,
    memory_mib: u64,
    rate: u64,
}

/// One move.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    order: Order,
    #[serde(flatten)]
    setting: Setting,
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
    /// Moves that were made.
    pub runs: Vec<Run>,
    /// Those that were not.
    pub failures: Vec<Failure>,
}

/// Measures, prints and writes. It fails when a move did, after all others were made.
pub fn run(options: &ReplayOptions) -> Result<()> {
    let report = measure(options, &Runs::open(options.out.as_deref())?)?;
    print!("{}", report.section());
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

/// How many pages are touched, each once.
pub fn touches(mib: u64) -> u64 {
    mib * PAGES_PER_MIB
}

/// For how long nothing is pushed, so that each touch is seen.
pub fn recording(options: &ReplayOptions) -> Duration {
    let touches = touches(options.memory);
    let touching = touches / options.rate.max(1);
    Duration::from_secs(touching + touches / FAULTS_PER_SECOND + 5)
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
    let touches = touches(options.memory);
    let name = file.to_str().context("a name in ASCII")?.to_owned();
    let told = match order {
        Order::Recorded => {
            ensure!(options.rate > 0, "how long to record follows from the rate");
            let seconds = recording(options).as_secs();
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
        setting: Setting {
            path: options.path.to_string(),
            memory_mib: options.memory,
            rate: options.rate,
        },
        touches,
        network_faults: migration.destination.faults.remote,
    })
}

impl Report {
    /// How many touches of a known order wait for the network, for each setting.
    pub fn targets(&self) -> Vec<Target> {
        self.settings()
            .into_iter()
            .map(|of| self.target(of))
            .collect()
    }

    fn target(&self, of: &Setting) -> Target {
        Target::value(
            "network faults with --replay, percent",
            self.percent(of, Order::Replayed),
            Bound::AtMost(3.0),
        )
    }

    fn settings(&self) -> Vec<&Setting> {
        let mut settings: Vec<&Setting> = Vec::new();
        for run in &self.runs {
            if !settings.contains(&&run.setting) {
                settings.push(&run.setting);
            }
        }
        settings
    }

    fn chosen(&self, of: &Setting, order: Order) -> impl Iterator<Item = &Run> {
        let runs = self.runs.iter();
        runs.filter(move |run| run.setting == *of && run.order == order)
    }

    fn percent(&self, of: &Setting, order: Order) -> Option<Summary> {
        Summary::of(&self.chosen(of, order).map(Run::percent).collect::<Vec<_>>())
    }

    /// For all reports.
    pub fn section(&self) -> Section {
        let mut conditions = vec!["median (smallest to largest) of n moves each".to_owned()];
        conditions.push(memory::STATEMENT.to_owned());
        conditions.extend(self.paths.iter().map(ProbedPath::line));
        Section {
            title: "When the order of touches is known",
            conditions,
            blocks: self
                .settings()
                .into_iter()
                .map(|of| self.block(of))
                .collect(),
            failures: self.failures.clone(),
        }
    }

    fn block(&self, of: &Setting) -> Block {
        let heading = ["", "n", FIGURE];
        let mut rows = vec![heading.map(str::to_owned).to_vec()];
        let mut bars = Vec::new();
        for (name, order) in CASES {
            let percent = self.percent(of, order);
            rows.push(vec![
                name.to_owned(),
                self.chosen(of, order).count().to_string(),
                cell(percent),
            ]);
            bars.push((name.to_owned(), percent, Peer::Ours.to_string()));
        }
        Block {
            title: of.title(),
            rows,
            plots: vec![Plot {
                title: FIGURE.to_owned(),
                bars,
            }],
            targets: vec![self.target(of)],
        }
    }
}

/// What is counted.
const FIGURE: &str = "network faults, percent of all touches";

/// All kinds of moves.
const CASES: [(&str, Order); 3] = [
    ("recorded, nothing pushed", Order::Recorded),
    ("pushed without a record", Order::Unprepared),
    ("pushed with --replay", Order::Replayed),
];

impl Run {
    /// The path it went over.
    pub fn path(&self) -> &str {
        &self.setting.path
    }

    fn percent(&self) -> f64 {
        self.network_faults as f64 * 100.0 / self.touches as f64
    }
}

impl Setting {
    fn title(&self) -> String {
        format!(
            "{} MiB touched at random, {} per second, over {}",
            self.memory_mib, self.rate, self.path
        )
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_is_replayed_is_judged() {
        let run = |order, network_faults| Run {
            order,
            setting: Setting {
                path: "1g".to_owned(),
                memory_mib: 64,
                rate: 10_000,
            },
            touches: 1000,
            network_faults,
        };
        let report = Report {
            runs: vec![run(Order::Unprepared, 500), run(Order::Replayed, 29)],
            ..Report::default()
        };
        let met: Vec<bool> = report.targets().iter().map(Target::is_met).collect();
        assert_eq!(met, [true]);
        let text = report.section().to_string();
        assert!(text.contains("50.0 (50.0 to 50.0)"), "{text}");
        assert!(text.contains("10000 per second, over 1g"), "{text}");
    }
}
