//! How many files this program may have open: as many as the host allows, for every process of a workload takes one. What
//! it starts gets the limit that it found.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// The limits before [`raise`]; of a process there is one, so it is no session's.
static FOUND: OnceLock<(rlim_t, rlim_t)> = OnceLock::new();

/// Raises the limit as far as it goes. A failure shows where a file cannot be opened.
pub fn raise() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        FOUND.get_or_init(|| (soft, hard));
    }
}

/// Lets `command` start with the limit that was found: what it starts may go by it, for good or ill (`select` knows 1024
/// files), and may live long.
pub fn as_found(command: &mut Command) -> &mut Command {
    let Some((soft, hard)) = FOUND.get().copied() else {
        return command;
    };
    let restore = move || setrlimit(Resource::RLIMIT_NOFILE, soft, hard).map_err(io::Error::from);
    // SAFETY: between fork and exec it makes one system call and allocates nothing.
    unsafe { command.pre_exec(restore) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_have_the_limit_that_was_found() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        setrlimit(Resource::RLIMIT_NOFILE, 100, hard).expect("lower");
        raise();
        assert_eq!(
            getrlimit(Resource::RLIMIT_NOFILE).expect("a limit"),
            (hard, hard)
        );
        let mut command = Command::new("sh");
        let output = as_found(command.args(["-c", "ulimit -n"])).output();
        let output = output.expect("sh runs");
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "100");
    }
}
