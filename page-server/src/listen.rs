//! Accepting one destination: two listeners, each driven by a thread of its own.

use std::net::SocketAddr;
use std::time::Duration;

use common::identity::{Identity, Trust};
use common::io_thread::{IoThread, Priority};
use common::limits::HANDSHAKE_TIMEOUT;
use common::proto::control::{BulkHello, Secret, SessionId};
use common::proto::stream;
use common::quic::{self, FaultGauge, Listener, PathProfile, QuicError, Role};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::privileges;

/// Authenticated peers that wait for their turn.
const WAITING_PEERS: usize = 4;

/// How the source listens.
#[derive(Clone, Debug)]
pub struct ListenPlan {
    /// Address of the fault connection.
    pub fault: SocketAddr,
    /// Address of the bulk connection.
    pub bulk: SocketAddr,
    /// Who we are.
    pub identity: Identity,
    /// Whom we accept.
    pub trust: Trust,
    /// Packet sizes.
    pub path: PathProfile,
}

/// One bound role.
#[derive(Debug)]
pub struct Port {
    /// Drives the socket and everything on its connections.
    pub thread: IoThread,
    address: SocketAddr,
    peers: mpsc::Receiver<Connection>,
}

/// The source's two ports.
#[derive(Debug)]
pub struct Listen {
    /// For control and demand.
    pub fault: Port,
    /// For skeleton and push.
    pub bulk: Port,
}

/// Why we cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The socket.
    #[error(transparent)]
    Quic(#[from] QuicError),
    /// The thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

impl Listen {
    /// Binds both ports, and gives up the capabilities that the calling thread does not need any more then.
    pub fn open(plan: &ListenPlan) -> Result<Self, ListenError> {
        let fault_thread = IoThread::start("fault", Priority::Urgent, privileges::DATA)?;
        let urgent_granted = fault_thread.granted();
        let bulk_thread = IoThread::start(
            "bulk",
            Priority::Background { urgent_granted },
            privileges::DATA,
        )?;
        let gauge = FaultGauge::default();
        let listen = Listen {
            fault: Port::open(fault_thread, Role::Fault, plan, &gauge)?,
            bulk: Port::open(bulk_thread, Role::Bulk, plan, &gauge)?,
        };
        privileges::give_up()?;
        Ok(listen)
    }
}

impl Port {
    fn open(
        thread: IoThread,
        role: Role,
        plan: &ListenPlan,
        gauge: &FaultGauge,
    ) -> Result<Self, QuicError> {
        let entered = thread.handle().enter();
        let address = match role {
            Role::Fault => plan.fault,
            Role::Bulk => plan.bulk,
        };
        let (identity, trust) = (&plan.identity, &plan.trust);
        let listener = quic::bind_server(address, identity, trust, role, plan.path, gauge)?;
        drop(entered);
        let address = listener.local_addr()?;
        let (send, peers) = mpsc::channel(WAITING_PEERS);
        thread.handle().spawn(admit(listener, send));
        Ok(Port {
            thread,
            address,
            peers,
        })
    }

    /// The bound address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next peer whose certificate we accept.
    pub async fn next(&mut self) -> Option<Connection> {
        self.peers.recv().await
    }
}

/// Finishes handshakes side by side, so that a slow stranger keeps nobody waiting.
async fn admit(listener: Listener, peers: mpsc::Sender<Connection>) {
    while let Some(handshake) = listener.next().await {
        let peers = peers.clone();
        tokio::spawn(async move {
            let peer = handshake.peer();
            match handshake.finish().await {
                Ok(connection) => {
                    // Nobody waits for peers any more once the migration has ended.
                    let _ = peers.send(connection).await;
                }
                Err(error) => tracing::warn!(%peer, %error, "refused a peer"),
            }
        });
    }
}

/// The bulk stream of the destination that knows this session's secret; others are turned away.
pub async fn accept_bulk(
    port: &mut Port,
    session: SessionId,
    secret: &Secret,
) -> Option<(Connection, SendStream, RecvStream)> {
    while let Some(connection) = port.next().await {
        match bulk_hello(&connection).await {
            Some((hello, send, recv))
                if hello.session == session && hello.secret.matches(secret) =>
            {
                return Some((connection, send, recv));
            }
            _ => {
                tracing::warn!(peer = %connection.remote_address(), "refused a bulk connection");
                connection.close(
                    1_u8.into(),
                    b"this bulk connection belongs to no session here",
                );
            }
        }
    }
    None
}

async fn bulk_hello(connection: &Connection) -> Option<(BulkHello, SendStream, RecvStream)> {
    let hello = async {
        let (send, mut recv) = connection.accept_bi().await.ok()?;
        let hello = stream::receive(&mut recv).await.ok()?;
        Some((hello, send, recv))
    };
    within(HANDSHAKE_TIMEOUT, hello).await
}

async fn within<T>(limit: Duration, step: impl Future<Output = Option<T>>) -> Option<T> {
    timeout(limit, step).await.ok().flatten()
}
