//! Counters in a file that several processes map: what a workload says of itself while it runs.
//!
//! The memory is shared and backed by a file, so it is there for the observer without a word between them, and CRIU
//! maps it again by its path.

use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

/// Types that several processes may map at once.
///
/// # Safety
///
/// The type consists of atomic integers only, so any bytes are a valid value and all access is atomic.
pub unsafe trait Counters: Sized + Sync + 'static {}

/// Maps the file at `path`, which is made of zeros when it is missing. It stays mapped to the end of the process.
pub fn map<T: Counters>(path: &Path) -> Result<&'static T> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    let length = NonZeroUsize::new(size_of::<T>()).context("counters have a size")?;
    file.set_len(length.get() as u64)
        .with_context(|| format!("cannot size {}", path.display()))?;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
    let address = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, &file, 0) };
    let address = address.with_context(|| format!("cannot map {}", path.display()))?;
    // SAFETY: the mapping is as long as `T`, page-aligned and never unmapped, and any bytes are a valid `T`.
    Ok(unsafe { address.cast::<T>().as_ref() })
}
