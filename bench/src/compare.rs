//! `bench compare`: the same workload moved by each peer in turns, over each path.

mod figures;
mod glance;
pub mod html;
mod judge;
pub mod markdown;
mod report;
mod run;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use tests::path::PathSpec;

use crate::path::ProbedPath;
use crate::peer::Peer;
use crate::runs::{self, Failure, Runs};
use crate::workload::Kind;
pub use report::Report;
pub use run::{Order, Run};

/// What to compare.
#[derive(Debug, Clone, Args)]
pub struct CompareOptions {
    /// Memory of the workload, at least.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub memory: u64,
    /// Moves by each peer.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repeat: usize,
    /// Commands redis' client issues per second, or pages touched; 0 for as many as possible.
    #[arg(long, value_name = "N", default_value_t = 4000)]
    pub rate: u32,
    /// Paths between the hosts: veth, veth,mtu=9000, 1g, 10g, rtt=10ms,loss=0.1%,rate=1g, ...
    #[arg(long, value_name = "PATH", default_value = "veth", num_args = 1..)]
    pub path: Vec<PathSpec>,
    /// Who moves it.
    #[arg(long, value_name = "NAME", default_values = ["criu", "ours"], num_args = 1..)]
    pub peer: Vec<Peer>,
    /// What is moved.
    #[arg(long, value_name = "NAME", default_value = "redis", num_args = 1..)]
    pub workload: Vec<Kind>,
    /// UDP payload for our two programs [default: they find out]
    #[arg(long, value_name = "BYTES")]
    pub udp_payload: Option<u16>,
    /// Writes the summary and every run to this file, as one JSON object.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Directory for runs.jsonl (one record a line, written after each move), report.md and report.html.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// What was measured.
#[derive(Debug, Default)]
pub struct Measured {
    /// Paths, each with its probes.
    pub paths: Vec<ProbedPath>,
    /// Moves that were made.
    pub moves: Vec<Run>,
    /// Those that were not.
    pub failures: Vec<Failure>,
}

/// Measures, prints and writes. It fails when a byte differs or a move of ours fails, after everything else was
/// measured, and never because of a time; a rival that fails is reported.
pub fn run(options: &CompareOptions) -> Result<()> {
    let report = measure(options, &Runs::open(options.out.as_deref())?)?;
    print!("{}", markdown::render(&report));
    if let Some(path) = &options.json {
        crate::write_json(path, &report)?;
    }
    if let Some(folder) = &options.out {
        crate::page::write(
            folder,
            &markdown::render(&report),
            &[html::sections(&report)],
        )?;
    }
    runs::judge(report.failures())
}

/// Measures.
pub fn measure(options: &CompareOptions, runs: &Runs) -> Result<Report> {
    let mut measured = Measured::default();
    for spec in &options.path {
        let (paths, failures) = (&mut measured.paths, &mut measured.failures);
        if !ProbedPath::keep(spec, runs, paths, failures)? {
            continue;
        }
        for kind in &options.workload {
            for round in 0..options.repeat {
                turns(options, *spec, *kind, round, runs, &mut measured)?;
            }
        }
    }
    Ok(Report::of(measured))
}

/// One move by each peer; who goes first changes from round to round.
fn turns(
    options: &CompareOptions,
    path: PathSpec,
    kind: Kind,
    round: usize,
    runs: &Runs,
    measured: &mut Measured,
) -> Result<()> {
    for peer in in_turn(&options.peer, round) {
        let order = Order {
            peer,
            kind,
            path,
            mib: options.memory,
            rate: options.rate,
            udp_payload: options.udp_payload,
            seed: round as u64,
        };
        let (moves, failures) = (&mut measured.moves, &mut measured.failures);
        order.keep(runs, moves, failures)?;
    }
    Ok(())
}

/// All peers, another one first in each round.
pub fn in_turn(peers: &[Peer], round: usize) -> Vec<Peer> {
    let mut peers = peers.to_vec();
    let first = round % peers.len().max(1);
    peers.rotate_left(first);
    peers
}

impl Order {
    /// Makes the move and keeps it, or why it failed.
    pub fn keep(
        &self,
        runs: &Runs,
        moves: &mut Vec<Run>,
        failures: &mut Vec<Failure>,
    ) -> Result<()> {
        let Self {
            peer,
            kind,
            path,
            mib,
            ..
        } = self;
        let what = format!("{path}, {kind}, {mib} MiB, {peer}");
        let outcome = self.carry_out().context(what.clone());
        if let Ok(run) = &outcome {
            eprintln!("{what}: {run}");
        }
        runs.keep(outcome, !peer.is_ours(), moves, failures)
    }
}
