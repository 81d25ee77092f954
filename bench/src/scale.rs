//! `bench scale`: how a move grows with the memory it moves.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use tests::path::PathSpec;

use crate::compare::{Order, Run, in_turn};
use crate::path::ProbedPath;
use crate::peer::Peer;
use crate::quiet;
use crate::runs::{self, Failure, Runs};
use crate::stats::Summary;
use crate::table::Table;
use crate::workload::Kind;

/// What to measure.
#[derive(Debug, Clone, Args)]
pub struct ScaleOptions {
    /// The smallest size.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    min: u64,
    /// The largest size; each is four times the one before.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    max: u64,
    /// Moves of each size by each peer.
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeat: usize,
    /// The path between the hosts.
    #[arg(long, value_name = "PATH", default_value = "veth")]
    path: PathSpec,
    /// Who moves it.
    #[arg(long, value_name = "NAME", default_values = ["criu", "ours"], num_args = 1..)]
    peer: Vec<Peer>,
    /// What is moved.
    #[arg(long, value_name = "NAME", default_value = "still")]
    workload: Kind,
    /// Commands or touches per second.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    rate: u32,
    /// Writes every run to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Directory for runs.jsonl, one record a line, written after each move.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Debug, Default, Serialize)]
struct Report {
    memory: &'static str,
    paths: Vec<ProbedPath>,
    runs: Vec<Run>,
    failures: Vec<Failure>,
}

/// Measures, prints and writes. It fails when a move of ours did, after all others were made.
pub fn run(options: &ScaleOptions) -> Result<()> {
    let runs = Runs::open(options.out.as_deref())?;
    let mut report = Report {
        memory: crate::memory::STATEMENT,
        ..Report::default()
    };
    let Report {
        paths, failures, ..
    } = &mut report;
    if ProbedPath::keep(&options.path, &runs, paths, failures)? {
        measure(options, &runs, &mut report)?;
    }
    print!("{}", render(options, &report));
    if let Some(path) = &options.json {
        crate::write_json(path, &report)?;
    }
    runs::judge(&report.failures)
}

fn measure(options: &ScaleOptions, runs: &Runs, report: &mut Report) -> Result<()> {
    for mib in sizes(options.min, options.max) {
        for round in 0..options.repeat {
            for peer in in_turn(&options.peer, round) {
                let order = order(options, peer, mib, round as u64);
                order.keep(runs, &mut report.runs, &mut report.failures)?;
            }
        }
    }
    Ok(())
}

fn order(options: &ScaleOptions, peer: Peer, mib: u64, seed: u64) -> Order {
    Order {
        peer,
        kind: options.workload,
        path: options.path,
        mib,
        rate: options.rate,
        udp_payload: None,
        seed,
    }
}

/// Powers of four from the smallest, and the largest itself.
fn sizes(min: u64, max: u64) -> Vec<u64> {
    let mut sizes: Vec<u64> = std::iter::successors(Some(min.max(1)), |size| size.checked_mul(4))
        .take_while(|size| *size < max)
        .collect();
    sizes.push(max);
    sizes
}

fn render(options: &ScaleOptions, report: &Report) -> String {
    let mut table = Table::default();
    table.row([
        "MiB",
        "peer",
        "n",
        "cutover ms",
        "total ms",
        "MiB/s",
        "RSS source MiB",
        "RSS destination MiB",
        "CPU s/GiB",
    ]);
    for mib in sizes(options.min, options.max) {
        for peer in &options.peer {
            let runs: Vec<&Run> = report
                .runs
                .iter()
                .filter(|run| run.memory_mib == mib && run.peer == *peer)
                .collect();
            let cell = |value: fn(&Run) -> Option<f64>| {
                let values: Vec<f64> = runs.iter().filter_map(|run| value(run)).collect();
                Summary::of(&values).map_or("-".to_owned(), |of| of.to_string())
            };
            table.row([
                &mib.to_string(),
                &peer.to_string(),
                &runs.len().to_string(),
                &cell(|run| Some(run.cutover_ms)),
                &cell(|run| Some(run.total_ms)),
                &cell(|run| run.bulk_mib_s),
                &cell(|run| Some(run.source.peak_rss_mib)),
                &cell(|run| Some(run.destination.peak_rss_mib)),
                &cell(|run| Some(run.per_gib(run.cpu_s))),
            ]);
        }
    }
    let mut text = format!(
        "\n{} over {}; median (smallest to largest)\n{}\n{}\n",
        options.workload,
        options.path,
        report.memory,
        quiet::statement(report.runs.iter().map(Run::disturbance))
    );
    for path in &report.paths {
        text += &format!("{}\n", path.line());
    }
    text += &format!("\n{}", table.render());
    for failure in &report.failures {
        text += &format!("failed: {}\n", failure.what);
    }
    text
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn sizes_end_with_the_largest() {
        assert_eq!(sizes(64, 1024), [64, 256, 1024]);
        assert_eq!(sizes(64, 10240), [64, 256, 1024, 4096, 10240]);
        assert_eq!(sizes(64, 64), [64]);
    }
}
