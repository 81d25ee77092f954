//! The workload's files move along.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use tests::harness::{self, Need, Test};
use tests::pair::PairPlan;
use tests::rig::Rig;
use tests::shell::run;
use tests::writer::Writer;

const FILES: &[Need] = &[
    Need::Namespaces,
    Need::Criu,
    Need::Program("rsync"),
    Need::Program("python3"),
];

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "a_tree_moves_with_its_process",
            needs: FILES,
            body: a_tree_moves_with_its_process,
        },
        Test {
            name: "a_destination_that_was_not_told_is_refused",
            needs: FILES,
            body: a_destination_that_was_not_told_is_refused,
        },
        Test {
            name: "a_source_that_was_not_told_is_refused",
            needs: FILES,
            body: a_source_that_was_not_told_is_refused,
        },
    ])
}

/// Files of every kind that can be made wrong by copying.
fn fill(tree: &Path) -> Result<()> {
    fs::create_dir_all(tree.join("deep/er"))?;
    fs::write(tree.join("plain"), "plain")?;
    fs::hard_link(tree.join("plain"), tree.join("deep/linked"))?;
    symlink("../plain", tree.join("deep/symbolic"))?;
    symlink("/nowhere", tree.join("dangling"))?;
    fs::write(tree.join("private"), "private")?;
    fs::set_permissions(tree.join("private"), fs::Permissions::from_mode(0o4710))?;
    std::os::unix::fs::chown(tree.join("private"), Some(1234), Some(4321))?;
    let sparse = fs::File::create(tree.join("sparse"))?;
    sparse.set_len(64 << 20)?;
    fs::write(tree.join("empty"), "")?;
    fs::write(tree.join("to be removed"), "x")?;
    run(Command::new("mkfifo").arg(tree.join("pipe")))?;
    fs::write(tree.join("quote ' and \" and \n"), "odd name")?;
    Ok(())
}

/// One line for each file below `tree`: all that it is, and a digest of its content.
fn listing(tree: &Path) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(tree.join(&folder))? {
            let name = folder.join(entry?.file_name());
            let path = tree.join(&name);
            let meta = fs::symlink_metadata(&path)?;
            let content = if meta.is_file() {
                run(Command::new("sha256sum").arg("--").arg(&path))?
            } else if meta.is_symlink() {
                fs::read_link(&path)?.display().to_string()
            } else {
                String::new()
            };
            if meta.is_dir() {
                folders.push(name.clone());
            }
            let content: String = content.chars().filter(|c| *c != '\\').take(64).collect();
            let size = if meta.is_dir() { 0 } else { meta.size() };
            lines.push(format!(
                "{name:?} {:o} {}:{} links {} size {size} {content}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                if meta.is_dir() { 0 } else { meta.nlink() },
            ));
        }
    }
    lines.sort();
    Ok(lines)
}

/// Source and destination share one file system here, so the destination sees another directory under the path.
struct TwoTrees {
    path: PathBuf,
    there: PathBuf,
}

impl TwoTrees {
    fn make(rig: &Rig) -> Result<Self> {
        Ok(Self {
            path: rig.make_folder("tree")?,
            there: rig.make_folder("tree-of-destination")?,
        })
    }

    /// A plan whose `lazy-restorer` has the destination's directory under the path.
    fn plan(&self, rig: &Rig) -> Result<PairPlan> {
        let mut plan = PairPlan::new(rig)?;
        plan.destination_mounts = vec![(self.there.clone(), self.path.clone())];
        Ok(plan)
    }
}

fn a_tree_moves_with_its_process(rig: &Rig) -> Result<()> {
    let trees = TwoTrees::make(rig)?;
    fill(&trees.path)?;
    fs::write(trees.there.join("only here"), "to be deleted")?;
    let writer = Writer::start(rig, &trees.path)?;
    let mut plan = trees.plan(rig)?;
    let sync = ["--sync".into(), trees.path.clone().into_os_string()];
    plan.server.extend(sync.clone());
    plan.restorer.extend(sync);
    // While the tree is frozen, after the first pass: what changes then must not be missed.
    plan.on_frozen = format!("{} && {}", writer.note_frozen(), plan.on_frozen);
    plan.migrate(rig, writer.pid())?;
    let frozen = writer.frozen_tree()?;
    let moved = trees.there.clone();
    writer.finish(&moved)?;
    let expected = listing(&frozen).context("the tree at the freeze")?;
    let there = listing(&moved)?;
    for line in expected
        .iter()
        .filter(|line| !line.contains("written by the workload"))
    {
        ensure!(
            there.contains(line),
            "missing on the destination: {line}\nthere: {there:#?}"
        );
    }
    ensure!(
        !moved.join("only here").exists(),
        "what was only on the destination is still there"
    );
    ensure!(
        fs::metadata(moved.join("sparse"))?.blocks() < 1024,
        "the sparse file lost its holes"
    );
    Ok(())
}

fn a_destination_that_was_not_told_is_refused(rig: &Rig) -> Result<()> {
    refused(rig, true)
}

fn a_source_that_was_not_told_is_refused(rig: &Rig) -> Result<()> {
    refused(rig, false)
}

/// Only one side was told of the tree: nothing moves.
fn refused(rig: &Rig, source_knows: bool) -> Result<()> {
    let trees = TwoTrees::make(rig)?;
    let writer = Writer::start(rig, &trees.path)?;
    let mut plan = trees.plan(rig)?;
    let options = match source_knows {
        true => &mut plan.server,
        false => &mut plan.restorer,
    };
    options.extend(["--sync".into(), trees.path.clone().into_os_string()]);
    let mut server = plan.start_server(rig, writer.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    ensure!(!restorer.end()?.success(), "lazy-restorer went on");
    ensure!(!server.end()?.success(), "page-server went on");
    let line = restorer.error_line()?;
    ensure!(line.contains("--sync"), "{line}");
    writer.finish(&trees.path)
}
