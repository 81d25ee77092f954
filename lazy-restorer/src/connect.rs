//! Reaching the source: two endpoints, each driven by a thread of its own, and the first messages on both.

use std::net::SocketAddr;
use std::time::Duration;

use common::control::{Control, ControlError};
use common::exit::{Failure, SessionError};
use common::host;
use common::identity::{Identity, Trust};
use common::io_thread::{IoThread, Priority};
use common::limits::HANDSHAKE_TIMEOUT;
use common::proto::control::{BulkHello, Hello, Resume, Secret, ToDestination, ToSource, Welcome};
use common::proto::stream;
use common::quic::{self, PathProfile, QuicError, Role};
use common::session::State;
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use tokio::time::timeout;

use crate::privileges;

/// Time closed connections have to send their last packets.
const CLOSING_TIMEOUT: Duration = Duration::from_millis(200);

/// How to reach the source.
#[derive(Clone, Debug)]
pub struct ConnectPlan {
    /// Its fault port.
    pub source: SocketAddr,
    /// Who we are.
    pub identity: Identity,
    /// Whom we accept.
    pub trust: Trust,
    /// Packet sizes.
    pub path: PathProfile,
    /// Protocol versions to offer.
    pub versions: Vec<u16>,
    /// The one-time token, if the source demands one.
    pub token: Option<Secret>,
}

/// The threads that drive a migration's connections, whichever they are at the time.
#[derive(Debug)]
pub struct Threads {
    /// Drives the fault connection and everything that resolves faults.
    pub fault: IoThread,
    /// Drives the bulk connection and what it brings.
    pub bulk: IoThread,
}

impl Threads {
    /// Starts both for a path of this kind, and gives up the capabilities that the calling thread does not need any more then.
    pub fn start(path: PathProfile) -> Result<Self, SessionError> {
        let internal = |error: std::io::Error| fail(Failure::Internal, &error);
        let fault =
            IoThread::start("fault", Priority::Urgent, privileges::DATA).map_err(internal)?;
        let urgent_granted = fault.granted();
        let bulk = Priority::bulk(path, urgent_granted);
        let bulk = IoThread::start("bulk", bulk, privileges::DATA).map_err(internal)?;
        privileges::give_up().map_err(internal)?;
        Ok(Threads { fault, bulk })
    }
}

/// A source that welcomed us.
#[derive(Debug)]
pub struct Source {
    /// The control stream.
    pub control: Control<ToDestination>,
    /// What the source said.
    pub welcome: Welcome,
    /// The bulk connection.
    pub bulk: Connection,
    bulk_stream: Option<(SendStream, RecvStream)>,
    endpoints: [Endpoint; 2],
}

/// Connects, says hello and opens the bulk connection.
pub async fn connect(plan: &ConnectPlan, threads: &Threads) -> Result<Source, SessionError> {
    let (endpoint, mut control) = open_control(plan, threads).await?;
    let welcome = say_hello(plan, &mut control).await?;
    open_bulk(plan, threads, (endpoint, control), welcome).await
}

/// Connects again to the source of a session whose link was lost.
pub async fn reconnect(
    plan: &ConnectPlan,
    threads: &Threads,
    welcome: &Welcome,
) -> Result<Source, SessionError> {
    let (endpoint, mut control) = open_control(plan, threads).await?;
    let resume = ToSource::Resume(Resume {
        version: welcome.version,
        session: welcome.session,
        secret: welcome.secret.clone(),
    });
    let welcome = match ask(&mut control, &resume).await? {
        ToDestination::WelcomeBack { bulk_port } => Welcome {
            bulk_port,
            ..welcome.clone()
        },
        _ => return Err(fail(Failure::Peer, &"the source does not take us back")),
    };
    open_bulk(plan, threads, (endpoint, control), welcome).await
}

async fn open_control(
    plan: &ConnectPlan,
    threads: &Threads,
) -> Result<(Endpoint, Control<ToDestination>), SessionError> {
    let (endpoint, fault) = open(&threads.fault, plan, plan.source, Role::Fault).await?;
    let (send, recv) = fault.open_bi().await.map_err(|error| {
        let error = QuicError::from_connection(plan.source, &error);
        fail(failure_of(&error), &error)
    })?;
    Ok((endpoint, Control::new(fault, send, recv)))
}

async fn open_bulk(
    plan: &ConnectPlan,
    threads: &Threads,
    (fault_endpoint, control): (Endpoint, Control<ToDestination>),
    welcome: Welcome,
) -> Result<Source, SessionError> {
    let address = SocketAddr::new(plan.source.ip(), welcome.bulk_port);
    let (bulk_endpoint, bulk) = open(&threads.bulk, plan, address, Role::Bulk).await?;
    let bulk_stream = open_bulk_stream(&bulk, &welcome)
        .await
        .map_err(|error| fail(Failure::Connection, &error))?;
    Ok(Source {
        control,
        welcome,
        bulk,
        bulk_stream: Some(bulk_stream),
        endpoints: [fault_endpoint, bulk_endpoint],
    })
}

async fn open(
    thread: &IoThread,
    plan: &ConnectPlan,
    address: SocketAddr,
    role: Role,
) -> Result<(Endpoint, Connection), SessionError> {
    // Bound here, for a large buffer may need a capability that the thread does not have.
    let entered = thread.handle().enter();
    let endpoint = quic::bind_client(address, None, &plan.identity, &plan.trust, role, plan.path);
    drop(entered);
    let endpoint = endpoint.map_err(|error| fail(failure_of(&error), &error))?;
    let connecting = thread.handle().spawn(async move {
        let connection = quic::connect(&endpoint, address).await?;
        Ok((endpoint, connection))
    });
    match connecting.await {
        Ok(Ok(connected)) => Ok(connected),
        Ok(Err(error)) => Err(fail(failure_of(&error), &error)),
        Err(error) => Err(fail(Failure::Internal, &error)),
    }
}

async fn say_hello(
    plan: &ConnectPlan,
    control: &mut Control<ToDestination>,
) -> Result<Welcome, SessionError> {
    let hello = ToSource::Hello(Hello {
        versions: plan.versions.clone(),
        token: plan.token.clone(),
        host: host::name(),
    });
    match ask(control, &hello).await? {
        ToDestination::Welcome(welcome) if plan.versions.contains(&welcome.version) => Ok(welcome),
        ToDestination::Welcome(welcome) => {
            let version = welcome.version;
            let text = format!("the source answers with version {version}, which was not offered");
            Err(fail(Failure::Peer, &text))
        }
        _ => Err(fail(
            Failure::Peer,
            &"the source does not begin with a welcome",
        )),
    }
}

/// Sends the first message and waits for the answer to it.
async fn ask(
    control: &mut Control<ToDestination>,
    message: &ToSource,
) -> Result<ToDestination, SessionError> {
    let exchange = async {
        control.send(message).await?;
        control.next().await
    };
    // The source answers one destination after the other; a busy one keeps us waiting this long.
    match timeout(3 * HANDSHAKE_TIMEOUT, exchange).await {
        Ok(Ok(ToDestination::Abort(abort))) => {
            let text = format!("source host {} refuses: {}", abort.host, abort.text);
            Err(fail(Failure::Refused, &text))
        }
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(ControlError::Connection(error))) => Err(fail(failure_of(&error), &error)),
        Ok(Err(error)) => Err(fail(Failure::Peer, &error)),
        Err(_) => Err(fail(
            Failure::Connection,
            &"the source does not answer; is it serving another destination?",
        )),
    }
}

async fn open_bulk_stream(
    bulk: &Connection,
    welcome: &Welcome,
) -> Result<(SendStream, RecvStream), String> {
    let (mut send, recv) = bulk.open_bi().await.map_err(|error| error.to_string())?;
    let hello = BulkHello {
        session: welcome.session,
        secret: welcome.secret.clone(),
    };
    stream::send(&mut send, &hello)
        .await
        .map_err(|error| error.to_string())?;
    Ok((send, recv))
}

fn failure_of(error: &QuicError) -> Failure {
    match error {
        QuicError::Refused { .. } => Failure::Refused,
        QuicError::Tls(_) => Failure::Identity,
        QuicError::BadMtu { .. } => Failure::BadInput,
        _ => Failure::Connection,
    }
}

fn fail(failure: Failure, error: &dyn std::fmt::Display) -> SessionError {
    SessionError::new(failure, State::Hello, error)
}

impl Source {
    /// The bulk stream, once: our credit's direction and the source's data.
    pub fn take_bulk_stream(&mut self) -> Option<(SendStream, RecvStream)> {
        self.bulk_stream.take()
    }

    /// Closes both connections, after `last` if there is one, and lets the source know before this program ends.
    pub async fn close(self, last: Option<ToSource>) {
        match last {
            Some(last) => self.control.farewell(&last).await,
            None => self.control.close().await,
        }
        self.bulk.close(0_u8.into(), b"done");
        for endpoint in self.endpoints {
            // Without this the closing packets may never leave, and the source waits for them.
            if timeout(CLOSING_TIMEOUT, endpoint.wait_idle())
                .await
                .is_err()
            {
                tracing::debug!("an endpoint is not idle yet");
            }
        }
    }
}
