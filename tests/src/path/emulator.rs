//! The emulator's loop: packets from one device wait for their time and go to the other.
//!
//! One thread, no system call for a packet but its `read` and its `write`. The wait ends to the microsecond: the
//! kernel's slack for timers is turned off, and the thread runs ahead of those that compete for the CPU, for a real
//! path does not become slower when the hosts are busy.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use std::os::fd::AsFd;

use crate::shared_file::Counters;

use super::link::{Fate, Link};
use super::spec::PathSpec;
use super::tun::Tun;

/// Packets taken from one device before the other's turn.
const BATCH: usize = 64;
/// A packet delivered this much after its time counts as late.
const LATE: Duration = Duration::from_millis(1);
/// Real-time level: above that of the programs under test.
const LEVEL: libc::c_int = 3;

/// What one direction carried, shared with whoever measures.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Traffic {
    /// Packets that came in.
    pub packets: AtomicU64,
    /// Their bytes.
    pub bytes: AtomicU64,
    /// Of these, lost on purpose.
    pub lost: AtomicU64,
    /// Of these, dropped because the queue was full.
    pub overflowed: AtomicU64,
    /// Of these, delivered more than a millisecond after their time.
    pub late: AtomicU64,
    /// The most a packet was delivered after its time.
    pub latest_ns: AtomicU64,
}

/// Both directions.
#[derive(Debug, Default)]
#[repr(C)]
pub struct PathCounters {
    /// From the source to the destination.
    pub forth: Traffic,
    /// From the destination to the source.
    pub back: Traffic,
}

// SAFETY: nothing but atomic integers.
unsafe impl Counters for PathCounters {}

/// One direction: where packets come from and those that are on their way.
struct Direction<'a> {
    link: Link,
    traffic: &'a Traffic,
    flying: VecDeque<Flying>,
}

/// A packet and when it arrives. The buffer is longer than the packet, so that it can be used again as it is.
struct Flying {
    due: Duration,
    bytes: usize,
    buffer: Vec<u8>,
}

/// Carries packets between the devices until the process is killed.
pub fn run(
    mut source: Tun,
    mut destination: Tun,
    spec: &PathSpec,
    counters: &PathCounters,
) -> Result<()> {
    become_punctual();
    let mut forth = Direction::new(spec, spec.seed, &counters.forth);
    let mut back = Direction::new(spec, !spec.seed, &counters.back);
    let mut spare = Spare {
        buffers: Vec::new(),
        bytes: spec.mtu as usize,
    };
    let clock = Instant::now();
    loop {
        wait(&source, &destination, forth.due(), back.due(), &clock)?;
        forth.take(&mut source, &mut spare, &clock)?;
        back.take(&mut destination, &mut spare, &clock)?;
        forth.deliver(&mut destination, &mut spare, &clock);
        back.deliver(&mut source, &mut spare, &clock);
    }
}

impl<'a> Direction<'a> {
    fn new(spec: &PathSpec, seed: u64, traffic: &'a Traffic) -> Self {
        Self {
            link: Link::new(spec, seed),
            traffic,
            flying: VecDeque::new(),
        }
    }

    fn due(&self) -> Option<Duration> {
        self.flying.front().map(|flying| flying.due)
    }

    /// Takes what waits, up to a batch.
    fn take(&mut self, from: &mut Tun, spare: &mut Spare, clock: &Instant) -> Result<()> {
        for _ in 0..BATCH {
            let mut buffer = spare.take();
            let read = from.read(&mut buffer).context("cannot read a packet")?;
            let unused = match read {
                Some(bytes) => self.admit(buffer, bytes, clock.elapsed()),
                None => Some(buffer),
            };
            spare.buffers.extend(unused);
            if read.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Sends a packet on its way; the buffer comes back when it does not get far.
    fn admit(&mut self, buffer: Vec<u8>, bytes: usize, now: Duration) -> Option<Vec<u8>> {
        let traffic = self.traffic;
        traffic.packets.fetch_add(1, Ordering::Relaxed);
        traffic.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let stopped = match self.link.send(now, bytes) {
            Fate::Arrives(due) => {
                self.flying.push_back(Flying { due, bytes, buffer });
                return None;
            }
            Fate::Overflows => &traffic.overflowed,
            Fate::Lost => &traffic.lost,
        };
        stopped.fetch_add(1, Ordering::Relaxed);
        Some(buffer)
    }

    fn deliver(&mut self, to: &mut Tun, spare: &mut Spare, clock: &Instant) {
        let now = clock.elapsed();
        while self.due().is_some_and(|due| due <= now) {
            let Some(flying) = self.flying.pop_front() else {
                return;
            };
            self.note_delay(now - flying.due);
            // A packet the kernel does not take, as when the device goes down, is a packet lost.
            let _ = to.write(&flying.buffer[..flying.bytes]);
            spare.buffers.push(flying.buffer);
        }
    }

    fn note_delay(&self, delay: Duration) {
        if delay > LATE {
            self.traffic.late.fetch_add(1, Ordering::Relaxed);
        }
        let ns = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        self.traffic.latest_ns.fetch_max(ns, Ordering::Relaxed);
    }
}

/// Buffers that are free.
struct Spare {
    buffers: Vec<Vec<u8>>,
    /// The size of one: a packet is never larger.
    bytes: usize,
}

impl Spare {
    fn take(&mut self) -> Vec<u8> {
        self.buffers.pop().unwrap_or_else(|| vec![0; self.bytes])
    }
}

/// Waits for a packet or until one is due.
fn wait(
    source: &Tun,
    destination: &Tun,
    forth: Option<Duration>,
    back: Option<Duration>,
    clock: &Instant,
) -> Result<()> {
    let due = forth.into_iter().chain(back).min();
    let timeout = due.map(|due| TimeSpec::from_duration(due.saturating_sub(clock.elapsed())));
    let mut fds = [source, destination].map(|tun| PollFd::new(tun.as_fd(), PollFlags::POLLIN));
    match ppoll(&mut fds, timeout, None) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(error).context("cannot wait for packets"),
    }
}

/// Exact timers and precedence; without the privilege for the latter the self-check has to say whether it is enough.
fn become_punctual() {
    // SAFETY: sets a property of this thread.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64) };
    let param = libc::sched_param {
        sched_priority: LEVEL,
    };
    // SAFETY: 0 is the calling thread, and `param` lives across the call.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param) } != 0 {
        eprintln!(
            "path-emulator: no real-time priority: {}",
            io::Error::last_os_error()
        );
    }
}
