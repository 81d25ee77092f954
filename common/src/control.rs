//! The control stream as both ends use it: messages in, messages out, and what the connection died of.

use std::net::SocketAddr;
use std::time::Duration;

use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::proto::ProtoError;
use crate::proto::stream;
use crate::quic::QuicError;

/// Messages that wait to be looked at. A peer that sends more at once than the protocol has steps waits.
const INBOX: usize = 8;
/// Time the last message has to be acknowledged before the connection is closed.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);
/// What a peer says that closes a connection because all is said.
const DONE: &[u8] = b"done";

/// Why no message came or went.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The connection ended.
    #[error(transparent)]
    Connection(#[from] QuicError),
    /// The peer does not speak our protocol.
    #[error("the peer at {peer} broke the protocol: {error}")]
    Proto {
        /// The peer.
        peer: SocketAddr,
        /// How.
        error: ProtoError,
    },
}

impl ControlError {
    /// Whether the link failed, rather than the peer's program.
    pub fn is_link_lost(&self) -> bool {
        match self {
            ControlError::Connection(error) => error.is_transient(),
            ControlError::Proto { .. } => false,
        }
    }
}

/// One end of a control stream that receives `In`.
#[derive(Debug)]
pub struct Control<In> {
    connection: Connection,
    peer: SocketAddr,
    send: SendStream,
    inbox: mpsc::Receiver<Result<In, ProtoError>>,
}

impl<In: DeserializeOwned + Send + 'static> Control<In> {
    /// Takes over a stream. A task reads it, so that waiting for a message may be interrupted at any time.
    pub fn new(connection: Connection, send: SendStream, mut recv: RecvStream) -> Self {
        let (outbox, inbox) = mpsc::channel(INBOX);
        tokio::spawn(async move {
            loop {
                let message = stream::receive(&mut recv).await;
                let ended = message.is_err();
                if outbox.send(message).await.is_err() || ended {
                    return;
                }
            }
        });
        Control {
            peer: connection.remote_address(),
            connection,
            send,
            inbox,
        }
    }

    /// The connection the stream belongs to.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The other end's address.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Sends a message.
    pub async fn send(&mut self, message: &impl Serialize) -> Result<(), ControlError> {
        let sent = stream::send(&mut self.send, message).await;
        match sent {
            Ok(()) => Ok(()),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// The next message. May be cancelled without loss.
    pub async fn next(&mut self) -> Result<In, ControlError> {
        match self.inbox.recv().await {
            Some(Ok(message)) => Ok(message),
            Some(Err(error)) => Err(self.explain(error).await),
            None => Err(self.ended().await.into()),
        }
    }

    /// Prefers what the connection died of to what the stream noticed of it.
    async fn explain(&self, error: ProtoError) -> ControlError {
        match error {
            ProtoError::Stream(_) => self.ended().await.into(),
            error => ControlError::Proto {
                peer: self.peer,
                error,
            },
        }
    }

    async fn ended(&self) -> QuicError {
        // A stream that ends while its connection lives was finished by the peer: it is about to close.
        let reason = timeout(FAREWELL_TIMEOUT, self.connection.closed()).await;
        match reason {
            Ok(error) => QuicError::from_connection(self.peer, &error),
            Err(_) => QuicError::Protocol {
                peer: self.peer,
                what: String::from("the control stream ended before the migration did"),
            },
        }
    }

    /// Sends a last message, makes sure that it arrives if it can, and closes the connection.
    pub async fn farewell(mut self, message: &impl Serialize) {
        if self.send(message).await.is_ok() {
            self.close().await;
        }
    }

    /// Says nothing more. The other end may.
    pub fn finish(&mut self) {
        // An error says that it was finished before.
        let _ = self.send.finish();
    }

    /// Says nothing more, and waits until the peer, who has read it all, says nothing more either. False when the connection
    /// was lost before. May be cancelled, and asked again.
    pub async fn is_understood(&mut self) -> bool {
        self.finish();
        while let Some(Ok(_)) = self.inbox.recv().await {}
        match self.connection.close_reason() {
            None => true,
            Some(ConnectionError::ApplicationClosed(close)) => close.reason[..] == *DONE,
            Some(_) => false,
        }
    }

    /// Waits until the peer has everything, but not for long, then closes the connection.
    pub async fn close(mut self) {
        self.finish();
        let acknowledged = timeout(FAREWELL_TIMEOUT, self.send.stopped());
        if acknowledged.await.is_err() {
            tracing::debug!("the peer did not acknowledge the last message");
        }
        self.leave();
    }

    /// Closes the connection, whatever the peer has heard.
    pub fn leave(self) {
        self.connection.close(0_u8.into(), DONE);
    }
}
