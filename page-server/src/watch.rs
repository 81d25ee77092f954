//! Follows what changes in a tree, so that the last look at it, while the workload stands still, need not be at all of it.
//!
//! The kernel tells of each change to an entry of a directory that is watched (`inotify`). When the watch begins
//! everything is looked at once. From then on a path is due for the last look when it was not as in the survey, when the
//! kernel told of it, or when it can change without a word of the kernel ([`crate::writers`]): who stores through a
//! mapping or by `io_submit`, has the file open, and of opening the kernel does tell.
//!
//! Directories that come later are not watched: a new directory is looked at as a whole.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use nix::sys::statfs;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::mounts_below::{self, MountsBelow};
use crate::names::Names;
use crate::survey::{FileId, Survey, listed, look};
use crate::writers;

/// What is told of. Opening, because what is open may be stored to in silence.
const TOLD: AddWatchFlags = AddWatchFlags::IN_MODIFY
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_OPEN)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF);
/// Not what has taken a directory's place meanwhile.
const AS_FOLDER: AddWatchFlags = AddWatchFlags::IN_ONLYDIR.union(AddWatchFlags::IN_DONT_FOLLOW);

/// File systems that only this kernel changes, through its own calls.
const LOCAL: &[statfs::FsType] = &[
    statfs::BTRFS_SUPER_MAGIC,
    statfs::EXT4_SUPER_MAGIC,
    statfs::OVERLAYFS_SUPER_MAGIC,
    statfs::TMPFS_MAGIC,
    statfs::XFS_SUPER_MAGIC,
];

/// Why a tree cannot be watched, or is not any more. All of it is looked at then.
#[derive(Debug, thiserror::Error)]
pub enum Unwatched {
    /// A system call; also when there are more directories than may be watched.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Another host may change it, or another program than the kernel.
    #[error("{0} is on a file system that others change as well")]
    Remote(PathBuf),
    /// Two directories are one.
    #[error("{0} is in the tree twice")]
    Twice(PathBuf),
    /// What is written to an overlay goes into its upper directory in silence.
    #[error(
        "an overlay has its upper directory, {0}, in the tree or above it, or where that is cannot be told"
    )]
    Overlay(PathBuf),
    /// More happened than the kernel could tell.
    #[error("too much happened")]
    Overflow,
    /// Other file systems are in the tree now.
    #[error("something was mounted or unmounted in the tree")]
    Mounts,
}

/// What the last look has to be at.
#[derive(Debug)]
pub struct Due {
    /// Paths from the tree's root on.
    pub paths: BTreeSet<PathBuf>,
    /// Of these, where directories came to or were made. What was told of below them was told by the names they had before, so all
    /// that is in them is looked at, also in one that is back where it was.
    pub arrived: HashSet<PathBuf>,
    /// Where all files were when the watch began.
    pub names: Names,
    /// Files of which all names are among the paths.
    known: HashSet<FileId>,
    /// Told of no more. To close it takes the kernel up to 20 ms.
    told: Inotify,
}

impl Due {
    /// Adds all names of `files`.
    pub fn add(&mut self, tree: &Path, files: &HashSet<FileId>) -> io::Result<()> {
        for file in files {
            if self.known.insert(*file) {
                self.paths.extend(self.names.of(tree, *file)?);
            }
        }
        Ok(())
    }
}

/// A watched tree.
#[derive(Debug)]
pub struct Watch {
    tree: PathBuf,
    folders: HashMap<WatchDescriptor, PathBuf>,
    due: Due,
    mounts: MountsBelow,
    /// It has ended early.
    end: Option<Unwatched>,
}

impl Watch {
    /// Watches `tree`, and looks at all of it for what is not as in `survey`.
    pub fn begin(tree: &Path, survey: &Survey) -> Result<Self, Unwatched> {
        let mounts = MountsBelow::look(tree)?;
        if let Some(upper) = mounts_below::upper_of_an_overlay(tree)? {
            return Err(Unwatched::Overlay(upper));
        }
        let told = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC);
        let mut watch = Watch {
            tree: tree.to_owned(),
            folders: HashMap::new(),
            due: Due {
                paths: BTreeSet::new(),
                arrived: HashSet::new(),
                names: Names::default(),
                known: HashSet::new(),
                told: told.map_err(io::Error::from)?,
            },
            mounts,
            end: None,
        };
        watch.look_at_all(survey)?;
        let due = &mut watch.due;
        due.names.complete();
        due.paths.extend(due.names.shared_with_outside().cloned());
        due.paths.extend(watch.mounts.files().cloned());
        // Those that have been opened since then, the kernel has told of.
        due.add(tree, &writers::everybodys())?;
        due.add(tree, survey.unmarked())?;
        Ok(watch)
    }

    fn look_at_all(&mut self, survey: &Survey) -> Result<(), Unwatched> {
        let mut local = HashSet::new();
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            // Before it is looked at: what changes then is told.
            if !self.watch(&folder)? {
                continue;
            }
            let Some(metadata) = look(&self.tree, &folder)? else {
                continue;
            };
            if local.insert(metadata.dev()) && !is_local(&self.tree.join(&folder))? {
                return Err(Unwatched::Remote(folder));
            }
            self.note(survey, &folder, &metadata);
            self.due.names.enter(&folder);
            for entry in listed(&self.tree, &folder)? {
                if entry.is_folder {
                    folders.push(entry.path);
                } else if let Some(metadata) = look(&self.tree, &entry.path)? {
                    self.due.names.note(&entry.path, &metadata);
                    self.note(survey, &entry.path, &metadata);
                }
            }
            // Our own look is told of as well, and would fill the queue.
            self.drain();
        }
        Ok(())
    }

    /// Whether the folder is still there.
    fn watch(&mut self, folder: &Path) -> Result<bool, Unwatched> {
        let path = self.tree.join(folder);
        match self.due.told.add_watch(&path, TOLD | AS_FOLDER) {
            Ok(descriptor) => match self.folders.insert(descriptor, folder.to_owned()) {
                None => Ok(true),
                Some(_) => Err(Unwatched::Twice(folder.to_owned())),
            },
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(false),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    fn note(&mut self, survey: &Survey, path: &Path, metadata: &fs::Metadata) {
        if !survey.knows(path, metadata) {
            self.due.paths.insert(path.to_owned());
        }
    }

    /// Takes what the kernel has told so far; its queue has an end.
    pub fn drain(&mut self) {
        while self.end.is_none() {
            match self.due.told.read_events() {
                Ok(events) => {
                    for event in events {
                        self.hear(event);
                    }
                }
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Err(error) => self.end = Some(io::Error::from(error).into()),
            }
        }
    }

    fn hear(&mut self, event: InotifyEvent) {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            self.end = Some(Unwatched::Overflow);
        }
        if event.mask.contains(AddWatchFlags::IN_UNMOUNT) {
            self.end = Some(Unwatched::Mounts);
        }
        // Of a directory, opening it changes nothing. What is told of one that is ignored from now on was told before.
        let nothing = AddWatchFlags::IN_OPEN | AddWatchFlags::IN_ISDIR;
        if event.mask == nothing || event.mask.contains(AddWatchFlags::IN_IGNORED) {
            return;
        }
        if let Some(folder) = self.folders.get(&event.wd) {
            let path = event.name.map_or(folder.clone(), |name| folder.join(name));
            // One that was made is not watched, and may have the inode of what was there before.
            let comes = AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE;
            if event.mask.contains(AddWatchFlags::IN_ISDIR) && event.mask.intersects(comes) {
                self.due.arrived.insert(path.clone());
            }
            self.due.paths.insert(path);
        }
    }

    /// The end of the watch: everything that may have changed.
    pub fn finish(mut self) -> Result<Due, Unwatched> {
        self.drain();
        if let Some(end) = self.end {
            return Err(end);
        }
        match MountsBelow::look(&self.tree)? == self.mounts {
            true => Ok(self.due),
            false => Err(Unwatched::Mounts),
        }
    }
}

/// A watch whose queue is emptied while it fills.
#[derive(Debug)]
pub struct Watching {
    watch: Arc<Mutex<Option<Watch>>>,
    draining: JoinHandle<()>,
}

impl Watching {
    /// Takes what is told from here on, on the current runtime.
    pub fn start(watch: Watch) -> io::Result<Self> {
        let readable: OwnedFd = watch.due.told.as_fd().try_clone_to_owned()?;
        // SAFETY: the descriptor is owned and goes into the `AsyncFd`.
        let readable = unsafe { AsyncFd::register_with_interest(readable, Interest::READABLE) }
            .map_err(io::Error::from)?;
        let watch = Arc::new(Mutex::new(Some(watch)));
        let watched = watch.clone();
        let draining = tokio::spawn(async move {
            while let Ok(mut told) = readable.readable().await {
                if let Some(watch) = &mut *watched.lock().unwrap_or_else(PoisonError::into_inner) {
                    watch.drain();
                }
                told.clear_ready();
            }
        });
        Ok(Watching { watch, draining })
    }

    /// The watch, which nobody empties any more.
    pub fn stop(self) -> Option<Watch> {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        watch.take()
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.draining.abort();
    }
}

fn is_local(path: &Path) -> io::Result<bool> {
    let kind = statfs::statfs(path)?.filesystem_type();
    Ok(LOCAL.contains(&kind))
}
