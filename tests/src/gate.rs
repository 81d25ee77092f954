//! A hook that stops a migration at its phase until the test lets it go on.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::rig::Rig;
use crate::wait::wait_until;

/// A gate in a hook: the hook says it is there and waits for a word.
#[derive(Debug)]
pub struct Gate {
    reached: PathBuf,
    go_on: PathBuf,
}

impl Gate {
    /// Makes a gate called `name`.
    pub fn new(rig: &Rig, name: &str) -> Result<Self> {
        let folder = rig.make_folder("gates")?;
        let gate = Self {
            reached: folder.join(format!("{name}.reached")),
            go_on: folder.join(format!("{name}.go")),
        };
        mkfifo(&gate.go_on, Mode::S_IRWXU)
            .with_context(|| format!("cannot make {}", gate.go_on.display()))?;
        Ok(gate)
    }

    /// The hook `line` with the gate behind it.
    pub fn after(&self, line: &str) -> String {
        format!(
            "{line}; touch {}; read word < {}",
            self.reached.display(),
            self.go_on.display()
        )
    }

    /// Waits until the hook is at the gate.
    pub fn wait(&self, limit: Duration) -> Result<()> {
        wait_until(
            limit,
            &format!("the hook at {}", self.reached.display()),
            || self.reached.exists(),
        )
    }

    /// Lets the hook end, if it still waits.
    pub fn open(&self) -> Result<()> {
        // Reading and writing never blocks on a FIFO; the word stays there until the hook reads it or is gone.
        let mut options = OpenOptions::new();
        let mut fifo = options
            .read(true)
            .write(true)
            .open(&self.go_on)
            .context("no gate")?;
        fifo.write_all(b"go\n").context("cannot open the gate")?;
        // The word is lost when the last end closes, so this one stays open with the rig.
        std::mem::forget(fifo);
        Ok(())
    }
}
