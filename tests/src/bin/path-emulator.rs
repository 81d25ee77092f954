//! Carries IP packets between two network namespaces as a long, narrow or lossy path would:
//! `path-emulator NAMESPACE NAMESPACE DEVICE COUNTERS PATH`.

use std::path::Path;

use anyhow::{Context, Result};
use tests::path::PathSpec;
use tests::path::emulator::{self, PathCounters};
use tests::path::tun::Tun;
use tests::shared_file;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, destination, device, counters, spec] = &arguments[..] else {
        anyhow::bail!("usage: path-emulator NAMESPACE NAMESPACE DEVICE COUNTERS PATH");
    };
    let spec: PathSpec = serde_json::from_str(spec).context("the path is no JSON")?;
    let counters: &PathCounters = shared_file::map(Path::new(counters))?;
    // The process stays where the last device is made, so it ends with that namespace's other processes.
    let source = Tun::make(source, device)?;
    let destination = Tun::make(destination, device)?;
    println!("ready");
    emulator::run(source, destination, &spec, counters)
}
