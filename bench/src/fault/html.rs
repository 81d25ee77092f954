//! The report as a part of a page.

use super::report::{Report, Setup};
use super::table;
use crate::page::{escaped, list, verbatim};
use crate::svg;

/// Everything but the page around it.
pub fn section(report: &Report) -> String {
    let mut text = format!(
        "<h1>Waiting for pages</h1>{}",
        list(&table::conditions(report))
    );
    for setup in &report.tables {
        text += &one(setup);
    }
    for failure in report.failures() {
        text += &format!("<p>Failed: {}</p>", escaped(&failure.what));
    }
    text
}

fn one(setup: &Setup) -> String {
    let waiting = setup.rows.iter().filter(|row| row.waits > 0);
    let rows: Vec<_> = waiting
        .map(|row| {
            (
                row.title(),
                row.waits_log2.clone(),
                row.case.peer.to_string(),
            )
        })
        .collect();
    let named: Vec<_> = rows
        .iter()
        .map(|(title, counts, class)| (&title[..], counts.clone(), class.clone()))
        .collect();
    let targets: Vec<String> = setup.targets.iter().map(ToString::to_string).collect();
    let bare =
        table::bare(setup).map_or(String::new(), |line| format!("<p>{}</p>", escaped(&line)));
    format!(
        "<h2>{}</h2>{}{bare}{}{}",
        escaped(&setup.setting.title()),
        crate::page::table(&table::cells(setup)),
        svg::histogram_figure("Waits for pages, part of all", &named),
        verbatim(&targets.join("\n")),
    )
}
