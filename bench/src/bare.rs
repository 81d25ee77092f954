//! What QUIC alone does between the two hosts, with the settings, sockets and threads of our programs: the figure the
//! whole path is set against in the same run.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path as FilePath;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::identity::{Identity, Trust};
use common::io_thread::{IoThread, Priority};
use common::privileges::Capabilities;
use common::quic::{self, FaultGauge, Listener, PathProfile, Role};
use serde::{Deserialize, Serialize};
use tests::identity::Identities;
use tests::namespace;
use tests::path::{Path, PathSpec};
use tests::rig::Rig;

/// Bytes of a request, and of the answer to it: those of a fault.
const REQUEST_BYTES: usize = 24;
const REPLY_BYTES: usize = 32 + 4096;
/// Bytes written at once: those of a full frame.
const CHUNK_BYTES: usize = 32 + (64 << 10);
/// Longer than any of it takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct BareOrder {
    /// Round trips.
    pub round_trips: u64,
    /// Round trips per second; 0 for one after the other.
    pub rate: u64,
    /// Bulk.
    pub mib: u64,
    /// UDP payload, if it is known.
    pub udp_payload: Option<u16>,
}

/// What was measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Bare {
    /// From a request of a fault's size to its page, median.
    pub p50_us: f64,
    /// The same, 99th percentile.
    pub p99_us: f64,
    /// Bulk, with nothing at either end.
    pub bulk_mib_s: f64,
}

impl fmt::Display for Bare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bare {
            p50_us,
            p99_us,
            bulk_mib_s,
        } = self;
        write!(
            f,
            "QUIC alone: p50 {p50_us:.0} us, p99 {p99_us:.0} us, {bulk_mib_s:.0} MiB/s"
        )
    }
}

/// Measures over a path of its own.
pub fn measure(spec: &PathSpec, order: BareOrder) -> Result<Bare> {
    let rig = Rig::new()?;
    let _path = Path::lay(&rig, *spec)?;
    let identities = Identities::make(&rig.make_folder("identities")?)?;
    let profile = PathProfile {
        mtu: order.udp_payload,
    };
    let address = SocketAddr::from((rig.source.address(), 0));
    let source = on_host(rig.source.namespace(), || {
        Source::listen(address, &identities.source, profile)
    })?;
    on_host(rig.destination.namespace(), || {
        source.ask(order, &identities.destination, profile)
    })
}

/// Runs `step` on a thread whose sockets belong to a host.
fn on_host<T: Send>(name: &str, step: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            namespace::enter(name)?;
            step()
        });
        let ended = thread.join();
        ended.map_err(|_| anyhow::anyhow!("a host of the measurement panicked"))?
    })
}

/// The end that answers. Its threads end with it.
struct Source {
    addresses: [SocketAddr; 2],
    _threads: [IoThread; 2],
}

fn threads(path: PathProfile) -> Result<[IoThread; 2]> {
    let fault = IoThread::start("bare-fault", Priority::Urgent, Capabilities::empty())?;
    let urgent_granted = fault.granted();
    let bulk = Priority::bulk(path, urgent_granted);
    let bulk = IoThread::start("bare-bulk", bulk, Capabilities::empty())?;
    Ok([fault, bulk])
}

impl Source {
    fn listen(address: SocketAddr, identity: &FilePath, path: PathProfile) -> Result<Self> {
        let identity = Identity::load(identity)?;
        let gauge = FaultGauge::default();
        let threads = threads(path)?;
        let bind = |thread: &IoThread, role| -> Result<Listener> {
            let _entered = thread.handle().enter();
            let bound = quic::bind_server(address, &identity, &Trust::Ca, role, path, &gauge)?;
            Ok(bound)
        };
        let fault = bind(&threads[0], Role::Fault)?;
        let bulk = bind(&threads[1], Role::Bulk)?;
        let addresses = [fault.local_addr()?, bulk.local_addr()?];
        threads[0].handle().spawn(answer(fault));
        threads[1].handle().spawn(push(bulk));
        Ok(Source {
            addresses,
            _threads: threads,
        })
    }

    /// The other end.
    fn ask(&self, order: BareOrder, identity: &FilePath, path: PathProfile) -> Result<Bare> {
        let identity = Identity::load(identity)?;
        let threads = threads(path)?;
        let [fault, bulk] = self.addresses;
        let waits = run(&threads[0], Role::Fault, fault, &identity, path, move |c| {
            round_trips(c, order)
        })?;
        let bulk_mib_s = run(&threads[1], Role::Bulk, bulk, &identity, path, move |c| {
            take_in(c, order.mib)
        })?;
        let at = |part: f64| waits[((waits.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e6;
        Ok(Bare {
            p50_us: at(0.5),
            p99_us: at(0.99),
            bulk_mib_s,
        })
    }
}

/// Connects on `thread`, from the host of the calling one, and runs `step` there.
fn run<T, F>(
    thread: &IoThread,
    role: Role,
    address: SocketAddr,
    identity: &Identity,
    path: PathProfile,
    step: impl FnOnce(quinn::Connection) -> F,
) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let entered = thread.handle().enter();
    let endpoint = quic::bind_client(address, None, identity, &Trust::Ca, role, path)?;
    drop(entered);
    let connecting = endpoint.clone();
    let connection = on_thread(thread, async move {
        Ok(quic::connect(&connecting, address).await?)
    })?;
    on_thread(thread, step(connection))
}

fn on_thread<T: Send + 'static>(
    thread: &IoThread,
    step: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let (send, receive) = std::sync::mpsc::channel();
    thread.handle().spawn(async move {
        // Without a receiver the measurement has ended.
        let _ = send.send(step.await);
    });
    receive
        .recv_timeout(PATIENCE)
        .context("QUIC alone takes too long")?
}

async fn answer(listener: Listener) -> Result<()> {
    let handshake = listener.next().await.context("closed")?;
    let connection = handshake.finish().await?;
    let (mut send, mut receive) = connection.accept_bi().await?;
    let mut request = [0; REQUEST_BYTES];
    let reply = bytes::Bytes::from(vec![1; REPLY_BYTES]);
    while receive.read_exact(&mut request).await.is_ok() {
        send.write_chunk(reply.clone()).await?;
    }
    Ok(())
}

async fn push(listener: Listener) -> Result<()> {
    let handshake = listener.next().await.context("closed")?;
    let connection = handshake.finish().await?;
    let (mut send, mut receive) = connection.accept_bi().await?;
    let mut wanted = [0; 8];
    receive.read_exact(&mut wanted).await?;
    let chunk = bytes::Bytes::from(vec![1; CHUNK_BYTES]);
    let mut left = u64::from_le_bytes(wanted);
    while left > 0 {
        send.write_chunk(chunk.clone()).await?;
        left = left.saturating_sub(CHUNK_BYTES as u64);
    }
    send.finish()?;
    // The other end closes the connection when it has everything.
    connection.closed().await;
    Ok(())
}

/// How long each took, the shortest first.
async fn round_trips(connection: quinn::Connection, order: BareOrder) -> Result<Vec<Duration>> {
    let (mut send, mut receive) = connection.open_bi().await?;
    let pause = Duration::from_nanos(1_000_000_000_u64.checked_div(order.rate).unwrap_or(0));
    let mut pacer = Pacer::start()?;
    let mut reply = vec![0; REPLY_BYTES];
    let mut waits = Vec::new();
    for _ in 0..order.round_trips.max(1) {
        let began = Instant::now();
        send.write_all(&[0; REQUEST_BYTES]).await?;
        receive.read_exact(&mut reply).await?;
        waits.push(began.elapsed());
        if !pause.is_zero() {
            pacer.sleep_until(began + pause).await?;
        }
    }
    waits.sort_unstable();
    Ok(waits)
}

/// Sleeps as the toucher does, in the kernel and to the point, and wakes the connection's thread as a fault does. The
/// runtime's own timer is a millisecond coarse, so round trips would begin from another depth of idleness than faults.
struct Pacer {
    wake_at: std::sync::mpsc::Sender<Instant>,
    woken: tokio::sync::mpsc::UnboundedReceiver<()>,
}

impl Pacer {
    fn start() -> Result<Self> {
        let (wake_at, asked) = std::sync::mpsc::channel::<Instant>();
        let (wake, woken) = tokio::sync::mpsc::unbounded_channel();
        // Ends when it is asked no more.
        std::thread::Builder::new()
            .name("bare-pacer".to_owned())
            .spawn(move || {
                for at in asked {
                    std::thread::sleep(at.saturating_duration_since(Instant::now()));
                    if wake.send(()).is_err() {
                        return;
                    }
                }
            })
            .context("no thread to keep the pace")?;
        Ok(Self { wake_at, woken })
    }

    async fn sleep_until(&mut self, at: Instant) -> Result<()> {
        self.wake_at.send(at).context("the pacer has ended")?;
        self.woken.recv().await.context("the pacer has ended")
    }
}

/// MiB per second.
async fn take_in(connection: quinn::Connection, mib: u64) -> Result<f64> {
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&(mib << 20).to_le_bytes()).await?;
    let began = Instant::now();
    let mut bytes = 0;
    while let Some(chunk) = receive.read_chunk(usize::MAX, true).await? {
        bytes += chunk.bytes.len();
    }
    ensure!(bytes as u64 >= mib << 20, "QUIC alone lost something");
    let rate = bytes as f64 / f64::from(1 << 20) / began.elapsed().as_secs_f64();
    connection.close(0_u8.into(), b"done");
    Ok(rate)
}
