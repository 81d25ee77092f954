//! The few CRIU image files both ends read: who was dumped, with which lazy pages, and where its threads stood.
//!
//! Field numbers and magics are facts of CRIU's image format (`images/*.proto`, `criu/include/magic.h`, 4.2); the
//! structs are ours and name only the fields we use.

mod core;
mod fingerprint;
mod framing;
mod inventory;
mod mm;
mod pagemap;
mod process;
mod pstree;

pub use self::core::{ThreadRegisters, parse_core};
pub use self::fingerprint::{ImagesDigest, images_digest};
pub use self::inventory::{run_id, without_network_lock};
pub use self::mm::{AddressSpaceLayout, DumpedVma, parse_mm};
pub use self::pagemap::{
    Pagemap, StoredPages, StoredRun, parse_pagemap, parse_stored_pages, without_lazy_content,
};
pub use self::process::{DumpedProcess, ReadImagesError, read_processes};
pub use self::pstree::{ImagePid, TreeEntry, parse_pstree};

/// Why an image file could not be understood.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file does not start with the magic numbers of its kind.
    #[error("magic numbers {found:#x?} where {expected:#x?} belong: not an image of this kind")]
    Magic {
        /// What the file starts with.
        found: [u32; 2],
        /// What it should start with.
        expected: [u32; 2],
    },
    /// The file ends within a message.
    #[error("the file ends in the middle of a message at byte {0}")]
    Truncated(usize),
    /// A message is longer than the limit.
    #[error("a message of {0} bytes is longer than any CRIU writes")]
    TooLong(usize),
    /// A message is not valid protobuf.
    #[error("malformed message")]
    Malformed(#[from] prost::DecodeError),
    /// A message is missing that the kind of file must hold.
    #[error("the file holds no {0}")]
    Missing(&'static str),
    /// The lazy pages do not form a map.
    #[error(transparent)]
    LazyMap(#[from] crate::lazy_map::LazyMapError),
    /// More tasks than a tree may have.
    #[error("more than {} processes", crate::limits::MAX_PROCESSES)]
    TooManyProcesses,
}
