//! A part of the reports that answers one question: the same figures as text, as Markdown and for a page.

use std::fmt;

use crate::page::{self, escaped, list, verbatim};
use crate::runs::Failure;
use crate::stats::Summary;
use crate::svg;
use crate::table::Table;
use crate::targets::Target;

/// One question.
#[derive(Debug, Default)]
pub struct Section {
    /// Its heading.
    pub title: &'static str,
    /// Under which conditions all of it was measured.
    pub conditions: Vec<String>,
    /// What was measured, setting by setting.
    pub blocks: Vec<Block>,
    /// What could not be measured, and why.
    pub failures: Vec<Failure>,
}

/// What was measured under one setting.
#[derive(Debug, Default)]
pub struct Block {
    /// The setting; empty when there is but one.
    pub title: String,
    /// Cells, the first row a heading.
    pub rows: Vec<Vec<String>>,
    /// What is seen better than read.
    pub plots: Vec<Plot>,
    /// What was to be reached.
    pub targets: Vec<Target>,
}

/// Bars beside each other.
#[derive(Debug)]
pub struct Plot {
    /// What they show, with its unit.
    pub title: String,
    /// The label of each, what it shows, and the class that colours it.
    pub bars: Vec<(String, Option<Summary>, String)>,
}

impl Section {
    /// As Markdown.
    pub fn markdown(&self) -> String {
        let mut text = format!("\n# {}\n\n", self.title);
        for line in &self.conditions {
            text += &format!("- {line}\n");
        }
        self.blocks
            .iter()
            .for_each(|block| text += &block.markdown());
        for failure in &self.failures {
            text += &format!("\nfailed: {}\n", failure.what);
        }
        text
    }

    /// As a part of a page.
    pub fn html(&self) -> String {
        let mut text = format!("<h1>{}</h1>", escaped(self.title));
        if !self.conditions.is_empty() {
            text += &list(&self.conditions);
        }
        self.blocks.iter().for_each(|block| text += &block.html());
        for failure in &self.failures {
            text += &format!("<p>Failed: {}</p>", escaped(&failure.what));
        }
        text
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f)?;
        for line in &self.conditions {
            writeln!(f, "{line}")?;
        }
        for block in &self.blocks {
            write!(f, "{block}")?;
        }
        let mut failures = self.failures.iter();
        failures.try_for_each(|failure| writeln!(f, "failed: {}", failure.what))
    }
}

impl Block {
    /// Its title, or that of its section.
    pub fn name<'a>(&'a self, section: &'a Section) -> &'a str {
        match &self.title[..] {
            "" => section.title,
            title => title,
        }
    }

    fn markdown(&self) -> String {
        let mut text = match &self.title[..] {
            "" => "\n".to_owned(),
            title => format!("\n## {title}\n\n"),
        };
        text += &page::markdown_table(&self.rows);
        if !self.targets.is_empty() {
            text += &format!("\n```\n{}\n```\n", self.judged());
        }
        text
    }

    fn html(&self) -> String {
        let mut text = match &self.title[..] {
            "" => String::new(),
            title => format!("<h2>{}</h2>", escaped(title)),
        };
        text += &page::table(&self.rows);
        if !self.plots.is_empty() {
            let plots = self.plots.iter().map(Plot::html).collect::<String>();
            text += &format!("<div class=\"plots\">{plots}</div>");
        }
        if !self.targets.is_empty() {
            text += &format!("<h3>Targets</h3>{}", verbatim(&self.judged()));
        }
        text
    }

    fn judged(&self) -> String {
        let lines: Vec<String> = self.targets.iter().map(ToString::to_string).collect();
        lines.join("\n")
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::default();
        self.rows.iter().for_each(|row| table.add(row.clone()));
        write!(f, "\n{}", self.title)?;
        if !self.title.is_empty() {
            writeln!(f)?;
        }
        write!(f, "{}", table.render())?;
        let mut targets = self.targets.iter();
        targets.try_for_each(|target| writeln!(f, "{target}"))
    }
}

impl Plot {
    fn html(&self) -> String {
        let bars = self.bars.iter();
        let bars: Vec<_> = bars
            .map(|(label, value, class)| (&label[..], *value, class.clone()))
            .collect();
        format!(
            "<figure><figcaption>{}</figcaption>{}</figure>",
            escaped(&self.title),
            svg::bars(&bars)
        )
    }
}

/// A figure as a cell; a dash when there is none.
pub fn cell(of: Option<Summary>) -> String {
    of.map_or("-".to_owned(), |of| of.to_string())
}

/// A number of things as a cell.
pub fn whole(of: Option<Summary>) -> String {
    of.map_or("-".to_owned(), |Summary { median, min, max }| {
        format!("{median:.0} ({min:.0} to {max:.0})")
    })
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::targets::Bound;

    #[test]
    fn all_three_forms_have_all_of_it() {
        let once = Some(Summary::single(3.0));
        let block = Block {
            title: "a & b".to_owned(),
            rows: vec![
                vec!["what".to_owned(), "ms".to_owned()],
                vec!["moving".to_owned(), cell(once)],
            ],
            plots: vec![Plot {
                title: "ms".to_owned(),
                bars: vec![("moving".to_owned(), once, "ours".to_owned())],
            }],
            targets: vec![Target::value("moving, ms", once, Bound::AtMost(2.0))],
        };
        let section = Section {
            title: "How long",
            conditions: vec!["median".to_owned()],
            blocks: vec![block],
            failures: vec![Failure {
                of_a_rival: false,
                what: "it <stood>".to_owned(),
            }],
        };
        let (markdown, html) = (section.markdown(), section.html());
        for form in [&markdown, &html, &section.to_string()] {
            for part in ["moving", "3.0 (3.0 to 3.0)", "median", "NOT MET"] {
                assert!(form.contains(part), "{part}: {form}");
            }
        }
        assert!(markdown.contains("# How long\n\n- median\n\n## a & b\n\n| what | ms |\n"));
        assert!(html.contains("<h2>a &amp; b</h2>"), "{html}");
        assert!(html.contains("<rect class=\"ours\""), "{html}");
        assert!(html.contains("it &lt;stood&gt;"), "{html}");
    }
}
