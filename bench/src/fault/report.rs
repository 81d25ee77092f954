//! What the runs of `bench fault` come to.

use serde::Serialize;
use tests::path::PathSpec;
use tests::touch::Pattern;

use super::judge::Judge;
use super::run::Run;
use super::{BareRun, Case, Measured, Setting};
use crate::bare::Bare;
use crate::path::ProbedPath;
use crate::peer::Peer;
use crate::runs::Failure;
use crate::stats::Summary;
use crate::targets::Target;

/// Everything that goes to the JSON file.
#[derive(Debug, Serialize)]
pub struct Report {
    pub memory: &'static str,
    pub paths: Vec<ProbedPath>,
    pub tables: Vec<Setup>,
    /// Moves that did not succeed.
    pub failures: Vec<Failure>,
    pub runs: Vec<Run>,
}

/// The runs of one setting.
#[derive(Debug, Serialize)]
pub struct Setup {
    #[serde(flatten)]
    pub setting: Setting,
    /// What QUIC alone does, in microseconds and MiB/s.
    pub bare_p50_us: Option<Summary>,
    pub bare_bulk_mib_s: Option<Summary>,
    pub rows: Vec<Row>,
    pub targets: Vec<Target>,
}

/// All runs of one kind: the median of each run's, and their spread.
#[derive(Debug, Serialize)]
pub struct Row {
    pub case: Case,
    pub runs: usize,
    /// Of all runs together.
    pub waits: u64,
    /// Waits of all runs together, by powers of two of nanoseconds.
    pub waits_log2: Vec<u64>,
    pub p50_us: Option<Summary>,
    pub p90_us: Option<Summary>,
    pub p99_us: Option<Summary>,
    pub p999_us: Option<Summary>,
    /// The same from reading the fault to installing the page, without the wake-up of the workload.
    pub served_p50_us: Option<Summary>,
    pub served_p99_us: Option<Summary>,
    pub install_p50_us: Option<Summary>,
    pub install_max_us: Option<Summary>,
    pub cpu_us_per_fault: Option<Summary>,
    pub network_faults_percent: Option<Summary>,
    pub touches_per_s: Option<Summary>,
    pub bulk_mib_s: Option<Summary>,
    pub wire_mib_s: Option<Summary>,
    pub total_ms: Option<Summary>,
    pub cutover_ms: Option<Summary>,
}

impl Setting {
    /// A heading.
    pub fn title(&self) -> String {
        let pattern = if self.scan { "in order" } else { "at random" };
        let pace = match self.rate {
            0 => "one after the other".to_owned(),
            rate => format!("{rate} per second"),
        };
        let mut title = format!(
            "{} MiB touched {pattern}, {pace}, over {}",
            self.memory_mib, self.path
        );
        if let Some(bytes) = self.udp_payload {
            title += &format!(", UDP payload {bytes}");
        }
        title
    }
}

impl Report {
    /// Puts together what was measured.
    pub fn of(measured: Measured) -> Self {
        let of_runs = measured.runs.iter().map(|run| &run.setting);
        let of_bares = measured.bares.iter().map(|run| &run.setting);
        let mut settings: Vec<Setting> = Vec::new();
        for setting in of_runs.chain(of_bares) {
            if !settings.contains(setting) {
                settings.push(setting.clone());
            }
        }
        let tables = settings.into_iter();
        let tables = tables.map(|setting| Setup::of(setting, &measured.runs, &measured.bares));
        Self {
            memory: crate::memory::STATEMENT,
            tables: tables.collect(),
            paths: measured.paths,
            failures: measured.failures,
            runs: measured.runs,
        }
    }

    /// Each target that was measured, and over which path.
    pub fn targets(&self) -> Vec<(String, Target)> {
        let of = |table: &Setup| {
            let named = table.targets.iter();
            let named = named.map(|target| (table.setting.path.clone(), target.clone()));
            named.collect::<Vec<_>>()
        };
        self.tables.iter().flat_map(of).collect()
    }

    /// What did not succeed.
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }
}

impl Setup {
    fn of(setting: Setting, runs: &[Run], bares: &[BareRun]) -> Self {
        let bare = |value: fn(&Bare) -> f64| {
            let here = bares.iter().filter(|run| run.setting == setting);
            Summary::of(&here.map(|run| value(&run.bare)).collect::<Vec<_>>())
        };
        let bare_p50_us = bare(|bare| bare.p50_us);
        let bare_bulk_mib_s = bare(|bare| bare.bulk_mib_s);
        let mut cases: Vec<Case> = Vec::new();
        let here: Vec<&Run> = runs.iter().filter(|run| run.setting == setting).collect();
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
        let targets = Judge {
            rows: &rows,
            bare_p50_us,
            bare_bulk_mib_s,
            path: setting.path.parse().unwrap_or_else(|_| PathSpec::default()),
            rate: setting.rate,
        }
        .all();
        Self {
            setting,
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
        let mut waits_log2 = Vec::new();
        for run in runs.iter().filter(|_| touches) {
            waits_log2.resize(run.waits_log2.len().max(waits_log2.len()), 0);
            let added = waits_log2.iter_mut().zip(&run.waits_log2);
            added.for_each(|(sum, count)| *sum += count);
        }
        let summary = |value: &dyn Fn(&Run) -> Option<f64>| {
            let values: Vec<f64> = runs.iter().filter_map(|run| value(run)).collect();
            Summary::of(&values)
        };
        let felt = |value: fn(&Run) -> f64| summary(&|run| touches.then(|| value(run)));
        let served = |value: fn(&tests::record::Latency) -> u64| {
            summary(&|run| {
                let served = run.served.as_ref().filter(|_| touches);
                served.map(|served| value(served) as f64)
            })
        };
        Self {
            case,
            runs: runs.len(),
            waits: runs.iter().map(|run| run.waits.count).sum(),
            waits_log2,
            p50_us: felt(|run| run.waits.p50_us),
            p90_us: felt(|run| run.waits.p90_us),
            p99_us: felt(|run| run.waits.p99_us),
            p999_us: felt(|run| run.waits.p999_us),
            served_p50_us: served(|served| served.p50),
            served_p99_us: served(|served| served.p99),
            install_p50_us: summary(&|run| Some(run.installs?.p50 as f64)),
            install_max_us: summary(&|run| Some(run.installs?.max as f64)),
            cpu_us_per_fault: summary(&|run| Some(run.cpu_us_per_fault?.iter().sum())),
            network_faults_percent: summary(&|run| run.network_faults().filter(|_| case.push)),
            touches_per_s: felt(|run| run.touches_per_s),
            bulk_mib_s: summary(&|run| run.bulk_mib_s),
            wire_mib_s: summary(&|run| run.wire_mib_s),
            total_ms: summary(&|run| run.total_ms),
            cutover_ms: summary(&|run| Some(run.cutover_ms)),
        }
    }

    /// What tables call it.
    pub fn title(&self) -> String {
        format!("{}, {}", self.case.peer, self.case.title())
    }
}
