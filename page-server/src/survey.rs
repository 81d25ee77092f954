//! What a tree of files looked like, so that later only what changed since need be looked at by rsync.
//!
//! No clock is asked: an entry is unchanged when its device, inode, change time and size are the same. The kernel sets
//! the change time with every change of content, owner, mode, attributes and number of links, and that of a directory
//! with every entry that comes or goes. Only what is stored through a mapping may leave no mark, so files that are or
//! were mapped so are looked for by their inodes.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use crate::watch::Due;

/// A tree at one moment: 16 bytes for each entry.
#[derive(Debug, Default)]
pub struct Survey {
    /// By the hash of an entry's path.
    entries: HashMap<u64, Seen>,
    /// Files that could be changed without a mark then.
    unmarked: HashSet<FileId>,
}

/// A file, whatever it is called and by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// The file with this metadata.
    pub fn of(metadata: &fs::Metadata) -> Self {
        FileId {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    /// For tables of many.
    pub fn hash(self) -> u64 {
        hash(&[self.device, self.inode])
    }
}

fn hash(numbers: &[u64]) -> u64 {
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
    xxh3_64(&bytes)
}

/// What has to be looked at again, as lists for rsync.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Again {
    /// Directories with a slash behind them whose entries must all be compared, and what is no regular file and changed.
    pub changed: Vec<Vec<u8>>,
    /// Regular files that changed. That they still do need not show in their times: the last change may have come in the
    /// same tick of the kernel's clock as rsync's look, or through a mapping that is gone.
    pub touched: Vec<Vec<u8>>,
    /// Files that may have changed without a mark.
    pub unmarked: Vec<Vec<u8>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// Hash of all that tells a change.
    state: u64,
    /// Hash of what tells another directory of the same name.
    identity: u32,
}

impl Seen {
    fn of(metadata: &fs::Metadata) -> Self {
        let identity = [metadata.dev(), metadata.ino()];
        let times = [metadata.ctime(), metadata.ctime_nsec()].map(i64::cast_unsigned);
        Seen {
            state: hash(&[
                identity[0],
                identity[1],
                times[0],
                times[1],
                metadata.size(),
            ]),
            identity: hash(&identity) as u32,
        }
    }
}

impl Survey {
    /// Looks at every entry of `tree`; `unmarked` files may change without a mark.
    pub fn make(tree: &Path, unmarked: HashSet<FileId>) -> io::Result<Self> {
        let mut survey = Survey {
            unmarked,
            ..Survey::default()
        };
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            survey.note(tree, &folder)?;
            for entry in listed(tree, &folder)? {
                match entry.is_folder {
                    true => folders.push(entry.path),
                    false => survey.note(tree, &entry.path)?,
                }
            }
        }
        Ok(survey)
    }

    fn note(&mut self, tree: &Path, path: &Path) -> io::Result<()> {
        // What vanishes meanwhile is what is looked for later.
        if let Some(metadata) = look(tree, path)? {
            self.entries.insert(name(path), Seen::of(&metadata));
        }
        Ok(())
    }

    /// Whether the entry is as it was.
    pub fn knows(&self, path: &Path, metadata: &fs::Metadata) -> bool {
        self.entries.get(&name(path)) == Some(&Seen::of(metadata))
    }

    /// Files that could be changed without a mark when the survey was made.
    pub fn unmarked(&self) -> &HashSet<FileId> {
        &self.unmarked
    }

    /// What changed in `tree` since, and which files may have changed without a mark: those that could when the survey
    /// was made, and those that can now.
    pub fn look_again(&self, tree: &Path, unmarked: &HashSet<FileId>) -> io::Result<Again> {
        let mut look = Look::new(self, tree, unmarked);
        if let Some(root) = look.judge(Path::new(""), false)? {
            look.descend(PathBuf::new(), root)?;
        }
        Ok(look.again)
    }

    /// The same when nothing but what is due can have changed.
    pub fn look_at(&self, tree: &Path, due: &Due, unmarked: &HashSet<FileId>) -> io::Result<Again> {
        let mut look = Look::new(self, tree, unmarked);
        look.arrived = Some(&due.arrived);
        // Always: it may be another one.
        look.folder(Path::new(""))?;
        let mut seen = HashSet::new();
        let mut paths: Vec<PathBuf> = due.paths.iter().rev().cloned().collect();
        while let Some(path) = paths.pop() {
            if seen.insert(path.clone())
                && let Some(linked) = look.entry(&path)?
            {
                paths.extend(due.names.of(tree, linked)?);
            }
        }
        Ok(look.again)
    }
}

/// What became of a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Folder {
    /// It was not there, or elsewhere. Then so is all that is below it.
    is_new: bool,
    /// Entries came or went, or it is new.
    is_changed: bool,
}

/// A look at a tree, against what it was.
struct Look<'a> {
    survey: &'a Survey,
    tree: &'a Path,
    unmarked: HashSet<FileId>,
    /// Folders that count as new even where they were before.
    arrived: Option<&'a HashSet<PathBuf>>,
    /// Folders looked at by name; none for those that are gone.
    folders: HashMap<PathBuf, Option<Folder>>,
    again: Again,
}

impl<'a> Look<'a> {
    fn new(survey: &'a Survey, tree: &'a Path, unmarked: &HashSet<FileId>) -> Self {
        Look {
            survey,
            tree,
            unmarked: survey.unmarked.union(unmarked).copied().collect(),
            arrived: None,
            folders: HashMap::new(),
            again: Again::default(),
        }
    }

    /// Looks at one folder, not at what is in it.
    fn judge(&mut self, folder: &Path, is_below_new: bool) -> io::Result<Option<Folder>> {
        let Some(now) = look(self.tree, folder)?.filter(fs::Metadata::is_dir) else {
            return Ok(None);
        };
        let now = Seen::of(&now);
        let before = self.survey.entries.get(&name(folder));
        // A directory that was elsewhere before brings entries that have not changed.
        let is_new = is_below_new || before.map(|seen| seen.identity) != Some(now.identity);
        let is_changed = is_new || before != Some(&now);
        if is_changed {
            self.again.changed.push(as_folder(folder));
        }
        Ok(Some(Folder { is_new, is_changed }))
    }

    /// Looks at everything below a folder.
    fn descend(&mut self, folder: PathBuf, state: Folder) -> io::Result<()> {
        let mut folders = vec![(folder, state)];
        while let Some((folder, state)) = folders.pop() {
            for entry in listed(self.tree, &folder)? {
                if !entry.is_folder {
                    self.file(&entry.path, state.is_changed)?;
                } else if let Some(below) = self.judge(&entry.path, state.is_new)? {
                    folders.push((entry.path, below));
                }
            }
        }
        Ok(())
    }

    /// What became of a folder that is looked at by its name, and all those above it; of a new one everything is looked at.
    fn folder(&mut self, folder: &Path) -> io::Result<Option<Folder>> {
        if let Some(known) = self.folders.get(folder) {
            return Ok(*known);
        }
        let above = match folder.parent() {
            Some(above) => self.folder(above)?,
            None => Some(Folder {
                is_new: false,
                is_changed: false,
            }),
        };
        let state = match above {
            // Looked at already, with all that is in it.
            None | Some(Folder { is_new: true, .. }) => above,
            Some(_) => {
                let has_arrived = self.arrived.is_some_and(|arrived| arrived.contains(folder));
                self.judge(folder, has_arrived)?
            }
        };
        self.folders.insert(folder.to_owned(), state);
        if let (Some(Folder { is_new: false, .. }), Some(state)) = (above, state)
            && state.is_new
        {
            self.descend(folder.to_owned(), state)?;
        }
        Ok(state)
    }

    /// Looks at one path. A file that changed and has more names is returned.
    fn entry(&mut self, path: &Path) -> io::Result<Option<FileId>> {
        let Some(above) = path.parent() else {
            return Ok(None);
        };
        match self.folder(above)? {
            None | Some(Folder { is_new: true, .. }) => Ok(None),
            Some(folder) => match look(self.tree, path)? {
                Some(metadata) if metadata.is_dir() => self.folder(path).map(|_| None),
                Some(_) => self.file(path, folder.is_changed),
                None => Ok(None),
            },
        }
    }

    /// Looks at what is no folder, in a folder whose entries are all compared when that `is_changed`.
    fn file(&mut self, path: &Path, is_changed: bool) -> io::Result<Option<FileId>> {
        let Some(file) = look(self.tree, path)? else {
            return Ok(None);
        };
        let id = FileId::of(&file);
        let before = self.survey.entries.get(&name(path));
        let same = before == Some(&Seen::of(&file));
        let is_linked = file.nlink() > 1 && !same;
        let bytes = path.as_os_str().as_bytes().to_vec();
        // rsync links names that it is told of at once: also where only the other name is new.
        if is_linked && !is_changed {
            self.again.changed.push(bytes.clone());
        }
        if self.unmarked.contains(&id) {
            self.again.unmarked.push(bytes);
        } else if file.is_file() && before.is_some() && !same {
            self.again.touched.push(bytes);
        } else if !is_changed && !same && file.nlink() == 1 {
            self.again.changed.push(bytes);
        }
        Ok(is_linked.then_some(id))
    }
}

/// An entry of a folder.
pub struct Entry {
    /// From the tree's root on.
    pub path: PathBuf,
    /// Whether it is a directory.
    pub is_folder: bool,
}

/// The entries of a folder; none when it is gone.
pub fn listed(tree: &Path, folder: &Path) -> io::Result<Vec<Entry>> {
    let entries = match fs::read_dir(tree.join(folder)) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let entries = entries.map(|entry| {
        let entry = entry?;
        Ok(Entry {
            path: folder.join(entry.file_name()),
            is_folder: entry.file_type()?.is_dir(),
        })
    });
    entries.collect()
}

/// What an entry is; none when it is gone.
pub fn look(tree: &Path, path: &Path) -> io::Result<Option<fs::Metadata>> {
    match fs::symlink_metadata(tree.join(path)) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Also when there is a file now where a directory on the way to it was.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn name(path: &Path) -> u64 {
    xxh3_64(path.as_os_str().as_bytes())
}

fn as_folder(path: &Path) -> Vec<u8> {
    let mut name = match path.as_os_str().is_empty() {
        true => OsString::from("."),
        false => path.as_os_str().to_owned(),
    };
    name.push("/");
    name.into_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(tree: &Path) -> Survey {
        Survey::make(tree, HashSet::new()).expect("readable")
    }

    fn changes(survey: &Survey, tree: &Path) -> Vec<String> {
        let again = survey.look_again(tree, &HashSet::new());
        let again = again.expect("readable");
        let changes = again.changed.into_iter().chain(again.touched);
        let mut changes: Vec<String> = changes
            .map(|change| String::from_utf8(change).expect("ours"))
            .collect();
        changes.sort();
        changes
    }

    #[test]
    fn only_what_changed_is_named() {
        let tree = tempfile::tempdir().expect("a directory");
        let path = |name: &str| tree.path().join(name);
        for folder in ["still", "grows", "moves/deep"] {
            fs::create_dir_all(path(folder)).expect("made");
        }
        for file in ["still/a", "still/b", "grows/a", "moves/deep/a"] {
            fs::write(path(file), "x").expect("written");
        }
        let survey = make(tree.path());
        assert_eq!(changes(&survey, tree.path()), Vec::<String>::new());
        fs::write(path("still/b"), "longer").expect("written");
        assert_eq!(changes(&survey, tree.path()), ["still/b"]);
        fs::write(path("grows/new"), "x").expect("written");
        fs::rename(path("moves"), path("still/moved")).expect("moved");
        let expected = [
            "./",
            "grows/",
            "still/",
            "still/b",
            "still/moved/",
            "still/moved/deep/",
        ];
        assert_eq!(changes(&survey, tree.path()), expected);
    }

    #[test]
    fn a_new_name_of_an_old_file_is_seen_at_both_names() {
        let tree = tempfile::tempdir().expect("a directory");
        let path = |name: &str| tree.path().join(name);
        fs::create_dir(path("a")).expect("made");
        fs::create_dir(path("b")).expect("made");
        fs::write(path("a/file"), "x").expect("written");
        let survey = make(tree.path());
        fs::hard_link(path("a/file"), path("b/file")).expect("linked");
        // It is compared, and then linked.
        assert_eq!(changes(&survey, tree.path()), ["a/file", "a/file", "b/"]);
    }

    #[test]
    fn a_folder_in_the_place_of_another_is_looked_at_wholly() {
        let tree = tempfile::tempdir().expect("a directory");
        let path = |name: &str| tree.path().join(name);
        for folder in ["one/deep", "two/deep"] {
            fs::create_dir_all(path(folder)).expect("made");
        }
        let survey = make(tree.path());
        fs::rename(path("one"), path("aside")).expect("moved");
        fs::rename(path("two"), path("one")).expect("moved");
        let expected = ["./", "aside/", "aside/deep/", "one/", "one/deep/"];
        assert_eq!(changes(&survey, tree.path()), expected);
    }

    #[test]
    fn a_file_that_changes_without_a_mark_is_found_at_all_its_names() {
        let tree = tempfile::tempdir().expect("a directory");
        let path = |name: &OsString| tree.path().join(name);
        let odd = OsString::from_vec(b"name \xff".to_vec());
        fs::write(path(&odd), "x").expect("written");
        fs::write(path(&"other".into()), "x").expect("written");
        let id = |name: &OsString| FileId::of(&fs::metadata(path(name)).expect("there"));
        let survey = Survey::make(tree.path(), [id(&odd)].into()).expect("readable");
        let unmarked = |now: HashSet<FileId>| {
            let again = survey.look_again(tree.path(), &now).expect("readable");
            let mut unmarked = again.unmarked;
            unmarked.sort();
            unmarked
        };
        assert_eq!(unmarked(HashSet::new()), [odd.as_bytes()]);
        fs::create_dir(path(&"folder".into())).expect("made");
        fs::hard_link(path(&"other".into()), path(&"folder/link".into())).expect("linked");
        let expected = [&b"folder/link"[..], odd.as_bytes(), b"other"];
        assert_eq!(unmarked([id(&"other".into())].into()), expected);
    }
}
