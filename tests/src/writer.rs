//! A process that keeps writing files: growing, replaced, mapped, and open though unlinked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::unistd::Pid;

use crate::process::Process;
use crate::rig::Rig;
use crate::wait::wait_until;

const PATIENCE: Duration = Duration::from_secs(120);

/// Argument: the tree. All it needs to know is in its memory; it checks each file against that in every round.
const SCRIPT: &str = r#"
import mmap, os, sys

tree = sys.argv[1] + "/written by the workload/"
os.makedirs(tree, exist_ok=True)
log = open(tree + "growing", "wb", buffering=0)
unlinked = open(tree + "unlinked", "w+b", buffering=0)
os.unlink(tree + "unlinked")
# More than CRIU takes along unless it is told to.
large, piece_of_large = open(tree + "large", "w+b", buffering=0), os.urandom(1 << 16)
os.unlink(tree + "large")
for _ in range(256):
    large.write(piece_of_large)
fd = os.open(tree + "mapped", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1 << 16)
mapped = mmap.mmap(fd, 1 << 16)
os.close(fd)
expected, rounds = b"", 0

def say(text):
    with open(tree + "state.new", "w") as f:
        f.write(text)
    os.rename(tree + "state.new", tree + "state")

def check():
    if open(tree + "growing", "rb").read() != expected:
        return "growing"
    unlinked.seek(0)
    if unlinked.read() != expected[-4096:]:
        return "unlinked"
    if os.pread(large.fileno(), 1 << 16, (rounds % 256) << 16) != piece_of_large:
        return "large"
    with open(tree + "mapped", "rb") as f:
        if f.read() != mapped[:]:
            return "mapped"
    if rounds and int.from_bytes(mapped[:8], "little") != rounds:
        return "mapping"
    if rounds and open(tree + f"numbered {rounds % 7}").read() != str(rounds):
        return "numbered"
    return ""

while not os.path.exists(tree + "stop"):
    wrong = check()
    if wrong:
        say(f"damaged {wrong}")
        sys.exit(1)
    rounds += 1
    piece = os.urandom(64)
    log.write(piece)
    expected += piece
    unlinked.seek(0)
    unlinked.truncate()
    unlinked.write(expected[-4096:])
    mapped[:8] = rounds.to_bytes(8, "little")
    mapped[-8:] = rounds.to_bytes(8, "little")
    for old in (f"numbered {rounds % 7}",):
        with open(tree + old, "w") as f:
            f.write(str(rounds))
    if rounds % 5 == 0 and os.path.exists(sys.argv[1] + "/to be removed"):
        os.unlink(sys.argv[1] + "/to be removed")
    say(f"runs {rounds}")
say("ok")
"#;

/// The running process.
#[derive(Debug)]
pub struct Writer {
    pid: Pid,
    /// It, if we started it.
    _process: Option<Process>,
    tree: PathBuf,
    frozen: PathBuf,
}

impl Writer {
    /// Starts it on the source, writing below `tree`, and waits until it does.
    pub fn start(rig: &Rig, tree: &Path) -> Result<Self> {
        let mut command = rig.source.command("setsid");
        command.args(Self::arguments()).arg(tree);
        let process = Process::start_detached("writer", &mut command)?;
        let writer = Self::watch(rig, process.pid(), tree)?;
        Ok(Self {
            _process: Some(process),
            ..writer
        })
    }

    /// What it is started with, but for the tree as it sees it.
    pub fn arguments() -> [&'static str; 4] {
        ["/usr/bin/python3", "-I", "-c", SCRIPT]
    }

    /// Watches one that somebody else started as `pid`, and waits until it writes below what is `tree` here.
    pub fn watch(rig: &Rig, pid: Pid, tree: &Path) -> Result<Self> {
        let writer = Self {
            pid,
            _process: None,
            tree: tree.to_owned(),
            frozen: rig.folder().join("tree-at-the-freeze"),
        };
        wait_until(PATIENCE, "the writer to write", || {
            rounds(&state(tree)) > 10
        })?;
        Ok(writer)
    }

    /// Its PID on the source.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// A line of shell for the freeze that keeps a copy of the tree as it is then.
    pub fn note_frozen(&self) -> String {
        format!(
            "cp -a '{}' '{}'",
            self.tree.display(),
            self.frozen.display()
        )
    }

    /// That copy.
    pub fn frozen_tree(&self) -> Result<PathBuf> {
        ensure!(self.frozen.is_dir(), "nobody noted the frozen tree");
        Ok(self.frozen.clone())
    }

    /// Waits until it has gone on where `tree` is its tree now, and ends it.
    pub fn finish(&self, tree: &Path) -> Result<()> {
        let before = rounds(&state(tree));
        wait_until(PATIENCE, "the writer to go on", || {
            let state = state(tree);
            rounds(&state) > before + 10 || state.starts_with("damaged")
        })?;
        std::fs::write(tree.join("written by the workload/stop"), "")?;
        wait_until(PATIENCE, "the writer to end", || {
            !state(tree).starts_with("runs")
        })?;
        let state = state(tree);
        ensure!(state == "ok", "the writer says: {state}");
        Ok(())
    }
}

fn state(tree: &Path) -> String {
    std::fs::read_to_string(tree.join("written by the workload/state")).unwrap_or_default()
}

fn rounds(state: &str) -> u64 {
    state
        .strip_prefix("runs ")
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(0)
}
