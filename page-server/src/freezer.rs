//! Freezing a container's cgroup before CRIU does.
//!
//! runc tells CRIU to freeze by the cgroup, and CRIU looks whether all tasks stand still in steps of 100 ms
//! (`freeze_processes` in `criu/seize.c`): the container stands still for that long without need. So our hook freezes
//! the cgroup at CRIU's `pre-dump`, and CRIU finds it frozen. CRIU leaves such a cgroup frozen when it lets the tasks
//! go; therefore it is noted in a file, and whoever makes the workload run again thaws it by that.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

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
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
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
    let Ok(cgroup) = fs::read_to_string(&note) else {
        return;
    };
    if let Err(error) = Freezer::at(PathBuf::from(&cgroup)).set(false) {
        tracing::error!(cgroup, %error, "the workload's cgroup stays frozen; thaw it by hand");
    }
    // The whole directory goes soon.
    let _ = fs::remove_file(note);
}

/// The freezer of a process, from its `/proc/PID/cgroup` and our `mountinfo`. Version 1 comes first: where both are
/// mounted runc uses that.
fn find(cgroups: &str, mounts: &str) -> Option<Freezer> {
    let member = |controller: &str| {
        cgroups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let names = fields.next()?;
            let path = fields.next()?;
            names
                .split(',')
                .any(|name| name == controller)
                .then_some(path)
        })
    };
    let below = |root: &str, path: &str| match path.trim_start_matches('/') {
        "" => None,
        path => Some(Path::new(root).join(path)),
    };
    if let (Some(path), Some(root)) = (member("freezer"), mounted(mounts, "cgroup", "freezer")) {
        return below(root, path).map(Freezer::Controller);
    }
    let root = mounted(mounts, "cgroup2", "")?;
    below(root, member("")?).map(Freezer::Unified)
}

/// Where a cgroup file system with an option is mounted (`proc_pid_mountinfo(5)`).
fn mounted<'a>(mounts: &'a str, kind: &str, option: &str) -> Option<&'a str> {
    mounts.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut file_system = file_system.split(' ');
        let is_kind = file_system.next() == Some(kind);
        let options = file_system.nth(1).unwrap_or_default();
        let has_option = option.is_empty() || options.split(',').any(|one| one == option);
        (is_kind && has_option).then(|| mount.split(' ').nth(4))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
30 29 0:20 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:21 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
32 30 0:22 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";

    #[test]
    fn version_1_comes_first() {
        let cgroups = "6:freezer:/box\n5:cpu,cpuacct:/box\n0::/box2\n";
        let expected = Freezer::Controller(PathBuf::from("/sys/fs/cgroup/freezer/box"));
        assert_eq!(find(cgroups, MOUNTS), Some(expected));
    }

    #[test]
    fn without_it_version_2_is_used() {
        let mounts = MOUNTS.lines().last().expect("a line");
        let expected = Freezer::Unified(PathBuf::from("/sys/fs/cgroup/unified/a/b"));
        assert_eq!(find("0::/a/b\n", mounts), Some(expected));
    }

    #[test]
    fn the_root_cgroup_is_left_alone() {
        assert_eq!(find("6:freezer:/\n0::/\n", MOUNTS), None);
        assert_eq!(find("", ""), None);
    }
}
