//! The system calls of the workload, thinly.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use common::page::{PAGE_SIZE, PageIndex, PageRange};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use userfaultfd::{FeatureFlags, Uffd, UffdBuilder};

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn pointer(page: PageIndex) -> *mut libc::c_void {
    page.addr().0 as *mut _
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Maps private anonymous memory where nothing is yet.
pub fn map(pages: PageRange) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let (start, bytes) = (pointer(pages.start), pages.bytes() as usize);
    // SAFETY: the kernel refuses to map over what is there.
    let at = unsafe { libc::mmap(start, bytes, READ_WRITE, flags, -1, 0) };
    check(i32::from(at != start))
}

/// Unmaps pages that belong to the caller.
pub fn unmap(pages: PageRange) -> io::Result<()> {
    // SAFETY: no reference to these pages exists; they are only reached by address.
    check(unsafe { libc::munmap(pointer(pages.start), pages.bytes() as usize) })
}

/// `madvise` on pages that belong to the caller.
pub fn advise(pages: PageRange, advice: i32) -> io::Result<()> {
    // SAFETY: no reference to these pages exists; they are only reached by address.
    check(unsafe { libc::madvise(pointer(pages.start), pages.bytes() as usize, advice) })
}

/// Splits the mapping at both ends of `pages` for good, and leaves them usable.
pub fn split_mapping(pages: PageRange) -> io::Result<()> {
    let protection = READ_WRITE | libc::PROT_EXEC;
    // SAFETY: nothing gets less accessible.
    check(unsafe { libc::mprotect(pointer(pages.start), pages.bytes() as usize, protection) })
}

/// `mremap`; `to` is heeded only with `MREMAP_FIXED`.
pub fn remap(from: PageRange, count: u64, flags: i32, to: PageIndex) -> io::Result<PageIndex> {
    let (old, new) = (
        from.bytes() as usize,
        PageRange::new(to, count).bytes() as usize,
    );
    // SAFETY: both places belong to the caller, who reaches them only by address.
    let at = unsafe { libc::mremap(pointer(from.start), old, new, flags, pointer(to)) };
    check(i32::from(at == libc::MAP_FAILED))?;
    Ok(PageIndex(at as u64 / PAGE_SIZE as u64))
}

/// Waits until nothing is mapped at `pages`.
pub fn await_unmapped(pages: PageRange) {
    let (start, bytes) = (pointer(pages.start), pages.bytes() as usize);
    let mut resident = vec![0; pages.count as usize];
    // SAFETY: there is a byte for each page.
    while unsafe { libc::mincore(start, bytes, resident.as_mut_ptr()) } == 0 {
        std::thread::yield_now();
    }
}

/// The content of a page, read word by word from whatever is mapped there.
pub fn load(page: PageIndex, into: &mut [u64; PAGE_SIZE / 8]) {
    for (index, word) in into.iter_mut().enumerate() {
        let address = (page.addr().0 as *const u64).wrapping_add(index);
        // SAFETY: the caller owns a readable mapping there; it is aligned.
        *word = unsafe { address.read_volatile() };
    }
}

/// Replaces the content of a page.
pub fn store(page: PageIndex, content: &[u64; PAGE_SIZE / 8]) {
    for (index, word) in content.iter().enumerate() {
        let address = (page.addr().0 as *mut u64).wrapping_add(index);
        // SAFETY: the caller owns a writable mapping there; it is aligned.
        unsafe { address.write_volatile(*word) };
    }
}

/// A descriptor with the features that `criu restore --lazy-pages` asks for.
pub fn userfault() -> Result<Uffd, userfaultfd::Error> {
    UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .user_mode_only(false)
        .require_features(
            FeatureFlags::EVENT_FORK
                | FeatureFlags::EVENT_REMAP
                | FeatureFlags::EVENT_REMOVE
                | FeatureFlags::EVENT_UNMAP,
        )
        .create()
}

/// Watches pages for faults.
pub fn register(uffd: &Uffd, pages: PageRange) -> Result<(), userfaultfd::Error> {
    uffd.register(pointer(pages.start), pages.bytes() as usize)?;
    Ok(())
}

/// Runs `body` in a copy of this process and returns whether it returned true. `body` must not allocate: another
/// thread may hold the allocator's lock at the moment of the fork.
pub fn in_child(body: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child only runs `body`, which keeps to what is safe after a fork.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let code = i32::from(!body());
        // SAFETY: it ends the child at once.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: `status` is valid for writes.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    waited == child && libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
}

/// Makes this process the leader of a session of its own.
pub fn lead_a_session() -> nix::Result<()> {
    nix::unistd::setsid().map(drop)
}

/// Forks a child that does nothing for as long as it lives.
pub fn leave_a_child() {
    // SAFETY: the child only waits.
    if let Ok(nix::unistd::ForkResult::Child) = unsafe { nix::unistd::fork() } {
        loop {
            nix::unistd::pause();
        }
    }
}

/// Sends a byte with a descriptor.
pub fn send_fd(socket: &UnixStream, byte: u8, fd: RawFd) -> nix::Result<()> {
    let bytes = [byte];
    let message = [ControlMessage::ScmRights(&[fd])];
    let data = [IoSlice::new(&bytes)];
    sendmsg::<()>(socket.as_raw_fd(), &data, &message, MsgFlags::empty(), None)?;
    Ok(())
}

/// Receives a byte and the descriptor that came with it, if one did.
pub fn receive_fd(socket: &UnixStream) -> nix::Result<(u8, Option<OwnedFd>)> {
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut data, Some(&mut space), flags)?;
    let fd = message.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel made the descriptor for us just now.
    let fd = fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    Ok((byte[0], fd))
}
