//! The workload's files move along.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use tests::container::Container;
use tests::exit_code::{ABORTED_BY_PEER, RESTORE};
use tests::failure::expect_failure;
use tests::fake_criu;
use tests::harness::{self, Need, Test};
use tests::pair::{PATIENCE, PairPlan};
use tests::process::Process;
use tests::rig::Rig;
use tests::shell::run;
use tests::small_disk;
use tests::wait::wait_until;
use tests::writer::Writer;

const FILES: &[Need] = &[
    Need::Namespaces,
    Need::Criu,
    Need::Program("rsync"),
    Need::Program("python3"),
];

const CONTAINER: &[Need] = &[
    Need::Namespaces,
    Need::Criu,
    Need::Program("runc"),
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
            name: "more_happens_than_can_be_followed",
            needs: FILES,
            body: more_happens_than_can_be_followed,
        },
        Test {
            name: "a_container_moves_with_its_root_filesystem",
            needs: CONTAINER,
            body: a_container_moves_with_its_root_filesystem,
        },
        Test {
            name: "a_file_open_under_a_name_that_is_gone",
            needs: FILES,
            body: a_file_open_under_a_name_that_is_gone,
        },
        Test {
            name: "a_refused_move_deletes_nothing",
            needs: FILES,
            body: a_refused_move_deletes_nothing,
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
            path: rig.make_folder("tree & more")?,
            there: rig.make_folder("tree-of-destination")?,
        })
    }

    /// A file that only the destination has.
    fn only_here(&self) -> Result<PathBuf> {
        let path = self.there.join("only here");
        fs::write(&path, "x")?;
        Ok(path)
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
    let only_here = trees.only_here()?;
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
        !only_here.exists(),
        "what was only on the destination is still there"
    );
    ensure!(
        fs::metadata(moved.join("sparse"))?.blocks() < 1024,
        "the sparse file lost its holes"
    );
    Ok(())
}

/// Argument: the tree. Writes to a file by a descriptor that was opened under a name it does not have any more.
const RENAMED: &str = r#"
import os, sys, time
os.chdir(sys.argv[1])
f = open("first", "w+b", buffering=0)
f.write(b"before")
os.link("first", "second")
os.unlink("first")
open("ready", "w").close()
while not os.path.exists("go on"):
    time.sleep(0.005)
f.write(b" and after")
open("done", "w").close()
"#;

/// The operator has CRIU keep the file by a name of its own, which comes along, a hard link, and goes after the restore.
fn a_file_open_under_a_name_that_is_gone(rig: &Rig) -> Result<()> {
    let trees = TwoTrees::make(rig)?;
    let mut command = rig.source.command("setsid");
    command.args(["/usr/bin/python3", "-I", "-c", RENAMED]);
    let workload = Process::start_detached("renamed", command.arg(&trees.path))?;
    let appears = |path: PathBuf| {
        let what = format!("{}", path.display());
        wait_until(PATIENCE, &what, || path.exists())
    };
    appears(trees.path.join("ready"))?;
    let mut plan = trees.plan(rig)?;
    let sync = ["--sync".into(), trees.path.clone().into_os_string()];
    plan.server.extend(sync.clone());
    plan.server
        .extend(["--criu-arg", "--link-remap"].map(OsString::from));
    plan.restorer.extend(sync);
    plan.migrate(rig, workload.pid())?;
    fs::write(trees.there.join("go on"), "")?;
    appears(trees.there.join("done"))?;
    let content = fs::read_to_string(trees.there.join("second"))?;
    ensure!(content == "before and after", "{content}");
    let left = listing(&trees.there)?;
    ensure!(left.len() == 4, "more than four files: {left:?}");
    Ok(())
}

/// Nothing of the container is on the destination but its name: bundle and root filesystem come, while the container
/// writes into them, and through a mapping too, where its own names of files mean nothing on the host.
fn a_container_moves_with_its_root_filesystem(rig: &Rig) -> Result<()> {
    let arguments = [&Writer::arguments()[..], &["/data"]].concat();
    // On a tmpfs the kernel never marks what is stored through a mapping.
    let disk = small_disk::mount(rig, "bundle-source", 64 << 10)?;
    let container = Container::prepare(rig, &arguments)?;
    let bundle = &container.source.bundle;
    ensure!(*bundle == disk, "the bundle is elsewhere");
    let data = bundle.join("rootfs/data");
    fs::create_dir(&data)?;
    fill(&bundle.join("rootfs/var"))?;
    container.run()?;
    let writer = Writer::watch(rig, container.source.running()?, &data)?;
    let there = rig.make_folder("bundle-there")?;
    let mut plan = container.plan(rig)?;
    plan.destination_mounts = vec![(there.clone(), bundle.clone())];
    plan.restorer.pop().context("the other bundle")?;
    plan.restorer.push(bundle.clone().into());
    plan.restorer
        .extend(["--runtime".into(), other_cgroup(rig)?.into()]);
    let sync = ["--sync".into(), bundle.clone().into_os_string()];
    plan.server.extend(sync.clone());
    plan.restorer.extend(sync);
    let frozen = rig.folder().join("bundle-at-the-freeze");
    let note = format!("cp -a '{}' '{}'", bundle.display(), frozen.display());
    plan.on_frozen = format!("{note} && {}", plan.on_frozen);
    let migration = plan.migrate(rig, writer.pid())?;
    ensure!(container.destination.running()? == migration.pid);
    ensure!(
        container.source.state().is_none(),
        "the source's runtime still knows it"
    );
    writer.finish(&there.join("rootfs/data"))?;
    let stays = |line: &String| !line.contains("written by") && !line.contains("config.json");
    let of = |tree: &Path| -> Result<Vec<String>> {
        Ok(listing(tree)?.into_iter().filter(stays).collect())
    };
    let (expected, there) = (of(&frozen)?, of(&there)?);
    ensure!(
        expected.len() > 20,
        "the bundle was not noted: {expected:#?}"
    );
    ensure!(
        expected == there,
        "at the freeze: {expected:#?}\nthere: {there:#?}"
    );
    run(Command::new("umount").arg("--lazy").arg(&disk)).map(drop)
}

/// Both hosts are one machine here, where a container's cgroup can be there only once: a runtime for the destination that
/// gives it another one.
fn other_cgroup(rig: &Rig) -> Result<PathBuf> {
    let script = r#"#!/bin/sh
previous=
for argument; do
  [ "$previous" != --bundle ] || sed -i 's/-source"/-destination"/' "$argument/config.json"
  previous=$argument
done
exec runc "$@"
"#;
    let path = rig.folder().join("runc-elsewhere");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
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

/// The names of these attributes.
const ATTRIBUTE_NAMES: [&str; 2] = ["user.note", "system.posix_acl_access"];

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

/// Paths that the last pass is asked to compare for them.
const LATE_PATHS: u64 = 16 // directories: ./, d2, d2/moved, d3, d6, 4 from d7 on, d8, aside, d9, d11, d12, d14, d14/empty
    + 8 // files: f1, f2 and f3 of d5, d11/f1, d12/f2, d13/f1, d15/f1 with its other name d16/pair
    + 3 // of these, names of files with several: they are compared, and then linked
    + FILES_PER_FOLDER as u64 // those that are called as in d9, and were in d10
    + 1; // the one that grows

/// Files that do not change.
const MANY: usize = 5_000;
const FILES_PER_FOLDER: usize = 50;

/// Arguments: the file, the destination's directory for it, what to write in the end. Lets the file grow as long as
/// rsync brings it, which shows by a file of its own.
const GROWER: &str = r#"
import os, sys, time
path, there, done = sys.argv[1:]
name = "." + os.path.basename(path) + "."
is_on_its_way = lambda: any(entry.startswith(name) for entry in os.listdir(there))
open(done + ".ready", "w").close()
while not is_on_its_way():
    time.sleep(0.0002)
grown = 0
while is_on_its_way() and grown < 64:
    with open(path, "ab") as f:
        f.write(os.urandom(1 << 20))
    grown += 1
with open(done, "w") as f:
    f.write(str(grown))
while True:
    time.sleep(1000)
"#;

/// Everything that can happen to a file between the passes, among many to which nothing happens.
fn late_changes_among_many_files(rig: &Rig) -> Result<()> {
    let trees = TwoTrees::make(rig)?;
    let tree = trees.path.display();
    for folder in 0..MANY / FILES_PER_FOLDER {
        let folder = trees.path.join(format!("d{folder}"));
        fs::create_dir(&folder)?;
        for file in 0..FILES_PER_FOLDER {
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
    let (grows, grown) = (trees.path.join("grows"), rig.folder().join("grown"));
    // Large enough that it is on its way for some time.
    fs::write(&grows, vec![7; 96 << 20])?;
    let mut command = rig.source.command("setsid");
    command.args(["/usr/bin/python3", "-I", "-c", GROWER]);
    command.args([&grows, &trees.there, &grown]);
    let grower = Process::start_detached("grower", &mut command)?;
    let looks = grown.with_extension("ready");
    wait_until(PATIENCE, "the grower to look", || looks.exists())?;
    let mut plan = trees.plan(rig)?;
    let sync = ["--sync".into(), trees.path.clone().into_os_string()];
    plan.server.extend(sync.clone());
    plan.restorer.extend(sync);
    // When CRIU is called the first pass is over, and nothing is frozen yet.
    let late = format!(
        "timeout 60 sh -c 'until [ -s {} ]; do sleep 0.01; done'; \
        cd '{tree}' && {LATE_CHANGES}; echo half >> d15/f1; /usr/bin/python3 -I {} '{tree}'",
        grown.display(),
        script.display(),
    );
    plan.source_criu = fake_criu::running_before(rig, "dump", &late)?;
    let migration = plan.migrate(rig, grower.pid())?;
    let grown: u64 = fs::read_to_string(grown)?.parse()?;
    ensure!(grown > 0, "the file did not grow while it came");
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
    let set = ATTRIBUTE_NAMES
        .iter()
        .filter(|name| attributes.contains(**name));
    let set = set.count() as u64;
    ensure!(
        set == attributes_taken(rig)?,
        "only these were set: {attributes}"
    );
    let (first, last) = (
        migration.destination.files.first,
        migration.destination.files.last,
    );
    ensure!((first.trees, first.paths) == (1, 0), "{first:?}");
    ensure!(
        (last.trees, last.paths) == (0, LATE_PATHS + set),
        "other paths than {LATE_PATHS} and {set} with attributes: {last:?}"
    );
    ensure!(last.bytes >= grown << 20, "{grown} MiB more: {last:?}");
    let look = &migration.source.last_look;
    ensure!(
        (look.watched_trees, look.whole_trees) == (1, 0) && look.paths < 2 * LATE_PATHS,
        "looked at besides what changed: {look:?}"
    );
    println!("{MANY} files, {set} attributes, {grown} MiB grown; {first:?}, {last:?}, {look:?}");
    Ok(())
}

/// An overlay stores into the tree, of which the kernel tells nobody who watches it: all files are looked at then.
fn more_happens_than_can_be_followed(rig: &Rig) -> Result<()> {
    let trees = TwoTrees::make(rig)?;
    let place = |name: &str| trees.path.join(name);
    for name in ["lower", "upper", "work"] {
        fs::create_dir(place(name))?;
    }
    fs::write(place("lower/file"), "before")?;
    let merged = rig.make_folder("merged")?;
    let options = format!(
        "lowerdir={l},upperdir={u},workdir={w}",
        l = place("lower").display(),
        u = place("upper").display(),
        w = place("work").display()
    );
    let mut mount = Command::new("mount");
    mount.args([
        "-t",
        "overlay",
        "overlay",
        "-o",
        &options.replace(' ', "\\ "),
    ]);
    run(mount.arg(&merged))?;
    fs::write(merged.join("file"), "copied up")?;
    let writer = Writer::start(rig, &trees.path)?;
    let mut plan = trees.plan(rig)?;
    let sync = ["--sync".into(), trees.path.clone().into_os_string()];
    plan.server.extend(sync.clone());
    plan.restorer.extend(sync);
    let late = format!("echo late >> '{}/file'", merged.display());
    plan.source_criu = fake_criu::running_before(rig, "dump", &late)?;
    let migration = plan.migrate(rig, writer.pid())?;
    let content = fs::read_to_string(trees.there.join("upper/file"));
    run(Command::new("umount").arg("--lazy").arg(&merged))?;
    ensure!(content? == "copied uplate\n", "the late change is missing");
    let look = &migration.source.last_look;
    ensure!((look.watched_trees, look.whole_trees) == (0, 1), "{look:?}");
    writer.finish(&trees.there)
}

/// How many of the attributes this file system takes.
fn attributes_taken(rig: &Rig) -> Result<u64> {
    let folder = rig.make_folder("probe/d0")?;
    for file in ["f1", "f2"] {
        fs::write(folder.join(file), "")?;
    }
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-I", "-c", ATTRIBUTES]);
    let said = run(command.arg(rig.folder().join("probe")))?;
    print!("{said}");
    let skipped = said.lines().filter(|line| line.starts_with("skipped"));
    Ok(ATTRIBUTE_NAMES.len() as u64 - skipped.count() as u64)
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
    let only_here = trees.only_here()?;
    let writer = Writer::start(rig, &trees.path)?;
    let mut plan = trees.plan(rig)?;
    let options = match source_knows {
        true => &mut plan.server,
        false => &mut plan.restorer,
    };
    options.extend(["--sync".into(), trees.path.clone().into_os_string()]);
    let whose = match source_knows {
        true => format!("only there [{}]", trees.path.display()),
        false => format!("only here [{}]", trees.path.display()),
    };
    is_refused(rig, &plan, &writer, &["--sync", &whose])?;
    ensure!(only_here.exists(), "what was only there is deleted");
    writer.finish(&trees.path)
}

fn is_refused(rig: &Rig, plan: &PairPlan, writer: &Writer, words: &[&str]) -> Result<()> {
    let mut server = plan.start_server(rig, writer.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(&mut restorer, RESTORE, words)?;
    expect_failure(&mut server, ABORTED_BY_PEER, words)?;
    ensure!(server.record()?.frozen_at_unix_us == 0, "it was frozen");
    Ok(())
}

/// What can be known before files come is checked before.
fn a_refused_move_deletes_nothing(rig: &Rig) -> Result<()> {
    let trees = TwoTrees::make(rig)?;
    let only_here = trees.only_here()?;
    let writer = Writer::start(rig, &trees.path)?;
    let plan = trees.plan(rig)?;
    let told = |server: &[&OsStr], restorer: &[&OsStr]| {
        let mut plan = plan.clone();
        plan.server.extend(server.iter().map(OsString::from));
        plan.restorer.extend(restorer.iter().map(OsString::from));
        plan
    };
    let sync = ["--sync".as_ref(), trees.path.as_os_str()];
    let shared = ["--shared-fs".as_ref()];
    let mut taken = told(&sync, &sync);
    // Source and destination are one machine.
    taken.restorer.retain(|option| option != "--pidns");
    for (plan, words) in [
        (taken, ["--pidns", "taken here"]),
        (told(&shared, &sync), ["--shared-fs", "source was told"]),
        (
            told(&sync, &shared),
            ["--shared-fs", "destination was told"],
        ),
    ] {
        is_refused(rig, &plan, &writer, &words)?;
        ensure!(only_here.exists(), "deleted, although {words:?}");
    }
    writer.finish(&trees.path)
}
