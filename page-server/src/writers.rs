//! Files that somebody may store to without a word of the kernel to those who watch directories: through a mapping, or by
//! `io_submit`, which tell of nothing, or as what a block device keeps its content in.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::mapped;
use crate::mounts_below::processes;
use crate::survey::FileId;

/// The permission of a link in `/proc/PID/fd` and `map_files` that says that the file may be written to by it.
const WRITABLE: u32 = 0o200;
/// Where the kernel lists its loop devices.
const BLOCK_DEVICES: &str = "/sys/block";

/// All files that anybody on this host has open for writing, or mapped so.
pub fn everybodys() -> HashSet<FileId> {
    let processes = processes().into_iter().flatten();
    let held = processes.flat_map(|process| {
        let directory = PathBuf::from(format!("/proc/{process}"));
        let mut links = descriptors(&directory);
        links.extend(mapped::shared(&directory));
        links
    });
    held.filter_map(|link| written(&link))
        .chain(behind_loop_devices())
        .collect()
}

fn descriptors(process: &Path) -> Vec<PathBuf> {
    // One that has ended meanwhile holds nothing any more.
    let entries = fs::read_dir(process.join("fd")).into_iter().flatten();
    entries.flatten().map(|entry| entry.path()).collect()
}

/// The file that a link of `/proc` leads to, when it may be written to by that.
fn written(link: &Path) -> Option<FileId> {
    if fs::symlink_metadata(link).ok()?.mode() & WRITABLE == 0 {
        return None;
    }
    let file = fs::metadata(link).ok()?;
    file.is_file().then(|| FileId::of(&file))
}

fn behind_loop_devices() -> impl Iterator<Item = FileId> {
    let devices = fs::read_dir(BLOCK_DEVICES).into_iter().flatten().flatten();
    devices.filter_map(|device| {
        let file = fs::read(device.path().join("loop/backing_file")).ok()?;
        let file = file.strip_suffix(b"\n").unwrap_or(&file);
        let file = fs::metadata(OsStr::from_bytes(file)).ok()?;
        Some(FileId::of(&file))
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_is_open_for_writing_is_found() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = |name: &str| folder.path().join(name);
        let written = File::create(path("written")).expect("made");
        File::create(path("read")).expect("made");
        let read = File::open(path("read")).expect("opened");
        let id = |file: &File| FileId::of(&file.metadata().expect("there"));
        let found = everybodys();
        assert!(found.contains(&id(&written)));
        assert!(!found.contains(&id(&read)));
        let gone = id(&written);
        drop(written);
        assert!(!everybodys().contains(&gone));
    }
}
