//! The files and directories a workload has open, or mapped, or works in, compared before anything is frozen.
//!
//! Files are not moved with a workload. CRIU opens them again by their paths, and fails when one is not there, has another
//! type or other permissions, or another size: after the freeze, which is too late to say so.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::libc;
use serde::{Deserialize, Serialize};

/// A file or directory that must be on both hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFile {
    /// Where the workload sees it.
    pub path: String,
    /// Type and permissions, as `stat` has them.
    pub mode: u32,
    /// Its size, if it is a regular file that the workload does not write: then it is what it will be at the freeze.
    pub bytes: Option<u64>,
}

/// How a file differs from what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// It is not there, or cannot be reached.
    Missing,
    /// A directory in the place of a file, or something else.
    Type,
    /// Other permissions.
    Permissions {
        /// Those of the source.
        source: u32,
        /// Those it has.
        here: u32,
    },
    /// Another size.
    Size {
        /// Bytes on the source.
        source: u64,
        /// Bytes it has.
        here: u64,
    },
}

impl OpenFile {
    /// The file that `metadata` is of, when it is a regular file or a directory. What else there is (pipes, sockets,
    /// devices) is made anew.
    pub fn of(path: &str, metadata: &Metadata, is_written: bool) -> Option<Self> {
        if !metadata.is_file() && !metadata.is_dir() {
            return None;
        }
        Some(OpenFile {
            path: path.to_owned(),
            mode: metadata.mode(),
            bytes: (metadata.is_file() && !is_written).then_some(metadata.len()),
        })
    }

    /// How what is at `here` differs from this one, if it does.
    pub fn mismatch(&self, here: &Path) -> Option<Mismatch> {
        let Ok(metadata) = here.metadata() else {
            return Some(Mismatch::Missing);
        };
        let (kind, permissions) = (libc::S_IFMT, !libc::S_IFMT);
        if metadata.mode() & kind != self.mode & kind {
            return Some(Mismatch::Type);
        }
        if let Some(source) = self.bytes.filter(|bytes| *bytes != metadata.len()) {
            let here = metadata.len();
            return Some(Mismatch::Size { source, here });
        }
        (metadata.mode() != self.mode).then_some(Mismatch::Permissions {
            source: self.mode & permissions,
            here: metadata.mode() & permissions,
        })
    }
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Mismatch::Missing => f.write_str("is not here"),
            Mismatch::Type => f.write_str("is something else here"),
            Mismatch::Permissions { source, here } => {
                write!(f, "has permissions {here:o} here, not {source:o}")
            }
            Mismatch::Size { source, here } => {
                write!(f, "has {here} bytes here, not {source}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn open(path: &Path, is_written: bool) -> OpenFile {
        let metadata = path.metadata().expect("there");
        OpenFile::of("/data", &metadata, is_written).expect("a file")
    }

    #[test]
    fn what_criu_would_refuse_differs() {
        let dir = tempfile::tempdir().expect("a directory");
        let [a, b, c] = ["a", "b", "c"].map(|name| dir.path().join(name));
        fs::write(&a, "12345").expect("written");
        fs::write(&b, "54321").expect("written");
        let (read, written) = (open(&a, false), open(&a, true));
        assert_eq!(read.mismatch(&b), None);
        assert_eq!(read.mismatch(&c), Some(Mismatch::Missing));
        assert_eq!(read.mismatch(dir.path()), Some(Mismatch::Type));
        symlink(&b, &c).expect("linked");
        assert_eq!(read.mismatch(&c), None);
        fs::write(&b, "123456").expect("written");
        let differs = read.mismatch(&b).expect("longer");
        assert_eq!(differs.to_string(), "has 6 bytes here, not 5");
        // It has grown on the source too, perhaps.
        assert_eq!(written.mismatch(&b), None);
        fs::set_permissions(&b, fs::Permissions::from_mode(0o600)).expect("changed");
        fs::set_permissions(&a, fs::Permissions::from_mode(0o640)).expect("changed");
        let differs = open(&a, true).mismatch(&b).expect("others");
        assert_eq!(differs.to_string(), "has permissions 600 here, not 640");
    }

    #[test]
    fn a_directory_has_no_size_and_a_device_is_not_looked_for() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(open(dir.path(), false).bytes, None);
        let null = Path::new("/dev/null").metadata().expect("there");
        assert_eq!(OpenFile::of("/dev/null", &null, false), None);
    }
}
