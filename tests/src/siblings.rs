//! Forked processes that share most of their memory: pages of one parent, with a few of each child's own.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::unistd::Pid;

use crate::process::Process;
use crate::rig::Rig;
use crate::wait::wait_until;

const PATIENCE: Duration = Duration::from_secs(120);

/// Arguments: folder, MiB, children. Each process says its number when it is ready, and when the file `stop` is there it
/// compares every byte of its memory and says `ok`.
const SCRIPT: &str = r#"
import mmap, os, random, sys, time

folder, mib, children = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
length = mib << 20
shared = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
rng = random.Random(11)
for at in range(0, length, 1 << 20):
    shared[at:at + (1 << 20)] = rng.randbytes(1 << 20)

me = 0
for number in range(1, children + 1):
    if os.fork() == 0:
        me = number
        break

OWN = 50
def own(page):
    return random.Random(me * 1000003 + page).randbytes(4096)

pages = length // 4096
mine = random.Random(me).sample(range(pages), OWN) if me else []
for page in mine:
    shared[page * 4096:(page + 1) * 4096] = own(page)

def say(what):
    path = f"{folder}/{me}.{what}"
    with open(path + ".new", "w") as f:
        f.write(what)
    os.rename(path + ".new", path)

say("ready")
while not os.path.exists(f"{folder}/stop"):
    time.sleep(0.01)
rng, mine, wrong = random.Random(11), set(mine), 0
for at in range(0, length, 1 << 20):
    block = bytearray(rng.randbytes(1 << 20))
    for page in range(at // 4096, (at >> 12) + 256):
        if page in mine:
            block[page * 4096 - at:(page + 1) * 4096 - at] = own(page)
    wrong += shared[at:at + (1 << 20)] != bytes(block)
say("wrong" if wrong else "ok")
while True:
    time.sleep(1)
"#;

/// Pages that each child has written since it was forked.
pub const OWN_PAGES: u64 = 50;

/// The running family.
#[derive(Debug)]
pub struct Siblings {
    process: Process,
    folder: PathBuf,
    children: usize,
}

impl Siblings {
    /// Starts a parent with `mib` of memory and its children on the source.
    pub fn start(rig: &Rig, mib: u64, children: usize) -> Result<Self> {
        let folder = rig.make_folder("siblings")?;
        let mut command = rig.source.command("setsid");
        command
            .args(["/usr/bin/python3", "-I", "-c", SCRIPT])
            .arg(&folder)
            .arg(mib.to_string())
            .arg(children.to_string());
        let siblings = Self {
            process: Process::start_detached("siblings", &mut command)?,
            folder,
            children,
        };
        siblings.wait_for("ready")?;
        Ok(siblings)
    }

    /// The parent's PID on the source.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Lets every process compare its memory.
    pub fn check(&self) -> Result<()> {
        std::fs::write(self.folder.join("stop"), "")?;
        wait_until(PATIENCE, "every process to compare its memory", || {
            self.all_said("ok") || self.anyone_said("wrong")
        })?;
        ensure!(!self.anyone_said("wrong"), "memory was damaged");
        Ok(())
    }

    fn wait_for(&self, what: &str) -> Result<()> {
        wait_until(PATIENCE, "every process to start", || self.all_said(what))
    }

    fn all_said(&self, what: &str) -> bool {
        (0..=self.children).all(|number| self.said(number, what))
    }

    fn anyone_said(&self, what: &str) -> bool {
        (0..=self.children).any(|number| self.said(number, what))
    }

    fn said(&self, number: usize, what: &str) -> bool {
        self.folder.join(format!("{number}.{what}")).exists()
    }
}
