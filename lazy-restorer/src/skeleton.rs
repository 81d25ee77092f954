//! Staging the skeleton: files as they arrive, into a directory of our own.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use common::images::{
    DumpedProcess, ImageError, ReadImagesError, read_processes, without_network_lock,
};
use common::limits::MAX_SKELETON_FILES;
use common::proto::ProtoError;
use common::proto::bulk::{BULK_HEADER_BYTES, BulkHeader, MAX_NAME_BYTES};
use common::proto::skeleton_name::SkeletonName;
use quinn::{ReadExactError, RecvStream};

use crate::memory::ProcessImage;

/// Why the skeleton could not be staged.
#[derive(Debug, thiserror::Error)]
pub enum SkeletonError {
    /// The connection broke.
    #[error("the bulk connection broke while the skeleton came: {0}")]
    Stream(#[from] ReadExactError),
    /// The source broke the protocol.
    #[error("the source broke the protocol: {0}")]
    Proto(#[from] ProtoError),
    /// A name outside the closed set.
    #[error("the source sends a file called {0:?}, which no skeleton holds")]
    Name(String),
    /// Files out of order, or not the announced number of them.
    #[error("the source broke the protocol: {0}")]
    Order(&'static str),
    /// No room.
    #[error(
        "cannot write the skeleton to {path}: {error}; make room there or choose another --work-dir"
    )]
    Write {
        /// Where.
        path: PathBuf,
        /// The system's word.
        error: io::Error,
    },
    /// The inventory is none.
    #[error("cannot use the inventory of the dump: {0}")]
    Inventory(ImageError),
}

/// How the image of a dumped network namespace is called (`criu/image-desc.c`).
const NETWORK_NAMESPACE: &str = "netns-";

/// A file that is being written.
struct Open {
    name: SkeletonName,
    path: PathBuf,
    file: File,
    length: u64,
}

/// Receives the whole skeleton into `directory`; returns the stream for what follows.
pub async fn stage(
    mut stream: RecvStream,
    directory: PathBuf,
) -> Result<RecvStream, SkeletonError> {
    let mut staging = Staging {
        directory,
        open: None,
        has_network: false,
        files: 0,
        bytes: 0,
    };
    loop {
        let mut header = [0; BULK_HEADER_BYTES];
        stream.read_exact(&mut header).await?;
        match BulkHeader::decode(&header)? {
            BulkHeader::File {
                name,
                offset,
                payload,
            } => {
                let name = read_name(&mut stream, name).await?;
                let mut content = vec![0; payload as usize];
                stream.read_exact(&mut content).await?;
                staging.write(name, offset, &content)?;
            }
            BulkHeader::SkeletonEnd { files, bytes } => {
                staging.finish(files, bytes)?;
                staging.forget_network_lock()?;
                return Ok(stream);
            }
            BulkHeader::Data(_) | BulkHeader::Packed(_) => {
                return Err(SkeletonError::Order("pages before the skeleton's end"));
            }
        }
    }
}

async fn read_name(stream: &mut RecvStream, length: u8) -> Result<SkeletonName, SkeletonError> {
    let mut name = [0; MAX_NAME_BYTES];
    let name = &mut name[..usize::from(length)];
    stream.read_exact(name).await?;
    let name = String::from_utf8_lossy(name).into_owned();
    SkeletonName::parse(&name).ok_or(SkeletonError::Name(name))
}

struct Staging {
    directory: PathBuf,
    open: Option<Open>,
    /// The workload brings a network namespace of its own.
    has_network: bool,
    files: usize,
    bytes: u64,
}

impl Staging {
    fn write(
        &mut self,
        name: SkeletonName,
        offset: u64,
        content: &[u8],
    ) -> Result<(), SkeletonError> {
        let continues = self
            .open
            .as_ref()
            .is_some_and(|open| open.name == name && open.length == offset && offset > 0);
        if !continues {
            if offset != 0 {
                return Err(SkeletonError::Order(
                    "a skeleton file does not begin at its beginning",
                ));
            }
            self.create(name)?;
        }
        let Some(open) = &mut self.open else {
            return Err(SkeletonError::Order("no skeleton file is open"));
        };
        open.file
            .write_all(content)
            .map_err(|error| SkeletonError::Write {
                path: open.path.clone(),
                error,
            })?;
        open.length += content.len() as u64;
        self.bytes += content.len() as u64;
        Ok(())
    }

    fn create(&mut self, name: SkeletonName) -> Result<(), SkeletonError> {
        if self.files == MAX_SKELETON_FILES {
            return Err(SkeletonError::Order("too many skeleton files"));
        }
        let path = self.directory.join(name.as_str());
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| SkeletonError::Write {
                path: path.clone(),
                error,
            })?;
        self.files += 1;
        self.has_network |= name.as_str().starts_with(NETWORK_NAMESPACE);
        self.open = Some(Open {
            name,
            path,
            file,
            length: 0,
        });
        Ok(())
    }

    fn finish(&self, files: u32, bytes: u64) -> Result<(), SkeletonError> {
        if self.files != files as usize || self.bytes != bytes {
            return Err(SkeletonError::Order(
                "the skeleton is not as long as announced",
            ));
        }
        Ok(())
    }

    /// The source's lock on single connections is not here. Trying to remove it nevertheless costs the frozen workload
    /// an RCU grace period in the kernel's `nf_tables` (measured: 27 ms to 75 ms), or a program per connection.
    fn forget_network_lock(&self) -> Result<(), SkeletonError> {
        if self.has_network {
            return Ok(());
        }
        let path = self.directory.join("inventory.img");
        let write = |error| SkeletonError::Write {
            path: path.clone(),
            error,
        };
        let inventory = fs::read(&path).map_err(write)?;
        let inventory = without_network_lock(&inventory).map_err(SkeletonError::Inventory)?;
        fs::write(&path, inventory).map_err(write)
    }
}

/// What the staged images say about each process's memory.
pub fn processes(directory: &Path) -> Result<Vec<ProcessImage>, ReadImagesError> {
    let dumped = read_processes(directory)?.into_iter();
    Ok(dumped.map(memory_image).collect())
}

/// What of a dumped process matters to its memory.
pub fn memory_image(process: DumpedProcess) -> ProcessImage {
    ProcessImage {
        pid: process.pid,
        lazy: process.lazy,
        vmas: process.layout.vmas,
    }
}

/// Takes the end of a skeleton without files: the images are here already.
pub async fn expect_none(mut stream: RecvStream) -> Result<RecvStream, SkeletonError> {
    let mut header = [0; BULK_HEADER_BYTES];
    stream.read_exact(&mut header).await?;
    match BulkHeader::decode(&header)? {
        BulkHeader::SkeletonEnd { files: 0, bytes: 0 } => Ok(stream),
        _ => Err(SkeletonError::Order("files that nobody needs")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staging(directory: &Path) -> Staging {
        Staging {
            directory: directory.to_owned(),
            open: None,
            has_network: false,
            files: 0,
            bytes: 0,
        }
    }

    fn name(name: &str) -> SkeletonName {
        SkeletonName::parse(name).expect("of the set")
    }

    #[test]
    fn files_are_written_in_pieces() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut staging = staging(dir.path());
        staging.write(name("files.img"), 0, b"ab").expect("written");
        staging.write(name("files.img"), 2, b"cd").expect("written");
        staging.write(name("fs-1.img"), 0, b"").expect("written");
        staging.finish(2, 4).expect("complete");
        let content = fs::read(dir.path().join("files.img")).expect("there");
        assert_eq!(content, b"abcd");
    }

    #[test]
    fn the_lock_of_a_dumped_network_namespace_is_kept() {
        let inventory = [&0x5831_3116_u32.to_le_bytes()[..], &[2, 0, 0, 0, 8, 1]].concat();
        for (netns, changed) in [(None, true), (Some("netns-9.img"), false)] {
            let dir = tempfile::tempdir().expect("a directory");
            let mut staging = staging(dir.path());
            for file in [Some("inventory.img"), netns].into_iter().flatten() {
                staging.write(name(file), 0, &inventory).expect("written");
            }
            staging.forget_network_lock().expect("an inventory");
            let staged = fs::read(dir.path().join("inventory.img")).expect("there");
            assert_eq!(staged != inventory, changed, "{netns:?}");
        }
    }

    #[test]
    fn gaps_repetitions_and_wrong_ends_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut staging = staging(dir.path());
        staging.write(name("files.img"), 0, b"ab").expect("written");
        assert!(staging.write(name("files.img"), 3, b"x").is_err(), "gap");
        assert!(staging.write(name("files.img"), 0, b"x").is_err(), "again");
        assert!(staging.write(name("fs-1.img"), 5, b"x").is_err(), "middle");
        assert!(staging.finish(1, 3).is_err());
        assert!(staging.finish(2, 2).is_err());
        staging.finish(1, 2).expect("what was written");
    }
}
