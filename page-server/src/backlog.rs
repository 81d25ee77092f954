//! Connections that nobody has accepted yet. CRIU cannot dump them ("in-flight connection"), so they get a moment to be
//! accepted before the freeze, and a workload that does not accept is refused then.

use std::collections::HashSet;
use std::fs;
use std::time::Duration;

use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

/// Time a workload has to accept who waits. One that serves needs a few milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(2);
/// States of sockets (`include/net/tcp_states.h`).
const SYN_RECEIVED: u8 = 0x03;
const LISTENING: u8 = 0x0a;

/// Somebody waits, and the workload does not accept.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the workload does not accept who waits at port {0}, an in-flight connection that CRIU cannot dump; move it when it accepts again, or let CRIU drop such connections by --criu-arg --skip-in-flight"
)]
pub struct NotAccepted(u16);

/// Waits until nobody waits in a backlog of the processes `tasks`, whose first one is in their network namespace.
pub async fn drain(tasks: &[Pid]) -> Result<(), NotAccepted> {
    let Some(first) = tasks.first() else {
        return Ok(());
    };
    // Most trees have nobody waiting: then it is not asked whose the listening sockets are.
    if waiting(*first, None).is_none() {
        return Ok(());
    }
    let ours: HashSet<u64> = tasks.iter().flat_map(|task| sockets(*task)).collect();
    let deadline = Instant::now() + PATIENCE;
    while let Some(port) = waiting(*first, Some(&ours)) {
        if Instant::now() > deadline {
            return Err(NotAccepted(port));
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

/// The inodes of the sockets a process has open.
fn sockets(task: Pid) -> Vec<u64> {
    let entries = fs::read_dir(format!("/proc/{task}/fd"));
    let links = entries.into_iter().flatten().flatten();
    let inodes = links.filter_map(|entry| {
        let link = fs::read_link(entry.path()).ok()?;
        let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
        inode.parse().ok()
    });
    inodes.collect()
}

/// A port of the listening sockets `ours`, or of any, where somebody waits.
fn waiting(inhabitant: Pid, ours: Option<&HashSet<u64>>) -> Option<u16> {
    let tables = ["tcp", "tcp6"];
    let tables = tables.map(|name| fs::read_to_string(format!("/proc/{inhabitant}/net/{name}")));
    let lines: Vec<Line> = tables
        .iter()
        .flatten()
        .flat_map(|table| table.lines().filter_map(Line::read))
        .collect();
    waiting_in(&lines, ours)
}

fn waiting_in(lines: &[Line], ours: Option<&HashSet<u64>>) -> Option<u16> {
    let listeners = lines.iter().filter(|line| {
        line.state == LISTENING && ours.is_none_or(|ours| ours.contains(&line.inode))
    });
    let mut ports = HashSet::new();
    for listener in listeners {
        if listener.received > 0 {
            return Some(listener.port);
        }
        ports.insert(listener.port);
    }
    let mut opening = lines.iter().filter(|line| line.state == SYN_RECEIVED);
    opening
        .find(|line| ports.contains(&line.port))
        .map(|line| line.port)
}

/// A line of `/proc/net/tcp` (`Documentation/networking/proc_net_tcp.rst`).
struct Line {
    port: u16,
    state: u8,
    /// Of a listening socket: how many wait to be accepted.
    received: u32,
    inode: u64,
}

impl Line {
    fn read(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace().skip(1);
        let (_, port) = words.next()?.rsplit_once(':')?;
        let state = words.nth(1)?;
        let (_, received) = words.next()?.split_once(':')?;
        let inode = words.nth(4)?;
        Some(Line {
            port: u16::from_str_radix(port, 16).ok()?,
            state: u8::from_str_radix(state, 16).ok()?,
            received: u32::from_str_radix(received, 16).ok()?,
            inode: inode.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn now(test: impl Future<Output = Result<(), NotAccepted>>) -> Result<(), NotAccepted> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(test)
    }

    #[test]
    fn a_waiting_connection_is_seen_until_it_is_accepted() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = listener.local_addr().expect("bound");
        let ourselves = Pid::this();
        let ours: HashSet<u64> = sockets(ourselves).into_iter().collect();
        let port = || waiting(ourselves, Some(&ours));
        assert_ne!(port(), Some(address.port()));
        let _client = TcpStream::connect(address).expect("in the backlog");
        assert_eq!(port(), Some(address.port()));
        assert_eq!(now(drain(&[ourselves])), Err(NotAccepted(address.port())));
        let _accepted = listener.accept().expect("it waits");
        assert_ne!(port(), Some(address.port()));
    }

    #[test]
    fn half_open_connections_count_at_ports_of_ours_only() {
        let line = |port, state, inode| Line {
            port,
            state,
            received: 0,
            inode,
        };
        let lines = [line(80, LISTENING, 7), line(80, SYN_RECEIVED, 0)];
        let ours = |inode| HashSet::from([inode]);
        assert_eq!(waiting_in(&lines, Some(&ours(7))), Some(80));
        assert_eq!(waiting_in(&lines, Some(&ours(8))), None);
        assert_eq!(waiting_in(&lines[..1], None), None);
    }
}
