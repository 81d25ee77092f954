//! UDP sockets and the endpoints on them.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use nix::sys::socket::{setsockopt, sockopt};
use quinn::{Endpoint, EndpointConfig, ServerConfig, TokioRuntime};
use socket2::{Domain, Protocol, Socket, Type};
use tracing::{debug, warn};

use super::bursts::Bursts;
use super::{MAX_MTU, QuicError, Role};

/// Bytes a socket buffers in each direction. The default of 208 KiB loses thousands of packets per GiB (measured,
/// 3f); this loses none with 512 KiB outstanding.
const BUFFER_BYTES: usize = 4 << 20;

/// Makes an endpoint for `role` on a socket of its own, bound to `addr`; a server's if `server` is given.
///
/// Every endpoint accepts packets of [`MAX_MTU`], so that the sender's setting alone decides; quinn sets 13 MB of address
/// space aside for that.
pub(super) fn bind(
    addr: SocketAddr,
    server: Option<ServerConfig>,
    role: Role,
) -> Result<Endpoint, QuicError> {
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(QuicError::NoRuntime);
    }
    let socket = open(addr).map_err(|source| bind_error(addr, source))?;
    let mut config = EndpointConfig::default();
    config
        .max_udp_payload_size(MAX_MTU)
        .map_err(|_| QuicError::BadMtu { mtu: MAX_MTU })?;
    let socket = Bursts::new(socket, role == Role::Bulk).map_err(QuicError::Socket)?;
    Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))
        .map_err(QuicError::Socket)
}

fn open(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.ip().is_unspecified() && addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    enlarge_buffers(&socket);
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Asks for large buffers: beyond the system's limit if we are privileged, else up to it. Getting less costs speed,
/// not correctness.
fn enlarge_buffers(socket: &Socket) {
    if setsockopt(socket, sockopt::RcvBufForce, &BUFFER_BYTES).is_err()
        && let Err(error) = socket.set_recv_buffer_size(BUFFER_BYTES)
    {
        warn!(%error, "cannot enlarge a socket's receive buffer");
    }
    if setsockopt(socket, sockopt::SndBufForce, &BUFFER_BYTES).is_err()
        && let Err(error) = socket.set_send_buffer_size(BUFFER_BYTES)
    {
        warn!(%error, "cannot enlarge a socket's send buffer");
    }
    debug!(
        // The kernel doubles what it is asked for and reports that (socket(7)).
        receive_bytes = socket.recv_buffer_size().unwrap_or(0) / 2,
        send_bytes = socket.send_buffer_size().unwrap_or(0) / 2,
        "UDP socket buffers; raise net.core.rmem_max and wmem_max if these are below {BUFFER_BYTES}"
    );
}

fn bind_error(addr: SocketAddr, source: io::Error) -> QuicError {
    match source.kind() {
        ErrorKind::AddrInUse => QuicError::PortInUse { addr },
        ErrorKind::AddrNotAvailable => QuicError::AddressNotAvailable { addr },
        _ => QuicError::Bind { addr, source },
    }
}
