//! The report for people who read text.

use std::fmt;

use super::report::{Report, Row, Setup};
use super::run::Run;
use crate::path::ProbedPath;
use crate::quiet;
use crate::stats::Summary;
use crate::table::Table;

/// Columns, and what is in them.
type Column = (&'static str, fn(&Row) -> Option<Summary>);

const COLUMNS: [Column; 16] = [
    ("p50 us", |row| row.p50_us),
    ("p90", |row| row.p90_us),
    ("p99", |row| row.p99_us),
    ("p99.9", |row| row.p999_us),
    ("served p50", |row| row.served_p50_us),
    ("served p99", |row| row.served_p99_us),
    ("install p50", |row| row.install_p50_us),
    ("install max", |row| row.install_max_us),
    ("CPU us/fault", |row| row.cpu_us_per_fault),
    ("waits %", |row| row.network_faults_percent),
    ("bulk MiB/s", |row| row.bulk_mib_s),
    ("wire MiB/s", |row| row.wire_mib_s),
    ("touches/s", |row| row.touches_per_s),
    ("cutover ms", |row| row.cutover_ms),
    ("total ms", |row| row.total_ms),
    ("runs", |row| Some(Summary::single(row.runs as f64))),
];

/// What stands in front of the tables.
pub fn conditions(report: &Report) -> Vec<String> {
    let mut lines = vec![
        "median (smallest to largest of the runs)".to_owned(),
        report.memory.to_owned(),
        "waits as the workload felt them; served: from reading the fault to its page being in place; install: what the \
         destination's kernel took to put pages in place, one for a fault, up to 16 of a push (the longest are of cold \
         memory, or while another had the CPU); CPU us/fault: of both programs, from the move to the last touch of a run \
         in which nothing is pushed"
            .to_owned(),
        quiet::statement(report.runs.iter().map(Run::disturbance)),
    ];
    lines.extend(report.paths.iter().map(ProbedPath::line));
    lines
}

/// One setting: figures down, kinds of runs across, for there are many figures.
pub fn table(setup: &Setup) -> String {
    let mut table = Table::default();
    for row in cells(setup) {
        table.add(row);
    }
    table.render()
}

/// The rows of the table, the first its heading.
pub fn cells(setup: &Setup) -> Vec<Vec<String>> {
    let mut heading = vec![String::new()];
    heading.extend(setup.rows.iter().map(Row::title));
    let mut rows = vec![heading];
    for (name, value) in COLUMNS {
        let values: Vec<_> = setup.rows.iter().map(value).collect();
        if values.iter().all(Option::is_none) {
            continue;
        }
        let mut row = vec![name.to_owned()];
        let shown = |of: &Option<Summary>| match of {
            None => "-".to_owned(),
            Some(of) if name == "runs" => of.median.to_string(),
            Some(of) => of.to_string(),
        };
        row.extend(values.iter().map(shown));
        rows.push(row);
    }
    rows
}

/// QUIC alone in one line.
pub fn bare(setup: &Setup) -> Option<String> {
    let (p50, bulk) = (setup.bare_p50_us?, setup.bare_bulk_mib_s?);
    Some(format!(
        "QUIC alone: round trip of a fault p50 {p50} us, bulk {bulk} MiB/s"
    ))
}

/// Waits by powers of two, a line for each.
pub fn histogram(row: &Row) -> String {
    let total: u64 = row.waits_log2.iter().sum();
    let lines = row.waits_log2.iter().enumerate();
    let lines = lines
        .filter(|(_, count)| **count > 0)
        .map(|(power, count)| {
            let part = *count as f64 / total as f64;
            let bar = "#".repeat((part * 50.0).ceil() as usize);
            let [from, to] = [power, power + 1].map(crate::svg::time);
            format!(
                "  {from:>5} to {to:>5} {count:>7}  {:5.1} %  {bar}\n",
                part * 100.0
            )
        });
    format!(
        "{}, {} waits\n{}",
        row.title(),
        row.waits,
        lines.collect::<String>()
    )
}

impl Report {
    /// As Markdown.
    pub fn markdown(&self) -> String {
        let mut text = String::from("\n# Waiting for pages\n\n");
        for line in conditions(self) {
            text += &format!("- {line}\n");
        }
        for setup in &self.tables {
            text += &format!("\n## {}\n\n", setup.setting.title());
            text += &crate::page::markdown_table(&cells(setup));
            text += &format!("\n```\n{}```\n", below(setup));
        }
        for failure in self.failures() {
            text += &format!("\nfailed: {}\n", failure.what);
        }
        text
    }
}

/// What stands below a table.
pub fn below(setup: &Setup) -> String {
    let mut text = bare(setup).map_or(String::new(), |line| line + "\n");
    for target in &setup.targets {
        text += &format!("{target}\n");
    }
    for row in setup.rows.iter().filter(|row| row.waits > 0) {
        text += &histogram(row);
    }
    text
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f)?;
        for line in conditions(self) {
            writeln!(f, "{line}")?;
        }
        for setup in &self.tables {
            let title = setup.setting.title();
            write!(f, "\n{title}\n{}{}", table(setup), below(setup))?;
        }
        let mut failures = self.failures().iter();
        failures.try_for_each(|failure| writeln!(f, "failed: {}", failure.what))
    }
}
