//! A kernel setting changed for a while, by one process at a time.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result};

/// Puts a setting under `/proc/sys` back when dropped.
#[derive(Debug)]
pub struct Sysctl {
    path: PathBuf,
    before: String,
    /// Locked, so that nobody else takes the changed value for the original one.
    _lock: File,
}

impl Sysctl {
    /// Raises the setting `name`, such as `fs/pipe-max-size`, to at least `value`.
    pub fn raise(name: &str, value: u64) -> Result<Self> {
        let path = PathBuf::from("/proc/sys").join(name);
        let lock = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        lock.lock()
            .with_context(|| format!("cannot lock {}", path.display()))?;
        let before =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if before.trim().parse::<u64>().is_ok_and(|now| now < value) {
            fs::write(&path, value.to_string())
                .with_context(|| format!("cannot change {}", path.display()))?;
        }
        Ok(Self {
            path,
            before,
            _lock: lock,
        })
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.path, self.before.trim()) {
            eprintln!("rig: cannot put {} back: {error}", self.path.display());
        }
    }
}
