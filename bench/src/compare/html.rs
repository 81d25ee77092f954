//! The report as a part of a page.

use std::fmt::Write;

use super::report::{Comparison, Report};
use super::{glance, markdown};
use crate::page::{escaped, list, verbatim};
use crate::svg;

/// Everything but the page around it.
pub fn sections(report: &Report) -> String {
    let mut text = format!(
        "<h1>Moves side by side</h1>{}",
        list(&markdown::conditions(report))
    );
    for (title, rows) in glance::tables(report) {
        text += &format!("<h3>{}</h3>{}", escaped(&title), crate::page::table(&rows));
    }
    for table in &report.tables {
        text += &comparison(table);
    }
    text += &targets("Across paths", &report.across);
    for failure in report.failures() {
        text += &format!("<p>Failed: {}</p>", escaped(&failure.what));
    }
    text
}

fn comparison(table: &Comparison) -> String {
    let mut text = format!(
        "<h2>{}</h2><div class=\"plots\">",
        escaped(&table.point.title())
    );
    for row in &table.rows {
        let bars: Vec<_> = table
            .peers
            .iter()
            .zip(&row.values)
            .map(|(peer, value)| (peer.title(), *value, peer.to_string()))
            .collect();
        let unit = match row.figure.unit {
            "" => String::new(),
            unit => format!(", {unit}"),
        };
        write!(
            text,
            "<figure><figcaption>{}{unit}</figcaption>{}</figure>",
            escaped(row.figure.title),
            svg::bars(&bars)
        )
        .expect("writing to a String does not fail");
    }
    text += "</div>";
    text += &histogram(table);
    text + &targets("Targets", &table.targets)
}

fn histogram(table: &Comparison) -> String {
    let rows: Vec<_> = table
        .peers
        .iter()
        .zip(&table.waits_log2)
        .filter(|(_, counts)| !counts.is_empty())
        .map(|(peer, counts)| (peer.title(), counts.clone(), peer.to_string()))
        .collect();
    svg::histogram_figure("Waits for pages, part of all", &rows)
}

fn targets(title: &str, targets: &[crate::targets::Target]) -> String {
    if targets.is_empty() {
        return String::new();
    }
    let lines: Vec<String> = targets.iter().map(ToString::to_string).collect();
    format!("<h3>{title}</h3>{}", verbatim(&lines.join("\n")))
}
