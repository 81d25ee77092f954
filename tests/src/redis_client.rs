//! The client that must not notice: one connection, GET and SET all the time, every reply checked.

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;

use crate::client_times::ClientTimes;
use crate::dataset::Dataset;
use crate::namespace;
use crate::random::Random;
use crate::resp::{Connection, Reply};
use crate::wait::{wait_for, wait_until};

/// How long a reply may take before the connection counts as dead.
const SILENCE: Duration = Duration::from_secs(60);
/// Commands sent before replies are read, when the order of things does not matter.
const PIPELINE: usize = 512;

/// What the client is to do.
#[derive(Debug, Clone, Copy)]
pub struct ClientPlan {
    /// Redis holds at least this much memory after loading.
    pub mib: u64,
    /// The seed of the data and of the order of commands.
    pub seed: u64,
    /// Commands per second; 0 for as many as possible.
    pub rate: u32,
}

/// What the client saw.
#[derive(Debug, Clone, Serialize)]
pub struct ClientReport {
    /// Records redis holds, each compared byte for byte at the end.
    pub keys: usize,
    /// SETs done while the client ran.
    pub sets: u64,
    /// GETs done while the client ran, each compared.
    pub gets: u64,
    /// Bytes of all values.
    pub value_bytes: u64,
    /// When what happened.
    pub times: ClientTimes,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    forget: AtomicBool,
    replies: AtomicU64,
}

/// A running client.
#[derive(Debug)]
pub struct RedisClient {
    thread: JoinHandle<Result<ClientReport>>,
    shared: Arc<Shared>,
}

impl RedisClient {
    /// Connects from the network namespace `from`, fills redis and goes on with GET and SET.
    ///
    /// Returns as soon as redis is filled and the first commands have been answered.
    pub fn start(from: &str, redis: SocketAddrV4, plan: ClientPlan) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (loaded, is_loaded) = mpsc::channel();
        let from = from.to_owned();
        let its_shared = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            namespace::enter(&from)?;
            let mut session = Session::open(redis, plan)?;
            session.load()?;
            // The starter may have given up by now; the stop flag says so.
            let _ = loaded.send(());
            session.run(&its_shared)?;
            session.verify_all()
        });
        let client = Self { thread, shared };
        if is_loaded.recv().is_err() {
            return Err(client
                .end()
                .err()
                .unwrap_or_else(|| anyhow!("the client ended early")));
        }
        client.wait_for_replies(100)?;
        Ok(client)
    }

    /// Replies so far.
    pub fn replies(&self) -> u64 {
        self.shared.replies.load(Ordering::Relaxed)
    }

    /// Waits until `more` further commands have been answered.
    pub fn wait_for_replies(&self, more: u64) -> Result<()> {
        let wanted = self.replies() + more;
        wait_until(SILENCE, "the client's commands to be answered", || {
            self.replies() >= wanted || self.thread.is_finished()
        })?;
        ensure!(
            self.replies() >= wanted,
            "the client has ended; its report says why"
        );
        Ok(())
    }

    /// Forgets when replies came up to now: making a machine ready for a move may hold the client up.
    pub fn forget_times(&self) -> Result<()> {
        self.shared.forget.store(true, Ordering::Relaxed);
        self.wait_for_replies(2)
    }

    /// Stops the commands, compares every key and returns what was seen.
    pub fn end(self) -> Result<ClientReport> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the client panicked"))?
    }
}

/// The connection and what redis must hold.
struct Session {
    connection: Connection,
    dataset: Dataset,
    plan: ClientPlan,
    random: Random,
    versions: Vec<u32>,
    expected: Vec<u8>,
    times: ClientTimes,
    gets: u64,
    sets: u64,
    value_bytes: u64,
}

impl Session {
    fn open(redis: SocketAddrV4, plan: ClientPlan) -> Result<Self> {
        // Redis was started a moment ago.
        let connection = wait_for(Duration::from_secs(10), "redis to listen", || {
            Connection::open(redis, SILENCE).ok()
        })?;
        Ok(Self {
            connection,
            dataset: Dataset::new(plan.seed),
            plan,
            random: Random::new(!plan.seed),
            versions: Vec::new(),
            expected: Vec::new(),
            times: ClientTimes::start(),
            gets: 0,
            sets: 0,
            value_bytes: 0,
        })
    }

    fn load(&mut self) -> Result<()> {
        while self.used_memory()? < self.plan.mib << 20 {
            for _ in 0..4 {
                self.load_batch()?;
            }
        }
        Ok(())
    }

    fn load_batch(&mut self) -> Result<()> {
        for _ in 0..PIPELINE {
            let number = self.versions.len();
            self.dataset.value(number, 0, &mut self.expected);
            self.connection
                .queue(&[b"SET", self.dataset.key(number).as_bytes(), &self.expected]);
            self.versions.push(0);
        }
        self.connection.flush()?;
        (0..PIPELINE).try_for_each(|_| self.expect_ok())
    }

    fn used_memory(&mut self) -> Result<u64> {
        let Reply::Bulk(info) = self.connection.call(&[b"INFO", b"memory"])? else {
            anyhow::bail!("INFO is no text")
        };
        let info = String::from_utf8_lossy(&info);
        let line = info
            .lines()
            .find_map(|line| line.strip_prefix("used_memory:"))
            .context("no used_memory in INFO")?;
        line.trim().parse().context("used_memory is no number")
    }

    fn run(&mut self, shared: &Shared) -> Result<()> {
        self.times = ClientTimes::start();
        let pause = (self.plan.rate > 0).then(|| Duration::from_secs(1) / self.plan.rate);
        let mut due = Instant::now();
        while !shared.stop.load(Ordering::Relaxed) {
            if shared.forget.swap(false, Ordering::Relaxed) {
                self.times = ClientTimes::start();
            }
            let sent = Instant::now();
            self.one_command().with_context(|| {
                format!(
                    "{:.3} s after the client's start",
                    sent.duration_since(self.times.started()).as_secs_f64()
                )
            })?;
            self.times.note(sent, Instant::now());
            shared.replies.fetch_add(1, Ordering::Relaxed);
            if let Some(pause) = pause {
                // Commands missed during a gap are not made up for: that would hide how the service recovers.
                due = (due + pause).max(Instant::now());
                std::thread::sleep(due - Instant::now());
            }
        }
        Ok(())
    }

    fn one_command(&mut self) -> Result<()> {
        let number = self.random.index(self.versions.len());
        if self.random.below(10) < 3 {
            self.set(number)
        } else {
            self.get(number)
        }
    }

    fn set(&mut self, number: usize) -> Result<()> {
        let version = self.versions[number] + 1;
        self.dataset.value(number, version, &mut self.expected);
        self.connection
            .queue(&[b"SET", self.dataset.key(number).as_bytes(), &self.expected]);
        self.connection.flush()?;
        self.expect_ok()?;
        self.versions[number] = version;
        self.sets += 1;
        Ok(())
    }

    fn get(&mut self, number: usize) -> Result<()> {
        self.connection
            .queue(&[b"GET", self.dataset.key(number).as_bytes()]);
        self.connection.flush()?;
        self.gets += 1;
        self.compare(number)
    }

    fn expect_ok(&mut self) -> Result<()> {
        let reply = self.connection.reply()?;
        ensure!(
            reply == Reply::Status("OK".to_owned()),
            "redis answered a SET with {reply:?}"
        );
        Ok(())
    }

    fn compare(&mut self, number: usize) -> Result<()> {
        let reply = self.connection.reply()?;
        self.dataset
            .value(number, self.versions[number], &mut self.expected);
        let Reply::Bulk(value) = reply else {
            anyhow::bail!("{} is {reply:?}", self.dataset.key(number))
        };
        self.value_bytes += value.len() as u64;
        if value != self.expected {
            let at = value
                .iter()
                .zip(&self.expected)
                .take_while(|(got, wanted)| got == wanted)
                .count();
            anyhow::bail!(
                "{} (version {}) differs at byte {at} of {}: got {:?}",
                self.dataset.key(number),
                self.versions[number],
                self.expected.len(),
                String::from_utf8_lossy(&value[at..value.len().min(at + 64)])
            );
        }
        Ok(())
    }

    fn verify_all(mut self) -> Result<ClientReport> {
        let keys = self.versions.len();
        let count = self.connection.call(&[b"DBSIZE"])?;
        ensure!(
            count == Reply::Integer(keys as i64),
            "redis holds {count:?} keys instead of {keys}"
        );
        self.value_bytes = 0;
        for start in (0..keys).step_by(PIPELINE) {
            let batch = start..keys.min(start + PIPELINE);
            for number in batch.clone() {
                self.connection
                    .queue(&[b"GET", self.dataset.key(number).as_bytes()]);
            }
            self.connection.flush()?;
            batch
                .into_iter()
                .try_for_each(|number| self.compare(number))?;
        }
        Ok(ClientReport {
            keys,
            sets: self.sets,
            gets: self.gets,
            value_bytes: self.value_bytes,
            times: self.times,
        })
    }
}
