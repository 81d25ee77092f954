//! Mounts that a killed CRIU leaves in our directories.
//!
//! To restore cgroups CRIU mounts every cgroup hierarchy in its work directory (`prepare_cgroup_sfd` in
//! `criu/cgroup.c`). Whoever removed that directory with everything in it would remove the host's empty cgroups.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use crate::proc_text::{lines, mount_point};

/// Unmounts everything that is mounted below `directory`, last first.
pub fn detach_below(directory: &Path) {
    let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
    for mount in below(&mounts, directory).into_iter().rev() {
        if let Err(error) = umount2(&mount, MntFlags::MNT_DETACH) {
            tracing::warn!(mount = %mount.display(), %error, "cannot unmount");
        }
    }
}

/// The mount points below `directory` in `mountinfo`.
pub fn below(mounts: &[u8], directory: &Path) -> Vec<PathBuf> {
    lines(mounts)
        .filter_map(mount_point)
        .filter(|point| point.starts_with(directory))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_below_are_meant() {
        let mounts = b"\
28 1 0:19 / /srv/\xff rw - tmpfs none rw
30 29 0:20 / /run/a/yard rw - tmpfs none rw
31 30 0:21 / /run/a/yard/pids\\040here rw - cgroup none rw
32 29 0:22 / /run/ab rw - tmpfs none rw
";
        let expected = ["/run/a/yard", "/run/a/yard/pids here"].map(PathBuf::from);
        assert_eq!(below(mounts, Path::new("/run/a")), expected);
    }
}
