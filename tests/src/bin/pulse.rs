//! A workload's heartbeat: `pulse FILE COMMAND...` starts the command and ticks beside it until it is told to stop.
//!
//! As the root of a migrated tree it measures the cutover from inside: no instruction of it runs between the freeze
//! and the resume, so the longest time between two ticks is the time without the workload, however it was moved.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use tests::pulse::{Pulse, Ticker};
use tests::shared_file;

/// Short against any cutover, long enough not to disturb the workload.
const PERIOD: Duration = Duration::from_micros(500);

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let file = arguments
        .next()
        .context("usage: pulse FILE COMMAND [ARGUMENT]...")?;
    let pulse: &Pulse = shared_file::map(Path::new(&file))?;
    let mut ticker = Ticker::new(pulse);
    let child = arguments
        .next()
        .map(|program| start(&program, arguments))
        .transpose()?;
    while pulse.stop.load(Ordering::Relaxed) == 0 {
        ticker.tick();
        std::thread::sleep(PERIOD);
    }
    if let Some(mut child) = child {
        child.kill().context("cannot end the command")?;
        child.wait().context("the command did not end")?;
    }
    Ok(())
}

fn start(program: &str, arguments: impl Iterator<Item = String>) -> Result<std::process::Child> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
        .spawn()
        .with_context(|| format!("cannot start {program}"))
}
