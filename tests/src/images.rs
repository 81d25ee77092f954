//! CRIU's images, in memory on both hosts. They go from one to the other in one TCP connection over the path, as fast as it
//! goes: what a host has written the other does not have.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, anyhow};
use tempfile::TempDir;

use crate::namespace;
use crate::rig::Rig;

/// The rig's own tmpfs.
const MEMORY: &str = "/run";

/// The two directories.
#[derive(Debug)]
pub struct Images {
    _folder: TempDir,
    here: PathBuf,
    there: PathBuf,
}

impl Images {
    /// Both of them empty; they go when this is dropped.
    pub fn make() -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("images-")
            .tempdir_in(MEMORY)
            .context("no room for images")?;
        let (here, there) = (folder.path().join("here"), folder.path().join("there"));
        fs::create_dir(&here)?;
        fs::create_dir(&there)?;
        Ok(Self {
            _folder: folder,
            here,
            there,
        })
    }

    /// The source's.
    pub fn here(&self) -> &Path {
        &self.here
    }

    /// The destination's.
    pub fn there(&self) -> &Path {
        &self.there
    }

    /// A log of that name, on the host that wrote it.
    pub fn log(&self, name: &str) -> PathBuf {
        let there = self.there.join(name);
        match there.exists() {
            true => there,
            false => self.here.join(name),
        }
    }

    /// Has the destination have what the source has, logs excepted.
    pub fn copy(&self, rig: &Rig) -> Result<()> {
        copy(rig, &self.here, &self.there).context("cannot copy the images")
    }
}

fn copy(rig: &Rig, from: &Path, to: &Path) -> Result<()> {
    let address = rig.destination.address();
    let namespaces = [rig.source.namespace(), rig.destination.namespace()];
    let (send_port, port) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            namespace::enter(namespaces[1])?;
            let listener = TcpListener::bind((address, 0))?;
            // The sender waits for it.
            let _ = send_port.send(listener.local_addr()?.port());
            receive(listener.accept()?.0, to)
        });
        let sending = scope.spawn(move || {
            namespace::enter(namespaces[0])?;
            send(TcpStream::connect((address, port.recv()?))?, from)
        });
        for thread in [sending, receiving] {
            thread.join().map_err(|_| anyhow!("a copier panicked"))??;
        }
        Ok(())
    })
}

/// Length of the name, name, length of the file, file; again and again.
fn send(stream: TcpStream, from: &Path) -> Result<()> {
    let mut out = BufWriter::new(stream);
    for entry in fs::read_dir(from)? {
        let path: PathBuf = entry?.path();
        let is_log = path.extension().is_some_and(|extension| extension == "log");
        if is_log || !path.is_file() {
            continue;
        }
        let name = path.file_name().context("a file has a name")?;
        let name = name.as_encoded_bytes();
        let mut file = File::open(&path)?;
        out.write_all(&(name.len() as u64).to_le_bytes())?;
        out.write_all(name)?;
        out.write_all(&file.metadata()?.len().to_le_bytes())?;
        out.flush()?;
        io::copy(&mut file, out.get_mut())?;
    }
    out.flush()?;
    Ok(())
}

fn receive(stream: TcpStream, to: &Path) -> Result<()> {
    let mut from = BufReader::with_capacity(1 << 20, stream);
    while let Some(length) = number(&mut from)? {
        let mut name = vec![0; usize::try_from(length)?];
        from.read_exact(&mut name)?;
        let length = number(&mut from)?.context("the copy ends early")?;
        let mut file = File::create(to.join(String::from_utf8(name)?))?;
        io::copy(&mut from.by_ref().take(length), &mut file)?;
    }
    Ok(())
}

fn number(from: &mut impl Read) -> Result<Option<u64>> {
    let mut bytes = [0; 8];
    match from.read_exact(&mut bytes) {
        Ok(()) => Ok(Some(u64::from_le_bytes(bytes))),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error.into()),
    }
}
