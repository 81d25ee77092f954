//! Keeping packets for moving addresses out while no socket can answer them: a table of ours in the packet filter.
//!
//! The table belongs to the socket that made it (`NFT_TABLE_F_OWNER`, Linux 5.12): the kernel removes it when the last
//! copy of that socket closes, so it cannot be left behind. Emptying a chain takes effect at once; removing the table
//! takes a grace period of the kernel, 15 to 25 ms, which therefore passes on a thread of its own.
//!
//! Formats: `include/uapi/linux/netfilter/nf_tables.h` and `nfnetlink.h`. Numbers are big-endian.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::SockProtocol;

use super::MovingAddress;
use super::netlink::{ACK, APPEND, CREATE, Message, Netlink, REQUEST, attribute, nest};

/// `NFNL_SUBSYS_NFTABLES`.
const NF_TABLES: u16 = 10;
/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`.
const BATCH: (u16, u16) = (0x10, 0x11);
/// `NFT_MSG_NEWTABLE`.
const NEW_TABLE: u16 = 0;
/// `NFT_MSG_NEWCHAIN`.
const NEW_CHAIN: u16 = 3;
/// `NFT_MSG_NEWRULE`.
const NEW_RULE: u16 = 6;
/// `NFT_MSG_DELRULE`: without a handle all rules of the chain.
const DELETE_RULES: u16 = 8;
/// `NFT_TABLE_F_OWNER`.
const OWNED: u32 = 2;
/// Before connections are tracked.
const PRIORITY: i32 = -300;
const CHAIN: &str = "in";

/// Families of tables, and the hook where each sees what comes in: `NF_INET_PRE_ROUTING`, `NF_ARP_IN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Inet = 1,
    Arp = 3,
}

impl Family {
    fn hook(self) -> u32 {
        0
    }
}

/// Whom the door keeps out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shut {
    /// Everybody; and nobody is told that the addresses are here.
    Wholly,
    /// Who wants to open a TCP connection.
    ToNewConnections,
}

/// Packets for some addresses are dropped as long as this lives.
#[derive(Debug)]
pub struct Door {
    table: String,
    /// `None` once it was opened.
    netlink: Option<Netlink>,
    has_arp: bool,
}

impl Door {
    fn new(name: &str, netlink: Netlink) -> Self {
        Door {
            table: format!("postcopy-{name}"),
            netlink: Some(netlink),
            has_arp: false,
        }
    }

    /// Shuts the door for `addresses`; `name` distinguishes it from all others of this host.
    pub fn shut(name: &str, addresses: &[MovingAddress], shut: Shut) -> io::Result<Self> {
        let mut door = Door::new(name, Netlink::open(SockProtocol::NetlinkNetFilter)?);
        let ips = || addresses.iter().map(|address| address.ip);
        let rules: Vec<Vec<u8>> = match shut {
            Shut::Wholly => ips().flat_map(nothing_in).collect(),
            Shut::ToNewConnections => ips().map(no_connection_in).collect(),
        };
        door.make(Family::Inet, &rules)?;
        let asked: Vec<Vec<u8>> = ips()
            .filter_map(|ip| match ip {
                IpAddr::V4(ip) => Some(rule(DROP, |list| asks_by_arp(list, &ip.octets()))),
                IpAddr::V6(_) => None,
            })
            .collect();
        if shut == Shut::Wholly && !asked.is_empty() {
            match door.make(Family::Arp, &asked) {
                Ok(()) => door.has_arp = true,
                // Who asks is then told too early, and waits a little: no packet of his gets in.
                Err(error) => tracing::debug!(%error, "this kernel does not filter ARP"),
            }
        }
        Ok(door)
    }

    fn make(&mut self, family: Family, rules: &[Vec<u8>]) -> io::Result<()> {
        let table = self.table.clone();
        let new_table = message(family, NEW_TABLE, CREATE, |body| {
            text(body, 1, &table);
            number(body, 2, OWNED);
        });
        let new_chain = message(family, NEW_CHAIN, CREATE, |body| {
            text(body, 1, &table);
            text(body, 3, CHAIN);
            nest(body, 4, |hook| {
                number(hook, 1, family.hook());
                attribute(hook, 2, &PRIORITY.to_be_bytes());
            });
            text(body, 7, "filter");
        });
        let new_rules = rules.iter().map(|expressions| {
            message(family, NEW_RULE, CREATE | APPEND, |body| {
                text(body, 1, &table);
                text(body, 2, CHAIN);
                nest(body, 4, |list| list.extend(expressions));
            })
        });
        let messages = [new_table, new_chain].into_iter().chain(new_rules);
        self.commit(messages.collect())
    }

    /// Lets all packets in, from the return of this on.
    pub fn open(&mut self) -> io::Result<()> {
        let families = [Family::Inet, Family::Arp];
        let families = families.iter().take(1 + usize::from(self.has_arp));
        let empty = families.map(|family| {
            message(*family, DELETE_RULES, 0, |body| {
                text(body, 1, &self.table);
                text(body, 2, CHAIN);
            })
        });
        let emptied = self.commit(empty.collect());
        if let Some(netlink) = self.netlink.take() {
            thread::spawn(|| drop(netlink));
        }
        emptied
    }

    fn commit(&mut self, messages: Vec<Message>) -> io::Result<()> {
        let Some(netlink) = &mut self.netlink else {
            return Ok(());
        };
        let mark = |kind| Message {
            kind,
            flags: REQUEST,
            body: generic(0, NF_TABLES),
        };
        let mut batch = vec![mark(BATCH.0)];
        batch.extend(messages);
        batch.push(mark(BATCH.1));
        netlink.ask(&batch)
    }
}

/// A way to the packet filter of another network namespace, found while that may be entered.
#[derive(Debug)]
pub struct Doorway(Netlink);

impl Doorway {
    /// That of `network`, a namespace's file.
    pub fn find(network: &File) -> io::Result<Self> {
        let open = || {
            setns(network, CloneFlags::CLONE_NEWNET)?;
            Netlink::open(SockProtocol::NetlinkNetFilter)
        };
        // By a thread of its own, which ends there.
        let opened = thread::scope(|scope| scope.spawn(open).join());
        let netlink = opened.map_err(|_| io::Error::other("a thread panicked"))??;
        Ok(Doorway(netlink))
    }

    /// Keeps everybody out who wants to open a TCP connection to one of these `listeners`.
    pub fn shut(self, name: &str, listeners: &[SocketAddr]) -> io::Result<Door> {
        let mut door = Door::new(name, self.0);
        let rules: Vec<Vec<u8>> = listeners.iter().map(no_connection_to).collect();
        door.make(Family::Inet, &rules)?;
        Ok(door)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if self.netlink.is_some()
            && let Err(error) = self.open()
        {
            tracing::warn!(%error, table = self.table, "opening");
        }
    }
}

/// `struct nfgenmsg`.
fn generic(family: u8, resource: u16) -> Vec<u8> {
    let mut body = vec![family, 0];
    body.extend(resource.to_be_bytes());
    body
}

fn message(family: Family, kind: u16, flags: u16, fill: impl FnOnce(&mut Vec<u8>)) -> Message {
    let mut body = generic(family as u8, 0);
    fill(&mut body);
    Message {
        kind: NF_TABLES << 8 | kind,
        flags: REQUEST | ACK | flags,
        body,
    }
}

fn text(body: &mut Vec<u8>, kind: u16, value: &str) {
    let mut bytes = value.as_bytes().to_vec();
    bytes.push(0);
    attribute(body, kind, &bytes);
}

fn number(body: &mut Vec<u8>, kind: u16, value: u32) {
    attribute(body, kind, &value.to_be_bytes());
}

/// `NFT_PAYLOAD_NETWORK_HEADER`.
const NETWORK: u32 = 1;
/// `NFT_PAYLOAD_TRANSPORT_HEADER`.
const TRANSPORT: u32 = 2;
/// `NFT_REG_1`.
const REGISTER: u32 = 1;
/// `NFT_META_NFPROTO`.
const FAMILY_OF_PACKET: u32 = 15;
/// `NFT_META_L4PROTO`.
const PROTOCOL: u32 = 16;
const TCP: u8 = 6;
const ICMPV6: u8 = 58;
/// Neighbour solicitation and advertisement.
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;

/// `NF_DROP`.
const DROP: u32 = 0;
/// `NF_ACCEPT`.
const ACCEPT: u32 = 1;

/// The rules that keep all packets to an address out.
///
/// Sockets that are being restored send already, and ask who has their peer's address: those answers come in.
fn nothing_in(ip: IpAddr) -> Vec<Vec<u8>> {
    let everything = rule(DROP, |list| to(list, ip));
    match ip {
        IpAddr::V4(_) => vec![everything],
        IpAddr::V6(ip) => vec![
            rule(DROP, |list| {
                neighbours(list, SOLICITATION);
                header(list, TRANSPORT, 8, &ip.octets());
            }),
            rule(ACCEPT, |list| neighbours(list, ADVERTISEMENT)),
            everything,
        ],
    }
}

fn no_connection_in(ip: IpAddr) -> Vec<u8> {
    rule(DROP, |list| {
        to(list, ip);
        opens_tcp(list);
    })
}

/// A listener on all addresses may be one of both families.
fn no_connection_to(listener: &SocketAddr) -> Vec<u8> {
    rule(DROP, |list| {
        if !listener.ip().is_unspecified() {
            to(list, listener.ip());
        }
        opens_tcp(list);
        header(list, TRANSPORT, 2, &listener.port().to_be_bytes());
    })
}

/// The expressions of a rule with a `verdict` for what `matches`.
fn rule(verdict: u32, matches: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut list = Vec::new();
    matches(&mut list);
    // Register 0 is the verdict's.
    expression(&mut list, "immediate", |data| {
        number(data, 1, 0);
        nest(data, 2, |value| {
            nest(value, 2, |code| number(code, 1, verdict))
        });
    });
    list
}

fn expression(list: &mut Vec<u8>, name: &str, data: impl FnOnce(&mut Vec<u8>)) {
    nest(list, 1, |element| {
        text(element, 1, name);
        nest(element, 2, data);
    });
}

/// The register holds `value`.
fn equals(list: &mut Vec<u8>, value: &[u8]) {
    expression(list, "cmp", |data| {
        number(data, 1, REGISTER);
        number(data, 2, 0);
        nest(data, 3, |wanted| attribute(wanted, 1, value));
    });
}

fn load_header(list: &mut Vec<u8>, base: u32, offset: u32, length: u32) {
    expression(list, "payload", |data| {
        number(data, 1, REGISTER);
        number(data, 2, base);
        number(data, 3, offset);
        number(data, 4, length);
    });
}

fn header(list: &mut Vec<u8>, base: u32, offset: u32, value: &[u8]) {
    load_header(list, base, offset, value.len() as u32);
    equals(list, value);
}

fn meta(list: &mut Vec<u8>, key: u32, value: u8) {
    expression(list, "meta", |data| {
        number(data, 1, REGISTER);
        number(data, 2, key);
    });
    equals(list, &[value]);
}

/// Packets to an address.
fn to(list: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => {
            meta(list, FAMILY_OF_PACKET, libc::AF_INET as u8);
            header(list, NETWORK, 16, &ip.octets());
        }
        IpAddr::V6(ip) => {
            meta(list, FAMILY_OF_PACKET, libc::AF_INET6 as u8);
            header(list, NETWORK, 24, &ip.octets());
        }
    }
}

/// The first packet of a TCP connection: SYN without ACK.
fn opens_tcp(list: &mut Vec<u8>) {
    const SYN: u8 = 0x02;
    const ACKNOWLEDGEMENT: u8 = 0x10;
    meta(list, PROTOCOL, TCP);
    load_header(list, TRANSPORT, 13, 1);
    expression(list, "bitwise", |data| {
        number(data, 1, REGISTER);
        number(data, 2, REGISTER);
        number(data, 3, 1);
        nest(data, 4, |mask| attribute(mask, 1, &[SYN | ACKNOWLEDGEMENT]));
        nest(data, 5, |xor| attribute(xor, 1, &[0]));
    });
    equals(list, &[SYN]);
}

/// Questions who has an address. Answers have it as their target too.
fn asks_by_arp(list: &mut Vec<u8>, ip: &[u8]) {
    // Operation and target in an ARP packet of Ethernet and IPv4.
    header(list, NETWORK, 6, &[0, 1]);
    header(list, NETWORK, 24, ip);
}

/// Messages of a kind between IPv6 neighbours.
fn neighbours(list: &mut Vec<u8>, kind: u8) {
    meta(list, FAMILY_OF_PACKET, libc::AF_INET6 as u8);
    meta(list, PROTOCOL, ICMPV6);
    header(list, TRANSPORT, 0, &[kind]);
}
