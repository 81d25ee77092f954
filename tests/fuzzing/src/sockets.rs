//! Decoders that read a local socket, with descriptors that come along. Whatever comes, none of them may stay open.
//!
//! An input is a script of messages: a byte that says how long the message is and how many descriptors are attached, and
//! its bytes.

use std::io::{IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use lazy_restorer::handover::{self, Handover, HandoverError};
use lazy_restorer::keeper::Inheritance;
use lazy_restorer::remote_shell::Remote;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Messages that are sent: all of them lie in the socket before anyone reads.
const MAX_MESSAGES: usize = 64;
/// The upper bits of a message's first byte are the number of descriptors.
const RIGHTS_SHIFT: u32 = 6;
/// The lower bits are its length, less one.
const LENGTH_MASK: u8 = (1 << RIGHTS_SHIFT) - 1;
/// "RSTF", as CRIU writes it.
const RESTORE_FINISHED: u32 = 0x5253_5446;

/// CRIU's lazy-pages socket.
pub(crate) fn handover(script: &[u8]) -> bool {
    let Stage { stream, probe, .. } = Stage::play(script);
    let mut taken = false;
    let end = handover::read(&stream, |handover| {
        if let Handover::Process { image, pid, .. } = handover {
            assert!(image.0 > 0 && image.0 <= i32::MAX as u32);
            assert_eq!(pid, nix::unistd::Pid::this(), "who sent it");
        }
        taken = true;
        true
    });
    if let Err(HandoverError::Io(error)) = end {
        panic!("our socket: {error}");
    }
    drop(stream);
    probe.nothing_is_left();
    taken
}

/// What a keeper hands to a successor.
pub(crate) fn inheritance(script: &[u8]) -> bool {
    let Stage {
        stream,
        answers,
        probe,
    } = Stage::play(script);
    let inheritance = Inheritance::receive(stream);
    // The keeper does not wait for a word.
    drop(answers);
    let taken = inheritance.is_ok();
    drop(inheritance);
    probe.nothing_is_left();
    taken
}

/// What the program that rsync starts hands over.
pub(crate) fn remote_shell(script: &[u8]) -> bool {
    let stage = Stage::play(script);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build();
    let taken = runtime.expect("a runtime").block_on(async {
        stage.stream.set_nonblocking(true).expect("ours");
        let stream = tokio::net::UnixStream::from_std(stage.stream).expect("a runtime");
        Remote::accept(stream).await.is_ok()
    });
    stage.probe.nothing_is_left();
    taken
}

/// A socket at whose other end a script has been played.
struct Stage {
    stream: UnixStream,
    answers: UnixStream,
    probe: Probe,
}

impl Stage {
    fn play(script: &[u8]) -> Self {
        let (probe, passed) = Probe::new();
        let journal = memfd_create("postcopy-journal-7", MFdFlags::MFD_CLOEXEC).expect("memory");
        let fds = [&passed, &passed, &journal].map(AsRawFd::as_raw_fd);
        let (answers, stream) = UnixStream::pair().expect("a pair");
        // Credentials come with what is sent from then on.
        nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::PassCred, &true)
            .expect("ours");
        for (message, rights) in messages(script) {
            send(&answers, message, &fds[..rights]);
        }
        answers.shutdown(Shutdown::Write).expect("ours");
        Stage {
            stream,
            answers,
            probe,
        }
    }
}

/// Sees the end of its socket when every descriptor of the other end is closed.
struct Probe(UnixStream);

impl Probe {
    fn new() -> (Self, OwnedFd) {
        let (probe, passed) = UnixStream::pair().expect("a pair");
        probe.set_nonblocking(true).expect("ours");
        (Probe(probe), passed.into())
    }

    fn nothing_is_left(mut self) {
        let read = self.0.read(&mut [0]);
        assert!(matches!(read, Ok(0)), "a descriptor was kept: {read:?}");
    }
}

fn send(stream: &UnixStream, message: &[u8], rights: &[RawFd]) {
    let control = [ControlMessage::ScmRights(rights)];
    let control = if rights.is_empty() { &[] } else { &control[..] };
    let parts = [IoSlice::new(message)];
    let fd = stream.as_raw_fd();
    sendmsg::<()>(fd, &parts, control, MsgFlags::MSG_NOSIGNAL, None).expect("there is room");
}

fn messages(mut script: &[u8]) -> Vec<(&[u8], usize)> {
    let mut messages = Vec::new();
    while let Some((first, rest)) = script.split_first()
        && messages.len() < MAX_MESSAGES
    {
        let length = usize::from(first & LENGTH_MASK) + 1;
        let (message, rest) = rest.split_at(length.min(rest.len()));
        if !message.is_empty() {
            messages.push((message, usize::from(first >> RIGHTS_SHIFT)));
        }
        script = rest;
    }
    messages
}

/// One message of a script.
fn scripted(message: &[u8], rights: u8) -> Vec<u8> {
    let first = rights << RIGHTS_SHIFT | (message.len() as u8 - 1);
    [&[first], message].concat()
}

pub(crate) fn handovers() -> Vec<Vec<u8>> {
    let task = |pid: i32| [scripted(&pid.to_ne_bytes(), 0), scripted(&[0], 1)].concat();
    let zombie = scripted(&(-8_i32).to_ne_bytes(), 0);
    let finished = scripted(&RESTORE_FINISHED.to_ne_bytes(), 0);
    vec![
        [task(7), zombie, task(9), finished.clone()].concat(),
        finished,
    ]
}

pub(crate) fn inheritances() -> Vec<Vec<u8>> {
    let numbers = |numbers: &[i32]| -> Vec<u8> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|fd| fd.to_le_bytes()).collect();
        scripted(&bytes, numbers.len() as u8)
    };
    let count = |count: u32| scripted(&count.to_le_bytes(), 0);
    vec![
        count(0),
        [count(3), numbers(&[5, 6, 7])].concat(),
        [count(2), numbers(&[5]), numbers(&[9])].concat(),
    ]
}

pub(crate) fn handed_over_by_rsync(arguments: &[u8]) -> Vec<Vec<u8>> {
    let mut script = [scripted(&[0], 1), scripted(&[0], 1)].concat();
    for part in arguments.chunks(usize::from(LENGTH_MASK) + 1) {
        script.extend(scripted(part, 0));
    }
    vec![script]
}
