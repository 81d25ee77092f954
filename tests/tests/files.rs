//! The workload's files move along.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use tests::fake_criu;
use tests::harness::{self, Need, Test};
use tests::pair::PairPlan;
use tests::process::Process;
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
            name: "late_changes_among_many_files",
            needs: FILES,
            body: late_changes_among_many_files,
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

/// Of a file's content.
fn digest(content: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(content);
    format!("{:016x} of {}", hasher.finish(), content.len())
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
                digest(&fs::read(&path)?)
            } else if meta.is_symlink() {
                fs::read_link(&path)?.display().to_string()
            } else {
                String::new()
            };
            if meta.is_dir() {
                folders.push(name.clone());
            }
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

/// Arguments: tree. Sets attributes and an ACL, each on a file of its own.
const ATTRIBUTES: &str = r#"
import os, struct, sys
tree = sys.argv[1]
def attempt(what, path, name, value):
    try:
        os.setxattr(os.path.join(tree, path), name, value)
    except OSError as error:
        print(f"skipped: {what} on this file system: {error}")
attempt("extended attributes", "d0/f1", "user.note", b"late")
entries = [(1, 6, -1), (2, 4, 1234), (4, 4, -1), (0x10, 4, -1), (0x20, 4, -1)]
acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, mode, who & 0xffffffff) for tag, mode, who in entries)
attempt("ACLs", "d0/f2", "system.posix_acl_access", acl)
"#;

/// Arguments: tree. Prints all extended attributes, and with them the ACLs.
const SHOW_ATTRIBUTES: &str = r#"
import os, sys
os.chdir(sys.argv[1])
for folder, folders, files in sorted(os.walk(".")):
    for name in sorted(folders + files):
        path = os.path.join(folder, name)
        for key in sorted(os.listxattr(path, follow_symlinks=False)):
            print(path, key, os.getxattr(path, key, follow_symlinks=False).hex())
"#;

/// What is done to the tree after the first pass.
const LATE_CHANGES: &str = "mv d1 d2/moved; rm d3/f7; rm -r d4; ln d5/f1 d6/linked; chmod 640 d5/f2; echo longer > d5/f3; \
    rm d7/f1; mkdir -p d7/f1/now/deep; echo new > d7/f1/now/deep/file; ln -sfn elsewhere d8/link; mv d9 aside; mv d10 d9; \
    echo same > d11/f1; mv d11/f2 d12/f2; touch -d @1 d13/f1; mkdir d14/empty";

/// Files that do not change.
const MANY: usize = 5_000;

/// Everything that can happen to a file between the passes, among many to which nothing happens.
fn late_changes_among_many_files(rig: &Rig) -> Result<()> {
    let trees = TwoTrees::make(rig)?;
    let tree = trees.path.display();
    for folder in 0..100 {
        let folder = trees.path.join(format!("d{folder}"));
        fs::create_dir(&folder)?;
        for file in 0..MANY / 100 {
            fs::write(folder.join(format!("f{file}")), "same")?;
        }
    }
    symlink("somewhere", trees.path.join("d8/link"))?;
    fs::hard_link(trees.path.join("d15/f1"), trees.path.join("d16/pair"))?;
    let python = |script: &str, tree: &Path| {
        let mut command = Command::new("/usr/bin/python3");
        run(command.args(["-I", "-c", script]).arg(tree))
    };
    let script = rig.folder().join("attributes.py");
    fs::write(&script, ATTRIBUTES)?;
    let mut command = rig.source.command("setsid");
    let sleeper = Process::start_detached("sleeper", command.args(["sleep", "1000"]))?;
    let mut plan = trees.plan(rig)?;
    let sync = ["--sync".into(), trees.path.clone().into_os_string()];
    plan.server.extend(sync.clone());
    plan.restorer.extend(sync);
    let said = rig.folder().join("said");
    // When CRIU is called the first pass is over, and nothing is frozen yet.
    let late = format!(
        "cd {tree} && {LATE_CHANGES}; echo half >> d15/f1; /usr/bin/python3 -I {} {tree} > {}",
        script.display(),
        said.display()
    );
    plan.source_criu = fake_criu::running_before(rig, "dump", &late)?;
    plan.migrate(rig, sleeper.pid())?;
    print!("{}", fs::read_to_string(said)?);
    let (expected, there) = (listing(&trees.path)?, listing(&trees.there)?);
    let known: BTreeSet<&String> = there.iter().collect();
    let missing = expected.iter().filter(|line| !known.contains(line));
    let missing: Vec<&String> = missing.take(10).collect();
    ensure!(
        missing.is_empty(),
        "missing on the destination: {missing:#?}"
    );
    ensure!(
        there.len() == expected.len(),
        "{} entries on the destination in place of {}",
        there.len(),
        expected.len()
    );
    let attributes = python(SHOW_ATTRIBUTES, &trees.path)?;
    ensure!(
        attributes == python(SHOW_ATTRIBUTES, &trees.there)?,
        "other attributes than {attributes}"
    );
    println!("{MANY} files, {} attributes", attributes.lines().count());
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
