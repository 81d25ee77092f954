//! A process that has warmed up and waits: each copy of it checks all of its memory when it is told to end.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::unistd::Pid;

use crate::process::Process;
use crate::rig::Rig;
use crate::wait::wait_until;

const PATIENCE: Duration = Duration::from_secs(120);

/// Arguments: folder, MiB. Every copy names its verdict by fresh randomness, and a sign of its life by its PID namespace,
/// for all else is the same in all of them.
const SCRIPT: &str = r#"
import hashlib, os, random, sys, time

folder, mib = sys.argv[1], int(sys.argv[2])
rng = random.Random(11)
blocks = [bytearray(rng.randbytes(1 << 20)) for _ in range(mib)]
blocks.append(bytearray(8 << 20))
digests = [hashlib.sha256(block).digest() for block in blocks]
open(folder + "/warm", "w").close()
while not os.path.exists(folder + "/stop"):
    time.sleep(0.01)
    home = folder + "/runs-in-" + os.readlink("/proc/self/ns/pid")
    if not os.path.exists(home):
        open(home, "w").close()
    block = rng.randrange(mib)
    if hashlib.sha256(blocks[block]).digest() != digests[block]:
        break
damaged = [n for n, block in enumerate(blocks) if hashlib.sha256(block).digest() != digests[n]]
name = folder + "/verdict-" + os.urandom(8).hex()
with open(name + ".new", "w") as f:
    f.write(f"damaged {damaged}" if damaged else "ok")
os.rename(name + ".new", name)
"#;

/// The process, and whatever was made of it.
#[derive(Debug)]
pub struct WarmCopies {
    process: Process,
    folder: PathBuf,
}

impl WarmCopies {
    /// Starts it on the source with `mib` of random memory and waits until it is warm.
    pub fn start(rig: &Rig, mib: usize) -> Result<Self> {
        let folder = rig.make_folder("warm")?;
        let mut command = rig.source.command("setsid");
        command
            .args(["/usr/bin/python3", "-I", "-c", SCRIPT])
            .arg(&folder)
            .arg(mib.to_string());
        let process = Process::start_detached("warm", &mut command)?;
        wait_until(PATIENCE, "the process to warm up", || {
            folder.join("warm").exists()
        })?;
        let warm = Self { process, folder };
        warm.wait_for(0)?;
        Ok(warm)
    }

    /// The first one's PID on the source.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Whether the first one still lives.
    pub fn original_lives(&mut self) -> bool {
        self.process.is_running()
    }

    /// Waits until `copies` run besides the first one.
    pub fn wait_for(&self, copies: usize) -> Result<()> {
        let homes = || {
            let entries = std::fs::read_dir(&self.folder).into_iter().flatten();
            let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            names.filter(|name| name.starts_with("runs-in-")).count()
        };
        wait_until(PATIENCE, "all copies to run", || homes() > copies)
    }

    /// Ends all copies; there must be `copies`, and each must find its memory unharmed.
    pub fn finish(&self, copies: usize) -> Result<()> {
        ensure!(self.verdicts().is_empty(), "a copy ended by itself");
        std::fs::write(self.folder.join("stop"), "")?;
        wait_until(PATIENCE, "the verdict of each copy", || {
            self.verdicts().len() >= copies
        })?;
        let verdicts = self.verdicts();
        ensure!(
            verdicts == vec!["ok"; copies],
            "the copies say: {verdicts:?}"
        );
        Ok(())
    }

    fn verdicts(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .flatten();
        entries
            .filter(|entry| {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                name.starts_with("verdict-") && !name.ends_with(".new")
            })
            .filter_map(|entry| std::fs::read_to_string(entry.path()).ok())
            .collect()
    }
}
