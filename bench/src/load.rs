//! The client that loads redis: one connection, GET and SET all the time, by a chosen distribution, every reply checked.

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use tests::dataset::Dataset;
use tests::namespace;
use tests::pulse::wall_ns;
use tests::random::Random;
use tests::resp::{Connection, Reply};
use tests::wait::{wait_for, wait_until};

use crate::skew::Keys;
use crate::timeline::Timeline;

/// How long a reply may take before the connection counts as dead.
const SILENCE: Duration = Duration::from_secs(120);
/// Commands sent before replies are read, when time does not matter.
const PIPELINE: usize = 512;

/// What the client does.
#[derive(Debug, Clone, Copy)]
pub struct LoadPlan {
    /// Redis holds at least this much memory after loading.
    pub mib: u64,
    /// The seed of the data and of the order of commands.
    pub seed: u64,
    /// Commands per second; 0 for as many as possible.
    pub rate: u32,
    /// Some keys far more often than others.
    pub zipf: bool,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    replies: AtomicU64,
}

/// A running client.
#[derive(Debug)]
pub struct Load {
    thread: JoinHandle<Result<Timeline>>,
    shared: Arc<Shared>,
}

impl Load {
    /// Connects from the network namespace `from`, fills redis, and returns when the first commands were answered.
    pub fn start(from: &str, redis: SocketAddrV4, plan: LoadPlan) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (loaded, is_loaded) = mpsc::channel();
        let (from, its_shared) = (from.to_owned(), Arc::clone(&shared));
        let thread = std::thread::spawn(move || {
            namespace::enter(&from)?;
            let mut session = Session::open(redis, plan)?;
            session.load()?;
            // The starter may have given up by now; the stop flag says so.
            let _ = loaded.send(());
            session.run(&its_shared)?;
            session.verify_all()?;
            Ok(session.timeline)
        });
        let load = Self { thread, shared };
        match is_loaded.recv() {
            Ok(()) => load.wait_for_replies(100).map(|()| load),
            Err(_) => Err(load
                .end()
                .err()
                .unwrap_or_else(|| anyhow!("the client ended early"))),
        }
    }

    /// Waits until `more` further commands have been answered.
    pub fn wait_for_replies(&self, more: u64) -> Result<()> {
        let replies = || self.shared.replies.load(Ordering::Relaxed);
        let wanted = replies() + more;
        wait_until(SILENCE, "the client's commands to be answered", || {
            replies() >= wanted || self.thread.is_finished()
        })
    }

    /// Stops the commands, compares every key and returns how it went.
    pub fn end(self) -> Result<Timeline> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the client panicked"))?
    }
}

struct Session {
    connection: Connection,
    dataset: Dataset,
    plan: LoadPlan,
    versions: Vec<u32>,
    expected: Vec<u8>,
    timeline: Timeline,
}

impl Session {
    fn open(redis: SocketAddrV4, plan: LoadPlan) -> Result<Self> {
        // Redis was started a moment ago.
        let connection = wait_for(Duration::from_secs(10), "redis to listen", || {
            Connection::open(redis, SILENCE).ok()
        })?;
        Ok(Self {
            connection,
            dataset: Dataset::new(plan.seed),
            plan,
            versions: Vec::new(),
            expected: Vec::new(),
            timeline: Timeline::default(),
        })
    }

    fn load(&mut self) -> Result<()> {
        while self.used_memory()? < self.plan.mib << 20 {
            for _ in 0..4 * PIPELINE {
                let number = self.versions.len();
                self.versions.push(0);
                self.queue_set(number, 0);
                if (number + 1).is_multiple_of(PIPELINE) {
                    self.connection.flush()?;
                    (0..PIPELINE).try_for_each(|_| self.expect_ok())?;
                }
            }
        }
        Ok(())
    }

    fn used_memory(&mut self) -> Result<u64> {
        let Reply::Bulk(info) = self.connection.call(&[b"INFO", b"memory"])? else {
            anyhow::bail!("INFO is no text")
        };
        let info = String::from_utf8_lossy(&info);
        let line = info
            .lines()
            .find_map(|line| line.strip_prefix("used_memory:"));
        let line = line.context("no used_memory in INFO")?;
        line.trim().parse().context("used_memory is no number")
    }

    fn run(&mut self, shared: &Shared) -> Result<()> {
        let (keys, seed) = (self.versions.len(), !self.plan.seed);
        let mut keys = if self.plan.zipf {
            Keys::zipf(keys, seed)
        } else {
            Keys::uniform(keys, seed)
        };
        let mut random = Random::new(seed);
        let pause = 1_000_000_000_u64
            .checked_div(u64::from(self.plan.rate))
            .unwrap_or(0);
        let mut due = wall_ns();
        self.timeline = Timeline::default();
        while !shared.stop.load(Ordering::Relaxed) {
            let sent = wall_ns();
            let number = keys.next();
            if random.below(10) < 3 {
                self.set(number)?;
            } else {
                self.get(number)?;
            }
            let answered = wall_ns();
            self.timeline.note(sent, answered);
            shared.replies.fetch_add(1, Ordering::Relaxed);
            // Commands missed during a gap are not made up for: that would hide how the service recovers.
            due = (due + pause).max(answered);
            std::thread::sleep(Duration::from_nanos(due - answered));
        }
        Ok(())
    }

    fn queue_set(&mut self, number: usize, version: u32) {
        self.dataset.value(number, version, &mut self.expected);
        let key = self.dataset.key(number);
        self.connection
            .queue(&[b"SET", key.as_bytes(), &self.expected]);
    }

    fn set(&mut self, number: usize) -> Result<()> {
        self.queue_set(number, self.versions[number] + 1);
        self.connection.flush()?;
        self.expect_ok()?;
        self.versions[number] += 1;
        Ok(())
    }

    fn get(&mut self, number: usize) -> Result<()> {
        let key = self.dataset.key(number);
        self.connection.queue(&[b"GET", key.as_bytes()]);
        self.connection.flush()?;
        self.compare(number)
    }

    fn expect_ok(&mut self) -> Result<()> {
        let reply = self.connection.reply()?;
        let is_ok = reply == Reply::Status("OK".to_owned());
        ensure!(is_ok, "redis answered a SET with {reply:?}");
        Ok(())
    }

    fn compare(&mut self, number: usize) -> Result<()> {
        let reply = self.connection.reply()?;
        let version = self.versions[number];
        self.dataset.value(number, version, &mut self.expected);
        let is_right = matches!(&reply, Reply::Bulk(value) if *value == self.expected);
        ensure!(is_right, "record {number} is not as version {version} was");
        Ok(())
    }

    fn verify_all(&mut self) -> Result<()> {
        let keys = self.versions.len();
        for start in (0..keys).step_by(PIPELINE) {
            let batch = start..keys.min(start + PIPELINE);
            for number in batch.clone() {
                let key = self.dataset.key(number);
                self.connection.queue(&[b"GET", key.as_bytes()]);
            }
            self.connection.flush()?;
            batch
                .into_iter()
                .try_for_each(|number| self.compare(number))?;
        }
        Ok(())
    }
}
