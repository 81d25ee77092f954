//! `bench fault`: how long threads wait for a page, idle and while memory is pushed, and what that costs the push.

pub mod html;
mod judge;
mod report;
mod run;
mod table;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde::{Deserialize, Serialize};
use tests::path::PathSpec;
use tests::touch::Pattern;

use crate::bare::{self, Bare, BareOrder};
use crate::path::ProbedPath;
use crate::peer::Peer;
use crate::runs::{self, Failure, Recorded, Runs};
pub use report::Report;
pub use run::Run;

/// What to measure.
#[derive(Debug, Clone, Args)]
pub struct FaultOptions {
    /// Memory of the workload.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub memory: u64,
    /// Runs of each kind.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repeat: usize,
    /// Pages touched per second; 0 for one after the other.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub rate: u64,
    /// Pages touched when nothing is pushed.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub idle_touches: u64,
    /// Paths to measure: veth, veth,mtu=9000, 1g, rtt=10ms,loss=0.1%,rate=1g, ...
    #[arg(long, value_name = "PATH", default_value = "veth", num_args = 1..)]
    pub path: Vec<PathSpec>,
    /// Touches one page after the other instead of any.
    #[arg(long)]
    pub scan: bool,
    /// Measures only one of the two.
    #[arg(long, value_name = "NAME")]
    pub only: Option<Peer>,
    /// UDP payload for our two programs.
    #[arg(long, value_name = "BYTES")]
    pub udp_payload: Option<u16>,
    /// Writes one record for each run, and what was made of them, to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Directory for runs.jsonl (one record a line, written after each run), report.md and report.html.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// What all runs that are set side by side have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The path.
    pub path: String,
    /// Memory of the workload.
    pub memory_mib: u64,
    /// Pages touched per second; 0 for one after the other.
    pub rate: u64,
    /// One page after the other instead of any.
    pub scan: bool,
    /// UDP payload, if ours was told.
    pub udp_payload: Option<u16>,
}

/// QUIC alone, under the same setting.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BareRun {
    /// Under which it was measured.
    #[serde(flatten)]
    pub setting: Setting,
    /// What it did.
    #[serde(flatten)]
    pub bare: Bare,
}

impl Recorded for BareRun {
    const KIND: &'static str = "quic-alone";
}

/// What was measured.
#[derive(Debug, Default)]
pub struct Measured {
    /// Paths, each with its probes.
    pub paths: Vec<ProbedPath>,
    /// Runs that were made.
    pub runs: Vec<Run>,
    /// QUIC alone.
    pub bares: Vec<BareRun>,
    /// Runs that were not made.
    pub failures: Vec<Failure>,
}

/// One kind of run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// Who moves.
    pub peer: Peer,
    /// What the workload does when it has been moved.
    pub pattern: Pattern,
    /// Whether memory is pushed while it does.
    pub push: bool,
}

impl Case {
    fn title(self) -> &'static str {
        match (self.pattern, self.push) {
            (Pattern::Still, _) => "bulk alone",
            (_, true) => "faults and bulk",
            (_, false) => "faults alone",
        }
    }
}

impl FaultOptions {
    fn setting(&self, path: &PathSpec) -> Setting {
        Setting {
            path: path.to_string(),
            memory_mib: self.memory,
            rate: self.rate,
            scan: self.scan,
            udp_payload: self.udp_payload,
        }
    }
}

/// Measures, prints and writes. It fails when a run of ours did, after all others were made.
pub fn run(options: &FaultOptions) -> Result<()> {
    let report = measure(options, &Runs::open(options.out.as_deref())?)?;
    print!("{report}");
    if let Some(path) = &options.json {
        crate::write_json(path, &report)?;
    }
    if let Some(folder) = &options.out {
        crate::page::write(folder, &report.markdown(), &[html::section(&report)])?;
    }
    runs::judge(report.failures())
}

/// Measures.
pub fn measure(options: &FaultOptions, runs: &Runs) -> Result<Report> {
    let mut measured = Measured::default();
    for spec in &options.path {
        let (paths, failures) = (&mut measured.paths, &mut measured.failures);
        if !ProbedPath::keep(spec, runs, paths, failures)? {
            continue;
        }
        for round in 0..options.repeat {
            one_round(options, spec, round, runs, &mut measured)?;
        }
    }
    Ok(Report::of(measured))
}

fn one_round(
    options: &FaultOptions,
    spec: &PathSpec,
    round: usize,
    runs: &Runs,
    measured: &mut Measured,
) -> Result<()> {
    let bare = bare::measure(spec, bare_order(options));
    let bare = bare.with_context(|| format!("QUIC alone over {spec}"));
    let bare = bare.inspect(|bare| eprintln!("{spec}, {bare}"));
    let bare = bare.map(|bare| BareRun {
        setting: options.setting(spec),
        bare,
    });
    runs.keep(bare, false, &mut measured.bares, &mut measured.failures)?;
    for case in cases(options, round) {
        let run = run::measure(case, spec, options, round as u64);
        let run = run.with_context(|| format!("{} over {spec}, {}", case.peer, case.title()));
        let run = run.inspect(|run| eprintln!("{spec}, {run}"));
        // A rival that gives up is a result.
        let is_rival = case.peer != Peer::Ours;
        runs.keep(run, is_rival, &mut measured.runs, &mut measured.failures)?;
    }
    Ok(())
}

fn bare_order(options: &FaultOptions) -> BareOrder {
    BareOrder {
        round_trips: options.idle_touches,
        rate: options.rate,
        mib: options.memory,
        udp_payload: options.udp_payload,
    }
}

/// All kinds of runs; who goes first changes from round to round.
fn cases(options: &FaultOptions, round: usize) -> Vec<Case> {
    let pattern = if options.scan {
        Pattern::Scan
    } else {
        Pattern::Random
    };
    let case = |peer, pattern, push| Case {
        peer,
        pattern,
        push,
    };
    let mut cases = vec![
        case(Peer::Ours, pattern, false),
        case(Peer::Ours, pattern, true),
        case(Peer::Ours, Pattern::Still, true),
        // CRIU's daemon cannot be kept from fetching the rest, so it has no runs with faults alone.
        case(Peer::Criu, pattern, true),
        case(Peer::Criu, Pattern::Still, true),
    ];
    cases.retain(|case| options.only.is_none_or(|only| only == case.peer));
    if round % 2 == 1 {
        cases.reverse();
    }
    cases
}
