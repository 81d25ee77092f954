//! Reports as one page without anything from elsewhere, and where they are written.

use std::path::Path;

use anyhow::{Context, Result};

use crate::targets::NOT_MET;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}\
h2{margin-top:3rem;border-bottom:1px solid #ccc}.plots{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0}\
figcaption{font-weight:600}svg{font:12px system-ui,sans-serif}svg line{stroke:#222;stroke-width:1.5}\
.ours{fill:#2a7f62}.ours-plain{fill:#7fb8a4}.criu{fill:#c2703d}.criu-tls{fill:#d9a441}.stop-and-copy{fill:#8a8a8a}\
table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2rem .5rem;text-align:right}\
td:first-child,th:first-child{text-align:left}td:not(:first-child){white-space:nowrap}\
.not-met{color:#b3261e;font-weight:600}table+.plots,table+figure,.plots+figure{margin-top:1rem}\
pre{background:#f4f4f4;padding:.8rem;overflow-x:auto}li{margin:.2rem 0}";

/// The whole page of `sections`, which are HTML.
fn render(sections: &[String]) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Measured moves</title>\
         <style>{STYLE}</style>{}</html>\n",
        sections.concat()
    )
}

/// Writes `report.md` and `report.html`.
pub fn write(folder: &Path, markdown: &str, sections: &[String]) -> Result<()> {
    for (name, text) in [
        ("report.md", markdown.to_owned()),
        ("report.html", render(sections)),
    ] {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Text as HTML.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// Lines as a list.
pub fn list(lines: &[String]) -> String {
    let items: Vec<String> = lines
        .iter()
        .map(|line| format!("<li>{}</li>", escaped(line)))
        .collect();
    format!("<ul>{}</ul>", items.concat())
}

/// Rows of cells as Markdown, the first row a heading.
pub fn markdown_table(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        text += &format!("| {} |\n", row.join(" | "));
        if number == 0 {
            text += &format!("| --- |{}\n", " ---: |".repeat(row.len() - 1));
        }
    }
    text
}

/// Rows of cells, the first row a heading.
pub fn table(rows: &[Vec<String>]) -> String {
    let row = |(number, cells): (usize, &Vec<String>)| {
        let tag = if number == 0 { "th" } else { "td" };
        let one = |cell: &String| {
            let class = match cell == NOT_MET {
                true => " class=\"not-met\"",
                false => "",
            };
            format!("<{tag}{class}>{}</{tag}>", escaped(cell))
        };
        let cells: String = cells.iter().map(one).collect();
        format!("<tr>{cells}</tr>")
    };
    let rows: String = rows.iter().enumerate().map(row).collect();
    format!("<table>{rows}</table>")
}

/// Lines that are to stay as they are.
pub fn verbatim(text: &str) -> String {
    format!("<pre>{}</pre>", escaped(text))
}

#[cfg(test)]
mod test {
    use clap::ValueEnum;

    use super::*;
    use crate::peer::Peer;

    #[test]
    fn every_peer_has_a_colour() {
        for peer in Peer::value_variants() {
            assert!(STYLE.contains(&format!(".{peer}{{fill:")), "{peer}");
        }
    }

    #[test]
    fn text_is_no_markup() {
        assert_eq!(
            list(&["<= 1 & 2".to_owned()]),
            "<ul><li>&lt;= 1 &amp; 2</li></ul>"
        );
    }
}
