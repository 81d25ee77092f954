//! What processes cost, read from `/proc` while they live and once more when they have just ended.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::linux::fs::MetadataExt;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use tests::namespace;

/// Helpers live long, and finding them takes longer than a look.
const LOOKS_PER_HELPERS: u32 = 10;

/// The two hosts of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where it begins.
    Source,
    /// Where it ends.
    Destination,
}

/// A process this one started.
#[derive(Debug, Clone)]
pub struct Program {
    pid: i32,
    /// Until its end was seen.
    life: Option<std::sync::Arc<OwnedFd>>,
    /// The host it runs on, once it has entered it.
    pub side: Option<Side>,
    /// Seconds of CPU, with children it waited for.
    pub cpu_s: f64,
    /// Its largest resident set so far.
    pub peak_rss_kib: u64,
    /// The same of each process below it that runs the same program, such as the keeper.
    helpers: HashMap<i32, u64>,
    looks: u32,
    /// Whether it was looked at after its end.
    pub was_seen_ending: bool,
}

impl Program {
    /// The process `pid`, if it is still there.
    pub fn new(pid: i32) -> Option<Self> {
        // SAFETY: a system call without pointers.
        let life = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let life = i32::try_from(life).ok().filter(|life| *life >= 0)?;
        // SAFETY: a new descriptor nobody else owns.
        let life = unsafe { OwnedFd::from_raw_fd(life) };
        Some(Self {
            pid,
            life: Some(std::sync::Arc::new(life)),
            side: None,
            cpu_s: 0.0,
            peak_rss_kib: 0,
            helpers: HashMap::new(),
            looks: 0,
            was_seen_ending: false,
        })
    }

    /// Readable when the process ends; nothing when that was seen already.
    pub fn life(&self) -> Option<&OwnedFd> {
        self.life.as_deref()
    }

    /// Brings the figures up to date. `sides` are the inodes of the hosts' network namespaces.
    pub fn look(&mut self, sides: [u64; 2]) {
        if self.life.is_none() {
            return;
        }
        match stat(self.pid) {
            Some((state, cpu_s)) => {
                self.cpu_s = self.cpu_s.max(cpu_s);
                self.was_seen_ending = state == 'Z';
            }
            // Its parent was faster.
            None => self.life = None,
        }
        if self.was_seen_ending {
            self.life = None;
            return;
        }
        self.side = self.side.or_else(|| side(self.pid, sides));
        // Before it has entered its host it may still be this program's own image, about to be replaced.
        if self.side.is_some() {
            let peak = peak_rss_kib(self.pid).unwrap_or(0);
            self.peak_rss_kib = self.peak_rss_kib.max(peak);
            if self.looks.is_multiple_of(LOOKS_PER_HELPERS) {
                self.look_at_helpers();
            }
            self.looks += 1;
        }
    }

    /// Resident sets of everything that runs this program below this process, at their largest. Pages that they share
    /// count in each.
    pub fn peak_with_helpers_kib(&self) -> u64 {
        self.peak_rss_kib + self.helpers.values().sum::<u64>()
    }

    fn look_at_helpers(&mut self) {
        let exe = |pid| fs::read_link(format!("/proc/{pid}/exe")).ok();
        // CRIU's own forks turn into the workload.
        let Some(its) = exe(self.pid).filter(|path| !path.ends_with("criu")) else {
            return;
        };
        let mut below: Vec<i32> = children_of(&self.pid.to_string()).into_iter().collect();
        while let Some(pid) = below.pop() {
            below.extend(children_of(&pid.to_string()));
            if exe(pid).as_ref() == Some(&its) {
                let peak = self.helpers.entry(pid).or_default();
                *peak = (*peak).max(peak_rss_kib(pid).unwrap_or(0));
            }
        }
    }
}

/// The children of this process.
pub fn children() -> HashSet<i32> {
    children_of("self")
}

fn children_of(pid: &str) -> HashSet<i32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return HashSet::new();
    };
    threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|children| {
            let pids = children.split_whitespace().map(str::parse);
            pids.flatten().collect::<Vec<i32>>()
        })
        .collect()
}

/// Seconds of CPU of all children this process has waited for, and of theirs.
pub fn cpu_of_children() -> f64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_CHILDREN) else {
        return 0.0;
    };
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

/// The inodes of named network namespaces.
pub fn namespaces(names: &[String; 2]) -> Result<[u64; 2]> {
    let inode = |name: &String| {
        let path = namespace::path(name);
        fs::metadata(&path)
            .map(|metadata| metadata.st_ino())
            .with_context(|| format!("no {}", path.display()))
    };
    Ok([inode(&names[0])?, inode(&names[1])?])
}

/// Anonymous memory of a process and all below it, in bytes: what a move has to move.
pub fn resident_bytes(root: nix::unistd::Pid) -> u64 {
    let mut pids = tests::task::descendants(root);
    pids.push(root);
    pids.iter()
        .filter_map(|pid| status(pid.as_raw(), "RssAnon:"))
        .sum::<u64>()
        * 1024
}

fn side(pid: i32, sides: [u64; 2]) -> Option<Side> {
    let inode = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?.st_ino();
    [Side::Source, Side::Destination]
        .into_iter()
        .zip(sides)
        .find_map(|(side, its)| (its == inode).then_some(side))
}

/// State and CPU seconds.
fn stat(pid: i32) -> Option<(char, f64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_whitespace().collect();
    let ticks: u64 = fields
        .get(11..15)?
        .iter()
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    Some((fields.first()?.chars().next()?, ticks as f64 / 100.0))
}

fn peak_rss_kib(pid: i32) -> Option<u64> {
    status(pid, "VmHWM:")
}

fn status(pid: i32, field: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Nanoseconds of CPU all threads of a process have used up to now.
pub fn cpu_ns(pid: nix::unistd::Pid) -> u64 {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return 0;
    };
    threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok())
        .filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_time_of_all_threads_counts() {
        let me = nix::unistd::Pid::this();
        let before = cpu_ns(me);
        let spin = || (0..2_000_000_u64).fold(0, |sum, one| std::hint::black_box(sum ^ one));
        // Still there when it is looked at.
        let (done, is_done) = std::sync::mpsc::channel();
        let (looked, has_looked) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            spin();
            let _ = done.send(());
            let _ = has_looked.recv();
        });
        is_done.recv().expect("it spins");
        assert!(cpu_ns(me) > before);
        drop(looked);
        thread.join().expect("no panic");
    }
}
