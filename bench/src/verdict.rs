//! `bench targets`: measures what every target is about, and says in one table which are met.

mod parts;

use std::fmt;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use crate::compare::{self, CompareOptions};
use crate::fault::{self, FaultOptions};
use crate::files::{self, FilesOptions};
use crate::flood::{self, FloodOptions};
use crate::path::ProbedPath;
use crate::replay::{self, ReplayOptions};
use crate::runs::{self, Failure, Runs};
use crate::targets::Target;
use parts::parts;

/// What to measure.
#[derive(Debug, Args)]
pub struct VerdictOptions {
    /// Runs of each kind.
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeat: usize,
    /// Memory of the workloads.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// Memory of the workload that shows what does not grow with it.
    #[arg(long, value_name = "MIB", default_value_t = 10240)]
    largest: u64,
    /// Measures only parts whose name contains this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Writes the table to this file as well, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Directory for runs.jsonl, to which every run is written as it ends, and report.md, the table
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// One part: a measurement, and those of its targets that count here.
struct Part {
    name: &'static str,
    measure: Measure,
    /// How their names begin.
    counts: &'static [&'static str],
}

enum Measure {
    Fault(FaultOptions),
    Compare(Box<CompareOptions>),
    Flood(FloodOptions),
    Replay(ReplayOptions),
    Files(FilesOptions),
}

/// A target, and where it was measured.
#[derive(Debug, Serialize)]
struct Judged {
    part: &'static str,
    path: String,
    target: Target,
}

#[derive(Debug, Serialize)]
struct Verdict {
    memory_mib: u64,
    repeat: usize,
    judged: Vec<Judged>,
    /// Paths with what the probes said of them.
    paths: Vec<ProbedPath>,
    /// What could not be measured, and why.
    failures: Vec<Failure>,
}

/// Measures, prints and writes. It fails when something of ours could not be measured, after everything else was, and
/// never because of a time.
pub fn run(options: &VerdictOptions) -> Result<()> {
    let runs = Runs::open(options.out.as_deref())?;
    let mut verdict = Verdict {
        memory_mib: options.memory,
        repeat: options.repeat,
        judged: Vec::new(),
        paths: Vec::new(),
        failures: Vec::new(),
    };
    for part in parts(options)? {
        if part.name.contains(&options.only) {
            eprintln!("--- {} ---", part.name);
            verdict.add(&part, &runs.of_part(part.name))?;
        }
    }
    print!("{verdict}");
    if let Some(path) = &options.json {
        crate::write_json(path, &verdict)?;
    }
    if let Some(folder) = &options.out {
        let path = folder.join("report.md");
        std::fs::write(path, verdict.to_string())?;
    }
    runs::judge(&verdict.failures)
}

/// What a part came to.
struct Outcome {
    /// Targets, and the paths they are about.
    targets: Vec<(String, Target)>,
    paths: Vec<ProbedPath>,
    failures: Vec<Failure>,
}

impl Verdict {
    fn add(&mut self, part: &Part, runs: &Runs) -> Result<()> {
        let outcome = match part.measure.carry_out(runs) {
            Ok(outcome) => outcome,
            // The other parts can be measured all the same.
            Err(error) => {
                let error = error.context(part.name);
                return runs.fail(&error, false, &mut self.failures);
            }
        };
        let named = |failure: Failure| Failure {
            what: format!("{}: {}", part.name, failure.what),
            ..failure
        };
        self.failures
            .extend(outcome.failures.into_iter().map(named));
        self.paths.extend(outcome.paths);
        let counts = |target: &Target| {
            let mut counts = part.counts.iter();
            counts.any(|what| target.what().starts_with(what))
        };
        for (path, target) in outcome.targets {
            if counts(&target) {
                self.judged.push(Judged {
                    part: part.name,
                    path,
                    target,
                });
            }
        }
        Ok(())
    }
}

/// What has no path of its own goes over the switch.
const SWITCH: &str = "switch";

fn over(path: &str, targets: Vec<Target>) -> Vec<(String, Target)> {
    let named = targets.into_iter();
    named.map(|target| (path.to_owned(), target)).collect()
}

impl Measure {
    fn carry_out(&self, runs: &Runs) -> Result<Outcome> {
        Ok(match self {
            Self::Fault(options) => {
                let report = fault::measure(options, runs)?;
                print!("{report}");
                Outcome {
                    targets: report.targets(),
                    paths: report.paths,
                    failures: report.failures,
                }
            }
            Self::Compare(options) => {
                let report = compare::measure(options, runs)?;
                print!("{}", compare::markdown::render(&report));
                Outcome {
                    targets: report.targets(),
                    paths: report.paths,
                    failures: report.failures,
                }
            }
            Self::Flood(options) => {
                let report = flood::measure(options, runs)?;
                print!("{}", report.section());
                Outcome {
                    targets: over(SWITCH, report.targets()),
                    paths: Vec::new(),
                    failures: report.failures,
                }
            }
            Self::Replay(options) => {
                let report = replay::measure(options, runs)?;
                print!("{}", report.section());
                Outcome {
                    targets: over(&options.path.to_string(), report.targets()),
                    paths: report.paths,
                    failures: report.failures,
                }
            }
            Self::Files(options) => {
                let report = files::measure(options, runs)?;
                print!("{}", report.section());
                Outcome {
                    targets: over(SWITCH, report.targets()),
                    paths: Vec::new(),
                    failures: report.failures,
                }
            }
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n# Targets\n\n{} MiB (redis on 1 Gbit/s: {}), medians of {} runs, each ratio within one run of the bench; \
             spread: smallest to largest that the runs allow; {}\n",
            self.memory_mib,
            2 * self.memory_mib,
            self.repeat,
            crate::memory::STATEMENT,
        )?;
        writeln!(f, "| part | path | figure | measured | spread | target | |")?;
        writeln!(f, "| --- | --- | --- | ---: | ---: | --- | --- |")?;
        for judged in &self.judged {
            let row = judged.target.cells().join(" | ");
            writeln!(f, "| {} | {} | {row} |", judged.part, judged.path)?;
        }
        let not_met = self.judged.iter().filter(|judged| !judged.target.is_met());
        writeln!(f, "\n{} of {} not met", not_met.count(), self.judged.len())?;
        let caveats = self.paths.iter().filter(|path| !path.caveats.is_empty());
        for path in caveats {
            writeln!(f, "{}", path.line())?;
        }
        let mut failures = self.failures.iter();
        failures.try_for_each(|failure| writeln!(f, "failed: {}", failure.what))
    }
}
