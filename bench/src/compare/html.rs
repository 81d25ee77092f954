//! The report as one page without anything from elsewhere.

use std::fmt::Write;

use super::markdown;
use super::report::{Comparison, Report};
use super::svg;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}\
h2{margin-top:3rem;border-bottom:1px solid #ccc}.plots{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0}\
figcaption{font-weight:600}svg{font:12px system-ui,sans-serif}svg line{stroke:#222;stroke-width:1.5}\
.ours{fill:#2a7f62}.criu{fill:#c2703d}.criu-tls{fill:#d9a441}.stop-and-copy{fill:#8a8a8a}\
pre{background:#f4f4f4;padding:.8rem;overflow-x:auto}li{margin:.2rem 0}";

/// The whole page.
pub fn render(report: &Report) -> String {
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Moving {0} MiB</title>\
         <style>{STYLE}</style><h1>Moving {0} MiB</h1><ul>",
        report.memory_mib
    );
    let mut put = |text: &str| page.push_str(text);
    for line in markdown::conditions(report) {
        put(&format!("<li>{}</li>", escaped(&line)));
    }
    put("</ul>");
    for table in &report.tables {
        put(&comparison(table));
    }
    put(&targets("Across paths", &report.across));
    for failure in &report.failures {
        put(&format!("<p>Failed: {}</p>", escaped(failure)));
    }
    page + "</html>\n"
}

fn comparison(table: &Comparison) -> String {
    let mut text = format!(
        "<h2>{} over {}</h2><div class=\"plots\">",
        table.workload,
        escaped(&table.path)
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
    match &svg::histogram(&rows)[..] {
        "" => String::new(),
        svg => {
            format!("<figure><figcaption>Waits for pages, part of all</figcaption>{svg}</figure>")
        }
    }
}

fn targets(title: &str, targets: &[crate::targets::Target]) -> String {
    if targets.is_empty() {
        return String::new();
    }
    let lines: Vec<String> = targets.iter().map(ToString::to_string).collect();
    format!("<h3>{title}</h3><pre>{}</pre>", escaped(&lines.join("\n")))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
