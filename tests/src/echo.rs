//! A server that sends back what it gets, over IPv4 and IPv6, and clients that notice the slightest thing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::host::Host;
use crate::namespace;
use crate::process::Process;
use crate::wait::{wait_for, wait_until};

/// The port it listens on.
pub const PORT: u16 = 7007;
/// How long an answer may take.
const SILENCE: Duration = Duration::from_secs(60);
/// Bytes of a message.
const MESSAGE_BYTES: usize = 64;

const SCRIPT: &str = r#"
import selectors, socket, sys
ready = selectors.DefaultSelector()
listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
ready.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in ready.select():
        if key.fileobj is listener:
            connection, _ = listener.accept()
            ready.register(connection, selectors.EVENT_READ)
            continue
        try:
            data = key.fileobj.recv(4096)
        except ConnectionResetError:
            data = b""
        if data:
            key.fileobj.sendall(data)
        else:
            ready.unregister(key.fileobj)
            key.fileobj.close()
"#;

/// The command line of the server.
pub fn arguments() -> Vec<String> {
    let port = PORT.to_string();
    ["/usr/bin/python3", "-I", "-c", SCRIPT, &port]
        .map(str::to_owned)
        .to_vec()
}

/// Starts the server on `host`, in a session of its own.
pub fn start(host: &Host) -> Result<Process> {
    Process::start_detached("echo", host.command("setsid").args(arguments()))
}

/// What a client does with its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Habit {
    /// Keeps one for ever.
    Keeps,
    /// Makes a new one for every message.
    Reconnects,
}

/// A client that always waits for an answer.
#[derive(Debug)]
pub struct EchoClient {
    thread: JoinHandle<Result<Duration>>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    answers: AtomicU64,
}

impl EchoClient {
    /// Connects from the network namespace `from`, and returns when it has been answered.
    pub fn start(from: &str, server: SocketAddr, habit: Habit) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (from, its) = (from.to_owned(), Arc::clone(&shared));
        let thread = std::thread::spawn(move || {
            namespace::enter(&from)?;
            run(server, habit, &its).with_context(|| format!("{habit:?} at {server}"))
        });
        let client = Self { thread, shared };
        client.wait_for_answers(5)?;
        Ok(client)
    }

    /// Waits for more answers than there are now.
    pub fn wait_for_answers(&self, more: u64) -> Result<()> {
        let answers = || self.shared.answers.load(Ordering::Relaxed);
        let wanted = answers() + more;
        wait_until(2 * SILENCE, "answers", || {
            answers() >= wanted || self.thread.is_finished()
        })
    }

    /// Ends it and returns the longest time it waited for an answer; its error, if it had one.
    pub fn end(self) -> Result<Duration> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let result = self.thread.join();
        result.map_err(|_| anyhow!("the client panicked"))?
    }
}

fn run(server: SocketAddr, habit: Habit, shared: &Shared) -> Result<Duration> {
    let open = || {
        let connection = TcpStream::connect_timeout(&server, SILENCE)?;
        connection.set_read_timeout(Some(SILENCE))?;
        connection.set_nodelay(true)?;
        Ok::<_, std::io::Error>(connection)
    };
    let mut connection = wait_for(SILENCE, "the server to listen", || open().ok())?;
    let mut longest = Duration::ZERO;
    for number in 0_u64.. {
        if shared.stop.load(Ordering::Relaxed) {
            break;
        }
        let asked = Instant::now();
        if habit == Habit::Reconnects && number > 0 {
            connection = open().context("connecting")?;
        }
        let mut message = [0; MESSAGE_BYTES];
        message[..8].copy_from_slice(&number.to_le_bytes());
        connection.write_all(&message).context("asking")?;
        let mut answer = [0; MESSAGE_BYTES];
        connection.read_exact(&mut answer).context("the answer")?;
        ensure!(answer == message, "message {number} came back changed");
        longest = longest.max(asked.elapsed());
        shared.answers.fetch_add(1, Ordering::Relaxed);
        // Leaves the processors to others.
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(longest)
}
