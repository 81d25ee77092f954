//! A python process with nested data that it changes and checks all the time.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::unistd::Pid;

use crate::process::Process;
use crate::rig::Rig;
use crate::wait::wait_until;

const PATIENCE: Duration = Duration::from_secs(120);

/// Arguments: status file, stop file, records. The status is `ROUNDS STATE`.
///
/// Each record is nested, holds its own digest, and is rebuilt from time to time; objects are shared and cyclic, so
/// the garbage collector runs over all of them.
const SCRIPT: &str = r#"
import gc, hashlib, os, random, sys

status, stop, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
rng = random.Random(7)

def say(rounds, state):
    with open(status + ".new", "w") as f:
        f.write(f"{rounds} {state}")
    os.rename(status + ".new", status)

def build(number):
    words = [rng.choice(("stock", "orders", "north", "south", "late")) + str(rng.randrange(10**6)) for _ in range(12)]
    record = {"number": number, "words": words, "tree": {"left": {"leaf": tuple(words[:3])}, "right": [words[3:], {w: len(w) for w in words}]},
              "bytes": bytearray(rng.randbytes(rng.randrange(50, 3000)))}
    record["self"] = record
    record["digest"] = digest(record)
    return record

def digest(record):
    h = hashlib.sha256()
    h.update(repr((record["number"], record["words"], record["tree"])).encode())
    h.update(record["bytes"])
    return h.digest()

def check(record):
    if digest(record) != record["digest"] or record["self"] is not record:
        say(rounds, f"damaged record {record['number']}")
        os._exit(1)

rounds = 0
records = [build(number) for number in range(count)]
index = {record["number"]: record for record in records}
while not os.path.exists(stop):
    for _ in range(200):
        number = rng.randrange(count)
        check(index[number])
        if rng.random() < 0.2:
            index[number] = records[number] = build(number)
    rounds += 1
    if rounds % 50 == 0:
        gc.collect()
    say(rounds, "runs")
for record in records:
    check(record)
say(rounds, "ok")
"#;

/// A running python workload.
#[derive(Debug)]
pub struct Python {
    process: Process,
    status: PathBuf,
    stop: PathBuf,
}

impl Python {
    /// Starts it on the source with `records` records and waits until it has built them.
    pub fn start(rig: &Rig, records: usize) -> Result<Self> {
        let folder = rig.make_folder("python")?;
        let (status, stop) = (folder.join("status"), folder.join("stop"));
        let mut command = rig.source.command("setsid");
        command
            .args(["/usr/bin/python3", "-I", "-c", SCRIPT])
            .arg(&status)
            .arg(&stop)
            .arg(records.to_string());
        let python = Self {
            process: Process::start_detached("python", &mut command)?,
            status,
            stop,
        };
        python.wait_for_rounds(5)?;
        Ok(python)
    }

    /// Its PID on the source.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Waits until it has done `more` rounds.
    pub fn wait_for_rounds(&self, more: u64) -> Result<()> {
        let wanted = self.status().0 + more;
        wait_until(PATIENCE, "the python workload to go on", || {
            let (rounds, state) = self.status();
            rounds >= wanted || !matches!(state.as_str(), "runs" | "")
        })?;
        let (_, state) = self.status();
        ensure!(state == "runs", "the python workload says: {state}");
        Ok(())
    }

    /// Ends it; it checks every record first.
    pub fn finish(&self) -> Result<()> {
        std::fs::write(&self.stop, "")?;
        wait_until(PATIENCE, "the python workload to end", || {
            self.status().1 != "runs"
        })?;
        let (_, state) = self.status();
        ensure!(state == "ok", "the python workload says: {state}");
        Ok(())
    }

    fn status(&self) -> (u64, String) {
        let text = std::fs::read_to_string(&self.status).unwrap_or_default();
        let (rounds, state) = text.split_once(' ').unwrap_or(("0", ""));
        (rounds.parse().unwrap_or(0), state.to_owned())
    }
}
