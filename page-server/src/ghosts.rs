//! Files that processes hold and that have no name any more: CRIU carries their content in its images, up to a limit
//! that is 1 MiB unless it is told another one.

use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::Pid;

/// What a file may grow by until it is dumped, besides once its size.
const ROOM: u64 = 1 << 20;
/// Bytes of a block in `stat`.
const BLOCK_BYTES: u64 = 512;
/// What memory without a file is called; CRIU carries that otherwise.
const MEMORY: &[&[u8]] = &[b"/memfd:", b"/SYSV", b"/dev/zero"];

/// The limit CRIU needs for the files of `processes`; none when its own will do.
pub fn ghost_limit(processes: &[Pid]) -> Option<u64> {
    let largest = processes.iter().flat_map(|pid| ghosts_of(*pid)).max()?;
    Some(largest.saturating_mul(2).saturating_add(ROOM))
}

/// Sizes of the nameless files of a process.
fn ghosts_of(process: Pid) -> Vec<u64> {
    let links = ["fd", "map_files"].map(|kind| fs::read_dir(format!("/proc/{process}/{kind}")));
    let links = links.into_iter().flatten().flatten().flatten();
    links.filter_map(|link| ghost(&link.path())).collect()
}

fn ghost(link: &Path) -> Option<u64> {
    let file = fs::metadata(link).ok()?;
    let is_ghost = file.is_file() && file.nlink() == 0 && !is_memory(link);
    is_ghost.then(|| size(&file))
}

fn is_memory(link: &Path) -> bool {
    let name = fs::read_link(link).unwrap_or_default();
    let name = name.as_os_str().as_bytes();
    MEMORY.iter().any(|memory| name.starts_with(memory))
}

fn size(file: &Metadata) -> u64 {
    file.size().max(file.blocks().saturating_mul(BLOCK_BYTES))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn only_files_without_a_name_count() {
        let ours = [Pid::this()];
        let largest = || ghost_limit(&ours).unwrap_or_default();
        let named = tempfile::NamedTempFile::new().expect("a file");
        named.as_file().set_len(1 << 30).expect("sized");
        let memory = memfd_create("memory", MFdFlags::empty()).expect("made");
        File::from(memory).set_len(1 << 30).expect("sized");
        assert!(largest() < 1 << 30);
        let file = tempfile::tempfile().expect("a file");
        file.set_len(1 << 24).expect("sized");
        assert!(largest() >= (2 << 24) + ROOM);
        assert_eq!(ghost_limit(&[Pid::from_raw(i32::MAX)]), None);
    }
}
