//! What the moves come to: medians and spreads by path, workload and peer, and the targets.

use serde::Serialize;
use tests::path::PathSpec;
use tests::path::probe::Measured;

use super::CompareOptions;
use super::figures::{FIGURES, Figure};
use super::run::Run;
use crate::peer::Peer;
use crate::stats::Summary;
use crate::targets::{Bound, Target};
use crate::workload::Kind;

/// Everything that is written.
#[derive(Debug, Serialize)]
pub struct Report {
    pub memory_mib: u64,
    pub rate: u32,
    pub memory: &'static str,
    /// The congestion control of the kernel's TCP, which CRIU and copies use.
    pub tcp: String,
    /// Paths with what the probes said of them.
    pub paths: Vec<ProbedPath>,
    pub tables: Vec<Comparison>,
    /// Targets that set one path against another.
    pub across: Vec<Target>,
    /// Moves that did not succeed.
    pub failures: Vec<String>,
    pub runs: Vec<Run>,
}

/// A path and its probes.
#[derive(Debug, Serialize)]
pub struct ProbedPath {
    pub path: String,
    #[serde(skip)]
    spec: PathSpec,
    pub measured: Measured,
}

/// One workload over one path.
#[derive(Debug, Serialize)]
pub struct Comparison {
    pub path: String,
    pub workload: Kind,
    pub peers: Vec<Peer>,
    pub rows: Vec<Row>,
    /// Waits of all runs of each peer, by powers of two of nanoseconds.
    pub waits_log2: Vec<Vec<u64>>,
    pub targets: Vec<Target>,
}

/// One figure for each peer.
#[derive(Debug, Serialize)]
pub struct Row {
    #[serde(skip)]
    pub figure: Figure,
    pub key: &'static str,
    pub values: Vec<Option<Summary>>,
    /// How many runs each is of.
    pub counts: Vec<usize>,
}

impl Report {
    /// An empty report.
    pub fn new(options: &CompareOptions) -> Self {
        let tcp = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control");
        Self {
            memory_mib: options.memory,
            rate: options.rate,
            memory: crate::memory::STATEMENT,
            tcp: tcp.unwrap_or_default().trim().to_owned(),
            paths: Vec::new(),
            tables: Vec::new(),
            across: Vec::new(),
            failures: Vec::new(),
            runs: Vec::new(),
        }
    }

    /// Notes what the probes said of a path.
    pub fn probed(&mut self, spec: &PathSpec, measured: Measured) {
        self.paths.push(ProbedPath {
            path: spec.to_string(),
            spec: *spec,
            measured,
        });
    }

    /// Makes the tables once all runs are there.
    pub fn conclude(&mut self) {
        let mut tables: Vec<Comparison> = Vec::new();
        for run in &self.runs {
            let known =
                |table: &Comparison| table.path == run.path && table.workload == run.workload;
            if !tables.iter().any(known) {
                tables.push(Comparison::of(&run.path, run.workload, &self.runs));
            }
        }
        self.tables = tables;
        self.across = self.background_over_distance();
    }

    /// Each target that was measured, and over which path.
    pub fn targets(&self) -> Vec<(String, Target)> {
        let of = |table: &Comparison| {
            let targets = table.targets.iter();
            let named = targets.map(|target| (table.path.clone(), target.clone()));
            named.collect::<Vec<_>>()
        };
        let across = self.across.iter();
        let across = across.map(|target| ("both".to_owned(), target.clone()));
        self.tables.iter().flat_map(of).chain(across).collect()
    }

    /// What did not succeed.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// The rate over a long path by that over a short one which is otherwise the same.
    fn background_over_distance(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for long in self.paths.iter().filter(|path| !path.spec.rtt.is_zero()) {
            let is_short_form = |short: &&ProbedPath| {
                let (one, other) = (short.spec, long.spec);
                one.rtt.is_zero() && one.rate == other.rate && one.loss == other.loss
            };
            let Some(short) = self.paths.iter().find(is_short_form) else {
                continue;
            };
            for table in self.tables.iter().filter(|table| table.path == long.path) {
                let over = self
                    .tables
                    .iter()
                    .find(|other| other.path == short.path && other.workload == table.workload);
                targets.push(Target::ratio(
                    &format!(
                        "bulk, {}, {} over {}",
                        table.workload, long.path, short.path
                    ),
                    table.median("bulk", Peer::Ours),
                    over.and_then(|table| table.median("bulk", Peer::Ours)),
                    Bound::AtLeast(0.85),
                ));
            }
        }
        targets
    }
}

impl Comparison {
    fn of(path: &str, workload: Kind, runs: &[Run]) -> Self {
        let here = || {
            runs.iter()
                .filter(|run| run.path == path && run.workload == workload)
        };
        let mut peers: Vec<Peer> = here().map(|run| run.peer).collect();
        peers.sort_unstable();
        peers.dedup();
        let rows = FIGURES.iter().map(|figure| {
            let of = |peer: &Peer| {
                let its = here().filter(|run| run.peer == *peer);
                its.filter_map(figure.get).collect::<Vec<f64>>()
            };
            let values: Vec<Vec<f64>> = peers.iter().map(of).collect();
            Row {
                figure: *figure,
                key: figure.key,
                counts: values.iter().map(Vec::len).collect(),
                values: values.iter().map(|values| Summary::of(values)).collect(),
            }
        });
        let waits = |peer: &Peer| {
            let mut sums = Vec::new();
            for run in here().filter(|run| run.peer == *peer) {
                sums.resize(run.waits_log2.len().max(sums.len()), 0);
                let added = sums.iter_mut().zip(&run.waits_log2);
                added.for_each(|(sum, count)| *sum += count);
            }
            sums
        };
        let mut comparison = Self {
            waits_log2: peers.iter().map(waits).collect(),
            path: path.to_owned(),
            workload,
            rows: rows.filter(Row::has_values).collect(),
            peers,
            targets: Vec::new(),
        };
        comparison.targets = comparison.all_targets();
        comparison
    }

    fn median(&self, key: &str, peer: Peer) -> Option<f64> {
        let column = self.peers.iter().position(|one| *one == peer)?;
        let row = self.rows.iter().find(|row| row.key == key)?;
        Some(row.values[column]?.median)
    }

    fn all_targets(&self) -> Vec<Target> {
        let ours = |key| self.median(key, Peer::Ours);
        let over = |what: &str, key, peer, bound| {
            Target::ratio(what, ours(key), self.median(key, peer), bound)
        };
        let most = Bound::AtMost;
        let least = Bound::AtLeast;
        vec![
            over("cutover over CRIU's", "cutover", Peer::Criu, most(1.0)),
            over("total over CRIU's", "total", Peer::Criu, most(1.0)),
            over(
                "brownout over CRIU's",
                "brownout",
                Peer::Criu,
                most(1.0 / 3.0),
            ),
            over("memory rate over CRIU's", "bulk", Peer::Criu, least(1.5)),
            over(
                "touches per second over CRIU's",
                "touches",
                Peer::Criu,
                least(10.0),
            ),
            over("wait p99 over CRIU's", "p99", Peer::Criu, most(0.2)),
            over(
                "CPU over that of CRIU with TLS",
                "cpu",
                Peer::CriuTls,
                most(1.0),
            ),
            Target::ratio(
                "total, compression as it pays over none",
                ours("total"),
                self.median("total", Peer::OursPlain),
                most(1.05),
            ),
            Target::value("touches that waited, percent", ours("waits"), most(21.0)),
            Target::value("wire bytes over resident bytes", ours("wire"), most(0.5)),
            Target::value(
                "peak RSS of page-server, MiB",
                ours("source_rss"),
                most(64.0),
            ),
            Target::value(
                "peak RSS of lazy-restorer, MiB",
                ours("destination_rss"),
                most(64.0),
            ),
        ]
        .into_iter()
        .filter(Target::is_measured)
        .collect()
    }
}

impl Row {
    fn has_values(&self) -> bool {
        self.values.iter().any(Option::is_some)
    }
}
