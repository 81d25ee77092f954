//! A PID namespace for the restored workload, with an init of ours: this very program, in two more roles.
//!
//! `lazy-restorer nursery -- COMMAND` makes the namespaces and starts `lazy-restorer nursery --init -- COMMAND` as
//! PID 1 in them; that one waits for a byte on standard input, runs COMMAND (CRIU), reports its exit, and stays to reap
//! orphans as long as there are processes. Killing it kills everything in the namespace. All but COMMAND is done before
//! the workload is frozen.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::process::{Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};

/// Line by which the outer role reports the PID of init, as the host numbers it.
pub const INIT_LINE: &str = "init ";
/// Line by which init reports the command's exit code.
pub const EXIT_LINE: &str = "exit ";

/// Makes the namespaces and starts init in them.
pub fn make(command: &[OsString]) -> ExitCode {
    match try_make(command) {
        Ok(init) => {
            report(INIT_LINE, init);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("cannot make a PID namespace: {error}");
            ExitCode::FAILURE
        }
    }
}

fn try_make(command: &[OsString]) -> io::Result<u32> {
    unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS)?;
    // Mounts of ours must not reach the host; mounts of the host may still reach us.
    mount_propagation(MsFlags::MS_SLAVE)?;
    // CRIU refuses shared mounts whose peers it cannot see.
    mount_propagation(MsFlags::MS_PRIVATE)?;
    let child = Command::new("/proc/self/exe")
        .args(["nursery", "--init", "--"])
        .args(command)
        .spawn()?;
    Ok(child.id())
}

fn mount_propagation(how: MsFlags) -> nix::Result<()> {
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        how | MsFlags::MS_REC,
        None::<&str>,
    )
}

/// PID 1: runs the command when told to, then reaps until nothing is left.
pub fn init(command: &[OsString]) -> ExitCode {
    let prepared = prepare();
    // Whoever prepared us changes its mind, or dies, by closing the pipe.
    if io::stdin().read_exact(&mut [0]).is_err() {
        return ExitCode::SUCCESS;
    }
    match prepared.and_then(|()| run_command(command)) {
        Ok(code) => {
            report(EXIT_LINE, code);
            if code != 0 {
                return ExitCode::FAILURE;
            }
            reap();
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("cannot run CRIU in the new PID namespace: {error}");
            report(EXIT_LINE, 127);
            ExitCode::FAILURE
        }
    }
}

fn prepare() -> io::Result<()> {
    // A terminal's signals are not for the namespace.
    setsid()?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)?;
    Ok(())
}

fn run_command(command: &[OsString]) -> io::Result<i32> {
    let [program, arguments @ ..] = command else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no command"));
    };
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let child = Pid::from_raw(child.id() as i32);
    loop {
        // Orphans of the restore may end before the command does.
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => return Ok(code),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                return Ok(128 + signal as i32);
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn reap() {
    // The report's reader must see its end: we are not to hold the pipe for as long as the workload lives.
    let _ = nix::unistd::close(libc::STDOUT_FILENO);
    while waitpid(None, Some(WaitPidFlag::__WALL)) != Err(Errno::ECHILD) {}
}

fn report(what: &str, value: impl std::fmt::Display) {
    let mut stdout = io::stdout();
    // Whoever asked may be gone; the command's fate does not depend on it.
    let _ = writeln!(stdout, "{what}{value}").and_then(|()| stdout.flush());
}
