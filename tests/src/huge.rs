//! A process that asked for huge pages, whose content it checks in the end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use crate::process::Process;
use crate::rig::Rig;
use crate::wait::wait_until;

const PATIENCE: Duration = Duration::from_secs(120);

/// Arguments: folder, MiB. Half of its memory is asked to be huge and half not to be. It says `ready`, and when the
/// file `stop` is there it compares every byte and says `ok`.
const SCRIPT: &str = r#"
import mmap, os, random, sys, time

folder, length = sys.argv[1], int(sys.argv[2]) << 20
huge, small = (mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2))
huge.madvise(mmap.MADV_HUGEPAGE)
small.madvise(mmap.MADV_NOHUGEPAGE)

def fill(memory, seed):
    rng = random.Random(seed)
    for at in range(0, length, 1 << 20):
        memory[at:at + (1 << 20)] = rng.randbytes(1 << 20)

def is_right(memory, seed):
    rng = random.Random(seed)
    return all(memory[at:at + (1 << 20)] == rng.randbytes(1 << 20) for at in range(0, length, 1 << 20))

def say(what):
    with open(f"{folder}/said.new", "w") as f:
        f.write(what)
    os.rename(f"{folder}/said.new", f"{folder}/said")

fill(huge, 1)
fill(small, 2)
say("ready")
while not os.path.exists(f"{folder}/stop"):
    time.sleep(0.01)
say("ok" if is_right(huge, 1) and is_right(small, 2) else "wrong")
while True:
    time.sleep(1)
"#;

/// The running process.
#[derive(Debug)]
pub struct Giant {
    process: Process,
    folder: PathBuf,
}

impl Giant {
    /// Starts it with twice `mib` of memory, and waits until all of it is there.
    pub fn start(rig: &Rig, mib: u64) -> Result<Self> {
        let folder = rig.make_folder("giant")?;
        let mut command = rig.source.command("setsid");
        command
            .args(["/usr/bin/python3", "-I", "-c", SCRIPT])
            .arg(&folder)
            .arg(mib.to_string());
        let process = Process::start_detached("giant", &mut command)?;
        let giant = Self { process, folder };
        giant.wait_until_it_says("ready")?;
        Ok(giant)
    }

    /// Its PID on the source.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Has it compare every byte.
    pub fn finish(&self) -> Result<()> {
        std::fs::write(self.folder.join("stop"), "")?;
        self.wait_until_it_says("ok")
    }

    fn wait_until_it_says(&self, wanted: &str) -> Result<()> {
        let said = || read(&self.folder.join("said"));
        wait_until(PATIENCE, "the giant", || {
            [wanted, "wrong"].contains(&said().as_str())
        })?;
        ensure!(said() == wanted, "the giant says: {}", said());
        Ok(())
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// MiB of anonymous memory of `pid` that lie on huge pages.
pub fn huge_mib(pid: Pid) -> Result<u64> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let mut lines = rollup.lines();
    let line = lines.find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    let kib: u64 = kib.context("no AnonHugePages")?.parse()?;
    Ok(kib >> 10)
}
