//! Connections that nobody has accepted yet. CRIU cannot dump them ("in-flight connection"), so they get a moment to be
//! accepted before the freeze, and a workload that does not accept is refused then.

use std::collections::HashSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
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
    let mut waited_at = None;
    while let Some(port) = waiting(*first, Some(&ours)) {
        waited_at = Some(port);
        if Instant::now() > deadline {
            return Err(NotAccepted(port));
        }
        sleep(PAUSE).await;
    }
    if let Some(port) = waited_at {
        tracing::info!(port, "accepted who waited");
    }
    Ok(())
}

/// Where the processes `tasks` listen, the first of which is in their network namespace.
pub fn listeners(tasks: &[Pid]) -> HashSet<SocketAddr> {
    let Some(first) = tasks.first() else {
        return HashSet::new();
    };
    let ours: HashSet<u64> = tasks.iter().flat_map(|task| sockets(*task)).collect();
    let listening = lines(*first).into_iter();
    listening
        .filter(|line| line.state == LISTENING && ours.contains(&line.inode))
        .map(|line| line.socket())
        .collect()
}

/// The addresses in a table of `/proc/net/tcp` or `tcp6`.
pub fn addresses(table: &str) -> Vec<SocketAddr> {
    let lines = table.lines().filter_map(Line::read);
    lines.map(|line| line.socket()).collect()
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
    waiting_in(&lines(inhabitant), ours)
}

/// All TCP sockets in the network namespace of `inhabitant`.
fn lines(inhabitant: Pid) -> Vec<Line> {
    let tables = ["tcp", "tcp6"];
    let tables = tables.map(|name| fs::read_to_string(format!("/proc/{inhabitant}/net/{name}")));
    let lines = tables.iter().flatten();
    lines
        .flat_map(|table| table.lines().filter_map(Line::read))
        .collect()
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
    address: IpAddr,
    port: u16,
    state: u8,
    /// Of a listening socket: how many wait to be accepted.
    received: u32,
    inode: u64,
}

impl Line {
    fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }

    fn read(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace().skip(1);
        let (address, port) = words.next()?.rsplit_once(':')?;
        let state = words.nth(1)?;
        let (_, received) = words.next()?.split_once(':')?;
        let inode = words.nth(4)?;
        Some(Line {
            address: read_address(address)?,
            port: u16::from_str_radix(port, 16).ok()?,
            state: u8::from_str_radix(state, 16).ok()?,
            received: u32::from_str_radix(received, 16).ok()?,
            inode: inode.parse().ok()?,
        })
    }
}

/// Words of 32 bits, each in the machine's order of what lies in memory in the network's.
fn read_address(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let digits = hex.get(8 * at..8 * at + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    if hex.len() == 8 {
        return Some(Ipv4Addr::from(word(0)?).into());
    }
    let words = [word(0)?, word(1)?, word(2)?, word(3)?];
    let bytes: [u8; 16] = words.concat().try_into().ok()?;
    Some(Ipv6Addr::from(bytes).to_canonical())
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
    fn listeners_are_found_with_their_addresses() {
        let addresses = ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"];
        let bound = addresses.map(|address| TcpListener::bind(address).expect("bound"));
        let found = listeners(&[Pid::this()]);
        for listener in &bound {
            let address = listener.local_addr().expect("bound");
            assert!(found.contains(&address), "{address} is not in {found:?}");
        }
    }

    #[test]
    fn half_open_connections_count_at_ports_of_ours_only() {
        let line = |port, state, inode| Line {
            address: Ipv4Addr::UNSPECIFIED.into(),
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
