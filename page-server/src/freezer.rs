//! Freezing a container's cgroup before CRIU does.
//!
//! runc tells CRIU to freeze by the cgroup, and CRIU looks whether all tasks stand still in steps of 100 ms
//! (`freeze_processes` in `criu/seize.c`): the container stands still for that long without need. So our hook freezes
//! the cgroup at CRIU's `pre-dump`, and CRIU finds it frozen. CRIU leaves such a cgroup frozen when it lets the tasks
//! go; therefore it is noted in a file, and whoever makes the workload run again thaws it by that.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use common::proc_text::{lines, mount_point};
use nix::unistd::Pid;

/// Names the file for the note; set for CRIU and inherited by its scripts. Without it nothing is frozen.
pub const NOTE_VARIABLE: &str = "POSTCOPY_FREEZER_NOTE";

/// Time to stand still. Beyond it CRIU's own patience is better.
const PATIENCE: Duration = Duration::from_millis(500);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_micros(200);

/// Where the note of a migration is.
pub fn note(directory: &Path) -> PathBuf {
    directory.join("frozen-cgroup")
}

/// A cgroup that can be frozen.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Freezer {
    /// The `freezer` controller of version 1.
    Controller(PathBuf),
    /// Version 2.
    Unified(PathBuf),
}

impl Freezer {
    /// That of a process; `None` when it is in the root cgroup, which cannot be frozen.
    fn of(pid: Pid) -> io::Result<Option<Self>> {
        let cgroups = fs::read(format!("/proc/{pid}/cgroup"))?;
        let mounts = fs::read("/proc/self/mountinfo")?;
        Ok(find(&cgroups, &mounts))
    }

    fn at(directory: PathBuf) -> Self {
        match directory.join("freezer.state").exists() {
            true => Freezer::Controller(directory),
            false => Freezer::Unified(directory),
        }
    }

    fn directory(&self) -> &Path {
        match self {
            Freezer::Controller(directory) | Freezer::Unified(directory) => directory,
        }
    }

    fn set(&self, frozen: bool) -> io::Result<()> {
        match self {
            Freezer::Controller(directory) => {
                let state = if frozen { "FROZEN" } else { "THAWED" };
                fs::write(directory.join("freezer.state"), state)
            }
            Freezer::Unified(directory) => fs::write(
                directory.join("cgroup.freeze"),
                u8::from(frozen).to_string(),
            ),
        }
    }

    fn is_frozen(&self) -> io::Result<bool> {
        match self {
            Freezer::Controller(directory) => {
                let state = fs::read_to_string(directory.join("freezer.state"))?;
                Ok(state.trim() == "FROZEN")
            }
            Freezer::Unified(directory) => {
                let events = fs::read_to_string(directory.join("cgroup.events"))?;
                Ok(events.lines().any(|line| line == "frozen 1"))
            }
        }
    }
}

/// Freezes the cgroup of `root` and notes it in the file `note`; leaves it as it was when that takes long.
pub fn freeze(root: Pid, note: &Path) -> io::Result<()> {
    let Some(freezer) = Freezer::of(root)? else {
        return Ok(());
    };
    // Whoever froze it before us will want to thaw it, too.
    if freezer.is_frozen()? {
        return Ok(());
    }
    fs::write(note, freezer.directory().as_os_str().as_encoded_bytes())?;
    freezer.set(true)?;
    let deadline = Instant::now() + PATIENCE;
    while !freezer.is_frozen()? {
        if Instant::now() > deadline {
            freezer.set(false)?;
            return fs::remove_file(note);
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// When the cgroup noted in `directory` was frozen.
pub fn frozen_at(directory: &Path) -> Option<SystemTime> {
    fs::metadata(note(directory)).ok()?.modified().ok()
}

/// Thaws the cgroup noted in `directory`, if one is.
pub fn thaw_noted(directory: &Path) {
    let note = note(directory);
    let Ok(noted) = fs::read(&note) else {
        return;
    };
    let cgroup = Path::new(OsStr::from_bytes(&noted));
    if let Err(error) = Freezer::at(cgroup.to_owned()).set(false) {
        tracing::error!(cgroup = %cgroup.display(), %error, "the workload's cgroup stays frozen; thaw it by hand");
    }
    // The whole directory goes soon.
    let _ = fs::remove_file(note);
}

/// The freezer of a process, from its `/proc/PID/cgroup` and our `mountinfo`. Version 1 comes first: where both are
/// mounted runc uses that.
fn find(cgroups: &[u8], mounts: &[u8]) -> Option<Freezer> {
    let controller = member(cgroups, b"freezer");
    if let (Some(path), Some(root)) = (controller, mounted(mounts, b"cgroup", b"freezer")) {
        return below(&root, path).map(Freezer::Controller);
    }
    let root = mounted(mounts, b"cgroup2", b"")?;
    below(&root, member(cgroups, b"")?).map(Freezer::Unified)
}

/// The directory by which a process of these `cgroups` is frozen.
pub fn directory_of(cgroups: &[u8], mounts: &[u8]) -> Option<PathBuf> {
    find(cgroups, mounts).map(|freezer| freezer.directory().to_owned())
}

/// The path in the hierarchy of a controller.
fn member<'a>(cgroups: &'a [u8], controller: &[u8]) -> Option<&'a [u8]> {
    lines(cgroups).find_map(|line| {
        let mut fields = line.splitn(3, |byte| *byte == b':').skip(1);
        let mut names = fields.next()?.split(|byte| *byte == b',');
        let path = fields.next()?;
        names.any(|name| name == controller).then_some(path)
    })
}

/// The cgroup at `path` of the hierarchy that is mounted at `root`; none for the root cgroup, and for one that our own
/// namespace does not show, which begins with `..`.
fn below(root: &Path, path: &[u8]) -> Option<PathBuf> {
    let parts = Path::new(OsStr::from_bytes(path)).components();
    let mut path = PathBuf::new();
    for part in parts {
        match part {
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    (!path.as_os_str().is_empty()).then(|| root.join(path))
}

/// Where a cgroup file system with an option is mounted (`proc_pid_mountinfo(5)`).
fn mounted(mounts: &[u8], kind: &[u8], option: &[u8]) -> Option<PathBuf> {
    lines(mounts).find_map(|line| {
        let mut words = line.split(|byte| *byte == b' ');
        words.find(|word| *word == b"-")?;
        let is_kind = words.next() == Some(kind);
        let mut options = words.nth(1).unwrap_or_default().split(|byte| *byte == b',');
        let has_option = option.is_empty() || options.any(|one| one == option);
        (is_kind && has_option).then(|| mount_point(line))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &[u8] = b"\
30 29 0:20 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:21 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
32 30 0:22 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";

    #[test]
    fn version_1_comes_first() {
        let cgroups = b"6:freezer:/box\n5:cpu,cpuacct:/box\n0::/box2\n";
        let expected = Freezer::Controller(PathBuf::from("/sys/fs/cgroup/freezer/box"));
        assert_eq!(find(cgroups, MOUNTS), Some(expected));
    }

    #[test]
    fn without_it_version_2_is_used() {
        let mounts = lines(MOUNTS).nth(2).expect("a line");
        let expected = Freezer::Unified(PathBuf::from("/sys/fs/cgroup/unified/a/b"));
        assert_eq!(find(b"0::/a/b\n", mounts), Some(expected));
    }

    #[test]
    fn the_root_cgroup_is_left_alone() {
        assert_eq!(find(b"6:freezer:/\n0::/\n", MOUNTS), None);
        assert_eq!(find(b"", b""), None);
    }

    /// As the kernel shows a process in a cgroup beside our namespace's root.
    #[test]
    fn a_cgroup_outside_our_namespace_is_left_alone() {
        assert_eq!(find(b"6:freezer:/../box\n", MOUNTS), None);
        assert_eq!(find(b"0::/../../box\n", MOUNTS), None);
    }

    #[test]
    fn names_need_not_be_utf8() {
        let mounts = [b"29 1 0:9 / /srv/\xff rw - tmpfs none rw\n", MOUNTS].concat();
        let found = directory_of(b"0::/a \xff\n", &mounts).expect("found");
        let expected = [&b"/sys/fs/cgroup/unified/a "[..], b"\xff"].concat();
        assert_eq!(found.as_os_str().as_bytes(), expected);
    }
}
