//! Which processes the copy consists of: named for good, so that nobody else is killed in their place.
//!
//! The restore hands the first ones over. What they fork is found again as their descendants, and by their sessions when a
//! parent has ended. Whether that was all of them only their userfault descriptors tell
//! ([`Memory::is_gone`](crate::memory::Memory::is_gone)).

use std::fs;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use common::proc_text;
use common::session_file::Task;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use procfs::process::{Process, Stat, all_processes};
use tokio::time::sleep;

use crate::exits::{bury, has_ended, pidfd_open, pidfd_send};
use crate::memory::Memory;

/// Time killed processes have until the kernel has taken their memory down.
const BURIAL: Duration = Duration::from_secs(10);
/// Pause between looks at it.
const LOOK: Duration = Duration::from_millis(20);
/// Of a copy that could not be killed wholly.
pub(crate) const SURVIVOR: &str = "a process of the copy that was forked here, and whose parents have ended, is still there; kill it";

/// A process whose PID may be another's by now, and a descriptor that never is.
#[derive(Debug)]
struct Named {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Named {
    /// The process with this PID, if `is_it` says so when the descriptor is there already.
    fn find(pid: Pid, is_it: impl FnOnce() -> bool) -> Option<Self> {
        let pidfd = pidfd_open(pid).ok()?;
        is_it().then_some(Named { pid, pidfd })
    }

    fn has_ended(&self) -> bool {
        has_ended(&self.pidfd)
    }
}

/// The processes of a restored copy.
#[derive(Debug, Default)]
pub struct Copy {
    restored: Vec<Named>,
    tasks: Vec<Task>,
    init: Option<Named>,
}

impl Copy {
    /// One more process that the restore made. One that has ended already is remembered by its name alone.
    pub fn add(&mut self, task: Task) {
        let named = Named::find(Pid::from_raw(task.pid), || task.is_alive());
        self.restored.extend(named);
        self.tasks.push(task);
    }

    /// All of them are below this one, and die with it: the init of a PID namespace of their own.
    pub fn are_below(&mut self, init: Task) {
        self.init = Named::find(Pid::from_raw(init.pid), || init.is_alive());
    }

    /// Those that the restore made.
    pub fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// Kills all of them that can be found, parents stopped first so that none is born unseen. Returns a pidfd of each.
    pub fn kill(&self) -> Vec<OwnedFd> {
        let known = self.init.iter().chain(&self.restored);
        let mut new: Vec<Named> = known
            .filter(|process| !process.has_ended())
            .filter_map(|process| Some((process.pid, process.pidfd.try_clone().ok()?)))
            .map(|(pid, pidfd)| Named { pid, pidfd })
            .collect();
        let mut found = Vec::new();
        loop {
            for process in &new {
                pidfd_send(&process.pidfd, Signal::SIGSTOP);
            }
            found.append(&mut new);
            new = self.others(&found);
            if new.is_empty() {
                break;
            }
        }
        for process in &found {
            pidfd_send(&process.pidfd, Signal::SIGKILL);
        }
        found.into_iter().map(|process| process.pidfd).collect()
    }

    /// Kills all of them, and waits until nobody has `memory` any more. False when somebody lives on whom we do not find.
    pub async fn kill_all(&self, memory: &Memory) -> bool {
        bury(self.kill()).await;
        let deadline = Instant::now() + BURIAL;
        // Who was forked here and has lost its parents is found by nobody, but its descriptor is here.
        while !memory.is_gone() {
            if Instant::now() > deadline {
                return false;
            }
            sleep(LOOK).await;
        }
        true
    }

    /// Processes of the copy that are not among `found`.
    fn others(&self, found: &[Named]) -> Vec<Named> {
        let stats = all_processes().into_iter().flatten().flatten();
        let stats = stats.filter_map(|process| process.stat().ok());
        let new = stats.filter(|stat| !found.iter().any(|known| known.pid.as_raw() == stat.pid));
        new.filter(|stat| self.is_ours(stat, found))
            .filter_map(|stat| {
                let is_it = || {
                    let stat = Process::new(stat.pid).and_then(|process| process.stat());
                    stat.is_ok_and(|stat| self.is_ours(&stat, found))
                };
                Named::find(Pid::from_raw(stat.pid), is_it)
            })
            .collect()
    }

    /// A child of one of ours is ours. So is everyone in a session that one of ours leads, for nobody enters a session
    /// but by birth. When that leader has ended, its number may be another session's: then only who carries memory that
    /// waits for pages is ours.
    fn is_ours(&self, stat: &Stat, found: &[Named]) -> bool {
        let is = |process: &Named, pid| process.pid.as_raw() == pid;
        if found.iter().any(|parent| is(parent, stat.ppid)) {
            return true;
        }
        let mut leaders = self.restored.iter();
        leaders.any(|leader| {
            is(leader, stat.session) && (!leader.has_ended() || has_lazy_memory(stat.pid))
        })
    }
}

/// Whether mappings of the process are registered with a userfault descriptor.
fn has_lazy_memory(pid: i32) -> bool {
    let maps = fs::read(format!("/proc/{pid}/smaps")).unwrap_or_default();
    proc_text::has_lazy_memory(&maps)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A shell in a session of its own, which says the PID of what it leaves behind and does `then`.
    fn start(then: &str) -> (Child, i32) {
        let script = format!("sleep 1000 >/dev/null & echo $!; {then}");
        let mut child = Command::new("setsid")
            .args(["sh", "-c", &script])
            .stdout(Stdio::piped())
            .spawn()
            .expect("setsid runs");
        let said = child.stdout.take().expect("a pipe");
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line).expect("a line");
        (child, line.trim().parse().expect("a PID"))
    }

    fn task_of(pid: u32) -> Task {
        Task::find(pid.cast_signed()).expect("it runs")
    }

    fn bury_all(dying: Vec<OwnedFd>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(bury(dying));
    }

    #[test]
    fn a_child_of_the_copy_is_killed_with_it() {
        let (mut shell, sleep) = start("wait");
        let sleep = Task::find(sleep).expect("it sleeps");
        let mut copy = Copy::default();
        copy.add(task_of(shell.id()));
        let dying = copy.kill();
        assert_eq!(dying.len(), 2);
        shell.wait().expect("our child");
        bury_all(dying);
        assert!(!sleep.is_alive());
    }

    /// A PID that was the copy's and is another's now.
    #[test]
    fn who_has_the_pid_of_an_ended_process_is_left_alone() {
        let (mut shell, sleep) = start("wait");
        let mut copy = Copy::default();
        copy.add(Task {
            start: task_of(shell.id()).start - 1,
            ..task_of(shell.id())
        });
        assert_eq!(copy.tasks().len(), 1);
        assert!(copy.kill().is_empty());
        let bystander = task_of(shell.id());
        assert!(bystander.is_alive());
        let mut all = Copy::default();
        all.add(bystander);
        let dying = all.kill();
        shell.wait().expect("our child");
        bury_all(dying);
        assert_eq!(Task::find(sleep), None);
    }
}
