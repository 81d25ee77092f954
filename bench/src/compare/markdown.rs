//! The report for people who read text.

use std::fmt::Write;

use super::glance;
use super::report::{Comparison, Report, Row};
use super::run::Run;
use crate::path::ProbedPath;
use crate::quiet;

/// The whole report as Markdown.
pub fn render(report: &Report) -> String {
    let mut text = String::new();
    write_all(&mut text, report).expect("writing to a String does not fail");
    text
}

fn write_all(text: &mut String, report: &Report) -> std::fmt::Result {
    writeln!(text, "\n# Moves side by side\n")?;
    for line in conditions(report) {
        writeln!(text, "- {line}")?;
    }
    for (title, rows) in glance::tables(report) {
        writeln!(text, "\n## At a glance: {title}\n")?;
        text.push_str(&crate::page::markdown_table(&rows));
    }
    for table in &report.tables {
        writeln!(text, "\n## {}\n", table.point.title())?;
        write_table(text, table)?;
        write_targets(text, &table.targets)?;
    }
    write_targets(text, &report.across)?;
    for failure in report.failures() {
        writeln!(text, "\nfailed: {}", failure.what)?;
    }
    Ok(())
}

/// Under which conditions all of it was measured.
pub fn conditions(report: &Report) -> Vec<String> {
    let mut lines = vec![
        "median (smallest to largest; number of moves), peers in turns on one machine, first in turn changing"
            .to_owned(),
        report.memory.to_owned(),
        format!("TCP of CRIU and of copies: the kernel's, congestion control {}", report.tcp),
        "rates are those of the middle of a move; MiB/s of memory count what arrived, MiB/s on the wire what the path \
         carried for it, which is less where memory is compressed"
            .to_owned(),
        "peak RSS: the largest program on a host, with the keeper and init it started; CRIU as it runs for both sides, but \
         not its forks, which turn into the workload"
            .to_owned(),
        "wire bytes by the source's device: on a path that is not emulated, packets leave it before they are cut to \
         size, and headers count once for each batch"
            .to_owned(),
    ];
    lines.push(quiet::statement(report.runs.iter().map(Run::disturbance)));
    lines.extend(report.paths.iter().map(ProbedPath::line));
    lines
}

fn write_table(text: &mut String, table: &Comparison) -> std::fmt::Result {
    let titles: Vec<&str> = table.peers.iter().map(|peer| peer.title()).collect();
    writeln!(text, "| | {} |", titles.join(" | "))?;
    writeln!(text, "| --- |{}", " ---: |".repeat(titles.len()))?;
    for row in &table.rows {
        let name = match row.figure.unit {
            "" => row.figure.title.to_owned(),
            unit => format!("{}, {unit}", row.figure.title),
        };
        writeln!(text, "| {name} | {} |", cells(row).join(" | "))?;
    }
    writeln!(text)
}

fn cells(row: &Row) -> Vec<String> {
    let cell = |(value, count): (&Option<crate::stats::Summary>, &usize)| {
        value.map_or("-".to_owned(), |of| {
            format!("{}; {count})", of.to_string().trim_end_matches(')'))
        })
    };
    row.values.iter().zip(&row.counts).map(cell).collect()
}

fn write_targets(text: &mut String, targets: &[crate::targets::Target]) -> std::fmt::Result {
    if targets.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n```")?;
    for target in targets {
        writeln!(text, "{target}")?;
    }
    writeln!(text, "```")
}
