//! The data frame: a run of pages of one process, on the demand and on the bulk stream alike.

use super::ProtoError;
use super::demand::{split_u32, split_u64};
use super::packed::{PackedHeader, TAG_PACKED};
use crate::images::ImagePid;
use crate::limits::MAX_FRAME_PAGES;
use crate::page::{PageIndex, PageRange, pages_to_bytes};

/// Bytes of the header: tag, encoding, page count, payload length, process, reserved, first page, zero bitmap.
pub const DATA_HEADER_BYTES: usize = 32;

/// First byte of a data frame.
pub const TAG_DATA: u8 = 0x11;

const TAG_WITHHELD: u8 = 0x12;

/// What the source sends on the demand stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DemandReply {
    /// Pages; the payload follows.
    Data(DataHeader),
    /// Compressed pages, from version 3 on; the payload follows.
    Packed(PackedHeader),
    /// Confirms a discard: these pages have not been sent and never will be.
    Withheld(ImagePid, PageRange),
}

impl DemandReply {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; DATA_HEADER_BYTES] {
        let (pid, pages) = match self {
            DemandReply::Data(header) => return header.encode(),
            DemandReply::Packed(header) => return header.encode(),
            DemandReply::Withheld(pid, pages) => (pid, pages),
        };
        let mut header = [0; DATA_HEADER_BYTES];
        header[0] = TAG_WITHHELD;
        header[8..12].copy_from_slice(&pid.0.to_le_bytes());
        header[16..24].copy_from_slice(&pages.start.0.to_le_bytes());
        header[24..32].copy_from_slice(&pages.count.to_le_bytes());
        header
    }

    /// Reads a header back.
    pub fn decode(header: &[u8; DATA_HEADER_BYTES]) -> Result<Self, ProtoError> {
        if header[0] == TAG_PACKED {
            let packed = PackedHeader::decode(header)?;
            if packed.referred != 0 || packed.kept {
                return Err(ProtoError::Field("reference"));
            }
            return Ok(DemandReply::Packed(packed));
        }
        if header[0] != TAG_WITHHELD {
            return Ok(DemandReply::Data(DataHeader::decode(header)?));
        }
        let (pid, _) = split_u32(&header[8..]);
        let (start, rest) = split_u64(&header[16..]);
        let (count, _) = split_u64(rest);
        let pages = PageRange::new(PageIndex(start), count);
        if count == 0 || !pages.is_addressable() {
            return Err(ProtoError::Field("page range"));
        }
        Ok(DemandReply::Withheld(ImagePid(pid), pages))
    }
}

/// How the payload of a data frame is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// The pages as they are, one after the other.
    Raw,
}

impl Encoding {
    fn to_byte(self) -> u8 {
        match self {
            Encoding::Raw => 1,
        }
    }

    fn from_byte(byte: u8) -> Result<Self, ProtoError> {
        match byte {
            1 => Ok(Encoding::Raw),
            _ => Err(ProtoError::Field("encoding")),
        }
    }
}

/// Header of a data frame. The payload holds only pages whose bit in `zero` is clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataHeader {
    /// The process whose pages these are.
    pub pid: ImagePid,
    /// Which pages, at most [`MAX_FRAME_PAGES`].
    pub pages: PageRange,
    /// Bit `n` set: page `n` of the run is all zeros and not in the payload.
    pub zero: u64,
    /// How the payload is written.
    pub encoding: Encoding,
    /// Bytes of the payload.
    pub payload: u32,
}

impl DataHeader {
    /// Header for raw pages.
    pub fn raw(pid: ImagePid, pages: PageRange, zero: u64) -> Self {
        let stored = pages.count - u64::from(zero.count_ones());
        DataHeader {
            pid,
            pages,
            zero,
            encoding: Encoding::Raw,
            payload: pages_to_bytes(stored) as u32,
        }
    }

    /// How many pages the payload holds.
    pub fn stored_pages(&self) -> u64 {
        self.pages.count - u64::from(self.zero.count_ones())
    }

    /// Whether page `n` of the run is all zeros.
    pub fn is_zero(&self, n: usize) -> bool {
        self.zero >> n & 1 == 1
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; DATA_HEADER_BYTES] {
        let mut header = [0; DATA_HEADER_BYTES];
        header[0] = TAG_DATA;
        header[1] = self.encoding.to_byte();
        header[2..4].copy_from_slice(&(self.pages.count as u16).to_le_bytes());
        header[4..8].copy_from_slice(&self.payload.to_le_bytes());
        header[8..12].copy_from_slice(&self.pid.0.to_le_bytes());
        header[16..24].copy_from_slice(&self.pages.start.0.to_le_bytes());
        header[24..32].copy_from_slice(&self.zero.to_le_bytes());
        header
    }

    /// Reads a header back and checks that its numbers fit each other.
    pub fn decode(header: &[u8; DATA_HEADER_BYTES]) -> Result<Self, ProtoError> {
        let [tag, encoding, count_low, count_high, rest @ ..] = header;
        if *tag != TAG_DATA {
            return Err(ProtoError::UnknownTag(*tag));
        }
        let (payload, rest) = split_u32(rest);
        let (pid, rest) = split_u32(rest);
        let (_, rest) = split_u32(rest);
        let (start, rest) = split_u64(rest);
        let (zero, _) = split_u64(rest);
        let count = u64::from(u16::from_le_bytes([*count_low, *count_high]));
        let header = DataHeader {
            pid: ImagePid(pid),
            pages: PageRange::new(PageIndex(start), count),
            zero,
            encoding: Encoding::from_byte(*encoding)?,
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
        if self.zero >> count != 0 {
            return Err(ProtoError::Field("zero bitmap"));
        }
        match self.encoding {
            Encoding::Raw if u64::from(self.payload) != pages_to_bytes(self.stored_pages()) => {
                Err(ProtoError::Field("payload length"))
            }
            Encoding::Raw => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn headers_survive_the_way(pid: u32, start in 0u64..1 << 36, count in 1u64..17, bits: u64) {
            let zero = bits & ((1 << count) - 1);
            let header = DataHeader::raw(ImagePid(pid), PageRange::new(PageIndex(start), count), zero);
            prop_assert_eq!(DataHeader::decode(&header.encode()).ok(), Some(header));
        }

        #[test]
        fn confirmations_survive_the_way(pid: u32, start in 0u64..1 << 36, count in 1u64..1 << 30) {
            let reply = DemandReply::Withheld(ImagePid(pid), PageRange::new(PageIndex(start), count));
            prop_assert_eq!(DemandReply::decode(&reply.encode()).ok(), Some(reply));
        }

        #[test]
        fn no_bytes_make_a_header_that_lies(mut bytes: [u8; DATA_HEADER_BYTES]) {
            bytes[0] = TAG_DATA;
            if let Ok(header) = DataHeader::decode(&bytes) {
                prop_assert!(header.pages.count <= MAX_FRAME_PAGES as u64);
                prop_assert_eq!(u64::from(header.payload), pages_to_bytes(header.stored_pages()));
            }
        }
    }

    #[test]
    fn a_payload_that_does_not_fit_the_bitmap_is_refused() {
        let mut header = DataHeader::raw(ImagePid(1), PageRange::new(PageIndex(1), 2), 0b01);
        header.payload += 1;
        assert!(DataHeader::decode(&header.encode()).is_err());
        header = DataHeader::raw(ImagePid(1), PageRange::new(PageIndex(1), 2), 0b01);
        header.zero = 0b101;
        assert!(DataHeader::decode(&header.encode()).is_err());
    }
}
