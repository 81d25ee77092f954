//! Files of the workload: requests at the beginning of their own streams on the bulk connection.

use serde::{Deserialize, Serialize};

/// Which files come along, as the source's operator says it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesFacts {
    /// Directories the source sends.
    pub sync: Vec<String>,
    /// Both hosts have the same files.
    pub shared: bool,
}

/// What the destination asks for; one request a stream, in the format of the control stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FilesRequest {
    /// An `rsync` that sends the tree at `path`. `arguments` are those its other end asks for; the rest of the stream
    /// is rsync's own protocol.
    Rsync {
        /// The tree.
        path: String,
        /// What follows `rsync` on its command line.
        arguments: Vec<String>,
    },
    /// The files below `path` whose times do not tell whether they are equal: those that changed since rsync was asked for
    /// first, and those the workload has, or then had, mapped shared and writable. [`MappedFiles`] is the answer.
    Mapped {
        /// The tree.
        path: String,
    },
    /// What changed below `path` since rsync was asked for it first: [`Changes`] is the answer. A source of an earlier
    /// release does not know this and ends the stream; then everything has to be compared.
    Changed {
        /// The tree.
        path: String,
    },
}

/// What has to be compared again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Changes {
    /// The whole tree.
    Everything,
    /// These paths relative to the tree; of those that end with a slash all entries, but not what is below them.
    Only(Vec<Vec<u8>>),
}

/// Paths relative to the tree, to be compared whatever their times say. Names need not be UTF-8.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedFiles(pub Vec<Vec<u8>>);
