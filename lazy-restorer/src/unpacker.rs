//! Packed frames back into pages: what is compressed, and what only refers to a page that came shortly before.

use std::io;

use common::compression::Decompressor;
use common::limits::{MAX_FRAME_PAGES, RECENT_PAGES};
use common::page::page_in_buffer;
use common::proto::ProtoError;
use common::proto::packed::{Body, PackedHeader, REFERENCE_BYTES, references};
use common::recent::RecentSlots;

/// Unpacks the frames of one bulk stream, in their order.
#[derive(Debug)]
pub struct Unpacker {
    decompressor: Decompressor,
    slots: RecentSlots,
    /// Content of the recent pages as it came: what becomes of it in the workload's memory does not matter.
    recent: Vec<u8>,
    stored: Box<[u8]>,
    pages: Box<[u8]>,
}

impl Unpacker {
    /// For a new stream.
    pub fn new() -> io::Result<Self> {
        let room = page_in_buffer(MAX_FRAME_PAGES).start;
        Ok(Unpacker {
            decompressor: Decompressor::new()?,
            slots: RecentSlots::default(),
            // Becomes resident only as pages are kept.
            recent: Vec::with_capacity(page_in_buffer(RECENT_PAGES).start),
            stored: vec![0; room].into(),
            pages: vec![0; room].into(),
        })
    }

    /// The pages of a frame that are not zero, one after the other: the payload of [`PackedHeader::unpacked`].
    pub fn unpack<'a>(
        &'a mut self,
        header: &PackedHeader,
        payload: &'a [u8],
    ) -> Result<&'a [u8], ProtoError> {
        let (front, body) = payload.split_at(header.references() * REFERENCE_BYTES);
        let length = page_in_buffer(header.stored_pages() as usize).start;
        let stored = match header.body {
            Body::Raw => body,
            Body::Zstd => {
                let stored = &mut self.stored[..length];
                self.decompressor.decompress(body, stored)?;
                stored
            }
        };
        let mut count = 0;
        if header.referred != 0 {
            let mut slots = references(front);
            let mut next = 0;
            for index in 0..header.pages.count as usize {
                if header.unpacked().is_zero(index) {
                    continue;
                }
                let page = if header.is_referred(index) {
                    let slot = slots.next().ok_or(ProtoError::Field("payload length"))??;
                    if !self.slots.holds(slot) {
                        return Err(ProtoError::Field("reference"));
                    }
                    &self.recent[page_in_buffer(slot)]
                } else {
                    next += 1;
                    &stored[page_in_buffer(next - 1)]
                };
                self.pages[page_in_buffer(count)].copy_from_slice(page);
                count += 1;
            }
        }
        if header.kept {
            keep(&mut self.slots, &mut self.recent, stored);
        }
        match header.referred {
            0 => Ok(stored),
            _ => Ok(&self.pages[..page_in_buffer(count).start]),
        }
    }
}

/// Makes pages recent.
fn keep(slots: &mut RecentSlots, recent: &mut Vec<u8>, pages: &[u8]) {
    for page in pages.chunks_exact(page_in_buffer(0).len()) {
        let at = page_in_buffer(slots.advance());
        if at.start == recent.len() {
            recent.extend_from_slice(page);
        } else {
            recent[at].copy_from_slice(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use common::compression::Compressor;
    use common::images::ImagePid;
    use common::page::{PAGE_SIZE, PageIndex, PageRange};

    use super::*;

    fn header(count: u64, zero: u64, referred: u64) -> PackedHeader {
        PackedHeader {
            pid: ImagePid(1),
            pages: PageRange::new(PageIndex(10), count),
            zero,
            referred,
            kept: true,
            body: Body::Raw,
            payload: 0,
        }
    }

    fn pages(fill: &[u8]) -> Vec<u8> {
        fill.iter().flat_map(|byte| [*byte; PAGE_SIZE]).collect()
    }

    fn first_bytes(pages: &[u8]) -> Vec<u8> {
        pages.chunks_exact(PAGE_SIZE).map(|page| page[0]).collect()
    }

    #[test]
    fn references_mean_pages_as_they_came() {
        let mut unpacker = Unpacker::new().expect("memory");
        let payload = pages(&[1, 2]);
        let read = unpacker
            .unpack(&header(3, 0b010, 0), &payload)
            .expect("valid");
        assert_eq!(first_bytes(read), [1, 2]);
        let mut payload = Vec::new();
        for slot in [1_u32, 0] {
            payload.extend_from_slice(&slot.to_le_bytes());
        }
        payload.extend(pages(&[3]));
        let frame = header(4, 0b1000, 0b0101);
        let read = unpacker.unpack(&frame, &payload).expect("valid");
        assert_eq!(first_bytes(read), [2, 3, 1]);
        assert_eq!(
            unpacker.recent.len(),
            3 * PAGE_SIZE,
            "referred pages are not kept again"
        );
    }

    #[test]
    fn compressed_pages_become_recent_too() {
        let mut unpacker = Unpacker::new().expect("memory");
        let stored = pages(&[8, 9]);
        let mut payload = vec![0; stored.len()];
        let mut compressor = Compressor::new().expect("memory");
        let length = compressor
            .compress(&stored, &mut payload)
            .expect("it shrinks");
        payload.truncate(length);
        let frame = PackedHeader {
            body: Body::Zstd,
            ..header(2, 0, 0)
        };
        assert_eq!(unpacker.unpack(&frame, &payload).expect("valid"), stored);
        let reference = 1_u32.to_le_bytes();
        let read = unpacker.unpack(&header(1, 0, 1), &reference);
        assert_eq!(first_bytes(read.expect("valid")), [9]);
        payload.truncate(length - 1);
        assert!(unpacker.unpack(&frame, &payload).is_err());
    }

    #[test]
    fn what_never_came_cannot_be_referred_to() {
        let mut unpacker = Unpacker::new().expect("memory");
        let reference = |slot: u32| slot.to_le_bytes();
        let frame = header(1, 0, 1);
        assert!(unpacker.unpack(&frame, &reference(0)).is_err());
        let payload = pages(&[1]);
        unpacker.unpack(&header(1, 0, 0), &payload).expect("valid");
        assert!(unpacker.unpack(&frame, &reference(0)).is_ok());
        assert!(unpacker.unpack(&frame, &reference(1)).is_err());
        assert!(unpacker.unpack(&frame, &reference(u32::MAX)).is_err());
    }

    #[test]
    fn the_oldest_pages_are_forgotten() {
        let mut unpacker = Unpacker::new().expect("memory");
        for number in 0..RECENT_PAGES + 2 {
            let payload = pages(&[number as u8]);
            unpacker.unpack(&header(1, 0, 0), &payload).expect("valid");
        }
        assert_eq!(unpacker.recent.len(), RECENT_PAGES * PAGE_SIZE);
        let newest = (RECENT_PAGES + 1) as u8;
        let reference = 1_u32.to_le_bytes();
        let read = unpacker.unpack(&header(1, 0, 1), &reference);
        assert_eq!(first_bytes(read.expect("valid")), [newest]);
    }
}
