//! Watches a move from outside: what the path carried when, and what the programs that moved it cost.
//!
//! It knows nothing of who moves, so it treats all alike: every process this one starts on one of the two hosts while it
//! watches belongs to the move, with whatever that process waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Result, anyhow};
use nix::poll::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;
use tests::path::{Bytes, DeviceCounters};
use tests::pulse::wall_ns;
use tests::rig::Rig;

use crate::programs::{self, Program, Side};

/// Milliseconds between two looks.
const PERIOD: u8 = 5;

/// A running watch.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Watched>>,
    cpu_before: f64,
}

/// What was seen.
#[derive(Debug, Clone, Default)]
pub struct Watched {
    /// What the path had carried, and when (`wall_ns`).
    wire: Vec<(u64, Bytes)>,
    programs: Vec<Program>,
    /// Seconds of CPU of everything that was started and has ended.
    pub cpu_s: f64,
}

/// What one host spent.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Seconds of CPU of all programs and their children, in hundredths; a little is missing of programs whose end was
    /// not seen. [`Watched::cpu_s`] is exact, but of both hosts.
    pub cpu_s: f64,
    /// The largest resident set of any one program of ours or of CRIU, at its peak, with those of the processes below it
    /// that run the same program (our keeper and init; CRIU's own forks turn into the workload and do not count).
    pub peak_rss_mib: f64,
}

/// Bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// As the source's device counts them, whatever they are.
    pub wire: f64,
    /// Of memory that arrived: more than on the wire where it is compressed.
    pub memory: f64,
}

impl Watch {
    /// Starts to watch what happens between the hosts of `rig`.
    pub fn start(rig: &Rig) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let sides = [&rig.source, &rig.destination].map(|host| host.namespace().to_owned());
        let known = programs::children();
        let its_stop = Arc::clone(&stop);
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let counters = DeviceCounters::enter(&sides[0])?;
            let mut eyes = Eyes {
                watched: Watched::default(),
                known,
                sides: programs::namespaces(&sides)?,
                counters,
            };
            eyes.look()?;
            // The starter waits for this.
            let _ = ready.send(());
            while !its_stop.load(Ordering::Relaxed) {
                eyes.wait();
                eyes.look()?;
            }
            Ok(eyes.watched)
        });
        // An early end says so when the watch is ended.
        let _ = is_ready.recv();
        Ok(Self {
            stop,
            thread,
            cpu_before: programs::cpu_of_children(),
        })
    }

    /// Stops watching.
    pub fn end(self) -> Result<Watched> {
        self.stop.store(true, Ordering::Relaxed);
        let watched = self.thread.join();
        let mut watched = watched.map_err(|_| anyhow!("the watch panicked"))??;
        watched.cpu_s = programs::cpu_of_children() - self.cpu_before;
        Ok(watched)
    }
}

struct Eyes {
    watched: Watched,
    known: std::collections::HashSet<i32>,
    sides: [u64; 2],
    counters: DeviceCounters,
}

impl Eyes {
    fn look(&mut self) -> Result<()> {
        self.watched.wire.push((wall_ns(), self.counters.read()?));
        for pid in programs::children() {
            if self.known.insert(pid) {
                self.watched.programs.extend(Program::new(pid));
            }
        }
        for program in &mut self.watched.programs {
            program.look(self.sides);
        }
        Ok(())
    }

    /// Until the next look, or until a program ends: it can be looked at for the last time then.
    fn wait(&self) {
        let living = self.watched.programs.iter().filter_map(Program::life);
        let mut fds: Vec<PollFd> = living
            .map(|life| PollFd::new(life.as_fd(), PollFlags::POLLIN))
            .collect();
        // An interrupted wait is a short one.
        let _ = poll(&mut fds, PERIOD);
    }
}

impl Watched {
    /// All that was carried.
    pub fn bytes(&self) -> Bytes {
        match (self.wire.first(), self.wire.last()) {
            (Some(first), Some(last)) => last.1.since(first.1),
            _ => Bytes::default(),
        }
    }

    /// What `side` spent.
    pub fn cost(&self, side: Side) -> Cost {
        let of_side = || {
            self.programs
                .iter()
                .filter(move |one| one.side == Some(side))
        };
        Cost {
            cpu_s: of_side().map(|one| one.cpu_s).sum(),
            peak_rss_mib: of_side()
                .map(|one| one.peak_with_helpers_kib() as f64 / 1024.0)
                .fold(0.0, f64::max),
        }
    }

    /// Programs whose end was not seen in time, so that some of their CPU time is missing.
    pub fn unseen_ends(&self) -> usize {
        let missed = |one: &&Program| one.side.is_some() && !one.was_seen_ending;
        self.programs.iter().filter(missed).count()
    }

    /// How fast it went after `from` (`wall_ns`), when `memory` bytes were moved in all, and `demanded` of them
    /// because somebody waited: those are not part of the rate of memory.
    ///
    /// How many bytes of memory a byte on the wire stands for is taken to be the same for the whole move.
    ///
    /// Only the middle counts, between a tenth and nine tenths of what was sent: neither the start of a connection nor
    /// its end are the rate of the memory.
    pub fn rate(&self, from: u64, memory: u64, demanded: u64) -> Option<Rate> {
        let after: Vec<_> = self.wire.iter().filter(|(at, _)| *at >= from).collect();
        let (first, last) = (after.first()?.1.sent, after.last()?.1.sent);
        let total = last - first;
        let at = |part: f64| {
            let wanted = first + (total as f64 * part) as u64;
            after.iter().find(|(_, bytes)| bytes.sent >= wanted)
        };
        let (low, high) = (at(0.1)?, at(0.9)?);
        let time = high.0.checked_sub(low.0).filter(|time| *time > 0)? as f64 / 1e9;
        let bytes = (high.1.sent - low.1.sent) as f64;
        let wire = bytes / time;
        let pushed = memory.saturating_sub(demanded) as f64;
        Some(Rate {
            wire,
            memory: wire * pushed / self.bytes().sent.max(1) as f64,
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_middle() {
        let wire = |ms: u64, sent| {
            let bytes = Bytes { received: 0, sent };
            (ms * 1_000_000, bytes)
        };
        // A slow start, 800 bytes in 80 ms, a slow end.
        let watched = Watched {
            wire: vec![wire(0, 0), wire(500, 100), wire(580, 900), wire(2000, 1000)],
            ..Watched::default()
        };
        let rate = |memory, demanded| {
            let rate = watched.rate(0, memory, demanded).expect("a rate");
            (rate.wire, rate.memory)
        };
        assert_eq!(rate(1000, 0), (10_000.0, 10_000.0));
        assert_eq!(rate(1000, 500), (10_000.0, 5_000.0));
        // Compressed, a byte on the wire is two and a half of memory.
        assert_eq!(rate(2500, 0), (10_000.0, 25_000.0));
        assert_eq!(watched.rate(3_000_000_000, 1000, 0), None);
        assert_eq!(watched.bytes().sent, 1000);
    }
}
