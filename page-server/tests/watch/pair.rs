//! Two trees of which rsync makes the one equal to the other, in two passes, as the two programs do it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use page_server::survey::{Again, FileId, Survey};
use page_server::watch::Due;
use tempfile::TempDir;

use crate::changes::{Change, Changer};

/// What the destination calls rsync with.
const OPTIONS: &[&str] = &["-aHAXS", "--numeric-ids", "--modify-window=-1"];

/// Where the trees are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Disk,
    Memory,
    /// An overlay on the disk, as the source.
    Overlay,
}

pub struct Pair {
    folder: TempDir,
    place: Place,
    changer: Changer,
}

impl Pair {
    pub fn make(place: Place) -> Self {
        let folder = match place {
            Place::Memory => TempDir::new_in("/dev/shm"),
            // Never a tmpfs.
            Place::Disk | Place::Overlay => TempDir::new_in(env!("CARGO_TARGET_TMPDIR")),
        };
        let pair = Self {
            folder: folder.expect("a directory"),
            place,
            changer: Changer::default(),
        };
        for name in ["source", "destination", "outside", "lower", "upper", "work"] {
            fs::create_dir(pair.path(name)).expect("made");
        }
        if place == Place::Overlay {
            pair.mount();
        }
        pair
    }

    fn mount(&self) {
        fs::create_dir(self.path("lower/d0")).expect("made");
        fs::write(self.path("lower/d0/f0"), "below").expect("written");
        let [lower, upper, work] = ["lower", "upper", "work"].map(|name| self.path(name));
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        let mounted = mount(
            Some("overlay"),
            &self.source(),
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        );
        mounted.expect("root mounts");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn source(&self) -> PathBuf {
        self.path("source")
    }

    pub fn outside(&self) -> PathBuf {
        self.path("outside")
    }

    pub fn change(&mut self, changes: &[Change]) {
        let (tree, outside) = (self.source(), self.outside());
        for change in changes {
            self.changer.apply(&tree, &outside, change);
        }
    }

    /// Looks at the tree and brings all of it.
    pub fn first_pass(&mut self) -> Survey {
        let tree = fs::File::open(self.source()).expect("there");
        nix::unistd::syncfs(tree).expect("written");
        let survey = Survey::make(&self.source(), HashSet::new()).expect("readable");
        self.rsync(&["--delete".into()]);
        survey
    }

    /// Brings what has to be looked at again.
    pub fn last_pass(&mut self, survey: &Survey, due: &Due) -> Again {
        let none = HashSet::new();
        let again = survey.look_at(&self.source(), due, &none);
        let again = again.expect("readable");
        let whole = [&again.unmarked[..], &again.touched[..]].concat();
        self.bring(&whole, &["--ignore-times", "--force"]);
        self.bring(&again.changed, &["--delete"]);
        again
    }

    fn bring(&self, paths: &[Vec<u8>], options: &[&str]) {
        if paths.is_empty() {
            return;
        }
        let mut list = tempfile::NamedTempFile::new().expect("a file");
        for path in paths {
            list.write_all(path).expect("written");
            list.write_all(&[0]).expect("written");
        }
        let mut from = OsString::from("--files-from=");
        from.push(list.path());
        let mut options: Vec<OsString> = options.iter().map(OsString::from).collect();
        options.extend(["--from0".into(), from]);
        self.rsync(&options);
    }

    fn rsync(&self, options: &[OsString]) -> String {
        let slash = |name| format!("{}/", self.path(name).display());
        let output = Command::new("rsync")
            .args(OPTIONS)
            .args(options)
            .args([slash("source"), slash("destination")])
            .output()
            .expect("rsync runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Content, kinds, owners, modes, times of files, attributes, links.
    pub fn assert_equal(&self, context: &str) {
        let differences = self.rsync(&[
            "--dry-run".into(),
            "--checksum".into(),
            "--delete".into(),
            "--itemize-changes".into(),
            "--omit-dir-times".into(),
        ]);
        assert_eq!(differences, "", "{context}");
        let [there, here] = ["source", "destination"].map(|name| links(&self.path(name)));
        assert_eq!(there, here, "{context}");
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if self.place == Place::Overlay {
            let unmounted = umount2(&self.source(), MntFlags::MNT_DETACH);
            if !std::thread::panicking() {
                unmounted.expect("mounted by us");
            }
        }
    }
}

/// Of each file with several names in the tree, which they are.
fn links(tree: &Path) -> BTreeSet<Vec<String>> {
    let mut files: HashMap<FileId, BTreeMap<String, ()>> = HashMap::new();
    let mut folders = vec![tree.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("readable") {
            let path = entry.expect("readable").path();
            let metadata = fs::symlink_metadata(&path).expect("there");
            if metadata.is_dir() {
                folders.push(path.clone());
            } else if metadata.nlink() > 1 {
                let name = path.strip_prefix(tree).expect("below it");
                let name = String::from_utf8_lossy(name.as_os_str().as_bytes()).into_owned();
                files
                    .entry(FileId::of(&metadata))
                    .or_default()
                    .insert(name, ());
            }
        }
    }
    let names = files.into_values().map(|names| names.into_keys().collect());
    names
        .filter(|names: &Vec<String>| names.len() > 1)
        .collect()
}
