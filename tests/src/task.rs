//! What `/proc` says of tasks: their state, their children, the namespace they are in.

use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::PathBuf;

use nix::unistd::Pid;

/// All PIDs there are at this moment.
pub fn all() -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .collect()
}

/// The one-letter state (`R`, `S`, `t`, `T`, `Z`, ...), or `None` when there is no such task.
pub fn state(pid: Pid) -> Option<char> {
    stat_fields(pid)?.0.chars().next()
}

/// The parent's PID.
pub fn parent(pid: Pid) -> Option<Pid> {
    stat_fields(pid).map(|(_, parent)| parent)
}

/// Whether the task exists and is not a zombie.
pub fn is_alive(pid: Pid) -> bool {
    state(pid).is_some_and(|state| state != 'Z' && state != 'X')
}

/// Whether any thread of the process is stopped or traced: frozen by someone who went away.
pub fn is_frozen(pid: Pid) -> bool {
    threads(pid)
        .into_iter()
        .any(|thread| matches!(state_of_thread(pid, thread), Some('t' | 'T')))
}

/// Whether any thread of the process waits for somebody to resolve its page fault.
pub fn waits_for_page(pid: Pid) -> bool {
    threads(pid).into_iter().any(|thread| {
        fs::read_to_string(format!("/proc/{pid}/task/{thread}/wchan"))
            .is_ok_and(|place| place.contains("handle_userfault"))
    })
}

/// Resident memory in KiB; none when there is no such process.
pub fn resident_kib(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or(0)
}

/// The process's name, as in `ps`.
pub fn name(pid: Pid) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// The process's children.
pub fn children(parent: Pid) -> Vec<Pid> {
    all()
        .into_iter()
        .filter(|pid| self::parent(*pid) == Some(parent))
        .collect()
}

/// Children, grandchildren and so on, parents before children.
pub fn descendants(root: Pid) -> Vec<Pid> {
    let parents: Vec<(Pid, Pid)> = all()
        .into_iter()
        .filter_map(|pid| Some((pid, parent(pid)?)))
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(
            parents
                .iter()
                .filter(|(_, its_parent)| *its_parent == parent)
                .map(|(pid, _)| *pid),
        );
        next += 1;
    }
    found.remove(0);
    found
}

/// The processes whose network namespace is the one at `path`.
pub fn in_network_namespace(path: &PathBuf) -> Vec<Pid> {
    let Some(wanted) = inode(path) else {
        return Vec::new();
    };
    all()
        .into_iter()
        .filter(|pid| inode(&PathBuf::from(format!("/proc/{pid}/ns/net"))) == Some(wanted))
        .collect()
}

/// How many sockets the process has open.
pub fn sockets(pid: Pid) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    let links = descriptors
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok());
    links
        .filter(|link| link.to_string_lossy().starts_with("socket:"))
        .count()
}

/// The host's PID of the task that calls itself `inner` in the PID namespace of `init`.
pub fn outer_pid(init: Pid, inner: i32) -> Option<Pid> {
    let wanted = inode(&PathBuf::from(format!("/proc/{init}/ns/pid")))?;
    all().into_iter().find(|pid| {
        inode(&PathBuf::from(format!("/proc/{pid}/ns/pid"))) == Some(wanted)
            && innermost_pid(*pid) == Some(inner)
    })
}

fn innermost_pid(pid: Pid) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))?
        .split_whitespace()
        .last()?
        .parse()
        .ok()
}

fn inode(path: &PathBuf) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.st_ino())
}

/// The process's threads.
pub fn threads(pid: Pid) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

fn state_of_thread(pid: Pid, thread: i32) -> Option<char> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).ok()?)?
        .0
        .chars()
        .next()
}

fn stat_fields(pid: Pid) -> Option<(String, Pid)> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// State and parent. The name before them is in parentheses and may hold anything, parentheses too.
fn parse_stat(stat: &str) -> Option<(String, Pid)> {
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?.to_owned();
    Some((state, Pid::from_raw(fields.next()?.parse().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_is_no_trap() {
        assert_eq!(
            parse_stat("7 (a) b (c) S 3 7 7"),
            Some(("S".to_owned(), Pid::from_raw(3)))
        );
    }

    #[test]
    fn this_process_is_alive_and_not_frozen() {
        let me = Pid::this();
        assert!(is_alive(me));
        assert!(!is_frozen(me));
        assert!(all().contains(&me));
    }
}
