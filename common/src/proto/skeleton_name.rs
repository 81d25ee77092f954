//! The closed set of file names a skeleton may hold. A name is never a path.

use std::fmt;

/// Name of a skeleton file that was checked against the set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SkeletonName(String);

/// Files with a fixed name (`criu/image-desc.c`).
const FIXED: &[&str] = &[
    "apparmor.img",
    "binfmt-misc.img",
    "bpfmap-data.img",
    "bpfmap-file.img",
    "cgroup.img",
    "cpuinfo.img",
    "descriptors.json",
    "eventfd.img",
    "eventpoll-tfd.img",
    "eventpoll.img",
    "ext-files.img",
    "fanotify-mark.img",
    "fanotify.img",
    "fifo-data.img",
    "fifo.img",
    "filelocks.img",
    "files.img",
    "inetsk.img",
    "inotify-wd.img",
    "inotify.img",
    "inventory.img",
    "memfd.img",
    "netlinksk.img",
    "ns-files.img",
    "packetsk.img",
    "pidfd.img",
    "pipes-data.img",
    "pipes.img",
    "pstree.img",
    "reg-files.img",
    "remap-fpath.img",
    "seccomp.img",
    "signalfd.img",
    "sk-queues.img",
    "timerfd.img",
    "tty-data.img",
    "tty-info.img",
    "tty.img",
    "tunfile.img",
    "unixsk.img",
];

/// Files whose name carries a number, decimal or hexadecimal.
const NUMBERED: &[&str] = &[
    "autofs-",
    "binfmt-misc-",
    "core-",
    "creds-",
    "fdinfo-",
    "fs-",
    "ghost-file-",
    "ids-",
    "ifaddr-",
    "ip6tables-",
    "ipcns-msg-",
    "ipcns-sem-",
    "ipcns-shm-",
    "ipcns-var-",
    "iptables-",
    "itimers-",
    "mm-",
    "mountpoints-",
    "netdev-",
    "netns-",
    "netns-ct-",
    "netns-exp-",
    "nftables-",
    "pagemap-",
    "pagemap-shmem-",
    "pages-",
    "pages-shmem-",
    "pidns-",
    "posix-timers-",
    "rlimit-",
    "route-",
    "route6-",
    "rule-",
    "sigacts-",
    "signal-p-",
    "signal-s-",
    "tcp-stream-",
    "timens-",
    "tmpfs-",
    "tmpfs-dev-",
    "userns-",
    "utsns-",
    "vmas-",
];

impl SkeletonName {
    /// Accepts a name of the set, refuses everything else.
    pub fn parse(name: &str) -> Option<Self> {
        (FIXED.contains(&name) || is_numbered(name)).then(|| SkeletonName(name.to_owned()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SkeletonName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_numbered(name: &str) -> bool {
    let stem = [".tar.gz.img", ".tar.gz", ".img"]
        .iter()
        .find_map(|suffix| name.strip_suffix(suffix));
    let Some(stem) = stem else { return false };
    let number = stem.len() - stem.bytes().rev().take_while(u8::is_ascii_hexdigit).count();
    let (prefix, digits) = stem.split_at(number);
    (1..=16).contains(&digits.len()) && NUMBERED.contains(&prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_accepted() {
        for name in [
            "inventory.img",
            "core-1.img",
            "pages-12.img",
            "ghost-file-1f.img",
            "tmpfs-dev-74.tar.gz.img",
            "tcp-stream-6a1b.img",
        ] {
            assert_eq!(
                SkeletonName::parse(name).map(|n| n.0),
                Some(name.to_owned())
            );
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for name in [
            "",
            ".",
            "..",
            "../inventory.img",
            "/etc/passwd",
            "core-.img",
            "core-1.img/x",
            "core-1/../../x.img",
            "core-12345678901234567.img",
            "pages-1.img\0",
            "lazy-pages.socket",
            "CORE-1.img",
            "stats-dump",
        ] {
            assert_eq!(SkeletonName::parse(name), None, "{name:?}");
        }
    }
}
