//! What the kernel writes in `/proc` about processes and mounts: pure.
//!
//! It is bytes. Names of processes, files and mounts need not be UTF-8; that of a process is cut after 15 bytes, wherever
//! in a letter that may be.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Fields before the mount point in a line of `mountinfo` (`proc_pid_mountinfo(5)`).
const FIELDS_BEFORE_POINT: usize = 4;
/// The start of a process is field 22 of `stat`, and its state field 3 (`proc_pid_stat(5)`).
const FIELDS_FROM_STATE_TO_START: usize = 22 - 4;

/// The lines of a text.
pub fn lines(text: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n')
}

/// What stands behind `name:` in `/proc/PID/status`, `/proc/meminfo` and their like.
pub fn field<'a>(text: &'a [u8], name: &str) -> Option<&'a str> {
    lines(text).find_map(|line| value(line, name))
}

/// What stands behind `name:` in a line.
fn value<'a>(line: &'a [u8], name: &str) -> Option<&'a str> {
    let value = line.strip_prefix(name.as_bytes())?.strip_prefix(b":")?;
    Some(str::from_utf8(value).ok()?.trim())
}

/// State and start in `/proc/PID/stat`. The name before them is in parentheses and may hold anything.
pub fn state_and_start(stat: &[u8]) -> Option<(char, u64)> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = str::from_utf8(&stat[end + 1..]).ok()?.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(FIELDS_FROM_STATE_TO_START)?.parse().ok()?;
    Some((state, start))
}

/// The last number of `NSpid` in `/proc/PID/status`: the PID in the process's own PID namespace.
pub fn innermost_pid(status: &[u8]) -> Option<u32> {
    field(status, "NSpid")?
        .split_whitespace()
        .last()?
        .parse()
        .ok()
}

/// Whether mappings in `/proc/PID/smaps` are registered with a userfault descriptor (`VmFlags`).
pub fn has_lazy_memory(smaps: &[u8]) -> bool {
    let mut flags = lines(smaps).filter_map(|line| value(line, "VmFlags"));
    flags.any(|flags| flags.split_whitespace().any(|flag| flag == "um"))
}

/// The mount point in a line of `mountinfo`.
pub fn mount_point(line: &[u8]) -> Option<PathBuf> {
    let point = line.split(|byte| *byte == b' ').nth(FIELDS_BEFORE_POINT)?;
    Some(unescape(point))
}

/// The path that the kernel has written with some bytes, as space and newline, as three octal digits behind a backslash.
pub fn unescape(text: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, more)) = rest.split_first() {
        let code = (*first == b'\\').then(|| more.get(..3)).flatten();
        let code = code.and_then(octal);
        plain.push(code.unwrap_or(*first));
        rest = match code {
            Some(_) => &more[3..],
            None => more,
        };
    }
    PathBuf::from(OsString::from_vec(plain))
}

fn octal(digits: &[u8]) -> Option<u8> {
    let mut number = 0_u8;
    for digit in digits {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
        number = number.checked_mul(8)?.checked_add(digit)?;
    }
    Some(number)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn octal_codes_are_characters() {
        assert_eq!(unescape(b"a\\040b\\134c"), Path::new("a b\\c"));
        for text in ["a\\04", "\\", "\\+12", "\\400", "\\089"] {
            assert_eq!(unescape(text.as_bytes()), Path::new(text));
        }
    }

    #[test]
    fn a_process_may_be_called_anything() {
        let stat = b"7 (a) R \xc3) S 1 7 7 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        assert_eq!(state_and_start(stat), Some(('S', 4711)));
        let status = b"Name:\tbr\xc3\nTgid:\t7\nNSpid:\t7\t1\n";
        assert_eq!(innermost_pid(status), Some(1));
        assert_eq!(field(status, "Tgid"), Some("7"));
        assert_eq!(field(status, "Name"), None);
        assert_eq!(field(status, "gid"), None);
    }

    #[test]
    fn lazy_memory_is_seen_beside_files_of_any_name() {
        let smaps =
            b"7f0000000000-7f0000001000 r--p 00000000 fd:01 9   /srv/\xff\nVmFlags: rd mr\n";
        assert!(!has_lazy_memory(smaps));
        let lazy = [
            &smaps[..],
            b"7f0000001000-7f0000002000 rw-p 0 0:0 0\nVmFlags: rd wr um\n",
        ];
        assert!(has_lazy_memory(&lazy.concat()));
    }
}
