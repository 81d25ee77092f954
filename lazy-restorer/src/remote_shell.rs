//! What rsync starts to reach the other host: this very program, in another role.
//!
//! It hands its input and output over to the `lazy-restorer` that waits for them and ends: so nothing is copied once
//! more, and rsync, which at its end looks only every 20 ms whether this program has ended, finds that it has.

use std::env;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use common::limits::MAX_CONTROL_BYTES;
use common::proto::{ProtoError, stream};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::{SFlag, fstat};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::unix::pipe;
use tokio::task::spawn_blocking;

use crate::handover::receive;

/// Names the socket of the waiting `lazy-restorer`; set for rsync and inherited by what it starts.
pub const SOCKET_VARIABLE: &str = "POSTCOPY_FILES_SOCKET";

/// Bytes of the arguments and their length; whatever is longer cannot be sent on.
const MAX_FRAME_BYTES: u64 = (size_of::<u32>() + MAX_CONTROL_BYTES) as u64;

/// Runs as rsync's way to the other host when called as it.
pub fn run_if_called() -> Option<ExitCode> {
    let socket = env::var_os(SOCKET_VARIABLE)?;
    Some(match hand_over(Path::new(&socket)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

fn hand_over(socket: &Path) -> io::Result<()> {
    // Ourselves, the host, and `rsync` come before what the other end needs.
    let arguments: Vec<String> = env::args().skip(3).collect();
    let stream = UnixStream::connect(socket)?;
    send(
        stream,
        &arguments,
        [io::stdin().as_fd(), io::stdout().as_fd()],
    )
}

fn send(
    mut stream: UnixStream,
    arguments: &Vec<String>,
    ends: [BorrowedFd<'_>; 2],
) -> io::Result<()> {
    for end in ends {
        let rights = [end.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&rights)];
        let byte = [IoSlice::new(&[0])];
        sendmsg::<()>(
            stream.as_raw_fd(),
            &byte,
            &rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
    }
    stream.write_all(&frame(arguments)?)
}

/// The arguments in the format that `stream::receive` takes.
fn frame(arguments: &Vec<String>) -> io::Result<Vec<u8>> {
    let mut frame = Vec::new();
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime
        .block_on(stream::send(&mut frame, arguments))
        .map_err(|error| io::Error::other(error.to_string()))?;
    Ok(frame)
}

/// What rsync wants of the other host.
pub struct Remote {
    /// What the rsync there is to be called with.
    pub arguments: Vec<String>,
    /// What it is to be told.
    pub from_rsync: Box<dyn AsyncRead + Send + Unpin>,
    /// Where what it says goes.
    pub to_rsync: Box<dyn AsyncWrite + Send + Unpin>,
}

impl Remote {
    /// Takes over from the program that rsync has started.
    pub async fn accept(local: tokio::net::UnixStream) -> Result<Self, ProtoError> {
        let local = local.into_std()?;
        local.set_nonblocking(false)?;
        let taken = spawn_blocking(move || take(&local)).await;
        let (frame, from_rsync, to_rsync) = taken.map_err(io::Error::other)??;
        Ok(Remote {
            arguments: stream::receive(&mut &frame[..]).await?,
            from_rsync: reader(from_rsync)?,
            to_rsync: writer(to_rsync)?,
        })
    }
}

fn take(local: &UnixStream) -> io::Result<(Vec<u8>, OwnedFd, OwnedFd)> {
    let end = || {
        let received = receive(local, &mut [0]).map_err(io::Error::other)?;
        let fd = received.fd.filter(|_| received.bytes == 1);
        fd.ok_or_else(|| io::Error::other("rsync's program handed nothing over"))
    };
    let (from_rsync, to_rsync) = (end()?, end()?);
    let mut frame = Vec::new();
    local.take(MAX_FRAME_BYTES).read_to_end(&mut frame)?;
    Ok((frame, from_rsync, to_rsync))
}

/// rsync's ends are sockets where it can make pairs of them, else pipes.
fn is_socket(end: &OwnedFd) -> io::Result<bool> {
    let kind = SFlag::from_bits_truncate(fstat(end)?.st_mode) & SFlag::S_IFMT;
    Ok(kind == SFlag::S_IFSOCK)
}

fn socket(end: OwnedFd) -> io::Result<tokio::net::UnixStream> {
    let socket = UnixStream::from(end);
    socket.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(socket)
}

fn reader(end: OwnedFd) -> io::Result<Box<dyn AsyncRead + Send + Unpin>> {
    Ok(match is_socket(&end)? {
        true => Box::new(socket(end)?),
        false => Box::new(pipe::Receiver::from_owned_fd(end)?),
    })
}

fn writer(end: OwnedFd) -> io::Result<Box<dyn AsyncWrite + Send + Unpin>> {
    Ok(match is_socket(&end)? {
        true => Box::new(socket(end)?),
        false => Box::new(pipe::Sender::from_owned_fd(end)?),
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// What is handed over, when rsync keeps the other ends.
    async fn handed_over(ends: [OwnedFd; 2]) -> Remote {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let sending = std::thread::spawn(move || {
            let arguments = vec![String::from("--server"), String::from("/a b/")];
            send(ours, &arguments, [ends[0].as_fd(), ends[1].as_fd()]).expect("sent");
        });
        theirs.set_nonblocking(true).expect("possible");
        let theirs = tokio::net::UnixStream::from_std(theirs).expect("a stream");
        let remote = Remote::accept(theirs).await.expect("handed over");
        sending.join().expect("it does not panic");
        assert_eq!(remote.arguments, ["--server", "/a b/"]);
        remote
    }

    async fn carries(mut remote: Remote, mut say: impl Write, mut hear: impl Read) {
        say.write_all(b"there").expect("taken");
        drop(say);
        let mut said = String::new();
        let heard = remote.from_rsync.read_to_string(&mut said);
        heard.await.expect("it ends");
        remote.to_rsync.write_all(b"back").await.expect("taken");
        drop(remote);
        let mut answer = String::new();
        hear.read_to_string(&mut answer).expect("it ends");
        assert_eq!([said, answer], ["there", "back"]);
    }

    #[tokio::test]
    async fn arguments_and_sockets_arrive_as_they_are() {
        let (say, input) = UnixStream::pair().expect("a pair");
        let (hear, output) = UnixStream::pair().expect("a pair");
        let remote = handed_over([input.into(), output.into()]).await;
        carries(remote, say, hear).await;
    }

    #[tokio::test]
    async fn pipes_do_as_well() {
        let (input, say) = io::pipe().expect("a pipe");
        let (hear, output) = io::pipe().expect("a pipe");
        let remote = handed_over([input.into(), output.into()]).await;
        carries(remote, say, hear).await;
    }

    #[tokio::test]
    async fn a_program_that_ends_early_is_an_error() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        drop(ours);
        theirs.set_nonblocking(true).expect("possible");
        let theirs = tokio::net::UnixStream::from_std(theirs).expect("a stream");
        assert!(Remote::accept(theirs).await.is_err());
    }
}
