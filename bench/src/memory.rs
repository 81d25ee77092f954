//! The machine's memory before a run.

use std::num::NonZeroUsize;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// What reports say of it.
pub const STATEMENT: &str =
    "memory: warm, as much as the workload holds was touched and given back before each move";

/// Touches `mib` of memory and gives it back, so that the destination's pages come from memory the machine has had
/// before. On a virtual machine the first touch of a page may cost a trip to the hypervisor, many times the page's copy.
pub fn warm(mib: u64) -> Result<()> {
    let bytes = usize::try_from(mib << 20)
        .ok()
        .and_then(NonZeroUsize::new)
        .context("nothing to warm")?;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
    let address =
        unsafe { mmap_anonymous(None, bytes, access, flags) }.context("cannot warm the memory")?;
    // SAFETY: this is the mapping just made, and nothing refers to it.
    unsafe { munmap(address, bytes.get()) }.context("cannot give the memory back")
}
