//! The programs and libraries a workload executes, compared before anything is frozen.
//!
//! Files are not moved with a workload. Code of another build at the same addresses would crash it long after the
//! original is gone, so both hosts hash what is mapped executable.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

/// Bytes read at a time.
const CHUNK_BYTES: usize = 256 * 1024;

/// A file that is mapped executable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramFile {
    /// Where the workload sees it.
    pub path: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Hash of its content. Both ends hash; it protects against mistakes, not against malice.
    pub digest: u64,
}

/// How a file differs from what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// It is not there, or cannot be read.
    Missing,
    /// It is another file.
    Content,
}

impl ProgramFile {
    /// Hashes the file at `content`, which the workload sees at `path`.
    pub fn of(path: &str, content: &Path) -> io::Result<Self> {
        let (bytes, digest) = hash(content)?;
        Ok(ProgramFile {
            path: path.to_owned(),
            bytes,
            digest,
        })
    }

    /// How the file at `here` differs from this one, if it does.
    pub fn difference(&self, here: &Path) -> Option<Difference> {
        match here.metadata() {
            Err(_) => return Some(Difference::Missing),
            Ok(metadata) if metadata.len() != self.bytes => return Some(Difference::Content),
            Ok(_) => {}
        }
        match hash(here) {
            Err(_) => Some(Difference::Missing),
            Ok(found) => (found != (self.bytes, self.digest)).then_some(Difference::Content),
        }
    }
}

fn hash(path: &Path) -> io::Result<(u64, u64)> {
    let mut file = File::open(path)?;
    let mut hasher = Xxh3::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut total = 0;
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok((total, hasher.digest())),
            length => {
                hasher.update(&chunk[..length]);
                total += length as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn another_content_of_the_same_size_differs() {
        let dir = tempfile::tempdir().expect("a directory");
        let (a, b, c) = (
            dir.path().join("a"),
            dir.path().join("b"),
            dir.path().join("c"),
        );
        fs::write(&a, vec![1; CHUNK_BYTES + 7]).expect("written");
        fs::write(&b, vec![1; CHUNK_BYTES + 7]).expect("written");
        let program = ProgramFile::of("/usr/bin/a", &a).expect("there");
        assert_eq!(program.difference(&b), None);
        let mut other = vec![1; CHUNK_BYTES + 7];
        other[CHUNK_BYTES] = 2;
        fs::write(&b, other).expect("written");
        assert_eq!(program.difference(&b), Some(Difference::Content));
        assert_eq!(program.difference(&c), Some(Difference::Missing));
    }
}
