//! Which files a tree of processes stores to through mappings: the kernel need not mark these as changed.
//!
//! Files are told by device and inode. Their names in `/proc/PID/maps` are the process's own, which in a container or
//! under a changed root mean other files here, and they need not be UTF-8.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use crate::survey::FileId;
use crate::workload::tree_pids;

/// Range, rights, offset, device and inode.
const FIELDS_BEFORE_NAME: usize = 5;

/// Files that the tree of `root` has mapped shared and writable.
pub fn mapped_files(root: Option<Pid>) -> HashSet<FileId> {
    let processes = root.map(tree_pids).unwrap_or_default();
    processes.into_iter().flat_map(mapped_by).collect()
}

fn mapped_by(process: Pid) -> Vec<FileId> {
    let maps = maps(process.as_raw());
    let mappings = maps
        .split(|byte| *byte == b'\n')
        .filter_map(mapping)
        .filter(|mapping| mapping.is_shared() && mapping.is_writable());
    let file = |mapping: Mapping<'_>| {
        // Of memory without a file there is no such link.
        let link = format!("/proc/{process}/map_files/{}", mapping.link_name());
        let metadata = fs::metadata(link).ok()?;
        metadata.is_file().then(|| FileId::of(&metadata))
    };
    mappings.filter_map(file).collect()
}

/// Links to the files that a process, with this directory in `/proc`, has mapped shared; not whether it may write to them.
pub fn shared(process: &Path) -> Vec<PathBuf> {
    let maps = fs::read(process.join("maps")).unwrap_or_default();
    let lines = maps.split(|byte| *byte == b'\n');
    let shared = lines.filter_map(mapping).filter(Mapping::is_shared);
    let links = process.join("map_files");
    shared
        .map(|mapping| links.join(mapping.link_name()))
        .collect()
}

/// What a process has mapped, a line each.
pub fn maps(process: i32) -> Vec<u8> {
    fs::read(format!("/proc/{process}/maps")).unwrap_or_default()
}

/// A line of `maps` (`proc_pid_maps(5)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping<'a> {
    start: u64,
    end: u64,
    rights: [u8; 4],
    /// The file as the process sees it, or what the kernel calls memory without one; may be empty.
    pub name: &'a [u8],
}

impl Mapping<'_> {
    /// The name of the link in `map_files` that leads to the file. There numbers have no zeros before them, in `maps` they
    /// have up to eight digits.
    pub fn link_name(&self) -> String {
        format!("{:x}-{:x}", self.start, self.end)
    }

    /// Whether its stores are the file's.
    pub fn is_shared(&self) -> bool {
        self.rights[3] == b's'
    }

    /// Whether it may be written to.
    pub fn is_writable(&self) -> bool {
        self.rights[1] == b'w'
    }

    /// Whether it may be run.
    pub fn is_executable(&self) -> bool {
        self.rights[2] == b'x'
    }
}

/// Reads a line of `maps`.
pub fn mapping(line: &[u8]) -> Option<Mapping<'_>> {
    let mut words = line.splitn(FIELDS_BEFORE_NAME + 1, |byte| *byte == b' ');
    let (start, end) = str::from_utf8(words.next()?).ok()?.split_once('-')?;
    let rights = words.next()?.try_into().ok()?;
    let name = words.nth(FIELDS_BEFORE_NAME - 2).unwrap_or_default();
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        rights,
        name: name.trim_ascii_start(),
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn only_shared_and_writable_mappings_count() {
        let is_meant = |mapping: Mapping<'_>| mapping.is_shared() && mapping.is_writable();
        let line = "7f5e6c000000-7f5e6c010000 rw-s 00000000 fd:01 1234   /srv/a b";
        let found = mapping(line.as_bytes()).expect("a mapping");
        assert_eq!(found.link_name(), "7f5e6c000000-7f5e6c010000");
        assert_eq!(found.name, b"/srv/a b");
        assert!(is_meant(found));
        for other in ["r--s", "rw-p", "---p"] {
            let line = line.replace("rw-s", other);
            assert!(!is_meant(mapping(line.as_bytes()).expect("a mapping")));
        }
        assert_eq!(mapping(b""), None);
        assert_eq!(mapping(b"7f5e6c000000-7f5e6c010000"), None);
        let odd = [line.as_bytes(), b"\xff"].concat();
        assert_eq!(mapping(&odd).expect("a mapping").name, b"/srv/a b\xff");
        let nameless = mapping(b"00400000-00452000 r-xp 00000000 00:00 0 ").expect("a mapping");
        assert_eq!(nameless.name, b"");
        assert_eq!(nameless.link_name(), "400000-452000");
    }

    #[test]
    fn a_mapped_file_is_found_whatever_it_is_called_and_wherever_it_lies() {
        for mapper in [ANYWHERE, LOW] {
            is_found(mapper);
        }
        assert!(mapped_files(None).is_empty());
    }

    fn is_found(mapper: &str) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join(OsStr::from_bytes(b"name \xff"));
        fs::write(&path, [0; 4096]).expect("written");
        let id = FileId::of(&fs::metadata(&path).expect("there"));
        let mut python = std::process::Command::new("python3")
            .args(["-I", "-c", mapper])
            .arg(&path)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("python3 runs");
        let mut said = [0; 1];
        let stdout = python.stdout.as_mut().expect("a pipe");
        std::io::Read::read_exact(stdout, &mut said).expect("it has mapped the file");
        let found = mapped_files(Some(Pid::from_raw(python.id().cast_signed())));
        drop(python.stdin.take());
        python.wait().expect("our child");
        if nix::unistd::geteuid().is_root() {
            assert!(found.contains(&id), "{found:?}");
        }
    }

    const ANYWHERE: &str = "import mmap, os, sys; fd = os.open(os.fsencode(sys.argv[1]), os.O_RDWR); \
        m = mmap.mmap(fd, 4096); print('x', flush=True); sys.stdin.read()";
    /// At 1 MiB, `MAP_SHARED | MAP_FIXED_NOREPLACE`.
    const LOW: &str = "import os, sys; from ctypes import *; fd = os.open(os.fsencode(sys.argv[1]), os.O_RDWR); \
        mmap = CDLL(None).mmap; mmap.restype = c_void_p; \
        mmap.argtypes = [c_void_p, c_size_t, c_int, c_int, c_int, c_long]; \
        assert mmap(1 << 20, 4096, 3, 0x100001, fd, 0) == 1 << 20; print('x', flush=True); sys.stdin.read()";
}
