//! What a successor must know of one family, in memory that outlives this program: the only file that maps it.
//!
//! The memory is a `memfd` that the keeper holds too. It has an *inbox*, into which the kernel writes the events of a
//! userfault descriptor directly, so that an event is here the moment it was read; a *log* of the changes made since
//! the last *checkpoint*; and two places for checkpoints, used in turns. One 64-bit word, the *root*, says which place
//! is valid, how long the log is, and how many batches of the inbox are in the log. It is written last: whenever this
//! program is killed, everything noted so far is found, and nothing twice.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use common::images::ImagePid;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::memory::descriptor::Buffer;
use crate::resolver::{CHANGE_WORDS, Change, MemberId};
use crate::uffd::{
    MESSAGE_WORDS, MESSAGES_PER_READ, MemoryEvent, Message, ReadError, Said, UserFault,
};

const MAGIC: u64 = u64::from_le_bytes(*b"pcjrnl01");
/// Words of the head: magic, root, inbox, the lengths of two checkpoints.
const HEAD_WORDS: usize = 8;
const ROOT: usize = 1;
const INBOX: usize = 2;
const LENGTHS: [usize; 2] = [3, 4];
const INBOX_AT: usize = HEAD_WORDS;
const LOG_AT: usize = INBOX_AT + MESSAGES_PER_READ * MESSAGE_WORDS;
/// Words of a note: a change, and what belongs to it.
const NOTE_WORDS: usize = CHANGE_WORDS + 2;
/// Notes between two checkpoints: some 200 KiB, and 256 MiB of pushed pages.
const LOG_NOTES: usize = 4096;
const WORDS: usize = LOG_AT + LOG_NOTES * NOTE_WORDS;
const BYTES: usize = WORDS * size_of::<u64>();
/// Where checkpoints begin: far apart in a file that is mostly a hole.
const CHECKPOINTS_AT: [u64; 2] = [1 << 40, 2 << 40];
/// Bytes of the largest checkpoint: three bitmaps of the largest process, and a million mappings.
const MAX_CHECKPOINT_BYTES: u64 = 512 << 20;
/// How the memory is called in `/proc/PID/fd`.
const NAME: &str = "postcopy-journal-";

/// A change, and what a successor must know besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// The change.
    pub change: Change,
    /// The descriptor of the member it brought, or the sum of the hashes of the pages that came.
    pub detail: u64,
    /// Of pages that came: which are zeros (bits 0 to 15), and whether they were pushed (bit 16).
    pub extra: u64,
}

impl From<Change> for Note {
    fn from(change: Change) -> Self {
        Note {
            change,
            detail: 0,
            extra: 0,
        }
    }
}

/// One family's journal.
#[derive(Debug)]
pub struct Journal {
    file: File,
    memory: NonNull<AtomicU64>,
    root: Root,
    /// Messages of the inbox that must be cleared before it is used again.
    used: usize,
    /// Whose events are read.
    member: MemberId,
}

// SAFETY: the mapping belongs to the journal alone, and is only accessed through atomics or under `&mut self`.
unsafe impl Send for Journal {}
// SAFETY: as above.
unsafe impl Sync for Journal {}

/// The word that makes everything else valid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Root {
    place: usize,
    batch: u32,
    length: usize,
}

/// Batches are counted in 31 bits.
const BATCHES: u32 = 1 << 31;

impl Root {
    fn encode(self) -> u64 {
        (self.place as u64) << 63 | u64::from(self.batch) << 32 | self.length as u64
    }

    fn decode(word: u64) -> Self {
        Root {
            place: (word >> 63) as usize,
            batch: (word >> 32) as u32 % BATCHES,
            length: (word & u64::from(u32::MAX)) as usize,
        }
    }

    fn next_batch(self) -> u32 {
        (self.batch + 1) % BATCHES
    }
}

/// What a journal holds.
#[derive(Debug)]
pub struct Recovered {
    /// The last checkpoint, if one was ever made.
    pub checkpoint: Option<Vec<u8>>,
    /// What was noted since.
    pub notes: Vec<Note>,
}

impl Journal {
    /// An empty journal of the family of `pid`.
    pub fn new(pid: ImagePid) -> io::Result<Self> {
        let name = format!("{NAME}{}", pid.0);
        let file = File::from(memfd_create(name.as_str(), MFdFlags::MFD_CLOEXEC)?);
        // Reserved now: a page that cannot be had later would end this program.
        fallocate(&file, FallocateFlags::empty(), 0, BYTES as i64)?;
        let journal = Journal::map(file)?;
        journal.word(0).store(MAGIC, Ordering::Release);
        Ok(journal)
    }

    /// Which family's journal a link of `/proc/PID/fd` names.
    pub fn named_by(link: &str) -> Option<ImagePid> {
        let name = link.strip_prefix("/memfd:")?.strip_prefix(NAME)?;
        let digits = name.split_whitespace().next()?;
        digits.parse().ok().map(ImagePid)
    }

    fn map(file: File) -> io::Result<Self> {
        let length = NonZeroUsize::new(BYTES).expect("it has a length");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // Populated: the kernel must be able to write events even while this program is being killed.
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping, of memory that nobody shrinks.
        let memory = unsafe { mmap(None, length, protection, flags, &file, 0)? };
        Ok(Journal {
            file,
            memory: memory.cast(),
            root: Root::default(),
            used: 0,
            member: MemberId(0),
        })
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < WORDS);
        // SAFETY: within the mapping.
        let word = unsafe { self.memory.add(index) };
        // SAFETY: the mapping lives as long as the journal, and is zeroed or written as words.
        unsafe { word.as_ref() }
    }

    /// How many notes there is room for before the next checkpoint.
    pub fn room(&self) -> usize {
        LOG_NOTES - self.root.length
    }

    /// Notes a change that is about to be made.
    pub fn note(&mut self, note: Note) {
        self.append(note);
        self.commit();
    }

    fn append(&mut self, note: Note) {
        assert!(self.room() > 0, "a checkpoint is due");
        let at = LOG_AT + self.root.length * NOTE_WORDS;
        let words = note.change.encode();
        let details = [note.detail, note.extra];
        for (index, word) in words.into_iter().chain(details).enumerate() {
            self.word(at + index).store(word, Ordering::Relaxed);
        }
        self.root.length += 1;
    }

    fn commit(&self) {
        self.word(ROOT).store(self.root.encode(), Ordering::Release);
    }

    /// Reads events and notes them. There must be room for a full inbox.
    pub fn read(&mut self, uffd: &UserFault) -> Result<Vec<MemoryEvent>, ReadError> {
        let member = self.member;
        for message in 0..self.used {
            self.word(INBOX_AT + message * MESSAGE_WORDS)
                .store(0, Ordering::Relaxed);
        }
        self.used = 0;
        let batch = self.root.next_batch();
        let head = u64::from(batch) | (member.0 as u64) << 32;
        self.word(INBOX).store(head, Ordering::Release);
        fence(Ordering::SeqCst);
        let inbox = self.word(INBOX_AT).as_ptr().cast();
        // SAFETY: the inbox has room for this many messages, and nobody else uses it while we are borrowed mutably.
        let count = unsafe { uffd.read_to(inbox, MESSAGES_PER_READ)? };
        if count == 0 {
            return Ok(Vec::new());
        }
        self.used = count;
        let mut events = Vec::with_capacity(count);
        for index in 0..count {
            let message = self.message(index);
            if let Some(note) = message.said().and_then(|said| Note::of(member, said)) {
                self.append(note);
            }
            // SAFETY: the kernel has just written it, and each message is taken once.
            events.extend(unsafe { message.take() });
        }
        self.root.batch = batch;
        self.commit();
        Ok(events)
    }

    fn message(&self, index: usize) -> Message {
        let at = INBOX_AT + index * MESSAGE_WORDS;
        Message(std::array::from_fn(|word| {
            self.word(at + word).load(Ordering::Acquire)
        }))
    }

    /// Everything noted so far is in `state` from now on.
    pub fn checkpoint(&mut self, state: &[u8]) -> io::Result<()> {
        let place = 1 - self.root.place;
        self.file.write_all_at(state, CHECKPOINTS_AT[place])?;
        self.word(LENGTHS[place])
            .store(state.len() as u64, Ordering::Release);
        let old = self.root.place;
        self.root.place = place;
        self.root.length = 0;
        self.commit();
        // The old one is never looked at again; that its memory stays is all that can go wrong.
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let _ = fallocate(
            &self.file,
            hole,
            CHECKPOINTS_AT[old] as i64,
            MAX_CHECKPOINT_BYTES as i64,
        );
        Ok(())
    }

    /// The bytes of the head and of everything noted since the last checkpoint, as a successor finds them.
    pub fn content(&self) -> io::Result<Vec<u8>> {
        let words = LOG_AT + self.root.length * NOTE_WORDS;
        let mut bytes = vec![0; words * size_of::<u64>()];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// What a killed program noted in the journal `fd`.
    pub fn recover(fd: OwnedFd) -> io::Result<Recovered> {
        let damaged = || io::Error::other("the journal makes no sense");
        let file = File::from(fd);
        let bytes = file.metadata()?.len();
        if bytes < BYTES as u64 {
            return Err(damaged());
        }
        let journal = Journal::map(file)?;
        let root = Root::decode(journal.word(ROOT).load(Ordering::Acquire));
        if journal.word(0).load(Ordering::Acquire) != MAGIC || root.length > LOG_NOTES {
            return Err(damaged());
        }
        let length = journal.word(LENGTHS[root.place]).load(Ordering::Acquire);
        let there = bytes.saturating_sub(CHECKPOINTS_AT[root.place]);
        if length > MAX_CHECKPOINT_BYTES.min(there) {
            return Err(damaged());
        }
        let mut checkpoint = vec![0; length as usize];
        journal
            .file
            .read_exact_at(&mut checkpoint, CHECKPOINTS_AT[root.place])?;
        let notes = (0..root.length).map(|index| journal.noted(index));
        let mut notes: Vec<Note> = notes.collect::<Option<_>>().ok_or_else(damaged)?;
        notes.extend(journal.unnoted(root));
        Ok(Recovered {
            checkpoint: (length > 0).then_some(checkpoint),
            notes,
        })
    }

    fn noted(&self, index: usize) -> Option<Note> {
        let at = LOG_AT + index * NOTE_WORDS;
        let load = |word: usize| self.word(at + word).load(Ordering::Relaxed);
        Some(Note {
            change: Change::decode(std::array::from_fn(load))?,
            detail: load(CHANGE_WORDS),
            extra: load(CHANGE_WORDS + 1),
        })
    }

    /// Events that were read, and whose reader was killed before it noted them.
    fn unnoted(&self, root: Root) -> Vec<Note> {
        let head = self.word(INBOX).load(Ordering::Acquire);
        if head as u32 != root.next_batch() {
            return Vec::new();
        }
        let member = MemberId((head >> 32) as usize);
        let messages = (0..MESSAGES_PER_READ).map(|index| self.message(index));
        messages
            .filter_map(|message| Note::of(member, message.said()?))
            .collect()
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody can use any more.
        let unmapped = unsafe { munmap(self.memory.cast(), BYTES) };
        debug_assert!(unmapped.is_ok());
    }
}

impl Note {
    /// What is to be noted of an event. Faults are not: who waits is woken, and faults again.
    fn of(member: MemberId, said: Said) -> Option<Self> {
        Some(match said {
            Said::Fault(_) => return None,
            Said::Fork(fd) => Note::of_descriptor(Change::Fork(member), fd),
            Said::Remap(from, to) => Change::Remap(member, from, to).into(),
            Said::Remove(pages) => Change::Remove(member, pages).into(),
            Said::Unmap(pages) => Change::Unmap(member, pages).into(),
        })
    }

    /// A change that brought a descriptor, by its number in the table that this program and its keeper share.
    pub fn of_descriptor(change: Change, fd: RawFd) -> Self {
        Note {
            detail: u64::from(fd.unsigned_abs()),
            ..change.into()
        }
    }

    /// The number of the descriptor that came with the change.
    pub fn descriptor(&self) -> RawFd {
        self.detail as RawFd
    }
}

/// Where a family's events go: into a journal, or nowhere that outlives us.
#[derive(Debug)]
pub enum Inbox {
    /// Only for as long as they are looked at.
    Plain(Box<[Message; MESSAGES_PER_READ]>),
    /// Into a journal.
    Kept(Box<Journal>),
}

impl Default for Inbox {
    fn default() -> Self {
        Inbox::Plain(Box::new([Message::default(); MESSAGES_PER_READ]))
    }
}

impl Inbox {
    /// Reads events, and notes them.
    pub fn read(&mut self, uffd: &UserFault) -> Result<Vec<MemoryEvent>, ReadError> {
        match self {
            Inbox::Kept(journal) => journal.read(uffd),
            Inbox::Plain(messages) => {
                // SAFETY: the buffer is ours and as long as it says.
                let count = unsafe { uffd.read_to(messages.as_mut_ptr(), MESSAGES_PER_READ)? };
                let messages = messages[..count].iter();
                // SAFETY: the kernel has just written them, and each is taken once.
                Ok(messages
                    .filter_map(|message| unsafe { message.take() })
                    .collect())
            }
        }
    }
}

impl Buffer for Inbox {
    fn begin(&mut self, member: MemberId) {
        if let Inbox::Kept(journal) = self {
            journal.member = member;
        }
    }

    fn note(&mut self, note: Note) {
        if let Inbox::Kept(journal) = self {
            journal.note(note);
        }
    }

    fn is_full(&self) -> bool {
        matches!(self, Inbox::Kept(journal) if journal.room() <= MESSAGES_PER_READ)
    }

    fn checkpoint(&mut self, state: &[u8]) -> io::Result<()> {
        match self {
            Inbox::Kept(journal) => journal.checkpoint(state),
            Inbox::Plain(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use common::page::{PageIndex, PageRange};

    use super::*;

    fn copy(journal: &Journal) -> OwnedFd {
        journal.file.as_fd().try_clone_to_owned().expect("a copy")
    }

    fn removal(page: u64) -> Note {
        Change::Remove(MemberId(3), PageRange::new(PageIndex(page), 1)).into()
    }

    #[test]
    fn a_successor_finds_what_was_noted() {
        let mut journal = Journal::new(ImagePid(7)).expect("memory");
        let notes: Vec<Note> = (0..5).map(removal).collect();
        for note in &notes {
            journal.note(*note);
        }
        let found = Journal::recover(copy(&journal)).expect("whole");
        assert_eq!(found.notes, notes);
        assert_eq!(found.checkpoint, None);
        for state in [b"one".as_slice(), b"another", b"third"] {
            journal.checkpoint(state).expect("room");
            journal.note(removal(9));
            let found = Journal::recover(copy(&journal)).expect("whole");
            assert_eq!(found.checkpoint.as_deref(), Some(state));
            assert_eq!(found.notes, [removal(9)]);
        }
    }

    #[test]
    fn events_that_were_read_and_not_noted_are_found_once() {
        let mut journal = Journal::new(ImagePid(7)).expect("memory");
        journal.note(removal(1));
        // What is there when a reader was killed right after the kernel wrote.
        let batch = journal.root.next_batch();
        journal
            .word(INBOX)
            .store(u64::from(batch) | 3 << 32, Ordering::Release);
        let message = [0x15, 2 << 12, 3 << 12, 0];
        for (index, word) in message.into_iter().enumerate() {
            journal
                .word(INBOX_AT + index)
                .store(word, Ordering::Release);
        }
        let found = Journal::recover(copy(&journal)).expect("whole");
        assert_eq!(found.notes, [removal(1), removal(2)]);
        journal.append(removal(2));
        journal.root.batch = batch;
        journal.commit();
        let found = Journal::recover(copy(&journal)).expect("whole");
        assert_eq!(found.notes, [removal(1), removal(2)]);
    }

    #[test]
    fn its_memory_has_a_name() {
        assert_eq!(
            Journal::named_by("/memfd:postcopy-journal-42 (deleted)"),
            Some(ImagePid(42))
        );
        assert_eq!(Journal::named_by("/memfd:other-42 (deleted)"), None);
        assert_eq!(Journal::named_by("anon_inode:[userfaultfd]"), None);
    }
}
