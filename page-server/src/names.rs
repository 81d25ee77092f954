//! In which folders of a tree which files are, to find the other names of a file.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::survey::{FileId, listed, look};

/// The files of a tree: 16 bytes for each.
#[derive(Debug, Default)]
pub struct Names {
    folders: Vec<PathBuf>,
    /// The hash of a file and the folder it is in; sorted when all have been noted.
    of: Vec<(u64, u32)>,
    /// Files with several names.
    linked: HashMap<FileId, Linked>,
}

#[derive(Debug)]
struct Linked {
    /// How many names there are, in the tree and elsewhere.
    count: u64,
    names: Vec<PathBuf>,
}

impl Names {
    /// What is noted next is in `folder`.
    pub fn enter(&mut self, folder: &Path) {
        self.folders.push(folder.to_owned());
    }

    /// Notes a file in the folder entered last.
    pub fn note(&mut self, path: &Path, metadata: &fs::Metadata) {
        let id = FileId::of(metadata);
        let folder = self.folders.len().saturating_sub(1);
        self.of.push((id.hash(), folder as u32));
        if metadata.nlink() > 1 {
            let linked = self.linked.entry(id).or_insert(Linked {
                count: 0,
                names: Vec::new(),
            });
            linked.count = metadata.nlink();
            linked.names.push(path.to_owned());
        }
    }

    /// Everything has been noted.
    pub fn complete(&mut self) {
        self.of.sort_unstable();
    }

    /// Names of files that can be changed by a name outside the tree, about which nobody who watches the tree hears.
    pub fn shared_with_outside(&self) -> impl Iterator<Item = &PathBuf> {
        let linked = self.linked.values();
        let shared = linked.filter(|linked| linked.count > linked.names.len() as u64);
        shared.flat_map(|linked| &linked.names)
    }

    /// The names that a file had, and those of them that it still has when it had one.
    pub fn of(&self, tree: &Path, id: FileId) -> io::Result<Vec<PathBuf>> {
        match self.linked.get(&id) {
            Some(linked) => Ok(linked.names.clone()),
            None => self.look_for(tree, id),
        }
    }

    fn look_for(&self, tree: &Path, id: FileId) -> io::Result<Vec<PathBuf>> {
        let hash = id.hash();
        let from = self.of.partition_point(|(of, _)| *of < hash);
        let found = self.of[from..].iter().take_while(|(of, _)| *of == hash);
        let mut names = Vec::new();
        for (_, folder) in found {
            for entry in listed(tree, &self.folders[*folder as usize])? {
                let metadata = look(tree, &entry.path)?;
                if metadata.is_some_and(|metadata| FileId::of(&metadata) == id) {
                    names.push(entry.path);
                }
            }
        }
        Ok(names)
    }
}
