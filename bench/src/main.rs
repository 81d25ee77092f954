//! `bench`: the demonstration, and the comparison with CRIU's own post-copy.

mod bare;
mod collected;
mod compare;
mod crowd;
mod demo;
mod fault;
mod files;
mod flood;
mod load;
mod memory;
mod micro;
mod page;
mod path;
mod peer;
mod programs;
mod quiet;
mod record;
mod replay;
mod runs;
mod scale;
mod section;
mod skew;
mod star;
mod stats;
mod svg;
mod table;
mod targets;
mod timeline;
mod verdict;
mod watch;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

/// Moves real workloads between two hosts made of network namespaces, and measures it. Needs root.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Do not wait for a quiet machine, nor repeat runs that others disturbed
    #[arg(long, global = true)]
    as_it_comes: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Moves a redis under a client that never disconnects, and checks every key.
    Demo(DemoOptions),
    /// Moves the same workload by CRIU and by ours, in turns and over several paths, and sets what it took side by side.
    Compare(compare::CompareOptions),
    /// Everything side by side: from one point in the middle one thing is changed at a time, path, workload or size.
    Report(star::StarOptions),
    /// Makes report.md and report.html of records of runs again.
    Page(collected::PageOptions),
    /// Measures how long a workload waits for pages, with and without a push beside, and how fast that push is.
    Fault(fault::FaultOptions),
    /// Moves a workload with and without a flood of handshakes by strangers, in turns.
    Flood(flood::FloodOptions),
    /// Moves a server under hundreds of connections, and shows how long any of its clients waited.
    Crowd(crowd::CrowdOptions),
    /// Moves a workload with files of growing size and number that do not change, and shows its cutover.
    Files(files::FilesOptions),
    /// Moves a workload, records the order of its touches, and moves it again with that record.
    Replay(replay::ReplayOptions),
    /// Moves workloads of growing size, and shows what grows with them.
    Scale(scale::ScaleOptions),
    /// Measures what every target is about, and says in one table which are met.
    Targets(verdict::VerdictOptions),
    /// Records the order in which a workload touches its memory after a move.
    Record(record::RecordOptions),
    /// Measures the hot pieces by themselves: resolver, frames, page reads, installs.
    Micro(micro::MicroOptions),
    /// Lays paths between two hosts and measures whether they are what they claim: veth, 1g, rtt=10ms,loss=0.1%,rate=1g.
    Path {
        /// The paths.
        #[arg(required = true)]
        paths: Vec<tests::path::PathSpec>,
    },
}

#[derive(Debug, Args)]
struct DemoOptions {
    /// Memory redis holds, at least.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// Commands the client issues per second; 0 for as many as it can.
    #[arg(long, value_name = "N", default_value_t = 4000)]
    rate: u32,
    /// Writes what the table shows to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.as_it_comes {
        quiet::take_runs_as_they_come();
    }
    let outcome = match cli.command {
        Command::Demo(options) => demo::run(&options),
        Command::Compare(options) => compare::run(&options),
        Command::Report(options) => star::run(&options),
        Command::Page(options) => collected::run(&options),
        Command::Fault(options) => fault::run(&options),
        Command::Flood(options) => flood::run(&options),
        Command::Crowd(options) => crowd::run(&options),
        Command::Files(options) => files::run(&options),
        Command::Replay(options) => replay::run(&options),
        Command::Scale(options) => scale::run(&options),
        Command::Targets(options) => verdict::run(&options),
        Command::Record(options) => record::run(&options),
        Command::Micro(options) => micro::run(&options),
        Command::Path { paths } => path::run(&paths),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Writes a record where the user wants it.
fn write_json(path: &std::path::Path, record: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(record).context("the record has no JSON form")?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}
