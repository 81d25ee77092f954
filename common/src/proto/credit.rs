//! What the destination sends on the bulk stream: how much may be pushed, and before that what it wants first.

use super::ProtoError;
use super::demand::{split_u32, split_u64};
use crate::images::ImagePid;
use crate::page::{PageIndex, PageRange};

/// Bytes of a credit frame.
pub const CREDIT_BYTES: usize = 8;

/// Bytes of one wanted run.
pub const WANTED_BYTES: usize = 16;

/// Runs in one piece of the wanted order: 64 KiB.
pub const MAX_WANTED_PIECE: usize = 4096;

/// Marks a piece of the wanted order; no total of bytes is that large.
const WANTED: u64 = 1 << 63;

/// One frame on the credit stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreditFrame {
    /// The total of bytes that may have been pushed.
    Total(u64),
    /// So many wanted runs follow; from version 2 on.
    Wanted(usize),
}

impl CreditFrame {
    /// The frame's bytes.
    pub fn encode(self) -> [u8; CREDIT_BYTES] {
        match self {
            CreditFrame::Total(bytes) => bytes.to_le_bytes(),
            CreditFrame::Wanted(runs) => (WANTED | runs as u64).to_le_bytes(),
        }
    }

    /// Reads a frame back.
    pub fn decode(frame: [u8; CREDIT_BYTES]) -> Result<Self, ProtoError> {
        let number = u64::from_le_bytes(frame);
        if number & WANTED == 0 {
            return Ok(CreditFrame::Total(number));
        }
        match usize::try_from(number & !WANTED) {
            Ok(runs) if (1..=MAX_WANTED_PIECE).contains(&runs) => Ok(CreditFrame::Wanted(runs)),
            _ => Err(ProtoError::Field("number of wanted runs")),
        }
    }
}

/// A run of pages that shall come before others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedRun {
    /// The process.
    pub pid: ImagePid,
    /// Its first page.
    pub start: PageIndex,
    /// Number of pages, not 0.
    pub count: u32,
}

impl WantedRun {
    /// Its pages.
    pub fn pages(&self) -> PageRange {
        PageRange::new(self.start, u64::from(self.count))
    }

    /// The run's bytes: process, number of pages, first page.
    pub fn encode(&self) -> [u8; WANTED_BYTES] {
        let mut bytes = [0; WANTED_BYTES];
        bytes[0..4].copy_from_slice(&self.pid.0.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.count.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.start.0.to_le_bytes());
        bytes
    }

    /// Reads a run back.
    pub fn decode(bytes: &[u8; WANTED_BYTES]) -> Result<Self, ProtoError> {
        let (pid, rest) = split_u32(bytes);
        let (count, rest) = split_u32(rest);
        let (start, _) = split_u64(rest);
        let run = WantedRun {
            pid: ImagePid(pid),
            start: PageIndex(start),
            count,
        };
        if count == 0 || !run.pages().is_addressable() {
            return Err(ProtoError::Field("page range"));
        }
        Ok(run)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_decode_to_what_encodes_back_or_fail(frame: [u8; CREDIT_BYTES], run: [u8; WANTED_BYTES]) {
            if let Ok(decoded) = CreditFrame::decode(frame) {
                prop_assert_eq!(decoded.encode(), frame);
            }
            if let Ok(decoded) = WantedRun::decode(&run) {
                prop_assert_eq!(decoded.encode(), run);
            }
        }

        #[test]
        fn frames_survive_the_way(total in 0u64..1 << 63, runs in 1..=MAX_WANTED_PIECE) {
            for frame in [CreditFrame::Total(total), CreditFrame::Wanted(runs)] {
                prop_assert_eq!(CreditFrame::decode(frame.encode()).ok(), Some(frame));
            }
        }
    }

    #[test]
    fn forged_numbers_are_refused() {
        for runs in [0, MAX_WANTED_PIECE as u64 + 1, WANTED - 1] {
            assert!(CreditFrame::decode((WANTED | runs).to_le_bytes()).is_err());
        }
        let run = |start, count| WantedRun {
            pid: ImagePid(1),
            start: PageIndex(start),
            count,
        };
        assert!(WantedRun::decode(&run(5, 0).encode()).is_err());
        assert!(WantedRun::decode(&run(u64::MAX, 1).encode()).is_err());
        assert!(WantedRun::decode(&run(5, 1).encode()).is_ok());
    }
}
