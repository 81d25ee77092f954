//! Frames of the bulk stream, source to destination: the skeleton's files, then pages.

use super::ProtoError;
use super::demand::{split_u32, split_u64};
use super::packed::{PackedHeader, TAG_PACKED};
use super::pages::{DATA_HEADER_BYTES, DataHeader, TAG_DATA};
use crate::limits::{MAX_SKELETON_CHUNK_BYTES, MAX_SKELETON_FILE_BYTES, MAX_SKELETON_FILES};

/// Every header on the bulk stream from the source has this size, so a reader always knows how much to read.
pub const BULK_HEADER_BYTES: usize = DATA_HEADER_BYTES;

const TAG_FILE: u8 = 0x41;
const TAG_SKELETON_END: u8 = 0x42;
/// Longest name in the closed set of skeleton files, with the numbers CRIU puts in.
pub const MAX_NAME_BYTES: usize = 64;

/// A header on the bulk stream, source to destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BulkHeader {
    /// Part of a skeleton file: the name follows, then `payload` bytes that belong at `offset`.
    File {
        /// Bytes of the name.
        name: u8,
        /// Where in the file the payload belongs.
        offset: u64,
        /// Bytes of payload, 0 for an empty file.
        payload: u32,
    },
    /// All files have been sent.
    SkeletonEnd {
        /// How many.
        files: u32,
        /// Their bytes in all.
        bytes: u64,
    },
    /// Pages.
    Data(DataHeader),
    /// Pages, made shorter.
    Packed(PackedHeader),
}

impl BulkHeader {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; BULK_HEADER_BYTES] {
        let mut header = [0; BULK_HEADER_BYTES];
        match self {
            BulkHeader::Data(data) => return data.encode(),
            BulkHeader::Packed(packed) => return packed.encode(),
            BulkHeader::File {
                name,
                offset,
                payload,
            } => {
                header[0] = TAG_FILE;
                header[1] = *name;
                header[4..8].copy_from_slice(&payload.to_le_bytes());
                header[8..16].copy_from_slice(&offset.to_le_bytes());
            }
            BulkHeader::SkeletonEnd { files, bytes } => {
                header[0] = TAG_SKELETON_END;
                header[4..8].copy_from_slice(&files.to_le_bytes());
                header[8..16].copy_from_slice(&bytes.to_le_bytes());
            }
        }
        header
    }

    /// Reads a header back.
    pub fn decode(header: &[u8; BULK_HEADER_BYTES]) -> Result<Self, ProtoError> {
        let [tag, name, _, _, rest @ ..] = header;
        let (first, rest) = split_u32(rest);
        let (second, _) = split_u64(rest);
        match *tag {
            TAG_DATA => Ok(BulkHeader::Data(DataHeader::decode(header)?)),
            TAG_PACKED => Ok(BulkHeader::Packed(PackedHeader::decode(header)?)),
            TAG_FILE => file(*name, second, first),
            TAG_SKELETON_END if first as usize > MAX_SKELETON_FILES => {
                Err(ProtoError::Field("number of skeleton files"))
            }
            TAG_SKELETON_END => Ok(BulkHeader::SkeletonEnd {
                files: first,
                bytes: second,
            }),
            tag => Err(ProtoError::UnknownTag(tag)),
        }
    }
}

fn file(name: u8, offset: u64, payload: u32) -> Result<BulkHeader, ProtoError> {
    if name == 0 || usize::from(name) > MAX_NAME_BYTES {
        return Err(ProtoError::Field("skeleton file name"));
    }
    if payload as usize > MAX_SKELETON_CHUNK_BYTES {
        return Err(ProtoError::Field("skeleton payload length"));
    }
    if offset > MAX_SKELETON_FILE_BYTES {
        return Err(ProtoError::Field("skeleton file offset"));
    }
    Ok(BulkHeader::File {
        name,
        offset,
        payload,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_decode_to_what_encodes_back_or_fail(mut bytes: [u8; BULK_HEADER_BYTES], tag in 0usize..5) {
            bytes[0] = [TAG_DATA, TAG_FILE, TAG_SKELETON_END, TAG_PACKED, bytes[0]][tag];
            if let Ok(header) = BulkHeader::decode(&bytes) {
                prop_assert_eq!(BulkHeader::decode(&header.encode()).ok(), Some(header));
            }
        }
    }

    #[test]
    fn forged_lengths_are_refused() {
        let file = |name, payload| {
            BulkHeader::File {
                name,
                offset: 0,
                payload,
            }
            .encode()
        };
        assert!(BulkHeader::decode(&file(9, 100)).is_ok());
        assert!(BulkHeader::decode(&file(0, 100)).is_err());
        assert!(BulkHeader::decode(&file(255, 100)).is_err());
        assert!(BulkHeader::decode(&file(9, u32::MAX)).is_err());
    }
}
