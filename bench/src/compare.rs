//! CRIU's own lazy-pages over plain TCP, and ours, on the same workload in turns.

use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use tests::beating_redis::BeatingRedis;
use tests::binaries;
use tests::criu_baseline::{self, BaselineHome};
use tests::pair::PairPlan;
use tests::redis_client::ClientPlan;
use tests::rig::Rig;

use crate::stats::Summary;
use crate::table::Table;
use crate::{CompareOptions, memory, write_json};

/// Commands answered between the end of a move and the end of the client: half a second at the usual rate.
const REPLIES_AFTER: u64 = 2000;

/// Who moves the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Contender {
    /// CRIU's own daemons.
    Criu,
    /// `page-server` and `lazy-restorer`.
    Ours,
}

/// One move.
#[derive(Debug, Clone, Serialize)]
struct Measurement {
    by: Contender,
    /// The longest time without an instruction of the workload, measured inside it.
    cutover_ms: f64,
    /// The longest time a command of the client took.
    client_gap_ms: f64,
    /// From the start of the move until the last page has arrived and both ends are gone.
    total_ms: f64,
    keys: usize,
    value_mib: f64,
}

/// What both did, and whether ours is at least as good.
#[derive(Debug, Serialize)]
struct Row {
    what: &'static str,
    criu: Option<Summary>,
    ours: Option<Summary>,
    ratio: Option<f64>,
    /// Whether ours must not be longer, and is not.
    met: Option<bool>,
}

#[derive(Debug, Serialize)]
struct Report {
    memory_mib: u64,
    client_rate: u32,
    memory: &'static str,
    rows: Vec<Row>,
    measurements: Vec<Measurement>,
}

/// Measures, prints and writes the comparison. It fails when a key differs, never because of a time.
pub fn run(options: &CompareOptions) -> Result<()> {
    let mut measurements = Vec::new();
    for round in 0..options.repeat {
        for contender in order(round, options.only) {
            let measurement = measure(contender, options, round as u64)
                .with_context(|| format!("{contender:?}"))?;
            eprintln!(
                "{:>4}: cutover {:.1} ms, client's longest gap {:.1} ms, total {:.0} ms",
                format!("{contender:?}").to_lowercase(),
                measurement.cutover_ms,
                measurement.client_gap_ms,
                measurement.total_ms
            );
            measurements.push(measurement);
        }
    }
    let report = Report {
        memory_mib: options.memory,
        client_rate: options.rate,
        memory: "warm: as much memory as the workload holds was touched and given back before each move",
        rows: rows(&measurements),
        measurements,
    };
    print!("{}", render(&report));
    options
        .json
        .as_ref()
        .map_or(Ok(()), |path| write_json(path, &report))
}

/// Who goes first changes from round to round.
fn order(round: usize, only: Option<Contender>) -> Vec<Contender> {
    let mut order = vec![Contender::Criu, Contender::Ours];
    if round % 2 == 1 {
        order.reverse();
    }
    order.retain(|contender| only.is_none_or(|only| only == *contender));
    order
}

fn measure(by: Contender, options: &CompareOptions, seed: u64) -> Result<Measurement> {
    let rig = Rig::new()?;
    let workload = BeatingRedis::start(
        &rig,
        ClientPlan {
            mib: options.memory,
            seed,
            rate: options.rate,
        },
    )?;
    memory::warm(options.memory + options.memory / 4)?;
    let mover = Mover::prepare(by, &rig)?;
    workload.client.wait_for_replies(REPLIES_AFTER)?;
    workload.forget_gaps()?;
    let total = mover.go(&rig, &workload)?;
    workload.client.wait_for_replies(REPLIES_AFTER)?;
    let cutover = workload.longest_gap()?;
    let client = workload.client.end()?;
    Ok(Measurement {
        by,
        cutover_ms: cutover.as_secs_f64() * 1e3,
        client_gap_ms: client.times.longest_gap.as_secs_f64() * 1e3,
        total_ms: total.as_secs_f64() * 1e3,
        keys: client.keys,
        value_mib: client.value_bytes as f64 / f64::from(1 << 20),
    })
}

/// All that can be made ready before a move is not part of it.
enum Mover {
    Criu(BaselineHome, std::path::PathBuf),
    Ours(Box<PairPlan>),
}

impl Mover {
    fn prepare(by: Contender, rig: &Rig) -> Result<Self> {
        Ok(match by {
            Contender::Criu => Self::Criu(BaselineHome::new(rig)?, binaries::criu()?),
            Contender::Ours => Self::Ours(Box::new(PairPlan::new(rig)?)),
        })
    }

    fn go(&self, rig: &Rig, workload: &BeatingRedis) -> Result<std::time::Duration> {
        match self {
            Self::Criu(home, criu) => {
                let started = Instant::now();
                criu_baseline::migrate(rig, home, criu, workload.pid())?;
                Ok(started.elapsed())
            }
            Self::Ours(plan) => Ok(plan.migrate(rig, workload.pid())?.total),
        }
    }
}

fn rows(measurements: &[Measurement]) -> Vec<Row> {
    let row = |what, must_be_met: bool, value: fn(&Measurement) -> f64| {
        let of = |by| {
            let values: Vec<f64> = measurements
                .iter()
                .filter(|one| one.by == by)
                .map(value)
                .collect();
            Summary::of(&values)
        };
        let (criu, ours) = (of(Contender::Criu), of(Contender::Ours));
        let ratio = criu.zip(ours).map(|(criu, ours)| ours.median / criu.median);
        Row {
            what,
            criu,
            ours,
            ratio,
            met: ratio.filter(|_| must_be_met).map(|ratio| ratio <= 1.0),
        }
    };
    vec![
        row("cutover", true, |one| one.cutover_ms),
        row("client's longest gap", false, |one| one.client_gap_ms),
        row("total time", true, |one| one.total_ms),
    ]
}

fn render(report: &Report) -> String {
    let mut table = Table::default();
    table.row([
        "",
        "CRIU lazy-pages (TCP)",
        "ours (QUIC, TLS 1.3)",
        "ours / CRIU",
        "not longer?",
    ]);
    for row in &report.rows {
        let cell = |summary: Option<Summary>| {
            summary.map_or("-".to_owned(), |of| {
                format!("{:.1} ms ({:.1} to {:.1})", of.median, of.min, of.max)
            })
        };
        let ratio = row
            .ratio
            .map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let met = row
            .met
            .map_or("", |met| if met { "met" } else { "NOT MET" });
        table.row([row.what, &cell(row.criu), &cell(row.ours), &ratio, met]);
    }
    let runs = report.measurements.len();
    format!(
        "\nredis with {} MiB, one client at {} commands/s, {runs} moves in turns; median (fastest to slowest)\n{}\n\n{}",
        report.memory_mib,
        report.client_rate,
        report.memory,
        table.render()
    )
}
