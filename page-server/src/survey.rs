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
        let hash = |numbers: &[u64]| {
            let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
            xxh3_64(&bytes)
        };
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

    /// What changed in `tree` since, and which files may have changed without a mark: those that could when the survey
    /// was made, and those that can now.
    pub fn look_again(&self, tree: &Path, unmarked: &HashSet<FileId>) -> io::Result<Again> {
        let unmarked: HashSet<FileId> = self.unmarked.union(unmarked).copied().collect();
        let mut again = Again::default();
        // A directory that was elsewhere before brings entries that have not changed.
        let mut folders = vec![(PathBuf::new(), false)];
        while let Some((folder, is_below_new)) = folders.pop() {
            let now = look(tree, &folder)?.as_ref().map(Seen::of);
            let before = self.entries.get(&name(&folder));
            let is_new =
                is_below_new || before.map(|seen| seen.identity) != now.map(|seen| seen.identity);
            let is_changed = is_new || before != now.as_ref();
            if is_changed {
                again.changed.push(as_folder(&folder));
            }
            for entry in listed(tree, &folder)? {
                if entry.is_folder {
                    folders.push((entry.path, is_new));
                    continue;
                }
                let Some(file) = look(tree, &entry.path)? else {
                    continue;
                };
                let before = self.entries.get(&name(&entry.path));
                let same = before == Some(&Seen::of(&file));
                let path = entry.path.into_os_string().into_vec();
                // rsync links names that it is told of at once: also where only the other name is new.
                if file.nlink() > 1 && !same && !is_changed {
                    again.changed.push(path.clone());
                }
                if unmarked.contains(&FileId::of(&file)) {
                    again.unmarked.push(path);
                } else if file.is_file() && before.is_some() && !same {
                    again.touched.push(path);
                } else if !is_changed && !same && file.nlink() == 1 {
                    again.changed.push(path);
                }
            }
        }
        Ok(again)
    }
}

struct Entry {
    path: PathBuf,
    is_folder: bool,
}

/// The entries of a folder; none when it is gone.
fn listed(tree: &Path, folder: &Path) -> io::Result<Vec<Entry>> {
    let entries = match fs::read_dir(tree.join(folder)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
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

fn look(tree: &Path, path: &Path) -> io::Result<Option<fs::Metadata>> {
    match fs::symlink_metadata(tree.join(path)) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
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
