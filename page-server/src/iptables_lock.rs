//! CRIU's other lock on the connections of a frozen task: a pair of iptables rules for each.
//!
//! It carries no mark of whose it is, so each rule is removed by what it says (`criu/netfilter.c`).

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::process::Stdio;

use nix::sys::socket::{SockaddrStorage, getpeername, getsockname, getsockopt, sockopt};
use nix::unistd::Pid;

use crate::network_lock::Network;
use crate::sockets;

/// CRIU's own packets carry this mark and pass (`SOCCR_MARK`).
const MARK: &str = "0xc114";

/// The connections of tasks that may be locked so. Found out while the tasks are there, and good when they are gone.
#[derive(Debug)]
pub struct IptablesLock(Vec<(SocketAddr, SocketAddr)>);

impl IptablesLock {
    /// That on `tasks`.
    pub fn on(tasks: &[Pid]) -> Self {
        IptablesLock(tasks.iter().flat_map(|task| connections(*task)).collect())
    }

    /// Removes the rules from `network`.
    pub fn remove(&self, network: &Network) {
        for (ours, theirs) in &self.0 {
            for (chain, source, destination) in [("INPUT", theirs, ours), ("OUTPUT", ours, theirs)]
            {
                let rule = rule(chain, *source, *destination);
                let removed = run(network, &rule, ours.is_ipv6());
                tracing::debug!(%source, %destination, removed, "iptables lock");
            }
        }
    }
}

/// The ends of each established TCP connection of `task`, its own first.
fn connections(task: Pid) -> Vec<(SocketAddr, SocketAddr)> {
    let sockets = sockets::of(task).into_iter();
    let tcp = sockets.filter(|socket| getsockopt(socket, sockopt::TcpRepair).is_ok());
    tcp.filter_map(|socket| {
        let ours: SockaddrStorage = getsockname(socket.as_raw_fd()).ok()?;
        let theirs: SockaddrStorage = getpeername(socket.as_raw_fd()).ok()?;
        Some((address(&ours)?, address(&theirs)?))
    })
    .collect()
}

/// An address as CRIU writes it: IPv4 also where a socket of IPv6 carries it.
fn address(socket: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(address) = socket.as_sockaddr_in() {
        return Some(SocketAddr::V4((*address).into()));
    }
    let address = std::net::SocketAddrV6::from(*socket.as_sockaddr_in6()?);
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

fn rule(chain: &str, source: SocketAddr, destination: SocketAddr) -> Vec<String> {
    let rule = format!(
        "-w -t filter -D {chain} --protocol tcp -m mark ! --mark {MARK} --source {} --sport {} --destination {} \
         --dport {} -j DROP",
        source.ip(),
        source.port(),
        destination.ip(),
        destination.port(),
    );
    rule.split_whitespace().map(String::from).collect()
}

/// True when there was such a rule.
fn run(network: &Network, arguments: &[String], ipv6: bool) -> bool {
    let program = if ipv6 { "ip6tables" } else { "iptables" };
    let status = network
        .command(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn both_ends_of_a_connection_are_found() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let ends = (
            client.local_addr().expect("connected"),
            client.peer_addr().expect("connected"),
        );
        assert!(connections(Pid::this()).contains(&ends));
    }

    #[test]
    fn the_rule_names_both_ends() {
        let ends = ["10.0.0.1:7", "10.0.0.2:9"].map(|end| end.parse().expect("an address"));
        let rule = rule("INPUT", ends[0], ends[1]).join(" ");
        assert!(rule.contains("--source 10.0.0.1 --sport 7"), "{rule}");
        assert!(rule.contains("--destination 10.0.0.2 --dport 9"), "{rule}");
    }
}
