//! A process named for good: its PID and when it started.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::proc_text;

/// A process. Its PID may be another's later, but not with the same start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Task {
    /// PID on this host.
    pub pid: i32,
    /// Clock ticks from the boot to its start (field 22 of `/proc/PID/stat`).
    pub start: u64,
}

impl Task {
    /// The process that has this PID now, unless it has ended.
    pub fn find(pid: i32) -> Option<Self> {
        let (state, start) = stat(pid)?;
        (!matches!(state, 'Z' | 'X')).then_some(Task { pid, start })
    }

    /// This process.
    pub fn ourselves() -> Option<Self> {
        Task::find(std::process::id().cast_signed())
    }

    /// Whether it has not ended.
    pub fn is_alive(self) -> bool {
        Task::find(self.pid) == Some(self)
    }

    /// Whether it is still the same and stands still: stopped, or held by a tracer.
    pub fn is_frozen(self) -> bool {
        stat(self.pid)
            .is_some_and(|(state, start)| start == self.start && matches!(state, 't' | 'T'))
    }
}

/// How often the threads of a process have gone to sleep since each began: the number grows when one of them runs, however
/// shortly, for then it must be stopped again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtRest {
    /// The process.
    pub task: Task,
    /// Its threads.
    pub threads: u32,
    /// Their voluntary context switches.
    pub sleeps: u64,
}

impl AtRest {
    /// The process at this moment, unless it has ended.
    pub fn look(task: Task) -> Option<Self> {
        let threads = fs::read_dir(format!("/proc/{}/task", task.pid)).ok()?;
        let mut found = AtRest {
            task,
            threads: 0,
            sleeps: 0,
        };
        for thread in threads {
            let status = fs::read(thread.ok()?.path().join("status")).ok()?;
            let count = proc_text::field(&status, "voluntary_ctxt_switches")?;
            found.threads += 1;
            found.sleeps += count.parse::<u64>().ok()?;
        }
        task.is_alive().then_some(found)
    }

    /// Whether no thread has run since, which everyone holds who held them then. One whose tracer was killed is stopped by
    /// a signal that waited for that, and has gone to sleep once more without running.
    pub fn is_untouched(self, by_tracer: bool) -> bool {
        let once_more = if by_tracer {
            0
        } else {
            u64::from(self.threads)
        };
        Self::look(self.task)
            .is_some_and(|now| now.threads == self.threads && now.sleeps <= self.sleeps + once_more)
    }
}

/// State and start.
fn stat(pid: i32) -> Option<(char, u64)> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    proc_text::state_and_start(&stat)
}

/// Names this boot of the host.
pub fn boot_id() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_runs_goes_to_sleep_again() {
        let mut child = std::process::Command::new("sleep");
        let mut child = child.arg("60").spawn().expect("sleep runs");
        let task = Task::find(child.id().cast_signed()).expect("it lives");
        let signal = |signal| {
            let pid = nix::unistd::Pid::from_raw(task.pid);
            nix::sys::signal::kill(pid, signal).expect("ours");
        };
        let stop = || {
            signal(nix::sys::signal::SIGSTOP);
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while !task.is_frozen() {
                assert!(std::time::Instant::now() < deadline, "it does not stop");
            }
        };
        stop();
        let before = AtRest::look(task).expect("it lives");
        assert_eq!(before.threads, 1);
        assert!(before.is_untouched(true));
        signal(nix::sys::signal::SIGCONT);
        stop();
        assert!(!before.is_untouched(true));
        // As when a tracer was killed, and then it ran.
        signal(nix::sys::signal::SIGCONT);
        stop();
        assert!(!before.is_untouched(false));
        child.kill().expect("our child");
        child.wait().expect("our child");
    }

    /// A name is cut after 15 bytes, be it in the middle of a letter.
    #[test]
    fn a_process_is_found_whatever_it_is_called() {
        let directory = tempfile::tempdir().expect("a directory");
        let program = directory.path().join("fourteen-bytes\u{e4}");
        std::os::unix::fs::symlink("/bin/sleep", &program).expect("made");
        let mut child = std::process::Command::new(program);
        let mut child = child.arg("60").spawn().expect("sleep runs");
        let name = fs::read(format!("/proc/{}/comm", child.id())).expect("it lives");
        let found = Task::find(child.id().cast_signed());
        let at_rest = found.and_then(AtRest::look);
        child.kill().expect("our child");
        child.wait().expect("our child");
        assert!(str::from_utf8(&name).is_err(), "{name:?}");
        assert!(found.is_some());
        assert!(at_rest.is_some());
    }

    #[test]
    fn a_pid_alone_is_not_enough() {
        let ourselves = Task::ourselves().expect("we run");
        assert!(ourselves.is_alive());
        assert!(!ourselves.is_frozen());
        let later = Task {
            start: ourselves.start + 1,
            ..ourselves
        };
        assert!(!later.is_alive());
        assert_eq!(Task::find(i32::MAX), None);
    }
}
