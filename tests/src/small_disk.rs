//! A disk that is full.

use std::path::PathBuf;

use anyhow::Result;

use crate::rig::Rig;
use crate::shell::run_line;

/// A file system of `kib` KiB, mounted for this rig's processes only.
pub fn mount(rig: &Rig, name: &str, kib: u32) -> Result<PathBuf> {
    let folder = rig.make_folder(name)?;
    run_line(&format!(
        "mount -t tmpfs -o size={kib}k tmpfs {}",
        folder.display()
    ))?;
    Ok(folder)
}
