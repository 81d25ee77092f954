//! Saying that `criu restore` may begin, in all the ways that `criu lazy-pages` has.

use std::env;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use nix::unistd::setsid;

/// Set for the one that goes on in the background.
const BACKGROUND_VARIABLE: &str = "POSTCOPY_IN_BACKGROUND";
/// What is written to standard output.
const READY: &str = "ready";

/// Whom to tell besides the reader of standard output.
#[derive(Clone, Debug, Default)]
pub struct Ready {
    /// A descriptor that a zero byte is written to; it is closed then.
    pub status_fd: Option<RawFd>,
    /// A file that our PID is written to; it must not exist.
    pub pidfile: Option<PathBuf>,
}

impl Ready {
    /// Says it.
    pub fn say(&self) -> io::Result<()> {
        if let Some(path) = &self.pidfile {
            write_pid(path).map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            })?;
        }
        if let Some(fd) = self.status_fd {
            // SAFETY: the operator gave us this descriptor for this very use, and nobody else here has it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            File::from(fd).write_all(&[0])?;
        }
        let mut stdout = io::stdout();
        writeln!(stdout, "{READY}")?;
        stdout.flush()
    }
}

/// As CRIU does it: the number and nothing else, and never over a file that is there.
fn write_pid(path: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    write!(file, "{}", std::process::id())
}

/// With `daemon`, runs this very command in the background and returns when that is ready or has failed. `None` when
/// it is to go on here.
pub fn in_background(daemon: bool) -> Option<ExitCode> {
    if env::var_os(BACKGROUND_VARIABLE).is_some() {
        // Signals meant for the group of who started us must not end us; that we lead one already is as good.
        let _ = setsid();
        return None;
    }
    daemon.then(|| match await_ready() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lazy-restorer: error: cannot go on in the background: {error}");
            ExitCode::FAILURE
        }
    })
}

fn await_ready() -> io::Result<ExitCode> {
    let mut child = Command::new(env::current_exe()?)
        .args(env::args_os().skip(1))
        .env(BACKGROUND_VARIABLE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut said)?;
    }
    if said.trim_end() == READY {
        println!("{READY}");
        return Ok(ExitCode::SUCCESS);
    }
    let code = child
        .wait()?
        .code()
        .and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, pipe};
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn status_and_pid_are_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let (mut reader, writer) = pipe().expect("a pipe");
        let ready = Ready {
            status_fd: Some(OwnedFd::from(writer).into_raw_fd()),
            pidfile: Some(dir.path().join("pid")),
        };
        ready.say().expect("said");
        let mut status = Vec::new();
        reader.read_to_end(&mut status).expect("closed");
        assert_eq!(status, [0]);
        let pid = fs::read_to_string(dir.path().join("pid")).expect("written");
        assert_eq!(pid.parse(), Ok(std::process::id()));
    }

    #[test]
    fn a_pidfile_that_is_there_is_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pid");
        fs::write(&path, "1").expect("written");
        let ready = Ready {
            status_fd: None,
            pidfile: Some(path.clone()),
        };
        let refused = ready.say().expect_err("somebody else's").to_string();
        assert!(refused.contains("pid: File exists"), "{refused}");
        assert_eq!(fs::read_to_string(path).expect("there"), "1");
    }
}
