//! The UDP socket under an endpoint: what tokio and quinn-udp do, with fewer system calls.
//!
//! quinn hands ten packets over at a time, whatever the kernel would take, and looks once more for packets after each
//! receive that left none. With packets of 1452 bytes the calls cost a bulk connection more than encryption does (measured:
//! `docs/decisions/0061-bursts.md`). So packets of a bulk connection that follow each other at once are joined into one
//! segmented send, and a receive that did not fill its buffers is known to have emptied the socket.

use std::fmt;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::Notify;

/// The most bytes of one send: what fits into one UDP datagram before it is segmented (RFC 768, less the headers).
const MAX_BURST_BYTES: usize = 65_507;
/// Joined packets keep a path busy for so long at the present rate and no longer, for a fault's answer must wait behind
/// them; what quinn sends in one call is never divided.
const BURST_TIME: Duration = Duration::from_micros(100);
/// The rate is taken over at least this long.
const RATE_INTERVAL: Duration = Duration::from_millis(1);

/// The socket of one endpoint. Used by the one thread that drives the endpoint.
#[derive(Debug)]
pub(super) struct Bursts {
    io: UdpSocket,
    state: UdpSocketState,
    /// `None`: everything is sent at once.
    joining: Option<Joining>,
}

#[derive(Debug)]
struct Joining {
    burst: Mutex<Burst>,
    /// There is something to send when nothing more follows.
    begun: Arc<Notify>,
}

/// Packets that wait for more of their kind.
#[derive(Debug)]
struct Burst {
    bytes: Vec<u8>,
    kind: Option<Kind>,
    pace: Pace,
}

/// What packets of one send have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    destination: SocketAddr,
    ecn: Option<EcnCodepoint>,
    from: Option<IpAddr>,
    packet: usize,
}

/// How much is joined at the rate of the last millisecond.
#[derive(Debug)]
struct Pace {
    since: Instant,
    sent: usize,
    most: usize,
}

impl Pace {
    fn note(&mut self, bytes: usize, now: Instant) {
        self.sent += bytes;
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed >= RATE_INTERVAL {
            let share = BURST_TIME.as_secs_f64() / elapsed.as_secs_f64();
            self.most = ((self.sent as f64 * share) as usize).min(MAX_BURST_BYTES);
            (self.since, self.sent) = (now, 0);
        }
    }
}

impl Kind {
    /// `None` for a packet that is alone: nobody knows whether others of its size follow.
    fn of(transmit: &Transmit<'_>) -> Option<Self> {
        let packet = transmit.segment_size.filter(|packet| *packet > 0)?;
        Some(Kind {
            destination: transmit.destination,
            ecn: transmit.ecn,
            from: transmit.src_ip,
            packet,
        })
    }

    /// Whether packets of `transmit` may follow some of this kind; one that is alone may be shorter.
    fn admits(self, transmit: &Transmit<'_>) -> bool {
        let is_short = transmit.segment_size.is_none() && transmit.contents.len() <= self.packet;
        let segment_size = is_short.then_some(self.packet).or(transmit.segment_size);
        let alike = Transmit {
            segment_size,
            ..*transmit
        };
        Kind::of(&alike) == Some(self)
    }

    fn transmit(self, contents: &[u8]) -> Transmit<'_> {
        Transmit {
            destination: self.destination,
            ecn: self.ecn,
            contents,
            segment_size: Some(self.packet),
            src_ip: self.from,
        }
    }
}

impl Bursts {
    /// Takes `socket` over; `joins` packets that follow each other at once. Must be called inside the runtime.
    pub(super) fn new(socket: std::net::UdpSocket, joins: bool) -> io::Result<Arc<Self>> {
        let state = UdpSocketState::new((&socket).into())?;
        let socket = Arc::new(Bursts {
            io: UdpSocket::from_std(socket)?,
            state,
            joining: joins.then(Joining::new),
        });
        if let Some(joining) = &socket.joining {
            let (begun, socket) = (Arc::clone(&joining.begun), Arc::downgrade(&socket));
            tokio::spawn(send_rests(begun, socket));
        }
        Ok(socket)
    }

    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let send = || self.state.send((&self.io).into(), transmit);
        self.io.try_io(Interest::WRITABLE, send)
    }

    /// Sends `burst`; it stays as it is while the socket takes nothing.
    fn send_burst(&self, burst: &mut Burst) -> io::Result<()> {
        if let Some(kind) = burst.kind {
            match self.send(&kind.transmit(&burst.bytes)) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(error),
                // As quinn has it, anything else is a packet lost.
                Ok(()) | Err(_) => {}
            }
            burst.bytes.clear();
            burst.kind = None;
        }
        Ok(())
    }

    fn send_rest(&self) -> io::Result<()> {
        match &self.joining {
            Some(joining) => self.send_burst(&mut joining.burst()),
            None => Ok(()),
        }
    }

    /// Takes all of `transmit`, which is sent now or with what follows it, or nothing while the socket takes nothing.
    fn join(&self, joining: &Joining, transmit: &Transmit<'_>) -> io::Result<()> {
        let mut burst = joining.burst();
        burst.pace.note(transmit.contents.len(), Instant::now());
        let joined = burst.join(transmit, self.state.max_gso_segments());
        if joined == transmit.contents.len() && burst.may_grow() {
            return Ok(());
        }
        if let Err(error) = self.send_burst(&mut burst) {
            burst.part_with(joined);
            return Err(error);
        }
        let rest = Transmit {
            contents: &transmit.contents[joined..],
            ..*transmit
        };
        if rest.contents.is_empty() {
            return Ok(());
        }
        if !burst.is_worth_waiting(&rest) {
            match self.send(&rest) {
                // It must be kept: its first packets have left.
                Err(error) if error.kind() == ErrorKind::WouldBlock && joined > 0 => {}
                sent => return sent,
            }
        }
        burst.begin(&rest);
        joining.begun.notify_one();
        Ok(())
    }
}

impl Burst {
    /// Adds those first packets of `transmit` that there is room for, if they are of the kind that waits; returns their
    /// bytes.
    fn join(&mut self, transmit: &Transmit<'_>, max_packets: usize) -> usize {
        let Some(kind) = self.kind.filter(|kind| kind.admits(transmit)) else {
            return 0;
        };
        if !self.may_grow() {
            return 0;
        }
        let most = (self.pace.most / kind.packet).min(max_packets) * kind.packet;
        let room = most.saturating_sub(self.bytes.len());
        let joined = room.min(transmit.contents.len());
        self.bytes.extend_from_slice(&transmit.contents[..joined]);
        joined
    }

    /// Whether more may be added: only the last packet of a send may be shorter than the others.
    fn may_grow(&self) -> bool {
        let whole = |kind: Kind| self.bytes.len().is_multiple_of(kind.packet);
        self.kind.is_some_and(whole)
    }

    /// Takes the last `bytes` out again.
    fn part_with(&mut self, bytes: usize) {
        self.bytes.truncate(self.bytes.len() - bytes);
    }

    /// Whether `transmit`, with which a burst would begin, may have others after it.
    fn is_worth_waiting(&self, transmit: &Transmit<'_>) -> bool {
        let bytes = transmit.contents.len();
        bytes <= self.pace.most
            && Kind::of(transmit).is_some_and(|kind| bytes.is_multiple_of(kind.packet))
    }

    /// Begins with `transmit`. Nothing may be waiting.
    fn begin(&mut self, transmit: &Transmit<'_>) {
        self.kind = Kind::of(transmit);
        self.bytes.extend_from_slice(transmit.contents);
    }
}

impl Joining {
    fn new() -> Self {
        Joining {
            burst: Mutex::new(Burst {
                bytes: Vec::with_capacity(MAX_BURST_BYTES),
                kind: None,
                pace: Pace {
                    since: Instant::now(),
                    sent: 0,
                    most: 0,
                },
            }),
            begun: Arc::default(),
        }
    }

    fn burst(&self) -> MutexGuard<'_, Burst> {
        self.burst.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Bursts {
    fn drop(&mut self) {
        if let Some(joining) = &self.joining {
            // The task that sends rests finds that there is no socket any more.
            joining.begun.notify_one();
        }
    }
}

/// Sends what waits when nothing followed it.
async fn send_rests(begun: Arc<Notify>, socket: Weak<Bursts>) {
    loop {
        begun.notified().await;
        // Whoever sends has its turn first: it may have more.
        tokio::task::yield_now().await;
        let Some(socket) = socket.upgrade() else {
            return;
        };
        while socket.send_rest().is_err() {
            if socket.io.writable().await.is_err() {
                return;
            }
        }
    }
}

impl AsyncUdpSocket for Bursts {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable {
            socket: self,
            wait: None,
        })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match &self.joining {
            Some(joining) => self.join(joining, transmit),
            None => self.send(transmit),
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.io.poll_recv_ready(cx))?;
            let receive = || self.state.recv((&self.io).into(), bufs, meta);
            if let Ok(count) = self.io.try_io(Interest::READABLE, receive) {
                if count < bufs.len() {
                    // The socket is empty, so what comes from now on is news to the poller, which has not run since.
                    let nothing = || Err::<(), _>(ErrorKind::WouldBlock.into());
                    let _ = self.io.try_io(Interest::READABLE, nothing);
                }
                return Poll::Ready(Ok(count));
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }
}

type Wait = Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>;

/// Waits until a socket can be written to. Each connection of an endpoint has its own, and they wait independently.
struct Writable {
    socket: Arc<Bursts>,
    wait: Option<Wait>,
}

impl UdpPoller for Writable {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nearly always: nothing to wait for.
        let is_ready = self.socket.io.try_io(Interest::WRITABLE, || Ok(())).is_ok();
        if is_ready && self.wait.is_none() {
            return Poll::Ready(Ok(()));
        }
        let socket = Arc::clone(&self.socket);
        let begin = || -> Wait { Box::pin(async move { socket.io.writable().await }) };
        let waited = ready!(self.wait.get_or_insert_with(begin).as_mut().poll(cx));
        self.wait = None;
        Poll::Ready(waited)
    }
}

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writable").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const PACKET: usize = 1000;

    fn socket(joins: bool) -> Arc<Bursts> {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("the loopback");
        socket.set_nonblocking(true).expect("a socket");
        Bursts::new(socket, joins).expect("a runtime")
    }

    /// Nothing can be sent, as far as `socket` knows.
    fn is_full(socket: &Bursts) {
        let nothing = || Err::<(), _>(ErrorKind::WouldBlock.into());
        let _ = socket.io.try_io(Interest::WRITABLE, nothing);
    }

    /// A packet that has left, behind the back of `socket`, is what tells it that there is room again.
    async fn has_room(socket: &Bursts, to: &Bursts) {
        let address = to.local_addr().expect("bound").into();
        let raw = socket2::SockRef::from(&socket.io);
        raw.send_to(&[u8::MAX; PACKET], &address).expect("sent");
        socket.io.writable().await.expect("a socket");
    }

    /// What waits in `socket`, in bytes.
    fn waiting(socket: &Bursts) -> usize {
        socket.joining.as_ref().expect("joins").burst().bytes.len()
    }

    /// Packets whose bytes are their number.
    fn contents(numbers: std::ops::Range<u8>) -> Vec<u8> {
        numbers.flat_map(|number| [number; PACKET]).collect()
    }

    fn transmit<'a>(to: &Bursts, contents: &'a [u8], segments: Option<usize>) -> Transmit<'a> {
        Transmit {
            destination: to.local_addr().expect("bound"),
            ecn: None,
            contents,
            segment_size: segments,
            src_ip: None,
        }
    }

    /// The next packets' sizes and first bytes.
    async fn receive(socket: &Bursts, packets: usize) -> Vec<(usize, u8)> {
        let mut buffers = vec![vec![0; 65536]; 8];
        let mut received = Vec::new();
        while received.len() < packets {
            let mut meta = vec![RecvMeta::default(); buffers.len()];
            let count = {
                let mut slices: Vec<_> = buffers.iter_mut().map(|b| IoSliceMut::new(b)).collect();
                std::future::poll_fn(|cx| socket.poll_recv(cx, &mut slices, &mut meta))
                    .await
                    .expect("a socket")
            };
            for (buffer, meta) in buffers.iter().zip(&meta).take(count) {
                let packets = buffer[..meta.len].chunks(meta.stride);
                received.extend(packets.map(|packet| (packet.len(), packet[0])));
            }
        }
        received
    }

    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().expect("a runtime")
    }

    /// Lets `socket`, which can be written to when this returns, join as much as there is room for.
    async fn is_fast(socket: &Bursts) {
        socket.io.writable().await.expect("a socket");
        let mut burst = socket.joining.as_ref().expect("joins").burst();
        burst.pace.most = MAX_BURST_BYTES;
        burst.pace.since = Instant::now() + Duration::from_secs(3600);
    }

    #[test]
    fn packets_keep_their_order_whether_joined_or_not() {
        runtime().block_on(async {
            let (from, to) = (socket(true), socket(false));
            is_fast(&from).await;
            let send = |range, segment| from.try_send(&transmit(&to, &contents(range), segment));
            send(0..10, Some(PACKET)).expect("room");
            send(10..20, Some(PACKET)).expect("room");
            assert_eq!(waiting(&from), 20 * PACKET, "what may be joined is");
            // One of another size cannot be, and must not overtake.
            from.try_send(&transmit(&to, &[20; 70], None))
                .expect("room");
            send(21..24, Some(PACKET)).expect("room");
            let received = receive(&to, 24).await;
            let expected: Vec<_> = (0..24)
                .map(|number| (if number == 20 { 70 } else { PACKET }, number))
                .collect();
            assert_eq!(received, expected);
        });
    }

    #[test]
    fn a_burst_is_sent_when_it_is_full_and_when_nothing_follows() {
        runtime().block_on(async {
            let (from, to) = (socket(true), socket(false));
            is_fast(&from).await;
            for start in [0, 40, 80] {
                let contents = contents(start..start + 40);
                let sent = from.try_send(&transmit(&to, &contents, Some(PACKET)));
                sent.expect("room");
            }
            let received = receive(&to, 120).await;
            assert!(received.iter().map(|(_, number)| *number).eq(0..120));
        });
    }

    #[test]
    fn a_burst_is_filled_with_the_first_packets_of_what_follows() {
        runtime().block_on(async {
            let (from, to) = (socket(true), socket(false));
            is_fast(&from).await;
            let send = |range| from.try_send(&transmit(&to, &contents(range), Some(PACKET)));
            let room = (MAX_BURST_BYTES / PACKET).min(from.state.max_gso_segments());
            let room = u8::try_from(room).expect("65 packets");
            send(0..room - 3).expect("room");
            send(room - 3..room + 7).expect("room");
            assert_eq!(waiting(&from), 7 * PACKET, "three filled the first send");
            let received = receive(&to, usize::from(room) + 7).await;
            assert!(received.iter().map(|(_, number)| *number).eq(0..room + 7));
        });
    }

    #[test]
    fn a_short_packet_ends_a_burst() {
        runtime().block_on(async {
            let (from, to) = (socket(true), socket(false));
            is_fast(&from).await;
            let mut several = contents(0..3);
            several.extend([3; 40]);
            let one = [4; 50];
            let send = |contents: &[u8], size| from.try_send(&transmit(&to, contents, size));
            send(&contents(0..3), Some(PACKET)).expect("room");
            send(&several, Some(PACKET)).expect("room");
            assert_eq!(waiting(&from), 0, "nothing may follow a short one");
            send(&contents(0..3), Some(PACKET)).expect("room");
            send(&one, None).expect("room");
            assert_eq!(waiting(&from), 0, "nor one that was alone");
            let received = receive(&to, 11).await;
            let numbers: Vec<_> = received.iter().map(|(_, number)| *number).collect();
            assert_eq!(numbers, [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 4]);
            assert_eq!([received[6].0, received[10].0], [40, 50]);
        });
    }

    #[test]
    fn what_is_refused_is_refused_whole() {
        runtime().block_on(async {
            let (from, to) = (socket(true), socket(false));
            is_fast(&from).await;
            let room = (MAX_BURST_BYTES / PACKET).min(from.state.max_gso_segments());
            let room = u8::try_from(room).expect("65 packets");
            let send = |range| from.try_send(&transmit(&to, &contents(range), Some(PACKET)));
            send(0..room - 3).expect("room");
            is_full(&from);
            let refused = send(room - 3..room + 7).expect_err("no room");
            assert_eq!(refused.kind(), ErrorKind::WouldBlock);
            assert_eq!(waiting(&from), usize::from(room - 3) * PACKET);
            has_room(&from, &to).await;
            // As quinn does, it is all offered again.
            send(room - 3..room + 7).expect("room");
            let received = receive(&to, usize::from(room) + 8).await;
            let numbers = received.iter().map(|(_, number)| *number);
            assert!(numbers.filter(|number| *number != u8::MAX).eq(0..room + 7));
        });
    }

    #[test]
    fn a_slow_path_gets_no_more_at_a_time_than_quinn_sends() {
        let now = Instant::now();
        let mut pace = Pace {
            since: now,
            sent: 0,
            most: 0,
        };
        // 100 MB/s for a millisecond, then 1 GB/s for one.
        pace.note(100_000, now + Duration::from_millis(1));
        assert_eq!(pace.most, 10_000);
        pace.note(1_000_000, now + Duration::from_millis(2));
        assert_eq!(pace.most, MAX_BURST_BYTES);
    }

    /// A receive that did not fill its buffers is not repeated; what comes later must wake the receiver all the same.
    #[test]
    fn no_packet_is_overlooked() {
        runtime().block_on(async {
            let to = socket(false);
            let address = to.local_addr().expect("bound");
            let heard = Arc::new(AtomicBool::new(false));
            let all_heard = Arc::clone(&heard);
            let sender = std::thread::spawn(move || {
                let from = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
                // Now many at a time, now one after the other: those come while the receiver looks, these while it waits.
                for number in 0_u64.. {
                    if all_heard.load(Ordering::Relaxed) {
                        break;
                    }
                    from.send_to(&number.to_le_bytes(), address).expect("sent");
                    if number / 512 % 2 == 0 {
                        std::thread::sleep(Duration::from_micros(20));
                    }
                }
            });
            let deadline = Duration::from_secs(60);
            let receiving = receive(&to, 10_000);
            let received = tokio::time::timeout(deadline, receiving).await;
            heard.store(true, Ordering::Relaxed);
            sender.join().expect("it sends");
            assert!(received.is_ok_and(|packets| packets.len() >= 10_000));
        });
    }
}
