//! The old way: stop the workload, dump all of it, copy the images, restore them.
//!
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use nix::unistd::Pid;

use crate::criu_baseline::{BaselineHome, network_lock};
use crate::images::Images;
use crate::rig::Rig;
use crate::shell::run;

/// Moves the tree under `pid` from the source of `rig` to `home`, with the service address.
pub fn migrate(rig: &Rig, home: &BaselineHome, criu: &Path, pid: Pid) -> Result<()> {
    let images = Images::make()?;
    let service = rig.service;
    run(&mut dump(rig, criu, pid, images.here())).context("cannot dump")?;
    rig.source.shell(&service.on_frozen())?;
    rig.destination.shell(&service.before_restore())?;
    images.copy(rig)?;
    run(&mut restore(rig, home, criu, images.there())).context("cannot restore")?;
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
