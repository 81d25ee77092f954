//! What a process tree has open that must be on the destination too.
//!
//! What CRIU brings along itself is left out: deleted files, and in a mount namespace of the tree's own everything on a
//! tmpfs.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use common::limits::{MAX_OPEN_FILES, MAX_OPEN_FILES_PATH_BYTES};
use common::open_file::OpenFile;
use common::proc_text::lines;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use procfs::process::{FDPermissions, FDTarget, Process};

use crate::mapped::{Mapping, mapping, maps};

/// The kernel writes this behind the path of a file that has none any more.
const DELETED: &str = " (deleted)";
/// What the kernel makes up; and no path there is the same on another host.
const MADE_UP: &[&str] = &["/proc", "/sys"];

/// One way by which a process holds a file.
struct Held {
    /// Where the process sees it.
    path: PathBuf,
    /// A link that leads to it, whatever is at its path by now.
    link: PathBuf,
    is_written: bool,
}

/// The files and directories of `processes`, as far as [`MAX_OPEN_FILES`] goes.
pub fn of(processes: &[Process]) -> Vec<OpenFile> {
    let mut found: BTreeMap<String, OpenFile> = BTreeMap::new();
    let mut path_bytes = 0;
    for process in processes {
        let brings_tmpfs = has_mounts_of_its_own(process);
        for held in held_by(process) {
            let Some(path) = worth_a_look(&held.path) else {
                continue;
            };
            if let Some(known) = found.get_mut(path) {
                known.bytes = known.bytes.filter(|_| !held.is_written);
                continue;
            }
            path_bytes += path.len();
            if found.len() == MAX_OPEN_FILES || path_bytes > MAX_OPEN_FILES_PATH_BYTES {
                return found.into_values().collect();
            }
            if let Some(file) = look_at(&held, path, brings_tmpfs) {
                found.insert(path.to_owned(), file);
            }
        }
    }
    found.into_values().collect()
}

fn held_by(process: &Process) -> impl Iterator<Item = Held> {
    let directory = PathBuf::from(format!("/proc/{}", process.pid));
    let descriptors = process.fd().into_iter().flatten().flatten();
    let links = directory.join("fd");
    let opened = descriptors.filter_map(move |descriptor| match descriptor.target {
        FDTarget::Path(ref path) => Some(Held {
            path: path.clone(),
            link: links.join(descriptor.fd.to_string()),
            is_written: descriptor.mode().contains(FDPermissions::WRITE),
        }),
        _ => None,
    });
    let links = directory.join("map_files");
    let maps = maps(process.pid);
    let mappings = lines(&maps).filter_map(mapping);
    let mapped: Vec<Held> = mappings
        .filter_map(|mapping| mapped(&links, mapping))
        .collect();
    let places = ["cwd", "root"].into_iter().filter_map(move |name| {
        let link = directory.join(name);
        Some(Held {
            path: fs::read_link(&link).ok()?,
            link,
            is_written: false,
        })
    });
    opened.chain(mapped).chain(places)
}

/// Programs are compared by their content, elsewhere.
fn mapped(links: &Path, mapping: Mapping<'_>) -> Option<Held> {
    let is_file = mapping.name.starts_with(b"/");
    (is_file && !mapping.is_executable()).then(|| Held {
        path: PathBuf::from(OsStr::from_bytes(mapping.name)),
        link: links.join(mapping.link_name()),
        is_written: mapping.is_shared() && mapping.is_writable(),
    })
}

fn worth_a_look(path: &Path) -> Option<&str> {
    let is_made_up = MADE_UP.iter().any(|made_up| path.starts_with(made_up));
    let text = path.to_str()?;
    (path.is_absolute() && !is_made_up && !text.ends_with(DELETED)).then_some(text)
}

fn look_at(held: &Held, path: &str, brings_tmpfs: bool) -> Option<OpenFile> {
    let metadata = fs::metadata(&held.link).ok()?;
    let file = OpenFile::of(path, &metadata, held.is_written)?;
    let is_on_tmpfs = || statfs(&held.link).is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC);
    (!brings_tmpfs || !is_on_tmpfs()).then_some(file)
}

/// Also when that cannot be found out: what is left out is compared by CRIU.
fn has_mounts_of_its_own(process: &Process) -> bool {
    let namespace = |name: &str| fs::read_link(format!("/proc/{name}/ns/mnt")).ok();
    let (theirs, ours) = (namespace(&process.pid.to_string()), namespace("self"));
    theirs.is_none() || theirs != ours
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};

    use super::*;

    #[test]
    fn what_we_have_open_is_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let [read, written, gone] = ["read", "written", "gone"].map(|name| dir.path().join(name));
        for path in [&read, &written, &gone] {
            fs::write(path, "12345").expect("written");
        }
        let _held = [&read, &written, &gone].map(|path| File::open(path).expect("opened"));
        let append = OpenOptions::new().append(true).open(&written);
        let _append = append.expect("opened");
        fs::remove_file(&gone).expect("removed");
        let found = of(&[Process::myself().expect("ourselves")]);
        let find = |path: &Path| found.iter().find(|file| Path::new(&file.path) == path);
        assert_eq!(find(&read).expect("found").bytes, Some(5));
        assert_eq!(find(&written).expect("found").bytes, None);
        assert_eq!(find(&gone), None);
        let here = std::env::current_dir().expect("there is one");
        assert!(find(&here).is_some(), "the working directory");
        assert!(found.iter().all(|file| !file.path.contains("deleted")));
        assert!(found.iter().all(|file| !file.path.starts_with("/proc")));
    }
}
