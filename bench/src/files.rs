//! `bench files`: does the cutover grow with files that do not change?

use std::fmt;
use std::fs;
use std::io::Write;
use std::path::{Path as FilePath, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use nix::unistd::syncfs;
use serde::{Deserialize, Serialize};
use tests::fake_criu;
use tests::pair::PairPlan;
use tests::random::Random;
use tests::rig::Rig;
use tests::touch::{Pattern, TouchPlan, Toucher};

use crate::memory;
use crate::peer::Peer;
use crate::quiet::{self, Disturbance, Use};
use crate::runs::{self, Failure, Recorded, Runs};
use crate::section::{Block, Plot, Section, cell, whole};
use crate::stats::Summary;
use crate::targets::{Bound, Target};

/// Memory of the workload: it is not about that.
const MEMORY_MIB: u64 = 16;

/// What to measure.
#[derive(Debug, Clone, Args)]
pub struct FilesOptions {
    /// Moves of each kind
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repeat: usize,
    /// Unchanged content in the smaller and in the larger tree, MiB
    #[arg(long, value_name = "MIB", num_args = 2, default_values_t = [64, 1024])]
    pub content: Vec<u64>,
    /// Unchanged files in the smaller and in the larger tree
    #[arg(long, value_name = "N", num_args = 2, default_values_t = [100, 10_000])]
    pub files: Vec<u64>,
    /// Directory for runs.jsonl, one record a line, written after each move
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Files that are sent along with `--sync`, of which one changes shortly before the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Tree {
    files: u64,
    mib: u64,
}

/// One move.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Run {
    /// None: nothing is sent along.
    tree: Option<Tree>,
    /// The longest time without an instruction of the workload.
    cutover_ms: f64,
    /// Of that, the last pass over the files.
    last_pass_ms: f64,
    /// Paths that the source looked at in it.
    looked_at: u64,
    /// From the first command to the end of both programs.
    total_ms: f64,
    /// The part of the machine's CPUs that others used meanwhile.
    used_by_others: f64,
}

impl Recorded for Run {
    const KIND: &'static str = "files";
}

impl Run {
    fn cutover(&self) -> Option<f64> {
        Some(self.cutover_ms)
    }

    /// Nothing when there was none.
    fn last_pass(&self) -> Option<f64> {
        self.tree.map(|_| self.last_pass_ms)
    }

    fn looked_at(&self) -> Option<f64> {
        self.tree.map(|_| self.looked_at as f64)
    }

    fn disturbance(&self) -> Disturbance {
        Disturbance {
            by_others: self.used_by_others,
            late: 0.0,
        }
    }
}

/// What was measured.
#[derive(Debug, Default)]
pub struct Report {
    /// Moves that were made.
    pub runs: Vec<Run>,
    /// Those that were not.
    pub failures: Vec<Failure>,
}

/// Measures, prints and writes. It fails when a move did, after all others were made.
pub fn run(options: &FilesOptions) -> Result<()> {
    let report = measure(options, &Runs::open(options.out.as_deref())?)?;
    print!("{}", report.section());
    runs::judge(&report.failures)
}

/// Measures.
pub fn measure(options: &FilesOptions, runs: &Runs) -> Result<Report> {
    let mut report = Report::default();
    for round in 0..options.repeat {
        let mut trees = trees(options);
        let first = round % trees.len();
        trees.rotate_left(first);
        for tree in trees {
            let run = quiet::measure(|| one(tree, round as u64), Run::disturbance);
            let run = run.with_context(|| format!("a move with {}", Shown(tree)));
            let run = run.inspect(|run| eprintln!("{}: {run:?}", Shown(tree)));
            runs.keep(run, false, &mut report.runs, &mut report.failures)?;
        }
    }
    Ok(report)
}

/// Without any, and then content and number by themselves, from small to large.
fn trees(options: &FilesOptions) -> Vec<Option<Tree>> {
    let content = options.content.iter();
    let content = content.map(|mib| Tree {
        files: BY_CONTENT,
        mib: *mib,
    });
    let number = options.files.iter();
    let number = number.map(|files| Tree {
        files: *files,
        mib: BY_NUMBER_MIB,
    });
    let trees = content.chain(number).map(Some);
    std::iter::once(None).chain(trees).collect()
}

/// The file that changes, besides those that do not. It is as large in every tree: what changed is compared as a whole.
const LATE: &str = "late";
/// Its size.
const LATE_BYTES: usize = 64 << 10;
/// Seconds between the first pass and the freeze. Both hosts are one kernel here, which goes on working for thousands of
/// files that the first pass made on the other one: CRIU's dump then took 30 ms and not 18, whatever was sent along.
const SETTLING: &str = "0.5";
/// Files of the trees that differ in their content.
const BY_CONTENT: u64 = 16;
/// Content of the trees that differ in the number of their files.
const BY_NUMBER_MIB: u64 = 8;

fn one(tree: Option<Tree>, seed: u64) -> Result<Run> {
    let rig = Rig::new()?;
    let plan = TouchPlan {
        mib: MEMORY_MIB,
        seed,
        pattern: Pattern::Still,
        rate: 0,
    };
    let toucher = Toucher::start(&rig, plan)?;
    memory::warm(2 * MEMORY_MIB)?;
    let mut pair = PairPlan::new(&rig)?;
    let mut late = "true".to_owned();
    if let Some(tree) = tree {
        let path = rig.make_folder("tree")?;
        fill(&path, tree, seed)?;
        // Both hosts have one file system here, so the destination sees another directory in its place.
        pair.destination_mounts = vec![(rig.make_folder("tree-there")?, path.clone())];
        let sync = ["--sync".into(), path.clone().into_os_string()];
        pair.server.extend(sync.clone());
        pair.restorer.extend(sync);
        fs::write(path.join(LATE), vec![1; LATE_BYTES])?;
        late = format!("sleep {SETTLING}; echo late >> '{}/{LATE}'", path.display());
    }
    // When CRIU is called the first pass is over, and nothing is frozen yet.
    pair.source_criu = fake_criu::running_before(&rig, "dump", &late)?;
    let before = Use::now(&rig);
    let migration = pair.migrate(&rig, toucher.pid())?;
    let used_by_others = Use::now(&rig).by_others_since(before);
    if tree.is_some() {
        let there = fs::read(rig.folder().join("tree-there").join(LATE))?;
        anyhow::ensure!(there.ends_with(b"late\n"), "the late change is missing");
    }
    toucher.finish()?;
    Ok(Run {
        tree,
        cutover_ms: toucher.report()?.cutover.as_secs_f64() * 1e3,
        last_pass_ms: migration.destination.files.last.took_us as f64 / 1e3,
        looked_at: migration.source.last_look.paths,
        total_ms: migration.total.as_secs_f64() * 1e3,
        used_by_others,
    })
}

/// Files in directories of a hundred, of content that cannot be guessed.
fn fill(path: &FilePath, tree: Tree, seed: u64) -> Result<()> {
    let bytes = ((tree.mib << 20) / tree.files) as usize;
    let mut random = Random::new(seed);
    let block: Vec<u8> = (0..1 << 20).map(|_| random.index(256) as u8).collect();
    for number in 0..tree.files {
        let folder = path.join((number / 100).to_string());
        fs::create_dir_all(&folder)?;
        let mut file = fs::File::create(folder.join((number % 100).to_string()))?;
        let mut left = bytes;
        while left > 0 {
            let from = random.index(block.len());
            let piece = &block[from..block.len().min(from + left)];
            file.write_all(piece)?;
            left -= piece.len();
        }
    }
    // An operator's files have been there for long; what the disk still has to write would be in the way of the move.
    Ok(syncfs(fs::File::open(path)?)?)
}

struct Shown(Option<Tree>);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("no files"),
            Some(Tree { files, mib }) => write!(f, "{files} files, {mib} MiB"),
        }
    }
}

impl Tree {
    fn is_by_content(&self) -> bool {
        self.files == BY_CONTENT
    }

    fn is_by_number(&self) -> bool {
        self.mib == BY_NUMBER_MIB
    }
}

impl Report {
    /// The larger tree over the smaller one.
    pub fn targets(&self) -> Vec<Target> {
        vec![
            self.over(
                "cutover, more unchanged content over less",
                Tree::is_by_content,
                |tree| tree.mib,
            ),
            self.over(
                "cutover, more unchanged files over fewer",
                Tree::is_by_number,
                |tree| tree.files,
            ),
        ]
    }

    /// The largest of some trees over the smallest.
    fn over(&self, what: &str, is_one: fn(&Tree) -> bool, size: fn(&Tree) -> u64) -> Target {
        let sizes = || self.trees().into_iter().flatten().filter(is_one);
        let (least, most) = (sizes().min_by_key(size), sizes().max_by_key(size));
        let pair = least.zip(most).filter(|(least, most)| least != most);
        let cutover = |tree| self.summary(Some(tree), Run::cutover);
        Target::ratio(
            what,
            pair.and_then(|(_, most)| cutover(most)),
            pair.and_then(|(least, _)| cutover(least)),
            Bound::AtMost(1.2),
        )
    }

    /// Those that were moved: without any, and then content and number by themselves, from small to large.
    fn trees(&self) -> Vec<Option<Tree>> {
        let mut trees: Vec<Option<Tree>> = Vec::new();
        for run in &self.runs {
            if !trees.contains(&run.tree) {
                trees.push(run.tree);
            }
        }
        trees.sort_by_key(|tree| {
            tree.map(|tree| match tree.is_by_content() {
                true => (0, tree.mib, tree.files),
                false => (1, tree.files, tree.mib),
            })
        });
        trees
    }

    fn summary(&self, tree: Option<Tree>, value: fn(&Run) -> Option<f64>) -> Option<Summary> {
        let runs = self.runs.iter().filter(|run| run.tree == tree);
        Summary::of(&runs.filter_map(value).collect::<Vec<_>>())
    }

    /// For all reports.
    pub fn section(&self) -> Section {
        let disturbances = self.runs.iter().map(Run::disturbance);
        let block = Block {
            title: String::new(),
            rows: self.cells(),
            plots: vec![
                self.plot("cutover, ms", Run::cutover),
                self.plot("of it the last pass over the files, ms", Run::last_pass),
            ],
            targets: self.targets(),
        };
        Section {
            title: "Files that do not change",
            conditions: vec![
                "median (smallest to largest) of n moves each".to_owned(),
                format!(
                    "{MEMORY_MIB} MiB that nobody touches, and a directory for --sync, in which one file changes shortly \
                     before the freeze"
                ),
                memory::STATEMENT.to_owned(),
                quiet::statement(disturbances),
            ],
            blocks: vec![block],
            failures: self.failures.clone(),
        }
    }

    fn cells(&self) -> Vec<Vec<String>> {
        let heading = [
            "with --sync",
            "n",
            "cutover ms",
            "last pass ms",
            "paths looked at in it",
            "total ms",
        ];
        let mut rows = vec![heading.map(str::to_owned).to_vec()];
        for tree in self.trees() {
            let shown = |value| cell(self.summary(tree, value));
            let count = self.runs.iter().filter(|run| run.tree == tree).count();
            rows.push(vec![
                Shown(tree).to_string(),
                count.to_string(),
                shown(Run::cutover),
                shown(Run::last_pass),
                whole(self.summary(tree, Run::looked_at)),
                shown(|run| Some(run.total_ms)),
            ]);
        }
        rows
    }

    fn plot(&self, title: &str, value: fn(&Run) -> Option<f64>) -> Plot {
        let bar = |tree| {
            let class = Peer::Ours.to_string();
            (Shown(tree).to_string(), self.summary(tree, value), class)
        };
        let bars = self.trees().into_iter().map(bar);
        Plot {
            title: title.to_owned(),
            bars: bars.filter(|(_, value, _)| value.is_some()).collect(),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_targets_set_large_trees_over_small_ones() {
        let options = FilesOptions {
            repeat: 1,
            content: vec![64, 1024],
            files: vec![100, 10_000],
            out: None,
        };
        let runs = trees(&options)
            .into_iter()
            .zip([10.0, 20.0, 22.0, 20.0, 30.0]);
        let runs = runs.map(|(tree, cutover_ms)| Run {
            tree,
            cutover_ms,
            last_pass_ms: 0.0,
            looked_at: 0,
            total_ms: 0.0,
            used_by_others: 0.0,
        });
        let mut report = Report {
            runs: runs.collect(),
            ..Report::default()
        };
        report.runs.rotate_left(3);
        let met = report.targets();
        let met: Vec<bool> = met.iter().map(Target::is_met).collect();
        assert_eq!(met, [true, false]);
        let shown: Vec<Option<Tree>> = report.trees();
        assert_eq!(shown, trees(&options), "whatever comes first in a round");
    }

    #[test]
    fn one_tree_alone_says_nothing() {
        let run = Run {
            tree: Some(Tree {
                files: BY_CONTENT,
                mib: 64,
            }),
            cutover_ms: 10.0,
            last_pass_ms: 0.0,
            looked_at: 0,
            total_ms: 0.0,
            used_by_others: 0.0,
        };
        let report = Report {
            runs: vec![run],
            ..Report::default()
        };
        assert!(!report.targets().iter().any(Target::is_measured));
    }
}
