//! Identities for both hosts, made by the program's own command.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::binaries;
use crate::shell::run;

/// One certificate authority and a certificate for each host.
#[derive(Debug, Clone)]
pub struct Identities {
    /// The source's directory, which holds the authority too.
    pub source: PathBuf,
    /// The destination's directory.
    pub destination: PathBuf,
}

impl Identities {
    /// Makes them under `folder`.
    pub fn make(folder: &Path) -> Result<Self> {
        let source = folder.join("source");
        let destination = folder.join("destination");
        init(&source, &[])?;
        issue(&source, &destination, &["--name", "destination"])?;
        Ok(Self {
            source,
            destination,
        })
    }
}

/// Makes an authority and a host certificate in `folder`; `options` are passed on.
pub fn init(folder: &Path, options: &[&str]) -> Result<()> {
    let mut command = Command::new(binaries::program("page-server")?);
    run(command
        .args(["identity", "init", "--dir"])
        .arg(folder)
        .args(options))?;
    Ok(())
}

/// Makes a host certificate of the authority in `authority`; `options` are passed on.
pub fn issue(authority: &Path, folder: &Path, options: &[&str]) -> Result<()> {
    let mut command = Command::new(binaries::program("page-server")?);
    command.args(["identity", "issue", "--ca"]).arg(authority);
    run(command.arg("--dir").arg(folder).args(options))?;
    Ok(())
}
