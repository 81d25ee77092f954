//! `bench page`: the reports, made again of the records of runs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use crate::path::ProbedPath;
use crate::runs::{self, Failure, Recorded};
use crate::{compare, crowd, fault, page};

/// What to read.
#[derive(Debug, Args)]
pub struct PageOptions {
    /// A runs.jsonl; report.md and report.html are written beside it
    #[arg(value_name = "RUNS")]
    file: PathBuf,
}

/// Records by what they are of.
#[derive(Debug, Default)]
pub struct Collected {
    paths: Vec<ProbedPath>,
    moves: Vec<compare::Run>,
    waits: Vec<fault::Run>,
    bares: Vec<fault::BareRun>,
    crowds: Vec<crowd::Run>,
    failures: Vec<Failure>,
}

/// Reads and writes.
pub fn run(options: &PageOptions) -> Result<()> {
    let folder = options.file.parent().context("a file has a directory")?;
    Collected::read(&options.file)?.write(folder)
}

impl Collected {
    /// Reads every record of a file.
    pub fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        let mut collected = Self::default();
        for (number, line) in text.lines().enumerate() {
            let taken = collected.take(line);
            taken.with_context(|| format!("line {} of {}", number + 1, file.display()))?;
        }
        Ok(collected)
    }

    fn take(&mut self, line: &str) -> Result<()> {
        let record: Value = serde_json::from_str(line)?;
        let kind = record["kind"].as_str().unwrap_or_default().to_owned();
        // A path is probed by every part that uses it; the last probe counts.
        if kind == ProbedPath::KIND {
            let path: ProbedPath = serde_json::from_value(record)?;
            self.paths.retain(|known| known.path != path.path);
            self.paths.push(path);
            return Ok(());
        }
        let is_taken = add(&kind, &record, &mut self.moves)?
            || add(&kind, &record, &mut self.waits)?
            || add(&kind, &record, &mut self.bares)?
            || add(&kind, &record, &mut self.crowds)?
            || add(&kind, &record, &mut self.failures)?;
        if !is_taken {
            eprintln!("(a record of {kind:?} has no place in these reports)");
        }
        Ok(())
    }

    /// Writes both reports.
    pub fn write(self, folder: &Path) -> Result<()> {
        let (paths, failures) = (self.paths, self.failures);
        let mut markdown = String::new();
        let mut sections = Vec::new();
        let moves = compare::Report::of(compare::Measured {
            paths: paths.clone(),
            moves: self.moves,
            failures,
        });
        markdown += &compare::markdown::render(&moves);
        sections.push(compare::html::sections(&moves));
        if !self.waits.is_empty() {
            let waits = fault::Report::of(fault::Measured {
                paths,
                runs: self.waits,
                bares: self.bares,
                failures: Vec::new(),
            });
            markdown += &waits.markdown();
            sections.push(fault::html::section(&waits));
        }
        if !self.crowds.is_empty() {
            let crowds = crowd::Report {
                runs: self.crowds,
                ..crowd::Report::default()
            };
            markdown += &crowds.markdown();
            sections.push(crowds.html());
        }
        page::write(folder, &markdown, &sections)
    }
}

/// Adds the record if it is of that kind; whether it was.
fn add<T: Recorded>(kind: &str, record: &Value, to: &mut Vec<T>) -> Result<bool> {
    if kind != T::KIND {
        return Ok(false);
    }
    to.push(serde_json::from_value(record.clone())?);
    Ok(true)
}

/// The reports of everything in a directory.
pub fn write_reports(folder: &Path) -> Result<()> {
    Collected::read(&folder.join(runs::FILE))?.write(folder)
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::runs::Runs;

    #[test]
    fn what_was_recorded_is_read_again() {
        let folder = std::env::temp_dir().join(format!("bench-page-{}", std::process::id()));
        let runs = Runs::open(Some(&folder)).expect("a folder");
        let run = crowd::Run {
            peer: crate::peer::Peer::OursPlain,
            server: crowd::Server::Nginx,
            way: crowd::Way::MoveAddress,
            path: "veth".to_owned(),
            connections: 7,
            answers: 100,
            resets: 0,
            stall_ms: 1.5,
            longest_wait_ms: 2.5,
            usual_wait_ms: 0.5,
            used_by_others: 0.0,
        };
        let failure = Failure {
            of_a_rival: true,
            what: "it <gave> up".to_owned(),
        };
        runs.note(&run).expect("a record");
        runs.note(&failure).expect("a record");
        write_reports(&folder).expect("reports");
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).expect("a report");
        let (markdown, html) = (read("report.md"), read("report.html"));
        assert!(markdown.contains("nginx, 7, veth"), "{markdown}");
        assert!(markdown.contains("failed: it <gave> up"), "{markdown}");
        assert!(html.contains("it &lt;gave&gt; up"), "{html}");
        std::fs::write(folder.join(runs::FILE), "{\"kind\":\"crowd\"}\n").expect("a file");
        assert!(write_reports(&folder).is_err(), "a record without figures");
        std::fs::remove_dir_all(&folder).expect("it is there");
    }
}
