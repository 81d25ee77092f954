//! The figures that matter most, one table each, with a row for each point that was measured: so that what changes
//! with the path, the workload or the size is seen at once.

use super::report::{Comparison, Report};
use crate::peer::Peer;

/// Their keys.
const KEYS: [&str; 7] = [
    "cutover",
    "client_gap",
    "brownout",
    "total",
    "bulk",
    "wire",
    "cpu",
];

/// A title and rows of cells, the first row a heading. Nothing when there is but one point.
pub fn tables(report: &Report) -> Vec<(String, Vec<Vec<String>>)> {
    if report.tables.len() < 2 {
        return Vec::new();
    }
    let mut peers: Vec<Peer> = report
        .tables
        .iter()
        .flat_map(|table| table.peers.clone())
        .collect();
    peers.sort_unstable();
    peers.dedup();
    let of = |key: &&str| {
        let rows = report.tables.iter().flat_map(|table| table.rows.iter());
        let figure = rows
            .map(|row| row.figure)
            .find(|figure| figure.key == *key)?;
        let title = match figure.unit {
            "" => figure.title.to_owned(),
            unit => format!("{}, {unit}", figure.title),
        };
        Some((title, rows_of(&report.tables, key, &peers)))
    };
    KEYS.iter().filter_map(of).collect()
}

fn rows_of(tables: &[Comparison], key: &str, peers: &[Peer]) -> Vec<Vec<String>> {
    let mut heading = vec![String::new()];
    heading.extend(peers.iter().map(|peer| peer.title().to_owned()));
    let mut rows = vec![heading];
    for table in tables {
        let values: Vec<_> = peers.iter().map(|peer| table.summary(key, *peer)).collect();
        if values.iter().all(Option::is_none) {
            continue;
        }
        let mut row = vec![table.point.title()];
        let shown = |of: &Option<crate::stats::Summary>| {
            of.map_or("-".to_owned(), |of| {
                let digits = if of.max < 10.0 { 2 } else { 0 };
                format!("{:.digits$}", of.median)
            })
        };
        row.extend(values.iter().map(shown));
        rows.push(row);
    }
    rows
}
