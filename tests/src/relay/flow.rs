//! The relay's sockets: one for each port, and one towards the source for each client that uses it.

use std::io;
use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use super::Lane;

/// Clients of one port at a time. The oldest makes room.
const MAX_FLOWS: usize = 32;

/// One of the relay's ports.
#[derive(Debug)]
pub struct Port {
    listener: UdpSocket,
    target: SocketAddrV4,
    flows: Vec<Flow>,
    next_id: u64,
}

/// A client of a port.
#[derive(Debug)]
struct Flow {
    id: u64,
    client: SocketAddr,
    upstream: UdpSocket,
    sent: u64,
}

/// Which socket is readable, and where what it holds goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inlet {
    /// Packets of clients.
    Listener,
    /// Packets of the source for one client.
    Upstream(u64),
}

impl Port {
    /// Binds a port.
    pub fn bind(listen: SocketAddrV4, target: SocketAddrV4) -> io::Result<Self> {
        let listener = UdpSocket::bind(listen)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            target,
            flows: Vec::new(),
            next_id: 0,
        })
    }

    /// Its sockets.
    pub fn inlets(&self) -> impl Iterator<Item = (Inlet, BorrowedFd<'_>)> {
        let listener = (Inlet::Listener, self.listener.as_fd());
        let flows = self.flows.iter();
        let upstream = flows.map(|flow| (Inlet::Upstream(flow.id), flow.upstream.as_fd()));
        [listener].into_iter().chain(upstream)
    }

    /// Takes one packet in; returns its length and the client whose it is. `None` when none waits.
    pub fn receive(&mut self, inlet: Inlet, buffer: &mut [u8]) -> io::Result<Option<(usize, u64)>> {
        let received = match inlet {
            Inlet::Listener => {
                let received = self.listener.recv_from(buffer);
                received.and_then(|(length, client)| Ok((length, self.flow_of(client)?)))
            }
            Inlet::Upstream(id) => match self.flow(id) {
                Some(flow) => flow.upstream.recv(buffer).map(|length| (length, id)),
                None => return Ok(None),
            },
        };
        match received {
            Ok(received) => Ok(Some(received)),
            // Refusals are told by ICMP to whoever sent last; the path does not care.
            Err(error) if is_nothing(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a packet on. One that cannot be sent is lost, as on any path.
    pub fn send(&mut self, lane: Lane, client: u64, packet: &[u8]) {
        let Some(flow) = self.flows.iter_mut().find(|flow| flow.id == client) else {
            return;
        };
        if lane.forth {
            flow.sent += 1;
            let _ = flow.upstream.send(packet);
        } else {
            let _ = self.listener.send_to(packet, flow.client);
        }
    }

    /// Gives a client another port towards the source if it has sent a multiple of `every` packets.
    pub fn rebind(&mut self, client: u64, every: u64) -> io::Result<bool> {
        let target = self.target;
        match self.flows.iter_mut().find(|flow| flow.id == client) {
            Some(flow) if every > 0 && flow.sent > 0 && flow.sent % every == 0 => {
                flow.upstream = towards(target)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn flow(&self, id: u64) -> Option<&Flow> {
        self.flows.iter().find(|flow| flow.id == id)
    }

    fn flow_of(&mut self, client: SocketAddr) -> io::Result<u64> {
        if let Some(flow) = self.flows.iter().find(|flow| flow.client == client) {
            return Ok(flow.id);
        }
        if self.flows.len() == MAX_FLOWS {
            self.flows.remove(0);
        }
        let id = self.next_id;
        self.next_id += 1;
        self.flows.push(Flow {
            id,
            client,
            upstream: towards(self.target)?,
            sent: 0,
        });
        Ok(id)
    }
}

fn towards(target: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(target)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn is_nothing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
    )
}
