//! Listening: two listeners, each driven by a thread of its own. Whoever has a certificate that we accept is heard side
//! by side with all others, so that a silent one keeps nobody waiting; what comes out are first words.

use std::collections::VecDeque;
use std::net::SocketAddr;

use common::control::Control;
use common::identity::{Identity, Trust};
use common::io_thread::{IoThread, Priority};
use common::limits::HANDSHAKE_TIMEOUT;
use common::proto::control::{BulkHello, Secret, SessionId, ToSource};
use common::proto::stream;
use common::quic::{self, FaultGauge, Listener, PathProfile, QuicError, Role};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::privileges;

/// Authenticated peers that wait for their turn.
const WAITING_PEERS: usize = 4;
/// Peers that are heard at once. The one that has been silent for longest makes room for another.
const HEARD_AT_ONCE: usize = 16;

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

/// One bound role, and the first words of those who come.
#[derive(Debug)]
pub struct Port<Call> {
    /// Drives the socket and everything on its connections.
    pub thread: IoThread,
    address: SocketAddr,
    calls: mpsc::Receiver<Call>,
}

/// A peer on the fault port that has opened its control stream, and the first message on that.
#[derive(Debug)]
pub struct Call {
    /// The stream.
    pub control: Control<ToSource>,
    /// The message.
    pub message: ToSource,
}

/// A peer on the bulk port that has opened its stream and said to which session it belongs.
#[derive(Debug)]
pub struct BulkCall {
    connection: Connection,
    hello: BulkHello,
    streams: (SendStream, RecvStream),
}

/// The source's two ports.
#[derive(Debug)]
pub struct Listen {
    /// For control and demand.
    pub fault: Port<Call>,
    /// For skeleton and push.
    pub bulk: Port<BulkCall>,
    /// What both show of the path.
    pub gauge: FaultGauge,
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
        let bulk = Priority::bulk(plan.path, urgent_granted);
        let bulk_thread = IoThread::start("bulk", bulk, privileges::DATA)?;
        let gauge = FaultGauge::default();
        let listen = Listen {
            fault: Port::open(fault_thread, Role::Fault, plan, &gauge, first_message)?,
            bulk: Port::open(bulk_thread, Role::Bulk, plan, &gauge, bulk_hello)?,
            gauge,
        };
        privileges::give_up()?;
        Ok(listen)
    }
}

impl<Call: Send + 'static> Port<Call> {
    /// `hear` gets the first words of a peer; it runs on the current runtime.
    fn open<Words>(
        thread: IoThread,
        role: Role,
        plan: &ListenPlan,
        gauge: &FaultGauge,
        hear: fn(Connection) -> Words,
    ) -> Result<Self, QuicError>
    where
        Words: Future<Output = Result<Call, String>> + Send + 'static,
    {
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
        let (send, calls) = mpsc::channel(WAITING_PEERS);
        tokio::spawn(hear_all(peers, send, hear));
        Ok(Port {
            thread,
            address,
            calls,
        })
    }

    /// The bound address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next peer whose certificate we accept and that has said something.
    pub async fn next(&mut self) -> Option<Call> {
        self.calls.recv().await
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

/// Hears peers side by side.
async fn hear_all<Call, Words>(
    mut peers: mpsc::Receiver<Connection>,
    calls: mpsc::Sender<Call>,
    hear: fn(Connection) -> Words,
) where
    Call: Send + 'static,
    Words: Future<Output = Result<Call, String>> + Send + 'static,
{
    let mut heard: VecDeque<AbortHandle> = VecDeque::new();
    while let Some(connection) = peers.recv().await {
        heard.retain(|peer| !peer.is_finished());
        if heard.len() == HEARD_AT_ONCE
            && let Some(oldest) = heard.pop_front()
        {
            oldest.abort();
        }
        let calls = calls.clone();
        let hearing = tokio::spawn(async move {
            let peer = connection.remote_address();
            let open = Unheard(Some(connection.clone()));
            match timeout(HANDSHAKE_TIMEOUT, hear(connection)).await {
                // Nobody waits for calls any more once the migration has ended.
                Ok(Ok(call)) => match calls.send(call).await {
                    Ok(()) => open.keep(),
                    Err(_) => drop(open),
                },
                Ok(Err(reason)) => tracing::warn!(%peer, reason, "refused a destination"),
                Err(_) => {
                    tracing::warn!(%peer, reason = "it says nothing", "refused a destination")
                }
            }
        });
        heard.push_back(hearing.abort_handle());
    }
}

/// A connection that is closed unless somebody listens to what it says.
struct Unheard(Option<Connection>);

impl Unheard {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Unheard {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            connection.close(1_u8.into(), b"nothing was said in time");
        }
    }
}

async fn first_message(connection: Connection) -> Result<Call, String> {
    let opened = connection.accept_bi().await;
    let (send, recv) = opened.map_err(|error| error.to_string())?;
    let mut control = Control::new(connection, send, recv);
    let message = control.next().await.map_err(|error| error.to_string())?;
    Ok(Call { control, message })
}

async fn bulk_hello(connection: Connection) -> Result<BulkCall, String> {
    let opened = connection.accept_bi().await;
    let (send, mut recv) = opened.map_err(|error| error.to_string())?;
    let hello = stream::receive(&mut recv).await;
    Ok(BulkCall {
        connection,
        hello: hello.map_err(|error| error.to_string())?,
        streams: (send, recv),
    })
}

/// The bulk stream of the destination that knows this session's secret; others are turned away.
pub async fn accept_bulk(
    port: &mut Port<BulkCall>,
    session: SessionId,
    secret: &Secret,
) -> Option<(Connection, SendStream, RecvStream)> {
    while let Some(call) = port.next().await {
        let connection = call.connection;
        if call.hello.session != session || !call.hello.secret.matches(secret) {
            tracing::warn!(peer = %connection.remote_address(), "refused a bulk connection");
            connection.close(
                1_u8.into(),
                b"this bulk connection belongs to no session here",
            );
        } else if connection.close_reason().is_none() {
            let (send, recv) = call.streams;
            return Some((connection, send, recv));
        }
        // Else it is of an earlier attempt.
    }
    None
}
