//! Netlink requests and their answers: bytes, and the socket they go through.
//!
//! Formats: netlink(7), `include/uapi/linux/netlink.h`. Numbers are in the byte order of the machine.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

/// `NLM_F_REQUEST`.
pub(super) const REQUEST: u16 = 0x1;
/// `NLM_F_ACK`.
pub(super) const ACK: u16 = 0x4;
/// `NLM_F_REPLACE`.
pub(super) const REPLACE: u16 = 0x100;
/// `NLM_F_CREATE`.
pub(super) const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`.
pub(super) const APPEND: u16 = 0x800;
/// `NLM_F_DUMP`.
const DUMP: u16 = 0x300;

/// `NLMSG_ERROR`: an error, or with errno 0 an acknowledgement.
const ERROR: u16 = 2;
/// `NLMSG_DONE`: the end of a list.
const DONE: u16 = 3;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// `NLA_TYPE_MASK`.
const TYPE_MASK: u16 = 0x3fff;

/// Bytes of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// The kernel's datagrams are not longer (`NLMSG_GOODSIZE`, and 32 KiB for lists).
const DATAGRAM_BYTES: usize = 64 << 10;

/// One message.
#[derive(Clone, Debug)]
pub(super) struct Message {
    pub kind: u16,
    pub flags: u16,
    pub body: Vec<u8>,
}

/// A socket to one part of the kernel.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket of the network namespace this thread is in.
    pub fn open(protocol: SockProtocol) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Netlink {
            socket,
            sequence: 0,
        })
    }

    /// Sends `messages` as one datagram and waits until the kernel has answered those that ask for it.
    pub fn ask(&mut self, messages: &[Message]) -> io::Result<()> {
        let expected = messages.iter().filter(|m| m.flags & ACK != 0).count();
        self.send(messages)?;
        let mut answered = 0;
        while answered < expected {
            for (kind, body) in self.receive()? {
                if kind != ERROR {
                    continue;
                }
                let errno = body.first_chunk().copied().map_or(0, i32::from_ne_bytes);
                if errno != 0 {
                    return Err(io::Error::from_raw_os_error(errno.saturating_neg()));
                }
                answered += 1;
            }
        }
        Ok(())
    }

    /// Asks for a list and returns the bodies of its entries.
    pub fn list(&mut self, kind: u16, body: Vec<u8>) -> io::Result<Vec<Vec<u8>>> {
        let flags = REQUEST | DUMP;
        self.send(&[Message { kind, flags, body }])?;
        let mut entries = Vec::new();
        loop {
            for (kind, body) in self.receive()? {
                match kind {
                    DONE => return Ok(entries),
                    ERROR => return Err(io::Error::other("the kernel refuses to list")),
                    _ => entries.push(body),
                }
            }
        }
    }

    fn send(&mut self, messages: &[Message]) -> io::Result<()> {
        let mut datagram = Vec::new();
        for message in messages {
            self.sequence += 1;
            let length = (HEADER_BYTES + message.body.len()) as u32;
            datagram.extend(length.to_ne_bytes());
            datagram.extend(message.kind.to_ne_bytes());
            datagram.extend(message.flags.to_ne_bytes());
            datagram.extend(self.sequence.to_ne_bytes());
            datagram.extend(0_u32.to_ne_bytes());
            datagram.extend(&message.body);
            pad(&mut datagram);
        }
        send(self.socket.as_raw_fd(), &datagram, MsgFlags::empty())?;
        Ok(())
    }

    fn receive(&self) -> io::Result<Vec<(u16, Vec<u8>)>> {
        let mut datagram = vec![0; DATAGRAM_BYTES];
        let length = recv(self.socket.as_raw_fd(), &mut datagram, MsgFlags::empty())?;
        Ok(messages(&datagram[..length]))
    }
}

/// Kinds and bodies of the messages in a datagram; what is cut off is left out.
fn messages(mut datagram: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let mut found = Vec::new();
    while let (Some(length), Some(kind)) = (u32_at(datagram, 0), u16_at(datagram, 4)) {
        let Some(body) = datagram.get(HEADER_BYTES..length as usize) else {
            break;
        };
        found.push((kind, body.to_vec()));
        datagram = datagram
            .get((length as usize).next_multiple_of(4)..)
            .unwrap_or_default();
    }
    found
}

/// Adds an attribute to a message's body.
pub(super) fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend((4 + value.len() as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    pad(body);
}

/// Adds an attribute that holds attributes.
pub(super) fn nest(body: &mut Vec<u8>, kind: u16, inner: impl FnOnce(&mut Vec<u8>)) {
    let mut value = Vec::new();
    inner(&mut value);
    attribute(body, kind | NESTED, &value);
}

/// The value of the first attribute of a kind in `attributes`.
pub(super) fn find_attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16_at(attributes, 0)?);
        let kind = u16_at(attributes, 2)? & TYPE_MASK;
        let value = attributes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*bytes))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_again() {
        let mut body = Vec::new();
        attribute(&mut body, 1, b"odd");
        attribute(&mut body, 7, &[1, 2, 3, 4]);
        assert_eq!(body.len(), 16);
        assert_eq!(find_attribute(&body, 1), Some(&b"odd"[..]));
        assert_eq!(find_attribute(&body, 7), Some(&[1, 2, 3, 4][..]));
        assert_eq!(find_attribute(&body, 2), None);
        for end in 0..body.len() {
            let _ = find_attribute(&body[..end], 7);
        }
    }

    #[test]
    fn lengths_that_lie_end_the_reading() {
        let mut datagram = vec![0; 20];
        for length in [0_u32, 3, 15, 16, 17, 20, 21, u32::MAX] {
            datagram[..4].copy_from_slice(&length.to_ne_bytes());
            let found = messages(&datagram).len();
            assert_eq!(found, usize::from((16..=20).contains(&length)), "{length}");
        }
    }
}
