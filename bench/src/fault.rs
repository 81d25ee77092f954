//! `bench fault`: how long threads wait for a page, idle and while memory is pushed, and what that costs the push.

mod report;
mod run;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use tests::path::{Path, PathSpec, probe};
use tests::rig::Rig;
use tests::touch::Pattern;

use crate::bare::{self, BareOrder};
use crate::peer::Peer;

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
}

/// One kind of run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
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

/// Measures, prints and writes.
pub fn run(options: &FaultOptions) -> Result<()> {
    let report = measure(options)?;
    print!("{report}");
    options
        .json
        .as_ref()
        .map_or(Ok(()), |path| crate::write_json(path, &report))
}

/// Measures.
pub fn measure(options: &FaultOptions) -> Result<report::Report> {
    let (mut runs, mut failures) = (Vec::new(), Vec::new());
    let mut bares = Vec::new();
    for spec in &options.path {
        let rig = Rig::new()?;
        let _path = Path::lay(&rig, *spec)?;
        eprintln!("{spec}: {}", probe::check(&rig, spec)?);
        drop(rig);
        for round in 0..options.repeat {
            let bare = bare::measure(spec, bare_order(options))
                .with_context(|| format!("QUIC alone over {spec}"))?;
            eprintln!("{spec}, {bare}");
            bares.push((spec.to_string(), bare));
            for case in cases(options, round) {
                let run = run::measure(case, spec, options, round as u64)
                    .with_context(|| format!("{} over {spec}, {}", case.peer, case.title()));
                match run {
                    Ok(run) => {
                        eprintln!("{spec}, {run}");
                        runs.push(run);
                    }
                    Err(error) if case.peer == Peer::Ours => return Err(error),
                    // A rival that gives up is a result.
                    Err(error) => failures.push(format!("{error:#}")),
                }
            }
        }
    }
    Ok(report::Report::new(options, runs, &bares, failures))
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
