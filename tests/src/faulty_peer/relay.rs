//! How messages pass from one real end to the other: each stream by a task for either direction.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use common::identity::Trust;
use common::proto::bulk::{BULK_HEADER_BYTES, BulkHeader};
use common::proto::control::BulkHello;
use common::proto::demand::{DEMAND_FRAME_BYTES, DemandFrame};
use common::proto::pages::{DATA_HEADER_BYTES, DemandReply};
use common::proto::stream;
use common::quic::{self, FaultGauge, Listener, PathProfile, Role};
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::{JoinSet, spawn};
use tokio::time::{sleep, timeout};

use super::mischief::{Answer, BulkFrame, Mischief, Passage};
use super::{LET_GO, Orders, Scenario};

/// Time the receiver of a stream's end has to acknowledge it.
const FAREWELL: Duration = Duration::from_secs(1);
/// Time a connection's last packets have to leave.
const CLOSING: Duration = Duration::from_millis(200);

/// The scenario, and what tells it to let a message go.
#[derive(Debug, Clone)]
struct Shared {
    mischief: Arc<Mutex<Mischief>>,
    let_go: Arc<Notify>,
}

/// The program: `faulty-peer SCENARIO LISTEN SOURCE IDENTITY IDENTITY`.
pub fn main(arguments: &[String]) -> Result<()> {
    let orders = Orders::parse(arguments)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run(Arc::new(orders)))
}

async fn run(orders: Arc<Orders>) -> Result<()> {
    let mischief = Shared {
        mischief: Arc::new(Mutex::new(Mischief::new(orders.scenario))),
        let_go: Arc::new(Notify::new()),
    };
    let mut told = signal(SignalKind::from_raw(LET_GO as i32))?;
    let let_go = mischief.let_go.clone();
    spawn(async move {
        while told.recv().await.is_some() {
            let_go.notify_one();
        }
    });
    let bulk_port = SocketAddr::new(orders.listen.ip(), orders.listen.port() + 1);
    let fault = bind(&orders, orders.listen, Role::Fault)?;
    let bulk = bind(&orders, bulk_port, Role::Bulk)?;
    println!("ready");
    let (with_bulk, orders_too) = (mischief.clone(), orders.clone());
    spawn(async move {
        while let Some(handshake) = bulk.next().await {
            if let Ok(below) = handshake.finish().await {
                spawn(pass_bulk(orders_too.clone(), below, with_bulk.clone()));
            }
        }
    });
    while let Some(handshake) = fault.next().await {
        let Ok(below) = handshake.finish().await else {
            continue;
        };
        let (orders, mischief) = (orders.clone(), mischief.clone());
        spawn(async move {
            // A source that cannot be reached is one that this peer's own destination cannot reach either.
            let above = connect(&orders, orders.source, Role::Fault).await?;
            pass_fault(below, above, mischief).await
        });
    }
    anyhow::bail!("the listener ended")
}

fn bind(orders: &Orders, address: SocketAddr, role: Role) -> Result<Listener> {
    let identity = &orders.as_source;
    let path = PathProfile::default();
    Ok(quic::bind_server(
        address,
        identity,
        &Trust::Ca,
        role,
        path,
        &FaultGauge::default(),
    )?)
}

async fn connect(orders: &Orders, address: SocketAddr, role: Role) -> Result<Connection> {
    let identity = &orders.as_destination;
    let path = PathProfile::default();
    let endpoint = quic::bind_client(address, None, identity, &Trust::Ca, role, path)?;
    Ok(quic::connect(&endpoint, address).await?)
}

/// Streams of the fault connection: the first is the control stream, the second demand.
async fn pass_fault(below: Connection, above: Connection, mischief: Shared) -> Result<()> {
    let (mut up, mut down) = (JoinSet::new(), JoinSet::new());
    let (send, recv) = below.accept_bi().await?;
    let (above_send, above_recv) = above.open_bi().await?;
    up.spawn(messages(
        recv,
        above_send,
        mischief.clone(),
        Mischief::upward,
    ));
    down.spawn(messages(
        above_recv,
        send,
        mischief.clone(),
        Mischief::downward,
    ));
    let demand = {
        let (below, above) = (below.clone(), above.clone());
        spawn(async move {
            let (send, recv) = below.accept_bi().await?;
            let (above_send, above_recv) = above.open_bi().await?;
            let answers = spawn(answers(above_recv, send, mischief.clone()));
            let up = requests(recv, above_send, mischief).await?;
            let down = answers.await??;
            anyhow::Ok((up, down))
        })
    };
    tokio::select! {
        reason = below.closed() => close(&above, &reason, up).await,
        reason = above.closed() => close(&below, &reason, down).await,
    }
    demand.abort();
    Ok(())
}

/// Passes on what is left, then the end.
async fn close(
    other: &Connection,
    reason: &ConnectionError,
    mut rest: JoinSet<Result<SendStream>>,
) {
    let mut passed = Vec::new();
    let passing = async {
        while let Some(stream) = rest.join_next().await {
            passed.push(stream);
        }
    };
    let _ = timeout(2 * FAREWELL, passing).await;
    match reason {
        ConnectionError::ApplicationClosed(frame) => other.close(frame.error_code, &frame.reason),
        _ => other.close(0_u8.into(), b""),
    }
}

async fn messages<M: Serialize + DeserializeOwned>(
    mut from: RecvStream,
    mut to: SendStream,
    mischief: Shared,
    pass: fn(&mut Mischief, M) -> Passage<M>,
) -> Result<SendStream> {
    while let Ok(message) = stream::receive(&mut from).await {
        let passage = pass(&mut lock(&mischief.mischief), message);
        let is_last = matches!(passage, Passage::Lose(_));
        for message in allowed(passage, &mischief.let_go).await {
            stream::send(&mut to, &message).await?;
        }
        if is_last {
            sleep(CLOSING).await;
            lose_everything();
        }
    }
    end(from, to).await
}

async fn requests(
    mut from: RecvStream,
    mut to: SendStream,
    mischief: Shared,
) -> Result<SendStream> {
    let mut frame = [0; DEMAND_FRAME_BYTES];
    while from.read_exact(&mut frame).await.is_ok() {
        let frame = DemandFrame::decode(&frame)?;
        let passage = lock(&mischief.mischief).request(frame);
        for frame in allowed(passage, &mischief.let_go).await {
            to.write_all(&frame.encode()).await?;
        }
    }
    end(from, to).await
}

async fn answers(mut from: RecvStream, mut to: SendStream, mischief: Shared) -> Result<SendStream> {
    let mut header = [0; DATA_HEADER_BYTES];
    while from.read_exact(&mut header).await.is_ok() {
        let reply = DemandReply::decode(&header)?;
        let length = match &reply {
            DemandReply::Data(data) => data.payload,
            DemandReply::Packed(packed) => packed.payload,
            DemandReply::Withheld(..) => 0,
        };
        let mut body = vec![0; length as usize];
        from.read_exact(&mut body).await?;
        let passage = lock(&mischief.mischief).answer(Answer { reply, body });
        for answer in allowed(passage, &mischief.let_go).await {
            to.write_all(&answer.reply.encode()).await?;
            to.write_all(&answer.body).await?;
        }
    }
    end(from, to).await
}

async fn pass_bulk(orders: Arc<Orders>, below: Connection, mischief: Shared) -> Result<()> {
    let port = orders.source.port() + 1;
    let source = SocketAddr::new(orders.source.ip(), port);
    let above = connect(&orders, source, Role::Bulk).await?;
    let (send, mut recv) = below.accept_bi().await?;
    let (mut above_send, above_recv) = above.open_bi().await?;
    let hello: BulkHello = stream::receive(&mut recv).await?;
    stream::send(&mut above_send, &hello).await?;
    let (mut up, mut down) = (JoinSet::new(), JoinSet::new());
    up.spawn(copy(recv, above_send));
    down.spawn(frames(above_recv, send, mischief));
    tokio::select! {
        reason = below.closed() => close(&above, &reason, up).await,
        reason = above.closed() => close(&below, &reason, down).await,
    }
    Ok(())
}

async fn frames(mut from: RecvStream, mut to: SendStream, mischief: Shared) -> Result<SendStream> {
    let mut header = [0; BULK_HEADER_BYTES];
    while from.read_exact(&mut header).await.is_ok() {
        let header = BulkHeader::decode(&header)?;
        let mut body = vec![0; body_bytes(&header)];
        from.read_exact(&mut body).await?;
        let passage = lock(&mischief.mischief).bulk(BulkFrame { header, body });
        for frame in allowed(passage, &mischief.let_go).await {
            to.write_all(&frame.header.encode()).await?;
            to.write_all(&frame.body).await?;
        }
    }
    end(from, to).await
}

fn body_bytes(header: &BulkHeader) -> usize {
    match header {
        BulkHeader::File { name, payload, .. } => usize::from(*name) + *payload as usize,
        BulkHeader::Data(data) => data.payload as usize,
        BulkHeader::Packed(packed) => packed.payload as usize,
        BulkHeader::SkeletonEnd { .. } => 0,
    }
}

async fn copy(mut from: RecvStream, mut to: SendStream) -> Result<SendStream> {
    while let Ok(Some(chunk)) = from.read_chunk(usize::MAX, true).await {
        to.write_chunk(chunk.bytes).await?;
    }
    end(from, to).await
}

/// Passes the end of a stream on. A stream that was lost with its connection did not end: what it went on to is returned
/// open, since dropping it would end it.
async fn end(mut from: RecvStream, mut to: SendStream) -> Result<SendStream> {
    let next = from.read_chunk(usize::MAX, true).await;
    let is_lost = matches!(next, Err(ReadError::ConnectionLost(_)));
    if !is_lost && to.finish().is_ok() {
        let _ = timeout(FAREWELL, to.stopped()).await;
    }
    Ok(to)
}

/// What may go on; never returns when nothing may.
async fn allowed<T>(passage: Passage<T>, let_go: &Notify) -> Vec<T> {
    match passage {
        Passage::Send(messages) => messages,
        Passage::Hold(message) => {
            let_go.notified().await;
            vec![message]
        }
        Passage::Lose(None) => lose_everything(),
        Passage::Lose(Some(message)) => vec![message],
        Passage::Stall => std::future::pending().await,
        Passage::Vanish => std::process::exit(1),
    }
}

/// All connections are gone without a word, and another one of us takes our place.
fn lose_everything() -> ! {
    let scenario = std::env::args()
        .nth(1)
        .and_then(|name| Scenario::named(&name));
    let next = scenario.map_or(Scenario::Passes, Scenario::next);
    let arguments = std::env::args().skip(2);
    let own = std::env::current_exe().unwrap_or_default();
    let mut command = Command::new(own);
    let error = command.arg(next.name()).args(arguments).exec();
    eprintln!("cannot go on: {error}");
    std::process::exit(1)
}

fn lock(mischief: &Mutex<Mischief>) -> std::sync::MutexGuard<'_, Mischief> {
    mischief.lock().unwrap_or_else(PoisonError::into_inner)
}
