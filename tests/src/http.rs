//! The little of HTTP that a client with one connection needs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// How long an answer may take.
const SILENCE: Duration = Duration::from_secs(60);

/// A connection that is opened once and never again.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Connects.
    pub fn open(server: SocketAddrV4) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server.into(), SILENCE)?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Asks for `path`.
    pub fn ask(&mut self, path: &str) -> Result<()> {
        let request = format!("GET /{path} HTTP/1.1\r\nHost: service\r\n\r\n");
        let stream = self.stream.get_mut();
        stream.write_all(request.as_bytes()).context("asking")
    }

    /// Reads the head of the answer, which must be a success, and returns the length of its body in bytes.
    pub fn head(&mut self) -> Result<usize> {
        let mut length = None;
        for number in 0.. {
            let mut line = String::new();
            ensure!(self.stream.read_line(&mut line)? > 0, "the server hung up");
            let line = line.trim_end().to_ascii_lowercase();
            ensure!(number > 0 || line == "http/1.1 200 ok", "{line:?}");
            ensure!(line != "connection: close", "the connection ends");
            if let Some(value) = line.strip_prefix("content-length:") {
                length = Some(value.trim().parse()?);
            }
            if line.is_empty() {
                break;
            }
        }
        length.context("no length")
    }

    /// Reads the next `length` bytes of a body.
    pub fn body(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).context("the body")?;
        Ok(body)
    }
}
