//! What the moves come to: medians and spreads by path, workload and peer, and the targets.

use serde::Serialize;

use super::figures::{FIGURES, Figure};
use super::run::Run;
use super::{Measured, judge};
use crate::path::ProbedPath;
use crate::peer::Peer;
use crate::runs::Failure;
use crate::stats::Summary;
use crate::targets::{Bound, Target};
use crate::workload::Kind;

/// The rate over a long path is to be this part of that over a short one.
const FAR_OVER_NEAR: f64 = 0.85;

/// Everything that is written.
#[derive(Debug, Serialize)]
pub struct Report {
    pub memory: &'static str,
    /// The congestion control of the kernel's TCP, which CRIU and copies use.
    pub tcp: String,
    /// Paths with what the probes said of them.
    pub paths: Vec<ProbedPath>,
    pub tables: Vec<Comparison>,
    /// Targets that set one path against another.
    pub across: Vec<Target>,
    /// Moves that did not succeed.
    pub failures: Vec<Failure>,
    pub runs: Vec<Run>,
}

/// What was the same for all peers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Point {
    pub path: String,
    pub workload: Kind,
    pub memory_mib: u64,
    /// Commands or touches per second.
    pub rate: u32,
}

/// All moves at one point.
#[derive(Debug, Serialize)]
pub struct Comparison {
    #[serde(flatten)]
    pub point: Point,
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

impl Point {
    fn of(run: &Run) -> Self {
        Self {
            path: run.path.clone(),
            workload: run.workload,
            memory_mib: run.memory_mib,
            rate: run.rate,
        }
    }

    /// A heading.
    pub fn title(&self) -> String {
        let Self {
            path,
            workload,
            memory_mib,
            rate,
        } = self;
        let what = match (workload, rate) {
            (Kind::Still, _) => return format!("{workload}, {memory_mib} MiB over {path}"),
            (Kind::Redis | Kind::RedisZipf, _) => "commands",
            (Kind::Touch | Kind::Scan, _) => "touches",
        };
        let pace = match rate {
            0 => format!("as many {what} as possible"),
            rate => format!("{rate} {what}/s"),
        };
        format!("{workload}, {memory_mib} MiB, {pace}, over {path}")
    }
}

impl Report {
    /// Puts together what was measured.
    pub fn of(measured: Measured) -> Self {
        let tcp = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control");
        let mut points: Vec<Point> = Vec::new();
        for run in &measured.moves {
            let point = Point::of(run);
            if !points.contains(&point) {
                points.push(point);
            }
        }
        let tables = points.iter();
        let tables = tables.map(|point| Comparison::of(point, &measured.moves));
        let mut report = Self {
            memory: crate::memory::STATEMENT,
            tcp: tcp.unwrap_or_default().trim().to_owned(),
            tables: tables.collect(),
            across: Vec::new(),
            paths: measured.paths,
            failures: measured.failures,
            runs: measured.moves,
        };
        report.across = report.background_over_distance();
        report
    }

    /// Each target that was measured, and over which path.
    pub fn targets(&self) -> Vec<(String, Target)> {
        let of = |table: &Comparison| {
            let targets = table.targets.iter();
            let named = targets.map(|target| (table.point.path.clone(), target.clone()));
            named.collect::<Vec<_>>()
        };
        let across = self.across.iter();
        let across = across.map(|target| ("both".to_owned(), target.clone()));
        self.tables.iter().flat_map(of).chain(across).collect()
    }

    /// What did not succeed.
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// The rate over a long path by that over a short one which is otherwise the same.
    fn background_over_distance(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for long in &self.tables {
            for short in self
                .tables
                .iter()
                .filter(|short| short.is_near_form_of(long))
            {
                let (from, to) = (&short.point, &long.point);
                let what = format!("bulk, {}, {} over {}", to.workload, to.path, from.path);
                targets.push(Target::ratio(
                    &what,
                    long.summary("bulk", Peer::Ours),
                    short.summary("bulk", Peer::Ours),
                    Bound::AtLeast(FAR_OVER_NEAR),
                ));
                // The rate is that of the middle of a move. A push that takes long to get up to speed shows here.
                targets.push(Target::ratio(
                    &format!("{what}, total time"),
                    long.summary("total", Peer::Ours),
                    short.summary("total", Peer::Ours),
                    Bound::AtMost(1.0 / FAR_OVER_NEAR),
                ));
            }
        }
        targets
    }
}

impl Comparison {
    /// Whether this is the same but for the distance. A workload that touches pages waits for each as long as the
    /// distance is, so that only one that does not shows what it does to the push.
    fn is_near_form_of(&self, long: &Self) -> bool {
        let spec = |table: &Self| table.point.path.parse::<tests::path::PathSpec>();
        let (Ok(near), Ok(far)) = (spec(self), spec(long)) else {
            return false;
        };
        let same = Point {
            path: long.point.path.clone(),
            ..self.point.clone()
        } == long.point;
        let by_distance = near.rtt.is_zero() && !far.rtt.is_zero();
        let is_still = self.point.workload == Kind::Still;
        same && is_still && by_distance && near.rate == far.rate && near.loss == far.loss
    }

    fn of(point: &Point, runs: &[Run]) -> Self {
        let here = || runs.iter().filter(|run| Point::of(run) == *point);
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
            rows: rows.filter(Row::has_values).collect(),
            peers,
            targets: Vec::new(),
            point: point.clone(),
        };
        comparison.targets = judge::targets(&comparison);
        comparison
    }

    /// What one figure of one peer comes to.
    pub fn summary(&self, key: &str, peer: Peer) -> Option<Summary> {
        let column = self.peers.iter().position(|one| *one == peer)?;
        let row = self.rows.iter().find(|row| row.key == key)?;
        row.values[column]
    }
}

impl Row {
    fn has_values(&self) -> bool {
        self.values.iter().any(Option::is_some)
    }
}
