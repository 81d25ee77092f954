//! What went wrong with a connection, in the operator's words.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use quinn::{ConnectError, ConnectionError};
use thiserror::Error;

use super::{MAX_MTU, MIN_MTU};
use crate::identity::printable;
use crate::limits::IDLE_TIMEOUT;

/// QUIC reports a TLS alert as this plus the alert's number (RFC 9001, section 4.8).
const CRYPTO_ERROR: u64 = 0x100;
/// Bytes of a peer's text that reach an error.
const MAX_REASON_BYTES: usize = 256;

/// Why an endpoint cannot be made, or a connection not be made or kept.
#[derive(Debug, Error)]
pub enum QuicError {
    /// Another socket has the port.
    #[error("UDP port {} of {} is in use; end the program that has it (`ss -lunp`) or choose another port", .addr.port(), .addr.ip())]
    PortInUse {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// No interface of this host has the address.
    #[error("{} is not an address of this host; choose one that `ip address` lists", .addr.ip())]
    AddressNotAvailable {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// The address cannot be bound for another reason.
    #[error("cannot bind UDP {addr}: {source}")]
    Bind {
        /// The address asked for.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// A bound socket cannot be used.
    #[error("cannot use the UDP socket: {0}")]
    Socket(io::Error),
    /// Called outside a tokio runtime.
    #[error(
        "a QUIC endpoint can only be made inside the tokio runtime that shall drive it (this is a bug)"
    )]
    NoRuntime,
    /// A packet size we cannot send.
    #[error(
        "an MTU of {mtu} is out of range; give the UDP payload in bytes, {MIN_MTU} to {MAX_MTU} (the link's MTU less 28 for IPv4, 48 for IPv6)"
    )]
    BadMtu {
        /// The size asked for, in bytes.
        mtu: u16,
    },
    /// The identity cannot be used for TLS.
    #[error("cannot set up TLS with this identity: {0}")]
    Tls(#[from] rustls::Error),
    /// The cipher that every QUIC handshake starts with is missing.
    #[error("the cryptographic provider lacks TLS13_AES_128_GCM_SHA256 (this is a bug)")]
    NoInitialCipher,
    /// Connecting cannot even be tried.
    #[error("cannot connect to {peer}: {source}")]
    Connect {
        /// The server's address.
        peer: SocketAddr,
        /// What is wrong with the attempt.
        source: ConnectError,
    },
    /// The server does not answer.
    #[error("no answer from {peer}; is page-server running there, and is that UDP port open?")]
    NoAnswer {
        /// The server's address.
        peer: SocketAddr,
    },
    /// One side does not accept the other.
    #[error("{peer}: {refusal}")]
    Refused {
        /// The peer's address.
        peer: SocketAddr,
        /// Who refused whom, and why.
        refusal: Refusal,
    },
    /// A connection that stood has gone silent.
    #[error("lost the connection to {peer}: nothing received for {} s; check the network and the peer", IDLE_TIMEOUT.as_secs())]
    Lost {
        /// The peer's address.
        peer: SocketAddr,
    },
    /// The peer no longer knows the connection.
    #[error("{peer} reset the connection; it was probably restarted")]
    Reset {
        /// The peer's address.
        peer: SocketAddr,
    },
    /// The peer's program closed the connection.
    #[error("{peer} closed the connection (code {code}): {reason:?}")]
    ClosedByPeer {
        /// The peer's address.
        peer: SocketAddr,
        /// The code it gave.
        code: u64,
        /// The text it gave, fit for a log.
        reason: String,
    },
    /// We closed the connection.
    #[error("the connection to {peer} was closed on this side")]
    Closed {
        /// The peer's address.
        peer: SocketAddr,
    },
    /// The peer has all the handshakes under way that it allows, or is closing.
    #[error("{peer} takes no new connection at the moment; try again")]
    Busy {
        /// The peer's address.
        peer: SocketAddr,
    },
    /// The peers do not understand each other.
    #[error("the connection to {peer} broke: {what}; do both hosts run the same version?")]
    Protocol {
        /// The peer's address.
        peer: SocketAddr,
        /// What the QUIC library said.
        what: String,
    },
}

impl QuicError {
    /// Explains why the connection to `peer` ended. Good for errors of the handshake and for those that a read or write
    /// on an established connection reports.
    pub fn from_connection(peer: SocketAddr, error: &ConnectionError) -> QuicError {
        if let Some(refusal) = refusal(error) {
            return QuicError::Refused { peer, refusal };
        }
        match error {
            ConnectionError::TimedOut => QuicError::Lost { peer },
            ConnectionError::Reset => QuicError::Reset { peer },
            ConnectionError::LocallyClosed => QuicError::Closed { peer },
            ConnectionError::ApplicationClosed(close) => QuicError::ClosedByPeer {
                peer,
                code: close.error_code.into_inner(),
                reason: reason(&close.reason),
            },
            ConnectionError::ConnectionClosed(close)
                if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED =>
            {
                QuicError::Busy { peer }
            }
            ConnectionError::ConnectionClosed(close) => QuicError::Protocol {
                peer,
                what: format!(
                    "the peer reports {:?} {:?}",
                    close.error_code,
                    reason(&close.reason)
                ),
            },
            other => QuicError::Protocol {
                peer,
                what: printable(&other.to_string()),
            },
        }
    }

    /// Whether trying again later can help: the peer or the network is away, rather than settings being wrong.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            QuicError::NoAnswer { .. }
                | QuicError::Lost { .. }
                | QuicError::Reset { .. }
                | QuicError::Busy { .. }
        )
    }
}

fn reason(text: &[u8]) -> String {
    let text = &text[..text.len().min(MAX_REASON_BYTES)];
    printable(&String::from_utf8_lossy(text))
}

/// One side does not accept the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Whether the peer refused us; otherwise we refused the peer.
    pub by_peer: bool,
    /// Why.
    pub cause: Cause,
}

/// Why one side does not accept the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The certificate is signed by another CA.
    UnknownCa,
    /// The certificate has expired or is not valid yet.
    Expired,
    /// The certificate is not among the fingerprints that are accepted.
    NotPinned,
    /// There was no certificate.
    NoCertificate,
    /// The certificate is malformed or made for something else.
    BadCertificate,
    /// No common protocol: another role, or another version.
    WrongProtocol,
}

/// Whether `error` means that one side did not accept the other, and why. Good both for the handshake and for the late
/// error by which a client learns that it was refused (see the [module](super)).
pub fn refusal(error: &ConnectionError) -> Option<Refusal> {
    let (by_peer, code) = match error {
        ConnectionError::TransportError(ours) => (false, ours.code),
        ConnectionError::ConnectionClosed(close) => (true, close.error_code),
        _ => return None,
    };
    let cause = cause(u64::from(code).checked_sub(CRYPTO_ERROR)?)?;
    Some(Refusal { by_peer, cause })
}

/// The cause behind a TLS alert (RFC 8446, section 6.2), as rustls uses them.
fn cause(alert: u64) -> Option<Cause> {
    match alert {
        // decrypt_error: a CA of the same name, but with another key.
        48 | 51 => Some(Cause::UnknownCa),
        45 => Some(Cause::Expired),
        // access_denied: rustls sends it for what our own check refuses.
        49 => Some(Cause::NotPinned),
        116 => Some(Cause::NoCertificate),
        42 | 43 | 44 | 46 => Some(Cause::BadCertificate),
        120 => Some(Cause::WrongProtocol),
        _ => None,
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let subject = match (self.cause, self.by_peer) {
            (Cause::WrongProtocol, _) => "this is not the connection the other side expects",
            (_, true) => "the peer refuses our certificate",
            (_, false) => "we refuse the peer's certificate",
        };
        write!(f, "{subject}: {}", self.advice())
    }
}

impl Refusal {
    fn advice(&self) -> &'static str {
        match (self.cause, self.by_peer) {
            (Cause::UnknownCa, _) => {
                "it is not signed by a CA that this side trusts; issue both hosts' identities from one CA (`page-server identity issue`)"
            }
            (Cause::Expired, _) => {
                "it has expired or is not valid yet; issue a new one (`page-server identity issue`), and compare both hosts' clocks"
            }
            (Cause::NotPinned, true) => {
                "its fingerprint is not among those the peer accepts; add there what `page-server identity show` prints here"
            }
            (Cause::NotPinned, false) => {
                "its fingerprint is not among those accepted here; if the peer is the right one, add what `page-server identity show` prints there"
            }
            (Cause::NoCertificate, true) => "we sent none; give this host an identity",
            (Cause::NoCertificate, false) => "it sent none; give that host an identity",
            (Cause::BadCertificate, _) => {
                "it is malformed or made for another purpose; issue a new one (`page-server identity issue`)"
            }
            (Cause::WrongProtocol, _) => {
                "the ports of the fault and the bulk connection are swapped, another program has this port, or the hosts run different versions"
            }
        }
    }
}

impl std::error::Error for Refusal {}
