//! `lazy-pages.socket`: each restoring task hands its userfault descriptor over.
//!
//! Messages (`criu/uffd.c`): a 32-bit PID in the task's own PID namespace, negative for a zombie, which has no
//! descriptor; else one byte with the descriptor attached; at the end the word "RSTF". Nothing is ever sent back.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use common::images::ImagePid;
use common::privileges::keep_for_data;
use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt, sockopt,
};
use nix::unistd::Pid;
use tokio::sync::mpsc;

use crate::privileges;
use crate::uffd::UserFault;

/// Name of the socket in CRIU's work directory (`LAZY_PAGES_SOCK_NAME`).
pub const SOCKET_NAME: &str = "lazy-pages.socket";
/// Descriptors in one message at most (`SCM_MAX_FD`, `include/net/scm.h`). With room for fewer the kernel would cut the
/// message off, and those that are already ours would be nobody's.
pub(crate) const MAX_RIGHTS: usize = 253;
/// "RSTF", larger than any PID.
const RESTORE_FINISHED: u32 = 0x5253_5446;

/// What comes over the socket.
#[derive(Debug)]
pub enum Handover {
    /// A task's memory.
    Process {
        /// Its PID in the images.
        image: ImagePid,
        /// Its PID on this host.
        pid: Pid,
        /// Its descriptor.
        uffd: UserFault,
    },
    /// All tasks are restored and about to run.
    Finished,
}

/// Why the socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// A system call.
    #[error("the lazy-pages socket fails: {0}")]
    Io(#[from] io::Error),
    /// CRIU sent something else.
    #[error("CRIU sent {0} on the lazy-pages socket; is this CRIU 4.2 or later?")]
    Unexpected(&'static str),
}

impl From<nix::Error> for HandoverError {
    fn from(error: nix::Error) -> Self {
        HandoverError::Io(error.into())
    }
}

/// What was collected, as it comes.
pub type Handovers = mpsc::UnboundedReceiver<Result<Handover, HandoverError>>;

/// Binds the socket and collects what comes on it, in a thread of its own, until CRIU closes it.
pub fn listen(work: &Path) -> Result<Handovers, HandoverError> {
    let listener = bind(work)?;
    collect(move || listener.accept().map(|(stream, _)| stream))
}

/// Binds the socket.
pub fn bind(work: &Path) -> Result<UnixListener, HandoverError> {
    let listener = UnixListener::bind(work.join(SOCKET_NAME))?;
    // Credentials are attached only to what is sent after this is set, so before CRIU can connect.
    setsockopt(&listener, sockopt::PassCred, &true)?;
    Ok(listener)
}

/// Collects what comes on the stream that `accept` returns, in a thread of its own, until CRIU closes it.
pub fn collect(
    accept: impl FnOnce() -> io::Result<UnixStream> + Send + 'static,
) -> Result<Handovers, HandoverError> {
    let (send, receive) = mpsc::unbounded_channel();
    thread::Builder::new()
        .name(String::from("handover"))
        .spawn(move || {
            let result = keep_for_data(privileges::DATA)
                .and_then(|()| accept())
                .map_err(HandoverError::from)
                .and_then(|stream| read(&stream, |handover| send.send(Ok(handover)).is_ok()));
            if let Err(error) = result {
                // The session has ended when nobody listens.
                let _ = send.send(Err(error));
            }
        })?;
    Ok(receive)
}

/// Reads what comes on the stream until its end, or until `take` has enough.
pub fn read(
    stream: &UnixStream,
    mut take: impl FnMut(Handover) -> bool,
) -> Result<(), HandoverError> {
    setsockopt(stream, sockopt::PassCred, &true)?;
    while let Some(handover) = next(stream)? {
        if !take(handover) {
            break;
        }
    }
    Ok(())
}

/// The next message; `None` at the end.
fn next(stream: &UnixStream) -> Result<Option<Handover>, HandoverError> {
    loop {
        let Some(word) = read_word(stream)? else {
            return Ok(None);
        };
        if u32::from_ne_bytes(word) == RESTORE_FINISHED {
            return Ok(Some(Handover::Finished));
        }
        match i32::from_ne_bytes(word) {
            0 => return Err(HandoverError::Unexpected("PID 0")),
            // A zombie needs nothing.
            pid if pid < 0 => {}
            pid => return receive_process(stream, ImagePid(pid.unsigned_abs())).map(Some),
        }
    }
}

fn read_word(stream: &UnixStream) -> Result<Option<[u8; 4]>, HandoverError> {
    let mut word = [0; 4];
    let mut filled = 0;
    while filled < word.len() {
        match receive(stream, &mut word[filled..])?.bytes {
            0 if filled == 0 => return Ok(None),
            0 => return Err(HandoverError::Unexpected("half a word")),
            bytes => filled += bytes,
        }
    }
    Ok(Some(word))
}

fn receive_process(stream: &UnixStream, image: ImagePid) -> Result<Handover, HandoverError> {
    let received = receive(stream, &mut [0])?;
    let fd = received
        .fd
        .ok_or(HandoverError::Unexpected("a PID without a descriptor"))?;
    let credentials = received.credentials.ok_or(HandoverError::Unexpected(
        "a descriptor without credentials",
    ))?;
    Ok(Handover::Process {
        image,
        pid: Pid::from_raw(credentials.pid()),
        uffd: UserFault::from_fd(fd),
    })
}

/// What came at once.
pub(crate) struct Received {
    pub(crate) bytes: usize,
    pub(crate) fd: Option<OwnedFd>,
    credentials: Option<UnixCredentials>,
}

/// Receives bytes, and the descriptor that comes with them.
pub(crate) fn receive(stream: &UnixStream, buffer: &mut [u8]) -> Result<Received, HandoverError> {
    let mut space = cmsg_space!([RawFd; MAX_RIGHTS], UnixCredentials);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut received = Received {
        bytes: message.bytes,
        fd: None,
        credentials: None,
    };
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::ScmRights(fds) => {
                // SAFETY: the kernel made these descriptors for us with this message; nobody else has them.
                let mut owned = fds
                    .into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                received.fd = owned.next();
                owned.for_each(drop);
            }
            ControlMessageOwned::ScmCredentials(credentials) => {
                received.credentials = Some(credentials);
            }
            _ => {}
        }
    }
    Ok(received)
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    fn collect(send: impl FnOnce(UnixStream)) -> Vec<Result<Handover, HandoverError>> {
        let dir = tempfile::tempdir().expect("a directory");
        let mut handovers = listen(dir.path()).expect("bound");
        send(UnixStream::connect(dir.path().join(SOCKET_NAME)).expect("connected"));
        std::iter::from_fn(|| handovers.blocking_recv()).collect()
    }

    fn send_fd(stream: &UnixStream) {
        let any = std::fs::File::open("/dev/null").expect("a descriptor");
        let fds = [any.as_raw_fd()];
        sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(&[0])],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::empty(),
            None,
        )
        .expect("sent");
    }

    #[test]
    fn tasks_zombies_and_the_end_are_told_apart() {
        let handovers = collect(|mut stream| {
            stream.write_all(&7_i32.to_ne_bytes()).expect("sent");
            send_fd(&stream);
            stream.write_all(&(-8_i32).to_ne_bytes()).expect("sent");
            stream
                .write_all(&RESTORE_FINISHED.to_ne_bytes())
                .expect("sent");
        });
        let [
            Ok(Handover::Process { image, pid, .. }),
            Ok(Handover::Finished),
        ] = &handovers[..]
        else {
            panic!("{handovers:?}");
        };
        assert_eq!(*image, ImagePid(7));
        assert_eq!(*pid, Pid::this(), "the sender's real PID");
    }

    #[test]
    fn a_broken_message_is_an_error() {
        let handovers = collect(|mut stream| {
            stream.write_all(&7_i32.to_ne_bytes()).expect("sent");
            stream.write_all(&[0]).expect("sent");
        });
        assert!(matches!(handovers[..], [Err(HandoverError::Unexpected(_))]));
        let handovers = collect(|mut stream| stream.write_all(&[1, 2]).expect("sent"));
        assert!(matches!(handovers[..], [Err(HandoverError::Unexpected(_))]));
    }
}
