//! Telling the neighbours where an address is now: gratuitous ARP, and unsolicited neighbour advertisements.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, sendto, socket,
};

use super::MovingAddress;

type Mac = [u8; 6];

/// To everybody on the link.
const BROADCAST: Mac = [0xff; 6];
/// Where `ff02::1` goes (RFC 2464, section 7).
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Neighbour advertisement (RFC 4861, section 4.4).
const ADVERTISEMENT: u8 = 136;
/// Flag: replace the link-layer address you know.
const OVERRIDE: u8 = 0x20;
const ICMPV6: u8 = 58;

/// Tells the neighbours on its device that `address` is here. On a device without link-layer addresses there is nobody
/// to tell.
pub(super) fn announce(address: &MovingAddress) -> io::Result<()> {
    let Some((device, mac)) = link_of(&address.device)? else {
        return Ok(());
    };
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let frames = match address.ip {
        // Some neighbours heed only requests, some only replies.
        IpAddr::V4(ip) => vec![arp(1, ip, mac), arp(2, ip, mac)],
        IpAddr::V6(ip) => vec![advertisement(ip, mac)],
    };
    for frame in frames {
        sendto(socket.as_raw_fd(), &frame, &device, MsgFlags::MSG_DONTWAIT)?;
    }
    Ok(())
}

/// The link-layer address of a device, if it has one.
fn link_of(device: &str) -> io::Result<Option<(LinkAddr, Mac)>> {
    let links = getifaddrs()?.filter(|entry| entry.interface_name == device);
    let mut links = links.filter_map(|entry| entry.address?.as_link_addr().copied());
    Ok(links.find_map(|link| {
        let mac = link.addr().filter(|mac| *mac != [0; 6])?;
        (link.family() == Some(AddressFamily::Packet)).then_some((link, mac))
    }))
}

/// An ARP packet about oneself (RFC 5227, section 3): operation 1 asks, 2 answers.
fn arp(operation: u16, ip: Ipv4Addr, mac: Mac) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, ETHERTYPE_ARP);
    // Ethernet and IPv4, with addresses of 6 and 4 bytes.
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac);
    frame.extend(ip.octets());
    frame.extend(if operation == 1 { [0; 6] } else { BROADCAST });
    frame.extend(ip.octets());
    frame
}

fn advertisement(ip: Ipv6Addr, mac: Mac) -> Vec<u8> {
    let mut icmp = vec![ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    icmp.extend(ip.octets());
    // Option: target link-layer address, one unit of 8 bytes.
    icmp.extend([2, 1]);
    icmp.extend(mac);
    let sum = checksum(ip, ALL_NODES, &icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = ethernet(ALL_NODES_MAC, mac, ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((icmp.len() as u16).to_be_bytes());
    // Neighbours believe only packets that cannot have come from another link: hop limit 255.
    frame.extend([ICMPV6, 255]);
    frame.extend(ip.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(icmp);
    frame
}

fn ethernet(destination: Mac, source: Mac, ethertype: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(96);
    frame.extend(destination);
    frame.extend(source);
    frame.extend(ethertype.to_be_bytes());
    frame
}

/// Of an ICMPv6 message, over the pseudo-header too (RFC 8200, section 8.1). Its length is even.
fn checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let mut covered = Vec::new();
    covered.extend(source.octets());
    covered.extend(destination.octets());
    covered.extend((message.len() as u32).to_be_bytes());
    covered.extend([0, 0, 0, ICMPV6]);
    covered.extend(message);
    let words = covered.chunks_exact(2);
    let mut sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 9];

    #[test]
    fn arp_names_the_address_as_sender_and_as_target() {
        let frame = arp(2, Ipv4Addr::new(10, 0, 0, 100), MAC);
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[..6], BROADCAST);
        assert_eq!(frame[20..22], [0, 2]);
        assert_eq!(frame[22..28], MAC);
        assert_eq!(frame[28..32], [10, 0, 0, 100]);
        assert_eq!(frame[38..42], [10, 0, 0, 100]);
    }

    #[test]
    fn an_advertisement_checks_out() {
        let ip = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x100);
        let frame = advertisement(ip, MAC);
        assert_eq!(frame.len(), 14 + 40 + 32);
        let icmp = &frame[54..];
        assert_eq!(icmp[0], ADVERTISEMENT);
        assert_eq!(icmp[8..24], ip.octets());
        // A message with its own checksum in it sums up to zero.
        assert_eq!(checksum(ip, ALL_NODES, icmp), 0);
    }
}
