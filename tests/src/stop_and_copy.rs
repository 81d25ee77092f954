//! The old way: stop the workload, dump all of it, copy the images, restore them.
//!
//! Images are in memory on both hosts, and the copy is one TCP connection over the path, as fast as it goes.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::unistd::Pid;

use crate::criu_baseline::{BaselineHome, network_lock};
use crate::namespace;
use crate::rig::Rig;
use crate::shell::run;

/// The rig's own tmpfs.
const MEMORY: &str = "/run";

/// Moves the tree under `pid` from the source of `rig` to `home`, with the service address.
pub fn migrate(rig: &Rig, home: &BaselineHome, criu: &Path, pid: Pid) -> Result<()> {
    let folder = tempfile::Builder::new()
        .prefix("stop-and-copy-")
        .tempdir_in(MEMORY)
        .context("no room for images")?;
    let (here, there) = (folder.path().join("here"), folder.path().join("there"));
    fs::create_dir(&here)?;
    fs::create_dir(&there)?;
    let service = rig.service;
    run(&mut dump(rig, criu, pid, &here)).context("cannot dump")?;
    rig.source.shell(&service.on_frozen())?;
    rig.destination.shell(&service.before_restore())?;
    copy(rig, &here, &there).context("cannot copy the images")?;
    run(&mut restore(rig, home, criu, &there)).context("cannot restore")?;
    rig.destination.shell(&service.on_resumed())?;
    Ok(())
}

fn dump(rig: &Rig, criu: &Path, pid: Pid, images: &Path) -> Command {
    let mut command = rig.source.command(criu);
    command.args(["dump", "--tree", &pid.to_string(), "--tcp-established"]);
    command.args(network_lock(criu));
    command.args(["--log-file", "dump.log", "--images-dir"]);
    command.arg(images);
    command
}

fn restore(rig: &Rig, home: &BaselineHome, criu: &Path, images: &Path) -> Command {
    let mut command = rig.destination.command("nsenter");
    command
        .args(["-t", &home.init().to_string(), "--pid", "--mount", "--"])
        .arg(criu);
    command.args(["restore", "--restore-detached", "--tcp-established"]);
    command.args(["--log-file", "restore.log", "--images-dir"]);
    command.arg(images);
    command
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
        if !path.is_file() {
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
