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

/// Files that the tree of `root` has mapped shared and writable.
pub fn mapped_files(root: Option<Pid>) -> HashSet<FileId> {
    let processes = root.map(tree_pids).unwrap_or_default();
    processes.into_iter().flat_map(mapped_by).collect()
}

fn mapped_by(process: Pid) -> Vec<FileId> {
    let maps = fs::read(format!("/proc/{process}/maps")).unwrap_or_default();
    let ranges = maps
        .split(|byte| *byte == b'\n')
        .filter_map(shared_and_writable);
    let file = |range| {
        // Of memory without a file there is no such link.
        let metadata = fs::metadata(format!("/proc/{process}/map_files/{range}")).ok()?;
        metadata.is_file().then(|| FileId::of(&metadata))
    };
    ranges.filter_map(file).collect()
}

/// Links to the files that a process, with this directory in `/proc`, has mapped shared; not whether it may write to them.
pub fn shared(process: &Path) -> Vec<PathBuf> {
    let maps = fs::read(process.join("maps")).unwrap_or_default();
    let lines = maps.split(|byte| *byte == b'\n');
    let ranges = lines.filter_map(|line| match mapping(line)? {
        (range, [_, _, _, b's']) => Some(range),
        _ => None,
    });
    let links = process.join("map_files");
    ranges.map(|range| links.join(range)).collect()
}

/// The range of a line of `maps` that stands for a mapping of this kind.
fn shared_and_writable(line: &[u8]) -> Option<&str> {
    let (range, rights) = mapping(line)?;
    matches!(rights, [_, b'w', _, b's']).then_some(range)
}

/// The range and the rights of a line of `maps`.
fn mapping(line: &[u8]) -> Option<(&str, &[u8])> {
    let mut words = line.split(|byte| *byte == b' ');
    let range = str::from_utf8(words.next()?).ok()?;
    Some((range, words.next()?))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn only_shared_and_writable_mappings_count() {
        let range = |line: &str| shared_and_writable(line.as_bytes()).map(str::to_owned);
        let line = "7f5e6c000000-7f5e6c010000 rw-s 00000000 fd:01 1234   /srv/a b";
        assert_eq!(range(line).as_deref(), Some("7f5e6c000000-7f5e6c010000"));
        for other in ["r--s", "rw-p", "---p"] {
            assert_eq!(range(&line.replace("rw-s", other)), None);
        }
        assert_eq!(range(""), None);
        assert_eq!(range("7f5e6c000000-7f5e6c010000"), None);
        let odd = [line.as_bytes(), b"\xff"].concat();
        assert!(shared_and_writable(&odd).is_some());
    }

    #[test]
    fn a_mapped_file_is_found_whatever_it_is_called() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join(OsStr::from_bytes(b"name \xff"));
        fs::write(&path, [0; 4096]).expect("written");
        let id = FileId::of(&fs::metadata(&path).expect("there"));
        let mut python = std::process::Command::new("python3")
            .args(["-I", "-c", MAPPER])
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
        assert!(mapped_files(None).is_empty());
    }

    const MAPPER: &str = "import mmap, os, sys; fd = os.open(os.fsencode(sys.argv[1]), os.O_RDWR); \
        m = mmap.mmap(fd, 4096); print('x', flush=True); sys.stdin.read()";
}
