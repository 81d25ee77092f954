//! The packed frame: a run of pages of one process on the bulk stream, made shorter than the pages are.
//!
//! Pages that were pushed shortly before are *referred* to by their number in the [recent pages](crate::recent), and
//! the others may be [compressed](crate::compression) together.

use super::ProtoError;
use super::demand::{split_u32, split_u64};
use super::pages::{DATA_HEADER_BYTES, DataHeader};
use crate::images::ImagePid;
use crate::limits::{MAX_FRAME_PAGES, RECENT_PAGES};
use crate::page::{PageIndex, PageRange, pages_to_bytes};

/// First byte of a packed frame.
pub const TAG_PACKED: u8 = 0x13;

/// Bytes of one reference.
pub const REFERENCE_BYTES: usize = size_of::<u32>();

const FLAG_KEPT: u8 = 1;

/// How the pages that are carried are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// As they are, one after the other.
    Raw,
    /// As one Zstandard frame of all of them.
    Zstd,
}

impl Body {
    fn to_byte(self) -> u8 {
        match self {
            Body::Raw => 1,
            Body::Zstd => 2,
        }
    }

    fn from_byte(byte: u8) -> Result<Self, ProtoError> {
        match byte {
            1 => Ok(Body::Raw),
            2 => Ok(Body::Zstd),
            _ => Err(ProtoError::Field("encoding")),
        }
    }
}

/// Header of a packed frame. The payload is one reference for each page in `referred`, then the body with the pages
/// that are neither zero nor referred to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedHeader {
    /// The process whose pages these are.
    pub pid: ImagePid,
    /// Which pages, at most [`MAX_FRAME_PAGES`].
    pub pages: PageRange,
    /// Bit `n` set: page `n` of the run is all zeros and not in the payload.
    pub zero: u64,
    /// Bit `n` set: page `n` of the run equals a recent page. The recent pages are meant as they were before this frame.
    pub referred: u64,
    /// The pages of the body become recent pages.
    pub kept: bool,
    /// How the body is written.
    pub body: Body,
    /// Bytes of the payload.
    pub payload: u32,
}

impl PackedHeader {
    /// How many pages are referred to.
    pub fn references(&self) -> usize {
        self.referred.count_ones() as usize
    }

    /// How many pages the body holds.
    pub fn stored_pages(&self) -> u64 {
        self.pages.count - u64::from((self.zero | self.referred).count_ones())
    }

    /// Whether page `n` of the run equals a recent one.
    pub fn is_referred(&self, n: usize) -> bool {
        self.referred >> n & 1 == 1
    }

    /// The header of a data frame with the same pages.
    pub fn unpacked(&self) -> DataHeader {
        DataHeader::raw(self.pid, self.pages, self.zero)
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; DATA_HEADER_BYTES] {
        let mut header = [0; DATA_HEADER_BYTES];
        header[0] = TAG_PACKED;
        header[1] = self.body.to_byte();
        header[2..4].copy_from_slice(&(self.pages.count as u16).to_le_bytes());
        header[4..8].copy_from_slice(&self.payload.to_le_bytes());
        header[8..12].copy_from_slice(&self.pid.0.to_le_bytes());
        header[12..14].copy_from_slice(&(self.referred as u16).to_le_bytes());
        header[14] = if self.kept { FLAG_KEPT } else { 0 };
        header[16..24].copy_from_slice(&self.pages.start.0.to_le_bytes());
        header[24..32].copy_from_slice(&self.zero.to_le_bytes());
        header
    }

    /// Reads a header back and checks that its numbers fit each other.
    pub fn decode(header: &[u8; DATA_HEADER_BYTES]) -> Result<Self, ProtoError> {
        let [tag, body, count_low, count_high, rest @ ..] = header;
        if *tag != TAG_PACKED {
            return Err(ProtoError::UnknownTag(*tag));
        }
        let (payload, rest) = split_u32(rest);
        let (pid, rest) = split_u32(rest);
        let (marks, rest) = split_u32(rest);
        let (start, rest) = split_u64(rest);
        let (zero, _) = split_u64(rest);
        let count = u64::from(u16::from_le_bytes([*count_low, *count_high]));
        let flags = marks >> u16::BITS;
        if flags > u32::from(FLAG_KEPT) {
            return Err(ProtoError::Field("flag"));
        }
        let header = PackedHeader {
            pid: ImagePid(pid),
            pages: PageRange::new(PageIndex(start), count),
            zero,
            referred: u64::from(marks as u16),
            kept: flags != 0,
            body: Body::from_byte(*body)?,
            payload,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), ProtoError> {
        let count = self.pages.count;
        if count == 0 || count > MAX_FRAME_PAGES as u64 || !self.pages.is_addressable() {
            return Err(ProtoError::Field("page range"));
        }
        if (self.zero | self.referred) >> count != 0 || self.zero & self.referred != 0 {
            return Err(ProtoError::Field("page bitmap"));
        }
        let references = (self.references() * REFERENCE_BYTES) as u64;
        let stored = pages_to_bytes(self.stored_pages());
        let fits = match u64::from(self.payload).checked_sub(references) {
            Some(body) if self.body == Body::Raw => body == stored,
            Some(body) => body > 0 && body < stored,
            None => false,
        };
        if fits {
            return Ok(());
        }
        Err(ProtoError::Field("payload length"))
    }
}

/// Reads the references at the front of a payload: numbers of recent pages.
pub fn references(bytes: &[u8]) -> impl Iterator<Item = Result<usize, ProtoError>> {
    bytes.chunks_exact(REFERENCE_BYTES).map(|bytes| {
        let (slot, _) = split_u32(bytes);
        let slot = slot as usize;
        if slot >= RECENT_PAGES {
            return Err(ProtoError::Field("reference"));
        }
        Ok(slot)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(count: u64, zero: u64, referred: u64, body: Body) -> PackedHeader {
        let mut header = PackedHeader {
            pid: ImagePid(5),
            pages: PageRange::new(PageIndex(77), count),
            zero,
            referred,
            kept: true,
            body,
            payload: 0,
        };
        let references = header.references() * REFERENCE_BYTES;
        let stored = pages_to_bytes(header.stored_pages());
        let body = if body == Body::Raw {
            stored
        } else {
            stored / 2
        };
        header.payload = references as u32 + body as u32;
        header
    }

    proptest! {
        #[test]
        fn headers_survive_the_way(count in 1u64..17, bits: u64, marks: u64, kept: bool) {
            let zero = bits & ((1 << count) - 1);
            let referred = marks & ((1 << count) - 1) & !zero;
            let header = PackedHeader { kept, ..header(count, zero, referred, Body::Raw) };
            prop_assert_eq!(PackedHeader::decode(&header.encode()).ok(), Some(header));
        }

        #[test]
        fn no_bytes_make_a_header_that_lies(mut bytes: [u8; DATA_HEADER_BYTES], small: bool) {
            bytes[0] = TAG_PACKED;
            if small {
                bytes[1] = 1 + bytes[1] % 2;
                bytes[3] = 0;
                bytes[15] = 0;
            }
            if let Ok(header) = PackedHeader::decode(&bytes) {
                prop_assert!(header.pages.count <= MAX_FRAME_PAGES as u64);
                let most = pages_to_bytes(header.pages.count);
                prop_assert!(u64::from(header.payload) <= most);
                prop_assert_eq!(PackedHeader::decode(&header.encode()).ok(), Some(header));
            }
        }
    }

    #[test]
    fn impossible_headers_are_refused() {
        let good = header(4, 0b0001, 0b0010, Body::Zstd);
        assert!(PackedHeader::decode(&good.encode()).is_ok());
        let bad = [
            PackedHeader {
                zero: 0b0011,
                ..good
            },
            PackedHeader {
                referred: 0b1_0010,
                ..good
            },
            PackedHeader { payload: 3, ..good },
            PackedHeader { payload: 4, ..good },
            PackedHeader {
                payload: 4 + 8192,
                ..good
            },
            PackedHeader {
                body: Body::Raw,
                ..good
            },
            // Nothing is stored, so there is nothing to compress.
            PackedHeader {
                zero: 0b1101,
                payload: 4,
                ..good
            },
        ];
        for header in bad {
            assert!(
                PackedHeader::decode(&header.encode()).is_err(),
                "{header:?}"
            );
        }
    }

    #[test]
    fn references_beyond_the_recent_pages_are_refused() {
        let bytes: Vec<u8> = [0, 7, RECENT_PAGES as u32]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        let read: Vec<_> = references(&bytes).map(Result::ok).collect();
        assert_eq!(read, [Some(0), Some(7), None]);
    }
}
