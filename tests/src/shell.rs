//! Running a command to its end and turning a failure into an error that quotes it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::libc;

/// Runs `command` to its end; its output is returned, a failure quotes its standard error.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs one line of words as a command; for fixed commands without spaces in their arguments.
pub fn run_line(line: &str) -> Result<String> {
    let mut words = line.split_whitespace();
    let program = words.next().context("an empty command line")?;
    run(Command::new(program).args(words))
}

/// Gives `command` a file that it can write to, by the number returned.
pub fn pass_descriptor(command: &mut Command, file: File) -> RawFd {
    const NUMBER: RawFd = 7;
    let renumber = move || {
        // SAFETY: the call takes two numbers; what it may close belongs to a program that is replaced next.
        let done = unsafe { libc::dup2(file.as_raw_fd(), NUMBER) };
        Errno::result(done).map(drop).map_err(io::Error::from)
    };
    // SAFETY: dup2 may be called between fork and exec.
    unsafe { command.pre_exec(renumber) };
    NUMBER
}

/// Whether `program` is found on `PATH`.
pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}
