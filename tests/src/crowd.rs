//! A crowd of clients of one server that speaks redis' protocol: each keeps one connection, and checks every reply.

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::namespace;
use crate::random::Random;
use crate::resp::{Connection, Reply};
use crate::rounds::{Felt, Rounds};
use crate::wait::{wait_for, wait_until};

/// How long a reply may take before the connection counts as dead.
const SILENCE: Duration = Duration::from_secs(60);
/// Bytes of the longest value of a crowd.
const VALUE_BYTES: usize = 6000;
/// GETs whose replies nobody reads for a while: far more bytes than all buffers on the way hold.
const UNREAD_REPLIES: usize = 48;
/// Bytes of each of these replies.
const LARGE_VALUE_BYTES: usize = 400_000;

/// Many connections that are always busy.
#[derive(Debug)]
pub struct Crowd {
    thread: JoinHandle<Result<CrowdReport>>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    rounds: AtomicU64,
}

/// What the crowd saw.
#[derive(Debug, Clone, Copy)]
pub struct CrowdReport {
    /// Replies, each as it had to be.
    pub replies: u64,
    /// How long they waited.
    pub felt: Felt,
}

impl Crowd {
    /// Opens `connections` connections from the network namespace `from` and keeps all of them busy.
    pub fn start(from: &str, server: SocketAddrV4, connections: usize, seed: u64) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (from, its) = (from.to_owned(), Arc::clone(&shared));
        let thread = std::thread::spawn(move || {
            namespace::enter(&from)?;
            let mut members: Vec<Member> = (0..connections)
                .map(|number| Member::open(server, number))
                .collect::<Result<_>>()?;
            run(&mut members, &mut Random::new(seed), &its)
        });
        let crowd = Self { thread, shared };
        crowd.wait_for_rounds(3)?;
        Ok(crowd)
    }

    /// Waits until every connection has been answered `more` times again.
    pub fn wait_for_rounds(&self, more: u64) -> Result<()> {
        let rounds = || self.shared.rounds.load(Ordering::Relaxed);
        let wanted = rounds() + more;
        wait_until(2 * SILENCE, "the crowd to be answered", || {
            rounds() >= wanted || self.thread.is_finished()
        })?;
        ensure!(rounds() >= wanted, "a client of the crowd has failed");
        Ok(())
    }

    /// Ends it and returns what it saw; the first client's error if there was one.
    pub fn end(self) -> Result<CrowdReport> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the crowd panicked"))?
    }
}

struct Member {
    connection: Connection,
    key: String,
    value: Vec<u8>,
}

impl Member {
    fn open(server: SocketAddrV4, number: usize) -> Result<Self> {
        Ok(Self {
            connection: open(server)?,
            key: format!("crowd-{number}"),
            value: Vec::new(),
        })
    }

    fn ask(&mut self, value: Vec<u8>) -> Result<()> {
        self.value = value;
        let key = self.key.as_bytes();
        self.connection.queue(&[b"SET", key, &self.value]);
        self.connection.queue(&[b"GET", key]);
        self.connection.flush()
    }

    fn check(&mut self) -> Result<()> {
        let set = self.connection.reply()?;
        ensure!(set == Reply::Status("OK".into()), "SET: {set:?}");
        let got = self.connection.reply()?;
        ensure!(got == Reply::Bulk(self.value.clone()), "wrong {}", self.key);
        Ok(())
    }
}

fn open(server: SocketAddrV4) -> Result<Connection> {
    wait_for(Duration::from_secs(60), "the server to listen", || {
        Connection::open(server, SILENCE).ok()
    })
}

fn run(members: &mut [Member], random: &mut Random, shared: &Shared) -> Result<CrowdReport> {
    let (mut replies, mut rounds) = (0, Rounds::default());
    while !shared.stop.load(Ordering::Relaxed) {
        rounds.begin();
        let mut asked = Vec::new();
        for member in &mut *members {
            let value = value(random, VALUE_BYTES);
            asked.push(Instant::now());
            member.ask(value).with_context(|| member.key.clone())?;
        }
        for (member, asked) in members.iter_mut().zip(asked) {
            member.check().with_context(|| member.key.clone())?;
            rounds.answered(asked, Instant::now());
            replies += 2;
        }
        shared.rounds.fetch_add(1, Ordering::Relaxed);
    }
    Ok(CrowdReport {
        replies,
        felt: rounds.felt(),
    })
}

fn value(random: &mut Random, longest: usize) -> Vec<u8> {
    let length = 1 + random.index(longest);
    let start = random.index(256);
    (0..length)
        .map(|i| (start + i * 7 + i / 251) as u8)
        .collect()
}

/// Connections that are in the middle of something: one whose many replies nobody reads, so that all buffers on the
/// way are full, and one that has sent half a request.
#[derive(Debug)]
pub struct Halfway {
    unread: Connection,
    large: Vec<u8>,
    half: Connection,
    rest: Vec<u8>,
}

impl Halfway {
    /// Opens them from the network namespace `from`, one behind the other on a thread of its own.
    pub fn start(from: &str, server: SocketAddrV4, seed: u64) -> Result<Self> {
        let from = from.to_owned();
        let thread = std::thread::spawn(move || {
            namespace::enter(&from)?;
            Self::open(server, &mut Random::new(seed))
        });
        thread.join().map_err(|_| anyhow!("panicked"))?
    }

    fn open(server: SocketAddrV4, random: &mut Random) -> Result<Self> {
        let mut unread = open(server)?;
        let large: Vec<u8> = (0..LARGE_VALUE_BYTES)
            .map(|_| random.index(256) as u8)
            .collect();
        let set = unread.call(&[b"SET", b"large", &large])?;
        ensure!(set == Reply::Status("OK".into()), "{set:?}");
        for _ in 0..UNREAD_REPLIES {
            unread.queue(&[b"GET", b"large"]);
        }
        unread.flush()?;
        let mut half = open(server)?;
        half.queue(&[b"SET", b"half", &large]);
        let rest = half.send_half()?;
        Ok(Self {
            unread,
            large,
            half,
            rest,
        })
    }

    /// Reads every reply and sends the other half.
    pub fn finish(mut self) -> Result<()> {
        for number in 0..UNREAD_REPLIES {
            let reply = self.unread.reply()?;
            let is_right = reply == Reply::Bulk(self.large.clone());
            ensure!(is_right, "the unread reply {number} is wrong");
        }
        self.half.send(&self.rest)?;
        let set = self.half.reply()?;
        ensure!(set == Reply::Status("OK".into()), "{set:?}");
        let got = self.half.call(&[b"GET", b"half"])?;
        ensure!(got == Reply::Bulk(self.large), "the halves do not fit");
        Ok(())
    }
}
