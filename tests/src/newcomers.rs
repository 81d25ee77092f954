//! Clients who come all the time to a server that lets one in after the other: somebody always waits to be accepted.

use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};

use crate::namespace;
use crate::pair::PATIENCE;
use crate::wait::{wait_for, wait_until};

/// Clients at a time.
const CLIENTS: usize = 8;
/// The port of the server.
const PORT: u16 = 7011;
/// Answers each with what it was sent. While it pauses all others wait in its backlog, and they are never through.
const SERVER: &str = r#"
import socket, time
listener = socket.create_server(("0.0.0.0", PORT), backlog=64)
while True:
    connection, _ = listener.accept()
    connection.sendall(connection.recv(100))
    connection.close()
    time.sleep(0.02)
"#;

/// The server's command line.
pub fn server() -> [String; 4] {
    let script = SERVER.replace("PORT", &PORT.to_string());
    ["/usr/bin/python3", "-I", "-c", &script].map(String::from)
}

/// The clients.
#[derive(Debug)]
pub struct Newcomers {
    threads: Vec<JoinHandle<Result<()>>>,
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU32>,
}

impl Newcomers {
    /// Starts them in the network namespace `from`, and waits until all of them were answered.
    pub fn start(from: &str, server: std::net::Ipv4Addr) -> Result<Self> {
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let server = SocketAddrV4::new(server, PORT);
        let client = || {
            let (from, stop, answers) = (from.to_owned(), Arc::clone(&stop), Arc::clone(&answers));
            std::thread::spawn(move || {
                namespace::enter(&from)?;
                come_again_and_again(server, &stop, &answers)
            })
        };
        let newcomers = Self {
            threads: (0..CLIENTS).map(|_| client()).collect(),
            stop,
            answers,
        };
        newcomers.wait_for_answers(2 * CLIENTS as u32)?;
        Ok(newcomers)
    }

    /// Waits until `more` were answered, or one was turned away.
    pub fn wait_for_answers(&self, more: u32) -> Result<()> {
        let answered = || self.answers.load(Ordering::Relaxed);
        let wanted = answered() + more;
        wait_until(PATIENCE, "newcomers to be answered", || {
            answered() >= wanted || self.threads.iter().any(JoinHandle::is_finished)
        })
    }

    /// Ends them; nobody may have been turned away.
    pub fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            let ended = thread.join().map_err(|_| anyhow!("a client panicked"))?;
            ended.context("a client was turned away")?;
        }
        Ok(())
    }
}

fn come_again_and_again(
    server: SocketAddrV4,
    stop: &AtomicBool,
    answers: &AtomicU32,
) -> Result<()> {
    let connect = || TcpStream::connect(server).ok();
    drop(wait_for(PATIENCE, "the server to listen", connect)?);
    while !stop.load(Ordering::Relaxed) {
        let mut connection = TcpStream::connect(server).context("connecting")?;
        connection.set_read_timeout(Some(PATIENCE))?;
        connection.write_all(b"hello")?;
        let mut answer = [0; 5];
        connection.read_exact(&mut answer).context("the answer")?;
        ensure!(&answer == b"hello", "{answer:?}");
        answers.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}
