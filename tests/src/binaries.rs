//! Where the programs under test are. They are found, not linked: a test starts them as an operator does.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

/// A program of this workspace, from `POSTCOPY_BIN_DIR` or the directory this program was built into.
pub fn program(name: &str) -> Result<PathBuf> {
    let folder = match std::env::var_os("POSTCOPY_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => build_folder()?,
    };
    let path = folder.join(name);
    ensure!(
        path.is_file(),
        "there is no {}: build it first (`make build`)",
        path.display()
    );
    Ok(path)
}

/// Test programs lie one level below the others, in `deps`.
fn build_folder() -> Result<PathBuf> {
    let own = std::env::current_exe().context("this program does not know where it is")?;
    let folder = own.parent().context("a program lies in a directory")?;
    let folder = if folder.ends_with("deps") {
        folder.parent().unwrap_or(folder)
    } else {
        folder
    };
    Ok(folder.to_owned())
}

/// CRIU: `POSTCOPY_CRIU`, the private prefix `make setup` fills, or `PATH`.
pub fn criu() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("POSTCOPY_CRIU") {
        let path = PathBuf::from(path);
        ensure!(
            path.is_file(),
            "POSTCOPY_CRIU names {}, which is no file",
            path.display()
        );
        return Ok(path);
    }
    let own = std::env::current_exe().context("this program does not know where it is")?;
    let prefixes = own.ancestors().map(|folder| folder.join(".deps/criu/bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    prefixes
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join("criu"))
        .find(|candidate| candidate.is_file())
        .context("no CRIU: `make setup` installs one")
}
