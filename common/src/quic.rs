//! The two QUIC connections of a migration: sockets, settings, and what their errors mean.
//!
//! Each [`Role`] has its own UDP socket and its own single-threaded tokio runtime at both ends; everything here that
//! binds must be called inside the runtime that shall drive the endpoint (it needs I/O and time enabled).
//!
//! A server verifies the client's certificate only after the client has finished its own side of the handshake (TLS
//! 1.3). So a client that is refused sees [`connect`] succeed and the first read or write fail;
//! [`QuicError::from_connection`] and [`refusal`] explain that error as well.

mod bursts;
mod congestion;
mod error;
mod knocks;
mod socket;
#[cfg(test)]
mod tests;
mod transport;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, Incoming, ServerConfig};
use rustls_pki_types::CertificateDer;
use tokio::time::timeout;

use crate::identity::{Fingerprint, Identity, SERVER_NAME, Trust, common_name};
use crate::limits::HANDSHAKE_TIMEOUT;
pub use congestion::FaultGauge;
pub use error::{Cause, QuicError, Refusal, refusal};
use knocks::{Answer, Knocker, Knocks};
use transport::Mtu;
pub use transport::{MAX_MTU, MIN_MTU, PathProfile};

/// Which of a migration's two connections. Endpoints of different roles refuse each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Control and demand: little data, every microsecond counts.
    Fault,
    /// Skeleton and background push: all the rest.
    Bulk,
}

impl Role {
    /// The protocol name both ends must offer in the TLS handshake.
    pub const fn alpn(self) -> &'static [u8] {
        match self {
            Role::Fault => b"postcopy-fault",
            Role::Bulk => b"postcopy-bulk",
        }
    }
}

/// Handshakes a server has under way that nobody has accepted yet; more are refused. A migration needs two, the rest is
/// room for strangers who must not lock it out.
const MAX_PENDING_HANDSHAKES: usize = 64;

/// Bytes kept of one such handshake; it fits into a few packets.
const MAX_PENDING_BYTES: u64 = 64 * 1024;

/// A bound server.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    loopback: Arc<ServerConfig>,
    knocks: Arc<Mutex<Knocks>>,
}

/// Binds a server for `role` to `addr`. It accepts peers whom `trust` names, never anybody without a certificate. The
/// servers of both roles share a `gauge`: it keeps what the bulk connection sends out of the way of faults.
///
/// Must be called inside the tokio runtime that shall drive it.
pub fn bind_server(
    addr: SocketAddr,
    identity: &Identity,
    trust: &Trust,
    role: Role,
    path: PathProfile,
    gauge: &FaultGauge,
) -> Result<Listener, QuicError> {
    let tls = identity.server_config(trust, role.alpn())?;
    let crypto = QuicServerConfig::try_from(tls).map_err(|_| QuicError::NoInitialCipher)?;
    let crypto = Arc::new(crypto);
    let config = |mtu| {
        let mut config = ServerConfig::with_crypto(crypto.clone());
        config
            .transport_config(Arc::new(transport::config(role, mtu, Some(gauge))))
            .max_incoming(MAX_PENDING_HANDSHAKES)
            .incoming_buffer_size(MAX_PENDING_BYTES);
        config
    };
    let elsewhere = config(path.resolve(false)?);
    let loopback = config(path.resolve(true)?);
    Ok(Listener {
        endpoint: socket::bind(addr, Some(elsewhere), role)?,
        loopback: Arc::new(loopback),
        knocks: Arc::default(),
    })
}

impl Listener {
    /// The endpoint, for statistics and closing. Accept with [`next`](Self::next), which knows the settings for a peer
    /// on this host.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The bound address, with the port the system chose if none was asked for.
    pub fn local_addr(&self) -> Result<SocketAddr, QuicError> {
        self.endpoint.local_addr().map_err(QuicError::Socket)
    }

    /// The next peer that wants to connect, or `None` once the endpoint is closed. Cheap and cancel-safe; the
    /// handshake happens in [`Handshake::finish`], so that a slow peer keeps nobody waiting.
    pub async fn next(&self) -> Option<Handshake> {
        loop {
            let incoming = self.endpoint.accept().await?;
            let peer = incoming.remote_address();
            let who = Knocker {
                host: peer.ip(),
                is_there: incoming.remote_address_validated(),
            };
            let answer = lock(&self.knocks).answer(who, Instant::now());
            match answer {
                Answer::Hear => {
                    return Some(Handshake {
                        peer,
                        who,
                        connecting: self.accept(incoming, peer),
                        knocks: self.knocks.clone(),
                    });
                }
                // One that cannot be asked is not heard.
                Answer::Ask => drop(incoming.retry()),
                Answer::Ignore => incoming.ignore(),
            }
        }
    }

    fn accept(
        &self,
        incoming: Incoming,
        peer: SocketAddr,
    ) -> Result<quinn::Connecting, ConnectionError> {
        if is_loopback(peer) {
            incoming.accept_with(self.loopback.clone())
        } else {
            incoming.accept()
        }
    }
}

/// A peer in the middle of connecting to a [`Listener`].
#[derive(Debug)]
pub struct Handshake {
    peer: SocketAddr,
    who: Knocker,
    connecting: Result<quinn::Connecting, ConnectionError>,
    knocks: Arc<Mutex<Knocks>>,
}

fn lock(knocks: &Mutex<Knocks>) -> std::sync::MutexGuard<'_, Knocks> {
    knocks.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Handshake {
    /// Where the peer calls from; not verified before the handshake is finished.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Finishes the handshake, within [`HANDSHAKE_TIMEOUT`]; afterwards the peer's identity is certain.
    pub async fn finish(self) -> Result<Connection, QuicError> {
        let (knocks, who) = (self.knocks.clone(), self.who);
        let finished = self.connect().await;
        if finished.is_err() {
            lock(&knocks).failed(who, Instant::now());
        }
        finished
    }

    async fn connect(self) -> Result<Connection, QuicError> {
        let connecting = self
            .connecting
            .map_err(|error| QuicError::from_connection(self.peer, &error))?;
        match timeout(HANDSHAKE_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(QuicError::from_connection(self.peer, &error)),
            Err(_) => Err(QuicError::Lost { peer: self.peer }),
        }
    }
}

/// Binds a client for `role` that will [`connect`] to `peer`, from `local` or from any address and port.
///
/// `peer` decides the address family and, unless `path` says otherwise, the packet size: a peer on this host's
/// loopback gets large packets. Must be called inside the tokio runtime that shall drive it.
pub fn bind_client(
    peer: SocketAddr,
    local: Option<SocketAddr>,
    identity: &Identity,
    trust: &Trust,
    role: Role,
    path: PathProfile,
) -> Result<Endpoint, QuicError> {
    let tls = identity.client_config(trust, role.alpn())?;
    bind_client_with(peer, local, tls, role, path.resolve(is_loopback(peer))?)
}

fn bind_client_with(
    peer: SocketAddr,
    local: Option<SocketAddr>,
    tls: rustls::ClientConfig,
    role: Role,
    mtu: Mtu,
) -> Result<Endpoint, QuicError> {
    let crypto = QuicClientConfig::try_from(tls).map_err(|_| QuicError::NoInitialCipher)?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport::config(role, mtu, None)));
    let local = local.unwrap_or_else(|| SocketAddr::new(any_address(peer), 0));
    let mut endpoint = socket::bind(local, None, role)?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}

/// Connects `endpoint`, made by [`bind_client`], to the server at `addr`, within [`HANDSHAKE_TIMEOUT`]. May be repeated,
/// for instance after the connection was lost.
///
/// Success means that we accept the server; whether it accepts us shows in the first answer (see the
/// [module](self)).
pub async fn connect(endpoint: &Endpoint, addr: SocketAddr) -> Result<Connection, QuicError> {
    let connecting = endpoint
        .connect(addr, SERVER_NAME)
        .map_err(|source| QuicError::Connect { peer: addr, source })?;
    match timeout(HANDSHAKE_TIMEOUT, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(ConnectionError::TimedOut)) | Err(_) => Err(QuicError::NoAnswer { peer: addr }),
        Ok(Err(error)) => Err(QuicError::from_connection(addr, &error)),
    }
}

/// Common name in the peer's certificate, fit for a log. `None` while the handshake is under way.
pub fn peer_name(connection: &Connection) -> Option<String> {
    common_name(&peer_certificate(connection)?)
}

/// Fingerprint of the peer's certificate. `None` while the handshake is under way.
pub fn peer_fingerprint(connection: &Connection) -> Option<Fingerprint> {
    Some(Fingerprint::of(&peer_certificate(connection)?))
}

fn peer_certificate(connection: &Connection) -> Option<CertificateDer<'static>> {
    let chain = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    chain.into_iter().next()
}

fn is_loopback(addr: SocketAddr) -> bool {
    addr.ip().to_canonical().is_loopback()
}

fn any_address(peer: SocketAddr) -> IpAddr {
    match peer {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}
