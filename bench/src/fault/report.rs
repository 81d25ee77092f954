//! What the runs of `bench fault` come to.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use tests::latency::{Latencies, Percentiles};
use tests::path::PathSpec;
use tests::touch::Pattern;

use super::run::Run;
use super::{Case, FaultOptions};
use crate::bare::Bare;
use crate::peer::Peer;
use crate::stats::Summary;
use crate::table::Table;
use crate::targets::{Bound, Target};

/// From this round trip on CRIU's way to fetch one page range after the other is what bounds it.
const LONG: Duration = Duration::from_millis(10);

/// Everything that goes to the JSON file.
#[derive(Debug, Serialize)]
pub struct Report {
    memory_mib: u64,
    touches_per_second: u64,
    pattern: &'static str,
    memory: &'static str,
    paths: Vec<OnePath>,
    /// Moves by others that did not succeed.
    failures: Vec<String>,
    runs: Vec<Run>,
}

/// The runs over one path.
#[derive(Debug, Serialize)]
struct OnePath {
    path: String,
    /// What QUIC alone does, in microseconds and MiB/s.
    bare_p50_us: Option<Summary>,
    bare_bulk_mib_s: Option<Summary>,
    rows: Vec<Row>,
    targets: Vec<Target>,
}

/// All runs of one kind.
#[derive(Debug, Serialize)]
struct Row {
    case: Case,
    runs: usize,
    /// Waits of all runs together.
    waits: Percentiles,
    waits_log2: Vec<u64>,
    /// The median of each run's, and their spread.
    p50_us: Option<Summary>,
    p99_us: Option<Summary>,
    /// The same from reading the fault to installing the page, without the wake-up of the workload.
    served_p99_us: Option<Summary>,
    network_faults_percent: Option<Summary>,
    touches_per_s: Option<Summary>,
    bulk_mib_s: Option<Summary>,
    total_ms: Option<Summary>,
    cutover_ms: Option<Summary>,
}

impl Report {
    /// Puts the runs together.
    pub fn new(
        options: &FaultOptions,
        runs: Vec<Run>,
        bares: &[(String, Bare)],
        failures: Vec<String>,
    ) -> Self {
        let paths = options
            .path
            .iter()
            .map(|spec| OnePath::of(spec, &runs, bares))
            .collect();
        Self {
            memory_mib: options.memory,
            touches_per_second: options.rate,
            pattern: if options.scan { "scan" } else { "random" },
            memory: crate::memory::STATEMENT,
            paths,
            failures,
            runs,
        }
    }
}

impl Report {
    /// Each target that was measured, and over which path.
    pub fn targets(&self) -> Vec<(String, Target)> {
        let of = |path: &OnePath| {
            let measured = path.targets.iter().filter(|target| target.is_measured());
            let named = measured.map(|target| (path.path.clone(), target.clone()));
            named.collect::<Vec<_>>()
        };
        self.paths.iter().flat_map(of).collect()
    }

    /// What did not succeed.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }
}

impl OnePath {
    fn of(spec: &PathSpec, runs: &[Run], bares: &[(String, Bare)]) -> Self {
        let path = spec.to_string();
        let bare = |value: fn(&Bare) -> f64| {
            let here = bares.iter().filter(|(of, _)| *of == path);
            Summary::of(&here.map(|(_, bare)| value(bare)).collect::<Vec<_>>())
        };
        let bare_p50_us = bare(|bare| bare.p50_us);
        let bare_bulk_mib_s = bare(|bare| bare.bulk_mib_s);
        let mut cases: Vec<Case> = Vec::new();
        let here: Vec<&Run> = runs.iter().filter(|run| run.path == path).collect();
        for run in &here {
            if !cases.contains(&run.case) {
                cases.push(run.case);
            }
        }
        cases.sort_by_key(|case| (case.peer == Peer::Ours, case.push, case.pattern as u8));
        let rows: Vec<Row> = cases
            .into_iter()
            .map(|case| Row::of(case, here.iter().copied().filter(|run| run.case == case)))
            .collect();
        let targets = Targets {
            rows: &rows,
            bare_p50_us,
            bare_bulk_mib_s,
            is_long: spec.rtt >= LONG,
        }
        .all();
        Self {
            path,
            bare_p50_us,
            bare_bulk_mib_s,
            rows,
            targets,
        }
    }
}

impl Row {
    fn of<'a>(case: Case, runs: impl Iterator<Item = &'a Run>) -> Self {
        let runs: Vec<&Run> = runs.collect();
        let touches = case.pattern != Pattern::Still;
        let mut all = Latencies::default();
        runs.iter().for_each(|run| all.merge(&run.latencies));
        let summary = |value: &dyn Fn(&Run) -> Option<f64>| {
            let values: Vec<f64> = runs.iter().filter_map(|run| value(run)).collect();
            Summary::of(&values)
        };
        Self {
            case,
            runs: runs.len(),
            waits: all.percentiles(),
            waits_log2: all.by_power_of_two(),
            p50_us: summary(&|run| touches.then_some(run.waits.p50_us)),
            p99_us: summary(&|run| touches.then_some(run.waits.p99_us)),
            served_p99_us: summary(&|run| {
                run.served
                    .filter(|_| touches)
                    .map(|served| served.p99 as f64)
            }),
            network_faults_percent: summary(&|run| run.network_faults().filter(|_| case.push)),
            touches_per_s: summary(&|run| touches.then_some(run.touches_per_s)),
            bulk_mib_s: summary(&|run| run.bulk_mib_s),
            total_ms: summary(&|run| run.total_ms),
            cutover_ms: summary(&|run| Some(run.cutover_ms)),
        }
    }
}

struct Targets<'a> {
    rows: &'a [Row],
    bare_p50_us: Option<Summary>,
    bare_bulk_mib_s: Option<Summary>,
    is_long: bool,
}

impl Targets<'_> {
    fn all(&self) -> Vec<Target> {
        let idle = self.row(Peer::Ours, true, false);
        let loaded = self.row(Peer::Ours, true, true);
        let still = self.row(Peer::Ours, false, true);
        let criu = self.row(Peer::Criu, true, true);
        let criu_still = self.row(Peer::Criu, false, true);
        let p50 = |row: Option<&Row>| row?.p50_us.map(|of| of.median);
        let p99 = |row: Option<&Row>| row?.p99_us.map(|of| of.median);
        let bulk = |row: Option<&Row>| row?.bulk_mib_s.map(|of| of.median);
        let faults = loaded.and_then(|row| row.network_faults_percent);
        let most = Bound::AtMost;
        vec![
            Target::ratio(
                "fault p50, loaded over idle",
                p50(loaded),
                p50(idle),
                most(1.5),
            ),
            Target::ratio(
                "fault p99, loaded over idle",
                p99(loaded),
                p99(idle),
                most(2.0),
            ),
            Target::ratio(
                "bulk with faults over bulk without",
                bulk(loaded),
                bulk(still),
                Bound::AtLeast(0.8),
            ),
            Target::value("fault p99, loaded, in us", p99(loaded), most(512.0)),
            Target::ratio(
                "fault p99, loaded, over CRIU's",
                p99(loaded),
                p99(criu),
                most(0.2),
            ),
            Target::ratio(
                "fault p50, idle, over QUIC alone",
                p50(idle),
                self.bare_p50_us.map(|of| of.median),
                most(1.5),
            ),
            Target::ratio(
                "bulk over QUIC alone",
                bulk(still),
                self.bare_bulk_mib_s.map(|of| of.median),
                Bound::AtLeast(0.75),
            ),
            Target::ratio(
                "bulk over CRIU's",
                bulk(still),
                bulk(criu_still),
                Bound::AtLeast(1.5),
            ),
            Target::ratio(
                "bulk with faults over CRIU's, long path",
                bulk(loaded).filter(|_| self.is_long),
                bulk(criu),
                Bound::AtLeast(10.0),
            ),
            Target::value(
                "network faults, percent",
                faults.map(|of| of.median),
                most(21.0),
            ),
        ]
    }

    fn row(&self, peer: Peer, touches: bool, push: bool) -> Option<&Row> {
        self.rows.iter().find(|row| {
            let case = row.case;
            case.peer == peer && case.push == push && (case.pattern != Pattern::Still) == touches
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let touches = match self.touches_per_second {
            0 => "one after the other".to_owned(),
            rate => format!("{rate} per second"),
        };
        let others = self.runs.iter().map(|run| run.used_by_others);
        writeln!(
            f,
            "\n{} MiB, {} touches, {touches}; median (smallest to largest of the runs)\n{}\n\
             others used up to {:.0} % of the machine's CPUs during a run",
            self.memory_mib,
            self.pattern,
            self.memory,
            others.fold(0.0, f64::max) * 100.0
        )?;
        for path in &self.paths {
            write!(f, "\n{}\n{}", path.path, table(&path.rows))?;
            for target in &path.targets {
                writeln!(f, "{target}")?;
            }
        }
        self.failures
            .iter()
            .try_for_each(|failure| writeln!(f, "failed: {failure}"))
    }
}

fn table(rows: &[Row]) -> String {
    let mut table = Table::default();
    table.row([
        "",
        "n",
        "waits",
        "p50 us",
        "p90",
        "p99 us",
        "p99.9",
        "served p99",
        "waits %",
        "bulk MiB/s",
        "touches/s",
        "cutover ms",
        "total ms",
    ]);
    for row in rows {
        let title = format!("{}, {}", row.case.peer, row.case.title());
        let spread = |of: Option<Summary>| of.map_or("-".to_owned(), |of| of.to_string());
        let touches = row.case.pattern != Pattern::Still;
        let shown = |us: f64| {
            if touches {
                format!("{us:.0}")
            } else {
                "-".to_owned()
            }
        };
        table.row([
            &title,
            &row.runs.to_string(),
            &row.waits.count.to_string(),
            &spread(row.p50_us),
            &shown(row.waits.p90_us),
            &spread(row.p99_us),
            &shown(row.waits.p999_us),
            &spread(row.served_p99_us),
            &spread(row.network_faults_percent),
            &spread(row.bulk_mib_s),
            &spread(row.touches_per_s),
            &spread(row.cutover_ms),
            &spread(row.total_ms),
        ]);
    }
    table.render()
}
