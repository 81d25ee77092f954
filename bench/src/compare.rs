//! `bench compare`: the same workload moved by each peer in turns, over each path.

mod figures;
mod html;
mod markdown;
mod report;
mod run;
mod svg;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path as FilePath, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use tests::path::{Path, PathSpec, probe};
use tests::rig::Rig;

use crate::peer::Peer;
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

/// Measures, prints and writes. It fails when a byte differs, never because of a time; a peer that fails is reported.
pub fn run(options: &CompareOptions) -> Result<()> {
    let report = measure(options)?;
    print!("{}", markdown::render(&report));
    write_all(options, &report)
}

/// The tables of a report.
pub fn markdown(report: &Report) -> String {
    markdown::render(report)
}

/// Measures.
pub fn measure(options: &CompareOptions) -> Result<Report> {
    if let Some(folder) = &options.out {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let mut report = Report::new(options);
    for spec in &options.path {
        report.probed(spec, measure_path(spec)?);
        for kind in &options.workload {
            for round in 0..options.repeat {
                turns(options, *spec, *kind, round, &mut report)?;
            }
        }
    }
    report.conclude();
    Ok(report)
}

fn measure_path(spec: &PathSpec) -> Result<probe::Measured> {
    let rig = Rig::new()?;
    let _path = Path::lay(&rig, *spec)?;
    let measured = probe::check(&rig, spec)?;
    eprintln!("{spec}: {measured}");
    Ok(measured)
}

/// One move by each peer; who goes first changes from round to round.
fn turns(
    options: &CompareOptions,
    path: PathSpec,
    kind: Kind,
    round: usize,
    report: &mut Report,
) -> Result<()> {
    let mut peers = options.peer.clone();
    let first = round % peers.len().max(1);
    peers.rotate_left(first);
    for peer in peers {
        let order = Order {
            peer,
            kind,
            path,
            mib: options.memory,
            rate: options.rate,
            udp_payload: options.udp_payload,
            seed: round as u64,
        };
        match order.carry_out() {
            Ok(run) => {
                eprintln!("{path}, {kind}, {peer}: {run}");
                append(options, &run)?;
                report.runs.push(run);
            }
            Err(error) if peer.is_ours() => {
                return Err(error.context(format!("{peer}, {kind} over {path}")));
            }
            Err(error) => {
                eprintln!("{path}, {kind}, {peer}: FAILED: {error:#}");
                report
                    .failures
                    .push(format!("{peer}, {kind} over {path}: {error:#}"));
            }
        }
    }
    Ok(())
}

fn append(options: &CompareOptions, run: &Run) -> Result<()> {
    let Some(folder) = &options.out else {
        return Ok(());
    };
    let path = folder.join("runs.jsonl");
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    writeln!(file, "{}", serde_json::to_string(run)?).context("cannot write a record")
}

fn write_all(options: &CompareOptions, report: &Report) -> Result<()> {
    if let Some(path) = &options.json {
        crate::write_json(path, report)?;
    }
    if let Some(folder) = &options.out {
        write(&folder.join("report.md"), &markdown::render(report))?;
        write(&folder.join("report.html"), &html::render(report))?;
    }
    Ok(())
}

fn write(path: &FilePath, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
