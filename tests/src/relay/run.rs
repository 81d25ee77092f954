//! The relay at work: one thread, every packet at its time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;

use super::fate::flip;
use super::flow::{Inlet, Port};
use super::{Fate, Faults, Lane, Outages, Relay, RelayCounters, RelayPlan};

/// The longest UDP packet.
const PACKET_BYTES: usize = 65_536;
/// Packets taken from one socket before others have their turn.
const BATCH: usize = 64;
/// Packets that wait for their time; more are lost, as in any queue.
const MAX_WAITING: usize = 100_000;
/// The relay looks at its clock at least this often.
const TICK: Duration = Duration::from_millis(5);

/// Relays until it is killed.
pub fn run(plan: &RelayPlan, counters: &'static RelayCounters) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Relay::GO_DARK);
    signals.thread_block().context("cannot block a signal")?;
    let orders = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .context("cannot wait for signals")?;
    let mut forwarder = Forwarder {
        ports: plan
            .ports
            .iter()
            .map(|(listen, target)| Port::bind(*listen, *target))
            .collect::<std::io::Result<_>>()
            .context("cannot bind a port")?,
        faults: plan.faults,
        outages: Outages::new(&plan.darkness.stretches_ms),
        dark_port: plan.darkness.port,
        told_at: None,
        numbers: BTreeMap::new(),
        waiting: BinaryHeap::new(),
        order: 0,
        counters,
    };
    println!("ready");
    loop {
        for (port, inlet) in forwarder.wait(&orders)? {
            forwarder.take_in(port, inlet)?;
        }
        while let Ok(Some(_)) = orders.read_signal() {
            forwarder.told_at.get_or_insert_with(Instant::now);
        }
        forwarder.send_due()?;
    }
}

struct Forwarder {
    ports: Vec<Port>,
    faults: Faults,
    outages: Outages,
    /// The only port that goes dark.
    dark_port: Option<usize>,
    /// When the outages began.
    told_at: Option<Instant>,
    /// Packets so far on each lane.
    numbers: BTreeMap<Lane, u64>,
    waiting: BinaryHeap<Reverse<Parcel>>,
    /// Keeps packets that are due at the same time in order.
    order: u64,
    counters: &'static RelayCounters,
}

/// A packet that waits for its time.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Parcel {
    due: Instant,
    order: u64,
    lane: Lane,
    client: u64,
    packet: Vec<u8>,
}

impl Forwarder {
    /// Waits until something can be read or is due; returns what can be read.
    fn wait(&self, orders: &SignalFd) -> Result<Vec<(usize, Inlet)>> {
        let mut names = Vec::new();
        let mut sockets = vec![PollFd::new(orders.as_fd(), PollFlags::POLLIN)];
        for (index, port) in self.ports.iter().enumerate() {
            for (inlet, socket) in port.inlets() {
                names.push((index, inlet));
                sockets.push(PollFd::new(socket, PollFlags::POLLIN));
            }
        }
        let due = self
            .waiting
            .peek()
            .map(|Reverse(first)| first.due.saturating_duration_since(Instant::now()));
        let timeout = TimeSpec::from_duration(due.unwrap_or(TICK).min(TICK));
        match ppoll(&mut sockets, Some(timeout), None) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for packets"),
        }
        let readable = sockets[1..].iter().map(|socket| socket.any() == Some(true));
        let pairs = names.into_iter().zip(readable);
        Ok(pairs
            .filter_map(|(name, ready)| ready.then_some(name))
            .collect())
    }

    fn take_in(&mut self, port: usize, inlet: Inlet) -> Result<()> {
        let mut buffer = vec![0; PACKET_BYTES];
        for _ in 0..BATCH {
            let Some((length, client)) = self.ports[port]
                .receive(inlet, &mut buffer)
                .context("cannot receive")?
            else {
                break;
            };
            let lane = Lane {
                port,
                forth: inlet == Inlet::Listener,
            };
            self.pass(lane, client, &buffer[..length]);
        }
        Ok(())
    }

    /// Decides what becomes of a packet.
    fn pass(&mut self, lane: Lane, client: u64, packet: &[u8]) {
        if self.dark_port.is_none_or(|port| port == lane.port) && self.is_dark() {
            count(&self.counters.swallowed);
            return;
        }
        let number = self.numbers.entry(lane).or_default();
        *number += 1;
        let fate = Fate::draw(&self.faults, lane, *number);
        if fate.copies == 0 || self.waiting.len() >= MAX_WAITING {
            count(&self.counters.dropped);
            return;
        }
        let mut packet = packet.to_vec();
        if let Some(bit) = fate.corrupt {
            flip(&mut packet, bit);
            count(&self.counters.corrupted);
        }
        if fate.reordered {
            count(&self.counters.reordered);
        }
        if fate.copies > 1 {
            count(&self.counters.duplicated);
        }
        for _ in 0..fate.copies {
            self.order += 1;
            self.waiting.push(Reverse(Parcel {
                due: Instant::now() + fate.delay,
                order: self.order,
                lane,
                client,
                packet: packet.clone(),
            }));
        }
    }

    fn is_dark(&self) -> bool {
        let since = self.told_at.map(|told_at| told_at.elapsed());
        if let Some(since) = since {
            let over = self.outages.over(since);
            self.counters.outages.store(over, Ordering::Relaxed);
        }
        since.is_some_and(|since| self.outages.is_dark(since))
    }

    fn send_due(&mut self) -> Result<()> {
        let now = Instant::now();
        while self
            .waiting
            .peek()
            .is_some_and(|Reverse(first)| first.due <= now)
        {
            let Some(Reverse(parcel)) = self.waiting.pop() else {
                break;
            };
            let port = &mut self.ports[parcel.lane.port];
            port.send(parcel.lane, parcel.client, &parcel.packet);
            count(&self.counters.passed);
            let rebound = parcel.lane.forth
                && port
                    .rebind(parcel.client, self.faults.rebind_every)
                    .context("cannot bind another port")?;
            if rebound {
                count(&self.counters.rebound);
            }
        }
        Ok(())
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
