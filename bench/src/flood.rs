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
use crate::peer::Peer;
use crate::quiet::{self, Disturbance, Use};
use crate::runs::{self, Failure, Recorded, Runs};
use crate::section::{Block, Plot, Section, cell};
use crate::stats::Summary;
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

/// What is the same with and without the flood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Setting {
    memory_mib: u64,
    strangers: usize,
}

/// One move.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Run {
    #[serde(flatten)]
    setting: Setting,
    flooded: bool,
    cutover_ms: f64,
    total_ms: f64,
    /// The part of the machine's CPUs that others used meanwhile.
    used_by_others: f64,
}

impl Recorded for Run {
    const KIND: &'static str = "flood";
}

impl Run {
    fn disturbance(&self) -> Disturbance {
        Disturbance {
            by_others: self.used_by_others,
            late: 0.0,
        }
    }
}

/// What was measured.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Moves that were made.
    pub runs: Vec<Run>,
    /// Those that were not.
    pub failures: Vec<Failure>,
}

/// Measures, prints and writes. It fails when a move did, after all others were made.
pub fn run(options: &FloodOptions) -> Result<()> {
    let report = measure(options, &Runs::open(options.out.as_deref())?)?;
    print!("{}", report.section());
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
            let run = quiet::measure(|| one(options, flooded, round as u64), Run::disturbance);
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
        setting: Setting {
            memory_mib: options.memory,
            strangers: options.strangers,
        },
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
    /// How much the flood slows a move, for each setting.
    pub fn targets(&self) -> Vec<Target> {
        self.settings()
            .into_iter()
            .map(|of| self.target(of))
            .collect()
    }

    fn target(&self, of: Setting) -> Target {
        Target::ratio(
            "total, flooded over quiet",
            self.summary(of, true, |run| run.total_ms),
            self.summary(of, false, |run| run.total_ms),
            Bound::AtMost(1.2),
        )
    }

    fn settings(&self) -> Vec<Setting> {
        let mut settings: Vec<Setting> = Vec::new();
        for run in &self.runs {
            if !settings.contains(&run.setting) {
                settings.push(run.setting);
            }
        }
        settings
    }

    fn chosen(&self, of: Setting, flooded: bool) -> impl Iterator<Item = &Run> {
        let runs = self.runs.iter();
        runs.filter(move |run| run.setting == of && run.flooded == flooded)
    }

    fn summary(&self, of: Setting, flooded: bool, value: fn(&Run) -> f64) -> Option<Summary> {
        Summary::of(&self.chosen(of, flooded).map(value).collect::<Vec<_>>())
    }

    /// For all reports.
    pub fn section(&self) -> Section {
        Section {
            title: "A flood of strangers",
            conditions: vec![
                "median (smallest to largest) of n moves each, with and without the flood in turns".to_owned(),
                "strangers knock at the source, each again as soon as it was refused; they get what the move leaves over of \
                 the processors"
                    .to_owned(),
                memory::STATEMENT.to_owned(),
                quiet::statement(self.runs.iter().map(Run::disturbance)),
            ],
            blocks: self.settings().into_iter().map(|of| self.block(of)).collect(),
            failures: self.failures.clone(),
        }
    }

    fn block(&self, of: Setting) -> Block {
        let mut rows = vec![
            ["", "n", "cutover ms", "total ms"]
                .map(str::to_owned)
                .to_vec(),
        ];
        for (name, flooded) in CASES {
            let shown = |value| cell(self.summary(of, flooded, value));
            rows.push(vec![
                name.to_owned(),
                self.chosen(of, flooded).count().to_string(),
                shown(|run| run.cutover_ms),
                shown(|run| run.total_ms),
            ]);
        }
        Block {
            title: of.title(),
            rows,
            plots: vec![
                self.plot(of, "cutover, ms", |run| run.cutover_ms),
                self.plot(of, "total time, ms", |run| run.total_ms),
            ],
            targets: vec![self.target(of)],
        }
    }

    fn plot(&self, of: Setting, title: &str, value: fn(&Run) -> f64) -> Plot {
        let bar = |(name, flooded): (&str, bool)| {
            let class = Peer::Ours.to_string();
            (name.to_owned(), self.summary(of, flooded, value), class)
        };
        Plot {
            title: title.to_owned(),
            bars: CASES.into_iter().map(bar).collect(),
        }
    }
}

impl Setting {
    fn title(&self) -> String {
        format!(
            "{} MiB under a flood of {} strangers",
            self.memory_mib, self.strangers
        )
    }
}

/// Both kinds of moves.
const CASES: [(&str, bool); 2] = [("without", false), ("flooded", true)];

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn settings_are_judged_by_themselves() {
        let run = |strangers, flooded, total_ms| Run {
            setting: Setting {
                memory_mib: 64,
                strangers,
            },
            flooded,
            cutover_ms: 1.0,
            total_ms,
            used_by_others: 0.0,
        };
        let report = Report {
            runs: vec![
                run(8, true, 11.0),
                run(800, true, 20.0),
                run(8, false, 10.0),
                run(800, false, 10.0),
            ],
            ..Report::default()
        };
        let met: Vec<bool> = report.targets().iter().map(Target::is_met).collect();
        assert_eq!(met, [true, false]);
        let titles: Vec<String> = report
            .section()
            .blocks
            .into_iter()
            .map(|of| of.title)
            .collect();
        let expected = [8, 800].map(|of| format!("64 MiB under a flood of {of} strangers"));
        assert_eq!(titles, expected);
    }
}
