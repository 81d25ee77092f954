//! `bench page`: the reports, made again of the records of runs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use crate::path::ProbedPath;
use crate::runs::{self, Failure, Recorded};
use crate::section::{Block, Section};
use crate::targets::Target;
use crate::{compare, crowd, fault, files, flood, page, replay};

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
    files: Vec<files::Run>,
    floods: Vec<flood::Run>,
    replays: Vec<replay::Run>,
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
            || add(&kind, &record, &mut self.files)?
            || add(&kind, &record, &mut self.floods)?
            || add(&kind, &record, &mut self.replays)?
            || add(&kind, &record, &mut self.failures)?;
        if !is_taken {
            eprintln!("(a record of {kind:?} has no place in these reports)");
        }
        Ok(())
    }

    /// Writes both reports.
    pub fn write(self, folder: &Path) -> Result<()> {
        let (mut forms, mut judged) = (Vec::new(), Vec::new());
        if !self.moves.is_empty() {
            let moves = compare::Report::of(compare::Measured {
                paths: self.paths.clone(),
                moves: self.moves,
                failures: Vec::new(),
            });
            for table in &moves.tables {
                judge(&table.point.title(), &table.targets, &mut judged);
            }
            judge("across paths", &moves.across, &mut judged);
            forms.push((
                compare::markdown::render(&moves),
                compare::html::sections(&moves),
            ));
        }
        if !self.waits.is_empty() || !self.bares.is_empty() {
            let waits = fault::Report::of(fault::Measured {
                paths: self.paths.clone(),
                runs: self.waits,
                bares: self.bares,
                failures: Vec::new(),
            });
            for setup in &waits.tables {
                judge(&setup.setting.title(), &setup.targets, &mut judged);
            }
            forms.push((waits.markdown(), fault::html::section(&waits)));
        }
        let sections = [
            of_crowds(self.crowds, &self.paths),
            of_replays(self.replays, &self.paths),
            of_floods(self.floods),
            of_files(self.files),
            of_failures(self.failures),
        ];
        for section in sections.iter().flatten() {
            for block in &section.blocks {
                judge(block.name(section), &block.targets, &mut judged);
            }
            forms.push((section.markdown(), section.html()));
        }
        if let Some(targets) = of_targets(&judged) {
            forms.insert(0, (targets.markdown(), targets.html()));
        }
        let (markdown, html): (Vec<String>, Vec<String>) = forms.into_iter().unzip();
        page::write(folder, &markdown.concat(), &html)
    }
}

/// A target, and what it was measured of.
type Judged = (String, Target);

fn judge(of: &str, targets: &[Target], judged: &mut Vec<Judged>) {
    let targets = targets.iter().filter(|target| target.is_measured());
    judged.extend(targets.map(|target| (of.to_owned(), target.clone())));
}

/// All of them in one table.
fn of_targets(judged: &[Judged]) -> Option<Section> {
    let heading = ["", "figure", "measured", "spread", "target", "verdict"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for (of, target) in judged {
        let mut row = vec![of.clone()];
        row.extend(target.cells());
        rows.push(row);
    }
    let not_met = judged.iter().filter(|(_, target)| !target.is_met()).count();
    let section = Section {
        title: "Targets",
        conditions: vec![
            format!("{not_met} of {} are not met", judged.len()),
            "measured: of medians; spread: the smallest and the largest that the runs allow"
                .to_owned(),
        ],
        blocks: vec![Block {
            rows,
            ..Block::default()
        }],
        failures: Vec::new(),
    };
    (!judged.is_empty()).then_some(section)
}

fn of_crowds(runs: Vec<crowd::Run>, paths: &[ProbedPath]) -> Option<Section> {
    let report = crowd::Report {
        paths: those_of(paths, runs.iter().map(|run| &run.path[..])),
        runs,
        ..crowd::Report::default()
    };
    (!report.runs.is_empty()).then(|| report.section())
}

fn of_replays(runs: Vec<replay::Run>, paths: &[ProbedPath]) -> Option<Section> {
    let report = replay::Report {
        paths: those_of(paths, runs.iter().map(replay::Run::path)),
        runs,
        ..replay::Report::default()
    };
    (!report.runs.is_empty()).then(|| report.section())
}

fn of_floods(runs: Vec<flood::Run>) -> Option<Section> {
    let report = flood::Report {
        runs,
        ..flood::Report::default()
    };
    (!report.runs.is_empty()).then(|| report.section())
}

fn of_files(runs: Vec<files::Run>) -> Option<Section> {
    let report = files::Report {
        runs,
        ..files::Report::default()
    };
    (!report.runs.is_empty()).then(|| report.section())
}

/// Of every part: the record of a failure does not say what it was a measurement of, but its text does.
fn of_failures(failures: Vec<Failure>) -> Option<Section> {
    let section = Section {
        title: "What could not be measured",
        failures,
        ..Section::default()
    };
    (!section.failures.is_empty()).then_some(section)
}

/// The paths that runs went over.
fn those_of<'a>(paths: &[ProbedPath], used: impl Iterator<Item = &'a str>) -> Vec<ProbedPath> {
    let used: Vec<&str> = used.collect();
    let paths = paths.iter();
    let paths = paths.filter(|path| used.contains(&&path.path[..]));
    paths.cloned().collect()
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
        assert!(
            !markdown.contains("Moves side by side"),
            "none were made: {markdown}"
        );
        std::fs::write(folder.join(runs::FILE), "{\"kind\":\"crowd\"}\n").expect("a file");
        assert!(write_reports(&folder).is_err(), "a record without figures");
        std::fs::remove_dir_all(&folder).expect("it is there");
    }

    /// As they are written: a later build has to read them too.
    const LINES: &str = r#"
{"part":"","kind":"files","tree":null,"cutover_ms":18.5,"last_pass_ms":0.0,"looked_at":0,"total_ms":400.0,"used_by_others":0.01}
{"part":"","kind":"files","tree":{"files":16,"mib":64},"cutover_ms":30.0,"last_pass_ms":12.0,"looked_at":1,"total_ms":900.0,"used_by_others":0.0}
{"part":"","kind":"files","tree":{"files":16,"mib":1024},"cutover_ms":33.0,"last_pass_ms":13.0,"looked_at":1,"total_ms":2900.0,"used_by_others":0.0}
{"part":"","kind":"flood","memory_mib":256,"strangers":8,"flooded":false,"cutover_ms":40.0,"total_ms":800.0,"used_by_others":0.0}
{"part":"","kind":"flood","memory_mib":256,"strangers":8,"flooded":true,"cutover_ms":44.0,"total_ms":1000.0,"used_by_others":0.0}
{"part":"","kind":"replay","order":"replayed","path":"1g","memory_mib":64,"rate":10000,"touches":16384,"network_faults":52}
"#;

    #[test]
    fn every_kind_has_its_place() {
        let folder = std::env::temp_dir().join(format!("bench-kinds-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join(runs::FILE), LINES.trim_start()).expect("a file");
        write_reports(&folder).expect("reports");
        for name in ["report.md", "report.html"] {
            let text = std::fs::read_to_string(folder.join(name)).expect("a report");
            for part in [
                "16 files, 1024 MiB",
                "no files",
                "256 MiB under a flood of 8 strangers",
                "64 MiB touched at random, 10000 per second, over 1g",
            ] {
                assert!(text.contains(part), "{part} in {name}: {text}");
            }
            assert!(text.contains("1 of 3 are not met"), "{name}: {text}");
            let not_met = text.matches("NOT MET").count();
            assert_eq!(not_met, 2, "the flood, twice in {name}: {text}");
        }
        std::fs::remove_dir_all(&folder).expect("it is there");
    }
}
