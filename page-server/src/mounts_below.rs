//! What is mounted in a tree, and overlays that write into it: of both the kernel tells nobody who watches directories.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use common::proc_text::{lines, mount_point, unescape};

use crate::survey::FileId;

/// Where an overlay's content is stored.
const UPPER: &[u8] = b"upperdir=";
/// Ends the fields of the mount; the file system's kind and options follow.
const SEPARATOR: &[u8] = b"-";

/// Mounts in a tree.
#[derive(Debug, PartialEq, Eq)]
pub struct MountsBelow {
    /// Lines of `mountinfo`.
    lines: Vec<Vec<u8>>,
    /// Files that something is mounted on, from the tree's root on. Another directory hears of their changes.
    files: Vec<PathBuf>,
}

impl MountsBelow {
    /// Those in `tree`, and the one it is on when that is mounted on the tree itself.
    pub fn look(tree: &Path) -> io::Result<Self> {
        let real = tree.canonicalize()?;
        let mounts = fs::read("/proc/thread-self/mountinfo")?;
        let mut below = MountsBelow {
            lines: Vec::new(),
            files: Vec::new(),
        };
        for line in lines(&mounts) {
            let Some(point) = mount_point(line) else {
                continue;
            };
            if let Ok(path) = point.strip_prefix(&real) {
                below.lines.push(line.to_vec());
                if !point.is_dir() {
                    below.files.push(path.to_owned());
                }
            }
        }
        Ok(below)
    }

    /// Files that something is mounted on.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.files.iter()
    }
}

/// The directory that an overlay of this host, in whatever mount namespace, stores into, when that is in the tree or has the
/// tree in it. Also when that cannot be told.
pub fn upper_of_an_overlay(tree: &Path) -> io::Result<Option<PathBuf>> {
    let real = tree.canonicalize()?;
    confirmed(|| find_upper(&real))
}

/// What is found twice. A namespace that was ending may be gone with its directories when these are looked for, and where
/// they are could not be told; a second look does not find it any more.
fn confirmed<T>(mut find: impl FnMut() -> io::Result<Option<T>>) -> io::Result<Option<T>> {
    match find()? {
        Some(_) => find(),
        None => Ok(None),
    }
}

fn find_upper(tree: &Path) -> io::Result<Option<PathBuf>> {
    for (process, mounts) in mount_namespaces()? {
        let root = PathBuf::from(format!("/proc/{process}/root"));
        let mut uppers = lines(&mounts).filter_map(upper).map(as_opened);
        if let Some(found) = uppers.find(|upper| meets(tree, &root, upper)) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn meets(tree: &Path, root: &Path, upper: &Path) -> bool {
    let Ok(inside) = upper.strip_prefix("/") else {
        return true;
    };
    // Whoever mounted it had our root, or that of the processes there.
    let file = |path: &Path| fs::metadata(path).map(|metadata| FileId::of(&metadata));
    match (upper.canonicalize(), file(&root.join(inside))) {
        (Ok(ours), _) if ours.starts_with(tree) || tree.starts_with(&ours) => true,
        (Ok(ours), Ok(theirs)) => !file(&ours).is_ok_and(|ours| ours == theirs),
        (Ok(_), Err(_)) => false,
        // Where their directory is in our eyes cannot be told.
        (Err(_), _) => true,
    }
}

/// The mounts of each namespace, as one of the processes in it sees them.
fn mount_namespaces() -> io::Result<HashMap<u32, Vec<u8>>> {
    let mut seen = HashSet::new();
    let mut found = HashMap::new();
    for process in processes()? {
        let Ok(namespace) = fs::read_link(format!("/proc/{process}/ns/mnt")) else {
            continue;
        };
        if seen.insert(namespace)
            && let Ok(mounts) = fs::read(format!("/proc/{process}/mountinfo"))
        {
            found.insert(process, mounts);
        }
    }
    Ok(found)
}

/// All processes there are.
pub fn processes() -> io::Result<impl Iterator<Item = u32>> {
    let entries = fs::read_dir("/proc")?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()))
}

/// The upper directory of an overlay, from its line of `mountinfo`.
pub fn upper(line: &[u8]) -> Option<PathBuf> {
    let mut words = line.split(|byte| *byte == b' ');
    words.find(|word| *word == SEPARATOR)?;
    if words.next()? != b"overlay" {
        return None;
    }
    let options = words.nth(1)?;
    let mut options = options.split(|byte| *byte == b',');
    let upper = options.find_map(|option| option.strip_prefix(UPPER))?;
    Some(unescape(upper))
}

/// The directory that was opened when this was named. The kernel drops a backslash before any character (fs/overlayfs/params.c:
/// ovl_unescape), and shows the option as it was given.
fn as_opened(named: PathBuf) -> PathBuf {
    let mut bytes = named.as_os_str().as_bytes().iter();
    let mut plain = Vec::new();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => plain.extend(bytes.next()),
            byte => plain.push(*byte),
        }
    }
    let plain = PathBuf::from(OsString::from_vec(plain));
    // Not before it read options so: then the name is what it is.
    match plain.exists() {
        true => plain,
        false => named,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OVERLAY: &str = "51 30 0:44 / /srv/box\\040one rw,relatime shared:7 - overlay overlay \
        rw,lowerdir=/a:/b,upperdir=/srv/up\\040per,workdir=/srv/work";

    #[test]
    fn the_upper_directory_of_an_overlay_is_found() {
        let found = upper(OVERLAY.as_bytes());
        assert_eq!(found.as_deref(), Some(Path::new("/srv/up per")));
        for line in [
            "30 29 0:20 / /run rw - tmpfs none rw,upperdir=/x",
            "30 29 0:20 / /run rw - overlay overlay ro,lowerdir=/a:/b",
            "30 29 0:20 / /run rw",
            "",
        ] {
            assert_eq!(upper(line.as_bytes()), None, "{line}");
        }
    }

    #[test]
    fn a_name_is_read_as_the_kernel_reads_it() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = |name: &str| folder.path().join(name);
        fs::create_dir_all(path("up per:1")).expect("made");
        assert_eq!(as_opened(path("up\\ per\\:1")), path("up per:1"));
        assert_eq!(as_opened(path("up per:1")), path("up per:1"));
        assert_eq!(as_opened(path("gone\\ by")), path("gone\\ by"));
    }

    #[test]
    fn an_overlay_that_stores_into_the_tree_is_noticed() {
        let folder = tempfile::tempdir().expect("a directory");
        let real = folder.path().canonicalize().expect("there");
        let path = |name: &str| real.join(name);
        for name in ["tree/upper", "tree/deep/er", "other"] {
            fs::create_dir_all(path(name)).expect("made");
        }
        let meets = |upper: &Path| meets(&path("tree"), Path::new("/"), upper);
        assert!(meets(&path("tree/upper")), "in it");
        assert!(meets(&real), "above it");
        assert!(!meets(&path("other")), "beside it");
        assert!(meets(Path::new("relative")), "it cannot be told");
        assert!(meets(Path::new("/nonexistent")), "it cannot be told");
    }

    #[test]
    fn what_is_gone_at_the_second_look_does_not_count() {
        let looks = |found: [Option<u8>; 2]| {
            let mut found = found.into_iter();
            confirmed(|| Ok(found.next().expect("no third look"))).expect("known")
        };
        assert_eq!(looks([Some(1), None]), None);
        assert_eq!(looks([Some(1), Some(2)]), Some(2));
        assert_eq!(looks([None, Some(1)]), None);
    }
}
