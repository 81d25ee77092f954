//! Staging the skeleton: files as they arrive, into a directory of our own.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use common::images::{
    DumpedProcess, ImageError, ReadImagesError, read_processes, without_network_lock,
};
use common::limits::MAX_SKELETON_FILES;
use common::proto::ProtoError;
use common::proto::bulk::{BULK_HEADER_BYTES, BulkHeader, MAX_NAME_BYTES};
use common::proto::skeleton_name::SkeletonName;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::memory::ProcessImage;

/// Why the skeleton could not be staged.
#[derive(Debug, thiserror::Error)]
pub enum SkeletonError {
    /// The connection broke.
    #[error("the bulk connection broke while the skeleton came: {0}")]
    Stream(#[from] io::Error),
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

/// Bytes of an inventory at most: CRIU's has a few hundred.
const MAX_INVENTORY_BYTES: u64 = 64 << 10;

/// How the image of a dumped network namespace is called (`criu/image-desc.c`).
const NETWORK_NAMESPACE: &str = "netns-";

/// A file that is being written.
struct Open {
    name: SkeletonName,
    file: File,
    length: u64,
}

/// An open directory: whoever writes into it needs no right to come there by its path.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    open: File,
}

impl Folder {
    /// Opens it.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let open = File::open(&path)?;
        Ok(Folder { path, open })
    }

    fn file(&self, name: &str, how: OFlag) -> Result<File, SkeletonError> {
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let opened = openat(&self.open, name, how | OFlag::O_CLOEXEC, mode);
        let opened = opened.map_err(|error| self.failed(name)(error.into()));
        opened.map(File::from)
    }

    fn failed(&self, name: &str) -> impl Fn(io::Error) -> SkeletonError + use<> {
        let path = self.path.join(name);
        move |error| SkeletonError::Write {
            path: path.clone(),
            error,
        }
    }
}

/// Receives the whole skeleton into `folder`; returns the stream for what follows.
pub async fn stage<S: AsyncRead + Unpin>(
    mut stream: S,
    folder: Folder,
) -> Result<S, SkeletonError> {
    let mut staging = Staging {
        folder,
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

async fn read_name(
    stream: &mut (impl AsyncRead + Unpin),
    length: u8,
) -> Result<SkeletonName, SkeletonError> {
    let mut name = [0; MAX_NAME_BYTES];
    let name = &mut name[..usize::from(length)];
    stream.read_exact(name).await?;
    let name = String::from_utf8_lossy(name).into_owned();
    SkeletonName::parse(&name).ok_or(SkeletonError::Name(name))
}

struct Staging {
    folder: Folder,
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
        let written = open.file.write_all(content);
        written.map_err(self.folder.failed(open.name.as_str()))?;
        open.length += content.len() as u64;
        self.bytes += content.len() as u64;
        Ok(())
    }

    fn create(&mut self, name: SkeletonName) -> Result<(), SkeletonError> {
        if self.files == MAX_SKELETON_FILES {
            return Err(SkeletonError::Order("too many skeleton files"));
        }
        let new = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        let file = self.folder.file(name.as_str(), new)?;
        self.files += 1;
        self.has_network |= name.as_str().starts_with(NETWORK_NAMESPACE);
        self.open = Some(Open {
            name,
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
        const NAME: &str = "inventory.img";
        let mut inventory = Vec::new();
        let read = self.folder.file(NAME, OFlag::O_RDONLY)?;
        let limited = read.take(MAX_INVENTORY_BYTES).read_to_end(&mut inventory);
        limited.map_err(self.folder.failed(NAME))?;
        let inventory = without_network_lock(&inventory).map_err(SkeletonError::Inventory)?;
        let mut write = self.folder.file(NAME, OFlag::O_WRONLY | OFlag::O_TRUNC)?;
        write
            .write_all(&inventory)
            .map_err(self.folder.failed(NAME))
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
pub async fn expect_none<S: AsyncRead + Unpin>(mut stream: S) -> Result<S, SkeletonError> {
    let mut header = [0; BULK_HEADER_BYTES];
    stream.read_exact(&mut header).await?;
    match BulkHeader::decode(&header)? {
        BulkHeader::SkeletonEnd { files: 0, bytes: 0 } => Ok(stream),
        _ => Err(SkeletonError::Order("files that nobody needs")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn staging(directory: &Path) -> Staging {
        Staging {
            folder: Folder::open(directory.to_owned()).expect("there"),
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
