//! What can happen to files, among few names, so that much happens to the same.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;

/// A name: folders from outer to inner, and an entry of the last.
#[derive(Clone, Debug)]
pub struct Name {
    folders: Vec<u8>,
    entry: u8,
    /// Of a folder in place of a file.
    is_folder: bool,
}

impl Name {
    fn any() -> impl Strategy<Value = Self> {
        (prop::collection::vec(0..3_u8, 0..3), 0..4_u8, any::<bool>()).prop_map(
            |(folders, entry, is_folder)| Self {
                folders,
                entry,
                is_folder,
            },
        )
    }

    fn path(&self) -> PathBuf {
        let mut path: PathBuf = self.folders.iter().map(|name| format!("d{name}")).collect();
        path.push(match self.is_folder {
            true => format!("d{}", self.entry),
            false => format!("f{}", self.entry),
        });
        path
    }
}

/// One change; nothing happens when it is not possible.
#[derive(Clone, Debug)]
pub enum Change {
    /// New content, with the old time when it has one.
    Write {
        name: Name,
        byte: u8,
        size: u16,
        keeps_time: bool,
    },
    Append {
        name: Name,
        byte: u8,
    },
    /// Of all that are held open; they stay so.
    AppendToOpen {
        byte: u8,
    },
    HoldOpen {
        name: Name,
    },
    CloseAll,
    Truncate {
        name: Name,
        size: u16,
    },
    Mode {
        name: Name,
        mode: u32,
    },
    Owner {
        name: Name,
        owner: u32,
    },
    Time {
        name: Name,
        seconds: u32,
    },
    Attribute {
        name: Name,
        value: u8,
    },
    Rename {
        from: Name,
        to: Name,
    },
    RenameOut {
        from: Name,
        to: u8,
    },
    RenameIn {
        from: u8,
        to: Name,
    },
    Link {
        from: Name,
        to: Name,
    },
    Symbolic {
        name: Name,
        target: u8,
    },
    Pipe {
        name: Name,
    },
    Folder {
        name: Name,
    },
    Remove {
        name: Name,
    },
}

impl Change {
    pub fn any() -> impl Strategy<Value = Self> {
        let name = Name::any;
        prop_oneof![
            4 => (name(), any::<u8>(), 0..3_u16, any::<bool>()).prop_map(|(name, byte, size, keeps_time)| {
                Self::Write { name, byte, size: size * 5000, keeps_time }
            }),
            2 => (name(), any::<u8>()).prop_map(|(name, byte)| Self::Append { name, byte }),
            1 => any::<u8>().prop_map(|byte| Self::AppendToOpen { byte }),
            1 => name().prop_map(|name| Self::HoldOpen { name }),
            1 => Just(Self::CloseAll),
            1 => (name(), any::<u16>()).prop_map(|(name, size)| Self::Truncate { name, size }),
            1 => (name(), 0..0o1000_u32).prop_map(|(name, mode)| Self::Mode { name, mode }),
            1 => (name(), 0..9_u32).prop_map(|(name, owner)| Self::Owner { name, owner }),
            1 => (name(), any::<u32>()).prop_map(|(name, seconds)| Self::Time { name, seconds }),
            1 => (name(), any::<u8>()).prop_map(|(name, value)| Self::Attribute { name, value }),
            4 => (name(), name()).prop_map(|(from, to)| Self::Rename { from, to }),
            1 => (name(), 0..3_u8).prop_map(|(from, to)| Self::RenameOut { from, to }),
            1 => (0..3_u8, name()).prop_map(|(from, to)| Self::RenameIn { from, to }),
            3 => (name(), name()).prop_map(|(from, to)| Self::Link { from, to }),
            1 => (name(), any::<u8>()).prop_map(|(name, target)| Self::Symbolic { name, target }),
            1 => name().prop_map(|name| Self::Pipe { name }),
            4 => name().prop_map(|name| Self::Folder { name }),
            2 => name().prop_map(|name| Self::Remove { name }),
        ]
    }
}

/// Arguments: path, value. Not every file system has such attributes.
const SET_ATTRIBUTE: &str = r#"
import os, sys
try:
    os.setxattr(sys.argv[1], "user.note", sys.argv[2].encode())
except OSError:
    pass
"#;

/// Who makes the changes.
#[derive(Default)]
pub struct Changer {
    open: Vec<File>,
}

impl Changer {
    pub fn apply(&mut self, tree: &Path, outside: &Path, change: &Change) {
        // A folder where a file is meant, or nothing at all: other changes make up for it.
        let _ = self.attempt(tree, outside, change);
    }

    fn attempt(&mut self, tree: &Path, outside: &Path, change: &Change) -> io::Result<()> {
        let at = |name: &Name| tree.join(name.path());
        let aside = |number: &u8| outside.join(number.to_string());
        match change {
            Change::Write {
                name,
                byte,
                size,
                keeps_time,
            } => write(&at(name), &vec![*byte; usize::from(*size)], *keeps_time),
            Change::Append { name, byte } => {
                // A pipe would wait for a reader.
                if fs::symlink_metadata(at(name))?.is_file() {
                    append(&at(name))?.write_all(&[*byte])?;
                }
                Ok(())
            }
            Change::AppendToOpen { byte } => self
                .open
                .iter_mut()
                .try_for_each(|file| file.write_all(&[*byte])),
            Change::HoldOpen { name } => {
                if fs::symlink_metadata(at(name))?.is_file() {
                    self.open.push(append(&at(name))?);
                }
                Ok(())
            }
            Change::CloseAll => {
                self.open.clear();
                Ok(())
            }
            Change::Truncate { name, size } => {
                let path = at(name);
                let path = path.as_path();
                nix::unistd::truncate(path, i64::from(*size))?;
                Ok(())
            }
            Change::Mode { name, mode } => {
                // Symbolic links are followed, perhaps to somewhere else.
                if fs::symlink_metadata(at(name))?.is_symlink() {
                    return Ok(());
                }
                fs::set_permissions(at(name), fs::Permissions::from_mode(0o700 | mode))
            }
            Change::Owner { name, owner } => {
                if fs::symlink_metadata(at(name))?.is_symlink() {
                    return Ok(());
                }
                chown(at(name), Some(*owner), Some(*owner))
            }
            Change::Time { name, seconds } => {
                if !fs::symlink_metadata(at(name))?.is_file() {
                    return Ok(());
                }
                let time = SystemTime::UNIX_EPOCH + Duration::from_secs((*seconds).into());
                File::open(at(name))?.set_modified(time)
            }
            Change::Attribute { name, value } => {
                if fs::symlink_metadata(at(name))?.is_file() {
                    let mut set = Command::new("python3");
                    set.args(["-I", "-c", SET_ATTRIBUTE]).arg(at(name));
                    set.arg(value.to_string()).status()?;
                }
                Ok(())
            }
            Change::Rename { from, to } => fs::rename(at(from), at(to)),
            Change::RenameOut { from, to } => fs::rename(at(from), aside(to)),
            Change::RenameIn { from, to } => fs::rename(aside(from), at(to)),
            Change::Link { from, to } => fs::hard_link(at(from), at(to)),
            Change::Symbolic { name, target } => symlink(format!("nowhere{target}"), at(name)),
            Change::Pipe { name } => Ok(nix::unistd::mkfifo(
                &at(name),
                nix::sys::stat::Mode::S_IRWXU,
            )?),
            Change::Folder { name } => fs::create_dir(at(name)),
            Change::Remove { name } => match fs::symlink_metadata(at(name))?.is_dir() {
                true => fs::remove_dir_all(at(name)),
                false => fs::remove_file(at(name)),
            },
        }
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).open(path)
}

fn write(path: &Path, content: &[u8], keeps_time: bool) -> io::Result<()> {
    let before = fs::symlink_metadata(path).ok();
    if before.as_ref().is_some_and(|before| !before.is_file()) {
        return Ok(());
    }
    fs::write(path, content)?;
    match before {
        Some(before) if keeps_time => File::open(path)?.set_modified(before.modified()?),
        _ => Ok(()),
    }
}
