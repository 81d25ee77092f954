//! The bytes of a session file: magic, version, length, checksum, and the session in postcard.

use xxhash_rust::xxh3::xxh3_64;

use super::SessionFile;
use crate::limits::{MAX_PROCESSES, MAX_SESSION_FILE_BYTES};

const MAGIC: [u8; 8] = *b"postcopy";
/// The version of this release. Another one is of another release, which alone may go on with its session.
const VERSION: u16 = 3;
/// Magic, version, length of the body, its hash.
const HEADER_BYTES: usize = 8 + 2 + 4 + 8;

/// Why bytes are no session file.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Something else.
    #[error("this is no session file")]
    Magic,
    /// Of another release.
    #[error("this session file has version {0}, this release knows {VERSION}")]
    Version(u16),
    /// Cut off, or with something behind it.
    #[error("the file has {found} bytes where {announced} belong")]
    Length {
        /// Bytes of the body.
        found: usize,
        /// Bytes it should have.
        announced: usize,
    },
    /// Longer than any session needs.
    #[error("the file has {0} bytes, more than any session needs")]
    TooLong(usize),
    /// Damaged.
    #[error("the file is damaged: its checksum differs")]
    Checksum,
    /// The body makes no sense.
    #[error("the file is malformed")]
    Malformed,
}

/// The session as bytes.
pub fn encode(file: &SessionFile) -> Result<Vec<u8>, DecodeError> {
    let body = postcard::to_extend(file, Vec::new()).map_err(|_| DecodeError::Malformed)?;
    if HEADER_BYTES + body.len() > MAX_SESSION_FILE_BYTES {
        return Err(DecodeError::TooLong(HEADER_BYTES + body.len()));
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend(xxh3_64(&body).to_le_bytes());
    bytes.extend(body);
    Ok(bytes)
}

/// The session of these bytes. Pure: it looks at nothing else, never panics, and allocates in proportion to `bytes`.
pub fn decode(bytes: &[u8]) -> Result<SessionFile, DecodeError> {
    if bytes.len() > MAX_SESSION_FILE_BYTES {
        return Err(DecodeError::TooLong(bytes.len()));
    }
    let (magic, rest) = bytes.split_first_chunk().ok_or(DecodeError::Magic)?;
    if *magic != MAGIC {
        return Err(DecodeError::Magic);
    }
    let cut = |announced| DecodeError::Length {
        found: bytes.len(),
        announced,
    };
    let (version, rest) = rest.split_first_chunk().ok_or(cut(HEADER_BYTES))?;
    let version = u16::from_le_bytes(*version);
    if version != VERSION {
        return Err(DecodeError::Version(version));
    }
    let (length, rest) = rest.split_first_chunk().ok_or(cut(HEADER_BYTES))?;
    let (checksum, body) = rest.split_first_chunk().ok_or(cut(HEADER_BYTES))?;
    let announced = u32::from_le_bytes(*length) as usize;
    if body.len() != announced {
        return Err(cut(HEADER_BYTES.saturating_add(announced)));
    }
    if xxh3_64(body) != u64::from_le_bytes(*checksum) {
        return Err(DecodeError::Checksum);
    }
    let (file, rest): (SessionFile, _) =
        postcard::take_from_bytes(body).map_err(|_| DecodeError::Malformed)?;
    let tasks = match &file.side {
        super::Side::Source(source) => source
            .original
            .frozen()
            .map_or(0, |frozen| frozen.tasks.len()),
        super::Side::Destination(destination) => destination.tasks.len(),
    };
    if !rest.is_empty() || tasks > MAX_PROCESSES {
        return Err(DecodeError::Malformed);
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::source_file;
    use super::*;

    #[test]
    fn a_file_is_read_back() {
        let file = source_file();
        let bytes = encode(&file).expect("small");
        assert_eq!(decode(&bytes), Ok(file));
    }

    #[test]
    fn every_truncation_and_every_changed_byte_is_refused() {
        let bytes = encode(&source_file()).expect("small");
        for end in 0..bytes.len() {
            assert!(decode(&bytes[..end]).is_err(), "{end}");
        }
        for index in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[index] ^= 0x41;
            assert!(decode(&damaged).is_err(), "{index}");
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(decode(&longer).is_err());
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = encode(&source_file()).expect("small");
        bytes[8] = 9;
        assert_eq!(decode(&bytes), Err(DecodeError::Version(9)));
    }

    proptest! {
        #[test]
        fn a_body_of_anything_never_panics(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend(VERSION.to_le_bytes());
            bytes.extend((body.len() as u32).to_le_bytes());
            bytes.extend(xxh3_64(&body).to_le_bytes());
            bytes.extend(body);
            let _ = decode(&bytes);
        }
    }
}
