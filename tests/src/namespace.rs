//! Namespaces: private mounts for the calling thread, and network namespaces by name.
//!
//! Names of network namespaces live under `/run/netns`. The rig gives itself a `/run` of its own, so they are seen by
//! the rig's processes only and vanish with the last of them.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::shell::run_line;

thread_local! {
    static MOUNTS_ARE_PRIVATE: Cell<bool> = const { Cell::new(false) };
}

/// Gives the calling thread, and everything it starts from now on, mounts of its own with an empty tmpfs on `/run`, and
/// on `/dev/shm`, where the programs keep what they stage: what is left there is this rig's.
///
/// A host's `/run` is a tmpfs, and CRIU keeps what it learnt about the kernel there (`/run/criu.kdat`) only if it is
/// one; in a container `/run` is often a plain directory, and every CRIU command would probe the kernel anew.
pub fn make_mounts_private() -> Result<()> {
    if MOUNTS_ARE_PRIVATE.get() {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace (is this root?)")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("cannot make mounts private")?;
    keep_inherited_files_to_ourselves();
    for (path, mode) in [("/run", "mode=755"), ("/dev/shm", "mode=1777")] {
        let tmpfs = Some("tmpfs");
        mount(tmpfs, path, tmpfs, MsFlags::empty(), Some(mode))
            .with_context(|| format!("cannot mount {path}"))?;
    }
    MOUNTS_ARE_PRIVATE.set(true);
    Ok(())
}

/// Marks what this process inherited from its own starter as close-on-exec.
///
/// A file opened in the old mount namespace would otherwise end up in a workload, and CRIU cannot name it there.
fn keep_inherited_files_to_ourselves() {
    let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: no file is closed, and nobody in this process relies on one surviving an exec.
    unsafe { libc::close_range(3, libc::c_uint::MAX, flags) };
}

/// Makes a network namespace called `name` with its loopback up.
pub fn add(name: &str) -> Result<()> {
    run_line(&format!("ip netns add {name}"))?;
    run_line(&format!("ip -n {name} link set lo up"))?;
    Ok(())
}

/// Where the network namespace `name` can be opened.
pub fn path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// Moves the calling thread into the network namespace `name`; sockets it opens from now on belong there.
pub fn enter(name: &str) -> Result<()> {
    let file =
        std::fs::File::open(path(name)).with_context(|| format!("no network namespace {name}"))?;
    setns(file, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("cannot enter network namespace {name}"))
}
