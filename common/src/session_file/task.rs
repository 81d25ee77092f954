//! A process named for good: its PID and when it started.

use std::fs;

use serde::{Deserialize, Serialize};

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

/// State and start. The name before them is in parentheses and may hold anything.
fn stat(pid: i32) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?.chars().next()?;
    // The state is field 3.
    let start = fields.nth(22 - 4)?.parse().ok()?;
    Some((state, start))
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
