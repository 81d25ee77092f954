//! The little of redis' protocol the client needs, on one TCP connection.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// A reply longer than any record of ours is not from our redis.
const MAX_REPLY_BYTES: usize = 1 << 20;

/// One reply.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// `+OK` and the like.
    Status(String),
    /// A number.
    Integer(i64),
    /// A value.
    Bulk(Vec<u8>),
    /// No such key.
    Nil,
}

/// A connection that is opened once and never again.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
    request: Vec<u8>,
}

impl Connection {
    /// Connects; `silence` is how long a reply may take before it is an error.
    pub fn open(address: SocketAddrV4, silence: Duration) -> Result<Self> {
        let writer = TcpStream::connect(address)
            .with_context(|| format!("cannot connect to redis at {address}"))?;
        writer.set_nodelay(true)?;
        writer.set_read_timeout(Some(silence))?;
        let reader = BufReader::with_capacity(256 << 10, writer.try_clone()?);
        Ok(Self {
            reader,
            writer,
            request: Vec::new(),
        })
    }

    /// Appends a command to what [`Connection::flush`] will send.
    pub fn queue(&mut self, words: &[&[u8]]) {
        push_header(b'*', words.len(), &mut self.request);
        for word in words {
            push_header(b'$', word.len(), &mut self.request);
            self.request.extend_from_slice(word);
            self.request.extend_from_slice(b"\r\n");
        }
    }

    /// Sends everything queued.
    pub fn flush(&mut self) -> Result<()> {
        self.writer
            .write_all(&self.request)
            .context("the connection to redis broke while sending")?;
        self.request.clear();
        Ok(())
    }

    /// Sends the first half of everything queued and returns the second.
    pub fn send_half(&mut self) -> Result<Vec<u8>> {
        let rest = self.request.split_off(self.request.len() / 2);
        self.flush()?;
        Ok(rest)
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let sent = self.writer.write_all(bytes);
        sent.context("the connection to redis broke while sending")
    }

    /// Sends one command and returns its reply.
    pub fn call(&mut self, words: &[&[u8]]) -> Result<Reply> {
        self.queue(words);
        self.flush()?;
        self.reply()
    }

    /// Reads the next reply.
    pub fn reply(&mut self) -> Result<Reply> {
        let line = self.line()?;
        let (kind, rest) = line
            .split_at_checked(1)
            .context("redis sent an empty line")?;
        match kind {
            "+" => Ok(Reply::Status(rest.to_owned())),
            ":" => Ok(Reply::Integer(
                rest.parse().context("redis sent a bad number")?,
            )),
            "$" if rest == "-1" => Ok(Reply::Nil),
            "$" => self.bulk(rest.parse().context("redis sent a bad length")?),
            _ => bail!("redis says: {line}"),
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let length = self
            .reader
            .read_line(&mut line)
            .context("the connection to redis broke")?;
        anyhow::ensure!(length > 0, "redis closed the connection");
        line.truncate(line.trim_end().len());
        Ok(line)
    }

    fn bulk(&mut self, length: usize) -> Result<Reply> {
        anyhow::ensure!(
            length <= MAX_REPLY_BYTES,
            "redis announces a reply of {length} bytes"
        );
        let mut bytes = vec![0; length + 2];
        self.reader
            .read_exact(&mut bytes)
            .context("the connection to redis broke within a reply")?;
        bytes.truncate(length);
        Ok(Reply::Bulk(bytes))
    }
}

fn push_header(kind: u8, number: usize, out: &mut Vec<u8>) {
    out.push(kind);
    out.extend_from_slice(number.to_string().as_bytes());
    out.extend_from_slice(b"\r\n");
}
