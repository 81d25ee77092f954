//! Facts about this host that both ends need: who it is, what it may do, where staging is cheap.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::utsname::uname;
use tempfile::TempDir;

use crate::proc_text;

/// Where staging directories go when the operator names none: the first that is a tmpfs.
const STAGING: &[&str] = &["/run", "/dev/shm", "/tmp"];

/// Name of this host.
pub fn name() -> String {
    uname_field(|uts| uts.nodename().to_string_lossy().into_owned())
}

/// Kernel release of this host (`uname -r`).
pub fn kernel() -> String {
    uname_field(|uts| uts.release().to_string_lossy().into_owned())
}

/// Machine of this host (`uname -m`).
pub fn architecture() -> String {
    uname_field(|uts| uts.machine().to_string_lossy().into_owned())
}

/// A kernel that lacks what is needed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("this host's kernel is {release}; Linux {}.{} or later is needed{reason}", .needed.0, .needed.1)]
pub struct OldKernel {
    /// What it is.
    pub release: String,
    /// What it should be at least.
    pub needed: (u32, u32),
    /// What for, as the end of the sentence; may be empty.
    pub reason: &'static str,
}

/// Refuses a kernel before `needed`.
pub fn check_kernel(
    release: &str,
    needed: (u32, u32),
    reason: &'static str,
) -> Result<(), OldKernel> {
    match kernel_numbers(release) {
        Some(numbers) if numbers < needed => Err(OldKernel {
            release: release.to_owned(),
            needed,
            reason,
        }),
        // A release whose name says no version is let pass: what is missing will say so itself.
        _ => Ok(()),
    }
}

/// The first two numbers of a kernel's release.
pub fn kernel_numbers(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || parts.next()?.parse().ok();
    Some((number()?, number()?))
}

fn uname_field(field: impl Fn(&nix::sys::utsname::UtsName) -> String) -> String {
    uname().map_or_else(|_| String::from("unknown"), |uts| field(&uts))
}

/// CPU feature flags as `/proc/cpuinfo` lists them for the first processor, sorted.
pub fn cpu_features() -> Vec<String> {
    features_in(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

/// The flags of the first processor in `cpuinfo`, sorted.
pub fn features_in(cpuinfo: &str) -> Vec<String> {
    let flags = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags")?.split_once(':'))
        .map_or("", |(_, flags)| flags);
    let mut features: Vec<String> = flags.split_whitespace().map(str::to_owned).collect();
    features.sort();
    features
}

/// Bytes of memory that could be used without swapping.
pub fn available_memory() -> Option<u64> {
    available_in(&fs::read("/proc/meminfo").ok()?)
}

/// Bytes that `meminfo` says are available.
pub fn available_in(meminfo: &[u8]) -> Option<u64> {
    let value = proc_text::field(meminfo, "MemAvailable")?;
    let kib: u64 = value.strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Whether this process holds a capability now (`linux/capability.h` numbers).
pub fn has_capability(number: u32) -> bool {
    let status = fs::read("/proc/self/status").unwrap_or_default();
    proc_text::field(&status, "CapEff")
        .and_then(|mask| u64::from_str_radix(mask, 16).ok())
        .is_some_and(|mask| mask >> number & 1 == 1)
}

/// `CAP_NET_ADMIN`: changing addresses and the packet filter.
pub const CAP_NET_ADMIN: u32 = 12;
/// `CAP_NET_RAW`: sending packets of one's own making.
pub const CAP_NET_RAW: u32 = 13;
/// `CAP_SYS_PTRACE`: reading another process's memory.
pub const CAP_SYS_PTRACE: u32 = 19;
/// `CAP_SYS_ADMIN`: what CRIU needs for almost everything.
pub const CAP_SYS_ADMIN: u32 = 21;

/// A new directory only we can read, on a tmpfs when there is one; removed when dropped.
pub fn staging_directory(named: Option<&Path>) -> io::Result<TempDir> {
    let parent = match named {
        Some(named) => named.to_owned(),
        None => default_staging(),
    };
    tempfile::Builder::new()
        .prefix("postcopy-")
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir_in(&parent)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", parent.display())))
}

fn default_staging() -> PathBuf {
    let is_tmpfs =
        |path: &&str| statfs(*path).is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC);
    PathBuf::from(STAGING.iter().copied().find(is_tmpfs).unwrap_or("/tmp"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn staging_is_private_and_goes_away() {
        let parent = tempfile::tempdir().expect("a directory");
        let staging = staging_directory(Some(parent.path())).expect("created");
        let path = staging.path().to_owned();
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        drop(staging);
        assert!(!path.exists());
    }

    #[test]
    fn a_missing_parent_is_named() {
        let error = staging_directory(Some(Path::new("/nonexistent"))).expect_err("no parent");
        assert!(error.to_string().contains("/nonexistent"));
    }

    #[test]
    fn an_old_kernel_is_refused() {
        let error = check_kernel("4.19.0-27-amd64", (5, 3), " for this").expect_err("too old");
        assert!(
            error
                .to_string()
                .contains("5.3 or later is needed for this"),
            "{error}"
        );
        assert!(check_kernel("5.2.21", (5, 3), "").is_err());
        assert!(check_kernel("5.10.0-28-amd64", (5, 12), "").is_err());
        for release in ["5.3.0", "6.1.0-43-amd64", "10.0", "unknown"] {
            assert_eq!(check_kernel(release, (5, 3), ""), Ok(()), "{release}");
        }
    }

    #[test]
    fn this_host_has_a_name_and_memory() {
        assert!(!name().is_empty());
        assert!(available_memory().expect("linux says so") > 0);
    }
}
