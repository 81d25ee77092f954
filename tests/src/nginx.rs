//! A real, unmodified nginx that serves files, and a crowd of its clients that keep their connections.

use std::fs;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::http::Connection;
use crate::namespace;
use crate::process::Process;
use crate::random::Random;
use crate::rig::Rig;
use crate::rounds::{Felt, Rounds};
use crate::wait::{wait_for, wait_until};

/// The port it listens on.
pub const PORT: u16 = 8080;
/// The name of the long file.
pub const LONG_FILE: &str = "long";
/// Bytes of the long file: far more than all buffers on the way hold.
pub const LONG_FILE_BYTES: usize = 48 << 20;
/// Bytes of the longest short file.
const SHORT_FILE_BYTES: usize = 20_000;
/// Short files.
const SHORT_FILES: usize = 32;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// nginx with its files.
#[derive(Debug)]
pub struct Nginx {
    /// Its master process.
    pub process: Process,
    files: Arc<Vec<Vec<u8>>>,
    /// The content of the long file.
    pub long: Vec<u8>,
}

impl Nginx {
    /// Starts it on the source with two workers.
    pub fn start(rig: &Rig, seed: u64) -> Result<Self> {
        let folder = rig.make_folder("nginx")?;
        let mut random = Random::new(seed);
        let mut make = |name: &str, length: usize| -> Result<Vec<u8>> {
            let content: Vec<u8> = (0..length).map(|_| random.index(256) as u8).collect();
            fs::write(folder.join(name), &content)?;
            Ok(content)
        };
        let files = (0..SHORT_FILES)
            .map(|number| {
                make(
                    &format!("short-{number}"),
                    1 + number * SHORT_FILE_BYTES / SHORT_FILES,
                )
            })
            .collect::<Result<_>>()?;
        let long = make(LONG_FILE, LONG_FILE_BYTES)?;
        let path = folder.display();
        // As root, like everything the tests move: without CAP_SYS_RESOURCE CRIU dumps no other user's processes.
        let settings = format!(
            "user root; daemon off; worker_processes 2; pid {path}/pid; error_log /dev/null;\n\
             events {{ worker_connections 1024; }}\n\
             http {{ access_log off; keepalive_timeout 600s; keepalive_requests 1000000; send_timeout 600s;\n\
             client_body_temp_path {path}/body; proxy_temp_path {path}/proxy; fastcgi_temp_path {path}/fastcgi;\n\
             uwsgi_temp_path {path}/uwsgi; scgi_temp_path {path}/scgi;\n\
             server {{ listen {PORT}; root {path}; }} }}\n"
        );
        let settings_file = folder.join("nginx.conf");
        fs::write(&settings_file, settings)?;
        let mut command = rig.source.command("setsid");
        command
            .args(["nginx", "-e", "/dev/null", "-c"])
            .arg(&settings_file);
        Ok(Self {
            process: Process::start_detached("nginx", &mut command)?,
            files: Arc::new(files),
            long,
        })
    }

    /// Opens `connections` connections from the network namespace `from` and keeps all of them busy.
    pub fn crowd(&self, from: &str, server: SocketAddrV4, connections: usize) -> Result<HttpCrowd> {
        let shared = Arc::new(Shared::default());
        let (from, files, its) = (from.to_owned(), self.files.clone(), shared.clone());
        let thread = std::thread::spawn(move || {
            namespace::enter(&from)?;
            run(server, connections, &files, &its)
        });
        let crowd = HttpCrowd { thread, shared };
        crowd.wait_for_rounds(3)?;
        Ok(crowd)
    }
}

/// Many connections that are always busy.
#[derive(Debug)]
pub struct HttpCrowd {
    thread: JoinHandle<Result<HttpReport>>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    rounds: AtomicU64,
}

/// What the crowd saw.
#[derive(Debug, Clone, Copy)]
pub struct HttpReport {
    /// Answers, each as it had to be.
    pub answers: u64,
    /// How long they waited.
    pub felt: Felt,
}

impl HttpCrowd {
    /// Waits until every connection has been answered `more` times again.
    pub fn wait_for_rounds(&self, more: u64) -> Result<()> {
        let rounds = || self.shared.rounds.load(Ordering::Relaxed);
        let wanted = rounds() + more;
        wait_until(2 * PATIENCE, "the crowd to be answered", || {
            rounds() >= wanted || self.thread.is_finished()
        })
    }

    /// Ends it; the first client's error if there was one.
    pub fn end(self) -> Result<HttpReport> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let result = self.thread.join();
        result.map_err(|_| anyhow!("the crowd panicked"))?
    }
}

fn run(
    server: SocketAddrV4,
    connections: usize,
    files: &[Vec<u8>],
    shared: &Shared,
) -> Result<HttpReport> {
    let open = || {
        wait_for(PATIENCE, "nginx to listen", || {
            Connection::open(server).ok()
        })
    };
    let mut members: Vec<Connection> = (0..connections).map(|_| open()).collect::<Result<_>>()?;
    let (mut answers, mut rounds) = (0, Rounds::default());
    for round in 0.. {
        if shared.stop.load(Ordering::Relaxed) {
            break;
        }
        rounds.begin();
        let wanted = |number: usize| (number + round) % files.len();
        let mut asked = Vec::new();
        for (number, member) in members.iter_mut().enumerate() {
            asked.push(Instant::now());
            let done = member.ask(&format!("short-{}", wanted(number)));
            done.with_context(|| format!("connection {number}"))?;
        }
        for (number, (member, asked)) in members.iter_mut().zip(asked).enumerate() {
            let expected = &files[wanted(number)];
            let body = member.head().and_then(|length| member.body(length));
            let body = body.with_context(|| format!("connection {number}"))?;
            ensure!(body == *expected, "connection {number} got a wrong file");
            rounds.answered(asked, Instant::now());
            answers += 1;
        }
        shared.rounds.fetch_add(1, Ordering::Relaxed);
    }
    Ok(HttpReport {
        answers,
        felt: rounds.felt(),
    })
}
