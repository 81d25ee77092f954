//! `pstree.img`: the tasks of the tree.

use std::fmt;

use prost::Message;
use serde::{Deserialize, Serialize};

use super::ImageError;
use super::framing::Messages;
use crate::limits::MAX_PROCESSES;

const PSTREE_MAGIC: u32 = 0x5027_3030;

/// PID of a dumped task as its image files name it: its PID within its own PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ImagePid(pub u32);

impl fmt::Display for ImagePid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.0)
    }
}

#[derive(Clone, PartialEq, Message)]
struct PstreeEntry {
    #[prost(uint32, required, tag = "1")]
    pid: u32,
    #[prost(uint32, required, tag = "2")]
    ppid: u32,
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    threads: Vec<u32>,
}

/// One process of the dumped tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeEntry {
    /// Its PID in the images.
    pub pid: ImagePid,
    /// Its parent's PID in the images; 0 for the root.
    pub parent: u32,
    /// Its thread IDs, the leader's included.
    pub threads: Vec<u32>,
}

/// Reads the tree, parents before children.
pub fn parse_pstree(file: &[u8]) -> Result<Vec<TreeEntry>, ImageError> {
    let mut messages = Messages::open(file, PSTREE_MAGIC)?;
    let mut tree = Vec::new();
    while let Some(entry) = messages.next::<PstreeEntry>()? {
        if tree.len() == MAX_PROCESSES {
            return Err(ImageError::TooManyProcesses);
        }
        tree.push(TreeEntry {
            pid: ImagePid(entry.pid),
            parent: entry.ppid,
            threads: entry.threads,
        });
    }
    if tree.is_empty() {
        return Err(ImageError::Missing("root task"));
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::framing::write;

    #[test]
    fn the_root_comes_first() {
        let entry = |pid: u32, ppid: u32| PstreeEntry {
            pid,
            ppid,
            threads: vec![pid, pid + 1],
        };
        let tree =
            parse_pstree(&write(PSTREE_MAGIC, &[entry(10, 0), entry(20, 10)])).expect("valid");
        assert_eq!(tree[0].pid, ImagePid(10));
        assert_eq!(tree[1].parent, 10);
        assert_eq!(tree[1].threads, [20, 21]);
    }

    #[test]
    fn an_empty_tree_is_an_error() {
        assert!(parse_pstree(&write::<PstreeEntry>(PSTREE_MAGIC, &[])).is_err());
    }
}
