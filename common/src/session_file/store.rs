//! The state directory: the only file that reads and writes session files.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::codec::{DecodeError, decode, encode};
use super::{SessionFile, Side};
use crate::limits::MAX_SESSION_FILE_BYTES;
use crate::proto::control::SessionId;

/// Where sessions are kept unless the operator names another place. A reboot ends every session, so `/run` it is.
pub const DEFAULT_DIRECTORY: &str = "/run/postcopy";

const SUFFIX: &str = ".session";

/// The state directory of one program.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
    role: &'static str,
}

/// One file of the state directory.
#[derive(Debug)]
pub struct Entry {
    /// Where.
    pub path: PathBuf,
    /// What it holds.
    pub file: Result<SessionFile, StoreError>,
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The system's word.
    #[error("{path}: {error}")]
    Io {
        /// Which file or directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file holds no session.
    #[error("{path}: {error}")]
    Decode {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: DecodeError,
    },
    /// Others could read the session's secret, or put a file of theirs there.
    #[error("{0} is not ours alone: it must belong to us and have mode 0700")]
    Exposed(PathBuf),
    /// There is no such session.
    #[error("there is no session {id} in {directory}")]
    Unknown {
        /// As the operator named it.
        id: String,
        /// Where.
        directory: PathBuf,
    },
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> StoreError {
    let path = path.to_owned();
    move |error| StoreError::Io {
        path: path.clone(),
        error,
    }
}

impl Store {
    /// The state directory of the source's sessions.
    pub fn of_source(directory: &Path) -> Self {
        Store {
            directory: directory.to_owned(),
            role: "source",
        }
    }

    /// The state directory of the destination's sessions.
    pub fn of_destination(directory: &Path) -> Self {
        Store {
            directory: directory.to_owned(),
            role: "destination",
        }
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where a session's file is.
    pub fn path(&self, id: &SessionId) -> PathBuf {
        self.directory.join(format!("{}-{id}{SUFFIX}", self.role))
    }

    /// Where a program listens for its successor in this session.
    pub fn socket(&self, id: &SessionId) -> PathBuf {
        self.directory.join(format!("{}-{id}.keeper", self.role))
    }

    /// Makes the directory, or makes sure that it is ours alone.
    pub fn prepare(&self) -> Result<(), StoreError> {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory);
        made.map_err(io_error(&self.directory))?;
        self.check()
    }

    fn check(&self) -> Result<(), StoreError> {
        let meta = fs::metadata(&self.directory).map_err(io_error(&self.directory))?;
        let ours = meta.uid() == nix::unistd::geteuid().as_raw();
        if !ours || meta.mode() & 0o077 != 0 {
            return Err(StoreError::Exposed(self.directory.clone()));
        }
        Ok(())
    }

    /// Writes a session: wholly, or not at all.
    pub fn write(&self, file: &SessionFile) -> Result<(), StoreError> {
        self.prepare()?;
        let path = self.path(&file.id);
        let bytes = encode(file).map_err(|error| StoreError::Decode {
            path: path.clone(),
            error,
        })?;
        let new = path.with_extension("new");
        let written = write_synced(&new, &bytes)
            .and_then(|()| fs::rename(&new, &path))
            .and_then(|()| File::open(&self.directory)?.sync_all());
        written.map_err(|error| {
            // The old file stays the truth.
            let _ = fs::remove_file(&new);
            io_error(&path)(error)
        })
    }

    /// Changes what is written of the session in `path`.
    pub fn change(
        &self,
        path: &Path,
        change: impl FnOnce(&mut SessionFile),
    ) -> Result<(), StoreError> {
        let mut file = self.read(path)?;
        change(&mut file);
        self.write(&file)
    }

    /// The session has ended: nothing of it is kept.
    pub fn remove(&self, id: &SessionId) {
        for path in [self.path(id), self.socket(id)] {
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "cannot remove");
            }
        }
        // Another session's file keeps it.
        let _ = fs::remove_dir(&self.directory);
    }

    /// All sessions of this role, in the order of their names.
    pub fn list(&self) -> Result<Vec<Entry>, StoreError> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error(&self.directory)(error)),
        };
        self.check()?;
        let mut paths: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| self.is_of_role(path))
            .collect();
        paths.sort();
        let entries = paths.into_iter().map(|path| Entry {
            file: self.read(&path),
            path,
        });
        Ok(entries.collect())
    }

    fn is_of_role(&self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.ends_with(SUFFIX) && name.starts_with(self.role)
    }

    fn read(&self, path: &Path) -> Result<SessionFile, StoreError> {
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| {
                file.take(MAX_SESSION_FILE_BYTES as u64 + 1)
                    .read_to_end(&mut bytes)
            })
            .map_err(io_error(path))?;
        let malformed = |error| StoreError::Decode {
            path: path.to_owned(),
            error,
        };
        let file = decode(&bytes).map_err(malformed)?;
        let is_source = matches!(file.side, Side::Source(_));
        // A file under another's name is not to be taken for that other.
        if path != self.path(&file.id) || is_source != (self.role == "source") {
            return Err(malformed(DecodeError::Malformed));
        }
        Ok(file)
    }

    /// The session that the operator names, in full or by how it begins.
    pub fn find(&self, id: &str) -> Result<SessionFile, StoreError> {
        let mut found: Vec<Entry> = self.list()?;
        found.retain(|entry| {
            let name = entry.path.file_stem().unwrap_or_default().to_string_lossy();
            let name = name.split_once('-').map_or("", |(_, name)| name);
            !id.is_empty() && name.starts_with(id)
        });
        match found.pop() {
            Some(entry) if found.is_empty() => entry.file,
            _ => Err(StoreError::Unknown {
                id: id.to_owned(),
                directory: self.directory.clone(),
            }),
        }
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // What a killed program left behind is of no use.
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::tests::source_file;
    use super::*;
    use crate::session::State;

    fn store() -> (tempfile::TempDir, Store) {
        let parent = tempfile::tempdir().expect("a directory");
        let store = Store::of_source(&parent.path().join("state"));
        (parent, store)
    }

    #[test]
    fn a_session_is_kept_for_its_owner_alone_until_it_ends() {
        let (_parent, store) = store();
        let mut file = source_file();
        store.write(&file).expect("written");
        file.state = State::Paused;
        store.write(&file).expect("written again");
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(store.directory()), 0o700);
        assert_eq!(mode(&store.path(&file.id)), 0o600);
        assert_eq!(store.find("0707").expect("by its beginning"), file);
        assert!(matches!(store.find("08"), Err(StoreError::Unknown { .. })));
        assert_eq!(store.list().expect("readable").len(), 1);
        store.remove(&file.id);
        assert!(!store.directory().exists());
        assert!(store.list().expect("nothing to read").is_empty());
    }

    #[test]
    fn a_directory_of_others_is_refused() {
        let (_parent, store) = store();
        store.write(&source_file()).expect("written");
        fs::set_permissions(store.directory(), fs::Permissions::from_mode(0o755)).expect("ours");
        assert!(matches!(
            store.write(&source_file()),
            Err(StoreError::Exposed(_))
        ));
        assert!(matches!(store.list(), Err(StoreError::Exposed(_))));
    }

    #[test]
    fn a_write_that_fails_leaves_what_was_there() {
        let (_parent, store) = store();
        let mut file = source_file();
        store.write(&file).expect("written");
        // What a killed program left behind is replaced, and never read.
        let new = store.path(&file.id).with_extension("new");
        fs::write(&new, b"half of it").expect("ours");
        assert_eq!(store.list().expect("readable").len(), 1);
        let before = file.clone();
        file.state = State::Paused;
        store.write(&file).expect("written again");
        assert!(!new.exists());
        // A directory in its place cannot be replaced.
        fs::create_dir(&new).expect("ours");
        assert!(matches!(store.write(&before), Err(StoreError::Io { .. })));
        assert_eq!(store.find("07").expect("there"), file);
    }

    #[test]
    fn a_damaged_file_is_listed_and_the_others_are_still_there() {
        let (_parent, store) = store();
        store.write(&source_file()).expect("written");
        fs::write(store.directory().join("source-00.session"), b"postcop").expect("ours");
        let listed = store.list().expect("readable");
        assert!(listed[0].file.is_err());
        assert!(listed[1].file.is_ok());
    }
}
