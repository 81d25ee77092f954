//! Reads pages and makes the data frame that carries them.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use common::digest::{page_hash, zero_page_hash};
use common::limits::MAX_FRAME_PAGES;
use common::page::{is_zero, page_in_buffer};
use common::proto::pages::{DATA_HEADER_BYTES, DataHeader};

use crate::memory::{MemoryError, PageSource};
use crate::pending::Run;

/// Buffers kept for use again: 2 MiB, more than is on a path without delay. On a long path the others are not kept.
const MAX_LENT: usize = 32;

/// A frame of pages ready to be sent.
#[derive(Debug)]
pub struct Frame {
    /// Header and payload.
    pub bytes: Bytes,
    /// What its pages hold.
    pub contents: Contents,
}

/// What the pages of a run hold, as they were read.
#[derive(Clone, Copy, Debug)]
pub struct Contents {
    /// Which pages.
    pub run: Run,
    /// Bit `n` set: page `n` is all zeros.
    pub zero: u64,
    hashes: [u64; MAX_FRAME_PAGES],
}

/// Buffers of frames, used again when the connection has let go of them: else each would be asked of the allocator, and
/// cleared, which is a fourth of what copying its content costs.
#[derive(Debug, Default)]
pub struct Buffers {
    /// The oldest first, which is acknowledged before the others.
    lent: VecDeque<Bytes>,
}

/// A run of pages as it was read.
#[derive(Debug)]
pub struct Loaded {
    /// What they hold.
    pub contents: Contents,
    /// Room for a header, then the pages.
    bytes: BytesMut,
}

/// Reads `run` and frames it.
pub fn read(source: &dyn PageSource, run: Run) -> Result<Frame, MemoryError> {
    let loaded = load(source, run)?;
    let header = DataHeader::raw(run.pid, run.pages, loaded.contents.zero);
    Ok(loaded.into_frame(&header.encode()))
}

/// Reads `run`.
pub fn load(source: &dyn PageSource, run: Run) -> Result<Loaded, MemoryError> {
    load_into(BytesMut::new(), source, run)
}

/// The same, into a buffer that is there already; what it holds does not matter.
pub fn load_into(
    mut bytes: BytesMut,
    source: &dyn PageSource,
    run: Run,
) -> Result<Loaded, MemoryError> {
    bytes.resize(DATA_HEADER_BYTES + run.pages.bytes() as usize, 0);
    source.read(run.pid, run.pages, &mut bytes[DATA_HEADER_BYTES..])?;
    let contents = Contents::of(run, &bytes[DATA_HEADER_BYTES..]);
    Ok(Loaded { contents, bytes })
}

impl Contents {
    fn of(run: Run, content: &[u8]) -> Self {
        let mut contents = Contents {
            run,
            zero: 0,
            hashes: [0; MAX_FRAME_PAGES],
        };
        let hashes = contents.hashes.iter_mut().enumerate();
        for (index, hash) in hashes.take(run.pages.count as usize) {
            let page = run.pages.start.forward(index as u64);
            let bytes = &content[page_in_buffer(index)];
            if is_zero(bytes) {
                contents.zero |= 1 << index;
                *hash = zero_page_hash(run.pid, page);
            } else {
                *hash = page_hash(run.pid, page, bytes);
            }
        }
        contents
    }

    /// The sum of the hashes of the pages whose bit in `pages` is set: what they add to the digest.
    pub fn digest(&self, pages: u64) -> u64 {
        let hashes = self.hashes.iter().enumerate();
        let wanted = hashes.filter(|(index, _)| pages >> index & 1 == 1);
        wanted.fold(0, |sum, (_, hash)| sum.wrapping_add(*hash))
    }

    /// The same for all of them.
    pub fn whole_digest(&self) -> u64 {
        self.digest(u64::MAX)
    }
}

impl Buffers {
    /// A buffer nobody uses, or a new one.
    pub fn take(&mut self) -> BytesMut {
        match self.lent.pop_front().map(Bytes::try_into_mut) {
            Some(Ok(bytes)) => bytes,
            Some(Err(in_use)) => {
                self.lent.push_front(in_use);
                BytesMut::new()
            }
            None => BytesMut::new(),
        }
    }

    /// `bytes` may be used again once everybody else has dropped them.
    pub fn lend(&mut self, bytes: &Bytes) {
        if self.lent.len() < MAX_LENT {
            self.lent.push_back(bytes.clone());
        }
    }
}

impl Loaded {
    /// Page number `index` of the run.
    pub fn page(&self, index: usize) -> &[u8] {
        &self.bytes[at(index)]
    }

    /// The numbers of the pages whose bit in `left_out` is clear.
    pub fn pages_besides(&self, left_out: u64) -> impl Iterator<Item = usize> + use<> {
        let count = self.contents.run.pages.count as usize;
        (0..count).filter(move |index| left_out >> index & 1 == 0)
    }

    /// A frame of all pages but zero pages, as they are, behind `header`.
    pub fn into_frame(mut self, header: &[u8; DATA_HEADER_BYTES]) -> Frame {
        if self.contents.zero != 0 {
            let stored = self.close_gaps();
            self.bytes.truncate(stored);
        }
        self.bytes[..DATA_HEADER_BYTES].copy_from_slice(header);
        Frame {
            bytes: self.bytes.freeze(),
            contents: self.contents,
        }
    }

    /// Moves the pages that are carried together; returns the frame's length.
    fn close_gaps(&mut self) -> usize {
        let mut stored = 0;
        for index in self.pages_besides(self.contents.zero) {
            if stored != index {
                self.bytes.copy_within(at(index), at(stored).start);
            }
            stored += 1;
        }
        at(stored).start
    }
}

/// Where page number `index` lies in a frame.
fn at(index: usize) -> Range<usize> {
    let page = page_in_buffer(index);
    DATA_HEADER_BYTES + page.start..DATA_HEADER_BYTES + page.end
}

#[cfg(test)]
mod tests {
    use common::images::ImagePid;
    use common::page::{PAGE_SIZE, PageIndex, PageRange};

    use super::*;
    use crate::memory::numbered::Numbered;

    #[test]
    fn zero_pages_are_marked_and_left_out() {
        let run = Run {
            pid: ImagePid(1),
            pages: PageRange::new(PageIndex(254), 5),
        };
        let frame = read(&Numbered, run).expect("readable");
        let (header, payload) = frame.bytes.split_at(DATA_HEADER_BYTES);
        let header = DataHeader::decode(header.try_into().expect("a header")).expect("valid");
        assert_eq!(header.zero, 0b00100);
        let first_bytes: Vec<u8> = payload.iter().step_by(PAGE_SIZE).copied().collect();
        assert_eq!(first_bytes, [254, 255, 1, 2]);
        assert_eq!(payload.len(), header.payload as usize);
        assert_eq!(frame.contents.zero, header.zero);
    }

    #[test]
    fn buffers_are_used_again_when_nobody_has_them() {
        let run = |count| Run {
            pid: ImagePid(1),
            pages: PageRange::new(PageIndex(254), count),
        };
        let mut buffers = Buffers::default();
        let mut frame = |count| {
            let loaded = load_into(buffers.take(), &Numbered, run(count)).expect("readable");
            let header = DataHeader::raw(ImagePid(1), run(count).pages, loaded.contents.zero);
            let bytes = loaded.into_frame(&header.encode()).bytes;
            let fresh = read(&Numbered, run(count)).expect("readable").bytes;
            assert_eq!(bytes, fresh, "whatever was in the buffer before");
            buffers.lend(&bytes);
            bytes
        };
        let first = frame(5);
        let second = frame(5);
        assert_ne!(first.as_ptr(), second.as_ptr(), "both are in use");
        let place = first.as_ptr();
        drop(first);
        // Shorter and longer than what was there: page 256 is zero and was left out.
        assert_eq!(frame(2).as_ptr(), place);
        drop(second);
        frame(5);
        frame(9);
    }

    #[test]
    fn a_digest_is_of_the_pages_it_is_asked_for() {
        let read = |start, count| {
            let run = Run {
                pid: ImagePid(1),
                pages: PageRange::new(PageIndex(start), count),
            };
            read(&Numbered, run).expect("readable").contents
        };
        let both = read(255, 2);
        assert_eq!(both.zero, 0b10);
        assert_eq!(both.digest(0b01), read(255, 1).whole_digest());
        assert_eq!(both.digest(0b10), read(256, 1).whole_digest());
        let sum = both.digest(0b01).wrapping_add(both.digest(0b10));
        assert_eq!(both.whole_digest(), sum);
        assert_eq!(both.digest(0), 0);
    }
}
