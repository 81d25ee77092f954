//! What the destination sends on the demand stream: requests for pages, and pages it will never need.

use super::ProtoError;
use crate::images::ImagePid;
use crate::limits::MAX_FRAME_PAGES;
use crate::page::{PageIndex, PageRange};

/// Bytes of one demand frame: tag, 3 reserved, process, first page, count.
pub const DEMAND_FRAME_BYTES: usize = 24;

const TAG_REQUEST: u8 = 0x21;
const TAG_DISCARD: u8 = 0x22;

/// One frame on the demand stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DemandFrame {
    /// Send these pages now. At most [`MAX_FRAME_PAGES`]; the answer is one data frame.
    Request(ImagePid, PageRange),
    /// The workload removed these pages before they came; do not send them.
    Discard(ImagePid, PageRange),
}

impl DemandFrame {
    /// The frame's bytes.
    pub fn encode(self) -> [u8; DEMAND_FRAME_BYTES] {
        let (tag, pid, pages) = match self {
            DemandFrame::Request(pid, pages) => (TAG_REQUEST, pid, pages),
            DemandFrame::Discard(pid, pages) => (TAG_DISCARD, pid, pages),
        };
        let mut frame = [0; DEMAND_FRAME_BYTES];
        frame[0] = tag;
        frame[4..8].copy_from_slice(&pid.0.to_le_bytes());
        frame[8..16].copy_from_slice(&pages.start.0.to_le_bytes());
        frame[16..24].copy_from_slice(&pages.count.to_le_bytes());
        frame
    }

    /// Reads a frame back.
    pub fn decode(frame: &[u8; DEMAND_FRAME_BYTES]) -> Result<Self, ProtoError> {
        let [tag, _, _, _, rest @ ..] = frame;
        let (pid, rest) = split_u32(rest);
        let (start, rest) = split_u64(rest);
        let (count, _) = split_u64(rest);
        let pid = ImagePid(pid);
        let pages = PageRange::new(PageIndex(start), count);
        if pages.count == 0 || !pages.is_addressable() {
            return Err(ProtoError::Field("page range"));
        }
        match *tag {
            TAG_REQUEST if pages.count > MAX_FRAME_PAGES as u64 => {
                Err(ProtoError::Field("number of requested pages"))
            }
            TAG_REQUEST => Ok(DemandFrame::Request(pid, pages)),
            TAG_DISCARD => Ok(DemandFrame::Discard(pid, pages)),
            tag => Err(ProtoError::UnknownTag(tag)),
        }
    }
}

/// Takes a little-endian number off the front. Panics when the slice is shorter: callers pass fixed-size frames.
pub(super) fn split_u32(bytes: &[u8]) -> (u32, &[u8]) {
    let (head, rest) = bytes.split_first_chunk().expect("frames have a fixed size");
    (u32::from_le_bytes(*head), rest)
}

/// Like [`split_u32`] for 64 bits.
pub(super) fn split_u64(bytes: &[u8]) -> (u64, &[u8]) {
    let (head, rest) = bytes.split_first_chunk().expect("frames have a fixed size");
    (u64::from_le_bytes(*head), rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_decode_to_what_encodes_back_or_fail(frame: [u8; DEMAND_FRAME_BYTES]) {
            if let Ok(decoded) = DemandFrame::decode(&frame) {
                prop_assert_eq!(DemandFrame::decode(&decoded.encode()).ok(), Some(decoded));
            }
        }

        #[test]
        fn frames_survive_the_way(pid: u32, start in 0u64..1 << 36, count in 1u64..17, discard: bool) {
            let pages = PageRange::new(PageIndex(start), count);
            let frame = if discard {
                DemandFrame::Discard(ImagePid(pid), pages)
            } else {
                DemandFrame::Request(ImagePid(pid), pages)
            };
            prop_assert_eq!(DemandFrame::decode(&frame.encode()).ok(), Some(frame));
        }
    }

    #[test]
    fn impossible_ranges_are_refused() {
        for count in [0, MAX_FRAME_PAGES as u64 + 1, u64::MAX] {
            let pages = PageRange::new(PageIndex(1), count);
            let frame = DemandFrame::Request(ImagePid(1), pages).encode();
            assert!(DemandFrame::decode(&frame).is_err(), "{count} pages");
        }
    }
}
