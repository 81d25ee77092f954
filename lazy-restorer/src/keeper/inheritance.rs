//! What a keeper hands to the successor of a killed `lazy-restorer`: every userfault descriptor and every journal, with
//! the numbers they had, which the journals speak of.
//!
//! Over a local socket: the number of descriptors, then groups of numbers with the descriptors attached. The successor
//! answers with one byte when it has made them its own; a successor that dies before gives nothing up.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use common::images::ImagePid;
use common::limits::MAX_PROCESSES;
use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg, sockopt,
};

use super::link_of;
use crate::handover::MAX_RIGHTS;
use crate::journal::Journal;

/// Descriptors sent at once; the kernel takes 253.
const GROUP: usize = 128;
/// Any byte will do.
const TAKEN: u8 = b'T';
/// Time a keeper that lives has to answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Descriptors at most: children forked here have one each, too.
const MAX_DESCRIPTORS: usize = 4 * MAX_PROCESSES;

/// What a successor was handed.
#[derive(Debug)]
pub struct Inheritance {
    stream: UnixStream,
    /// Userfault descriptors by the numbers they had.
    pub uffds: HashMap<RawFd, OwnedFd>,
    /// The journal of each family.
    pub journals: HashMap<ImagePid, OwnedFd>,
}

/// Asks the keeper that listens at `socket` for everything.
pub fn inherit(socket: &Path) -> io::Result<Inheritance> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    Inheritance::receive(stream)
}

impl Inheritance {
    /// What the keeper at the other end hands over.
    pub fn receive(mut stream: UnixStream) -> io::Result<Self> {
        let mut count = [0; 4];
        stream.read_exact(&mut count)?;
        let count = u32::from_le_bytes(count) as usize;
        if count > MAX_DESCRIPTORS {
            return Err(io::Error::other("the keeper holds too much"));
        }
        let mut inheritance = Inheritance {
            stream,
            uffds: HashMap::new(),
            journals: HashMap::new(),
        };
        let mut rest = count;
        while rest > 0 {
            let group = receive(&inheritance.stream, rest.min(GROUP))?;
            if group.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            rest -= group.len().min(rest);
            for (number, fd) in group {
                let journal = link_of(fd.as_raw_fd()).and_then(|link| Journal::named_by(&link));
                match journal {
                    Some(pid) => drop(inheritance.journals.insert(pid, fd)),
                    None => drop(inheritance.uffds.insert(number, fd)),
                }
            }
        }
        Ok(inheritance)
    }

    /// Everything is ours now: the keeper that had it ends.
    pub fn taken(mut self) -> io::Result<()> {
        self.stream.write_all(&[TAKEN])?;
        // It closes its end when it ends.
        let _ = self.stream.read(&mut [0]);
        Ok(())
    }
}

fn receive(stream: &UnixStream, count: usize) -> io::Result<Vec<(RawFd, OwnedFd)>> {
    let mut numbers = vec![0; count * size_of::<RawFd>()];
    let mut space = cmsg_space!([RawFd; MAX_RIGHTS]);
    let mut parts = [IoSliceMut::new(&mut numbers)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
    let received = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let bytes = received.bytes;
    let mut fds = Vec::new();
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(rights) = control {
            for fd in rights {
                // SAFETY: the kernel made it for us with this message; nobody else has it.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    if bytes != fds.len() * size_of::<RawFd>() {
        return Err(io::Error::other(
            "descriptors were lost on the way; is RLIMIT_NOFILE too low?",
        ));
    }
    let numbers = numbers
        .chunks_exact(size_of::<RawFd>())
        .map(|bytes| RawFd::from_le_bytes(bytes.try_into().expect("chunks of this size")));
    Ok(numbers.zip(fds).collect())
}

/// Hands everything to whoever asks as ourselves; true when it has made it its own.
pub(super) fn hand_over(stream: &UnixStream, held: &[RawFd]) -> bool {
    let handed = try_hand_over(stream, held);
    handed.unwrap_or(false)
}

fn try_hand_over(mut stream: &UnixStream, held: &[RawFd]) -> io::Result<bool> {
    let peer = getsockopt(&stream, sockopt::PeerCredentials)?;
    if peer.uid() != nix::unistd::geteuid().as_raw() {
        return Ok(false);
    }
    stream.set_nonblocking(false)?;
    stream.write_all(&(held.len() as u32).to_le_bytes())?;
    for group in held.chunks(GROUP) {
        let numbers: Vec<u8> = group.iter().flat_map(|fd| fd.to_le_bytes()).collect();
        let parts = [IoSlice::new(&numbers)];
        let rights = [ControlMessage::ScmRights(group)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, flags, None)?;
    }
    let mut answer = [0];
    Ok(stream.read(&mut answer)? == 1 && answer[0] == TAKEN)
}
