//! The CRIU program: finding it, asking its version, quoting its log.

pub mod under_runtime;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Environment variable that names the CRIU program.
pub const CRIU_VARIABLE: &str = "POSTCOPY_CRIU";

/// The oldest CRIU that dumps sockets on current kernels (4.1 cannot since 6.16).
const OLDEST: (u32, u32) = (4, 2);
/// Error lines quoted from a log: the first is the cause, the last its consequence.
const QUOTED_LINES: usize = 6;

/// A CRIU that can be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Criu {
    program: PathBuf,
    version: String,
    locks_by_nftables: bool,
}

/// Why there is no CRIU to use.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CriuError {
    /// It cannot be run.
    #[error(
        "cannot run {program}: {reason}; install CRIU 4.2 or later, or name it with --criu or {CRIU_VARIABLE}"
    )]
    NotFound {
        /// What was tried.
        program: String,
        /// The system's word.
        reason: String,
    },
    /// It does not say its version.
    #[error("{0} --version does not answer as CRIU does")]
    NoVersion(String),
    /// It is too old.
    #[error("{program} is version {version}; 4.2 or later is needed")]
    TooOld {
        /// The program.
        program: String,
        /// Its version.
        version: String,
    },
}

impl Criu {
    /// The CRIU of `--criu`, else of [`CRIU_VARIABLE`], else of the search path.
    pub fn find(named: Option<&Path>) -> Result<Self, CriuError> {
        let program = named
            .map(PathBuf::from)
            .or_else(|| env::var_os(CRIU_VARIABLE).map(PathBuf::from))
            .unwrap_or_else(|| PathBuf::from("criu"));
        let shown = program.display().to_string();
        let output = Command::new(&program)
            .arg("--version")
            .output()
            .map_err(|error| CriuError::NotFound {
                program: shown.clone(),
                reason: error.to_string(),
            })?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = parse_version(&text).ok_or(CriuError::NoVersion(shown.clone()))?;
        if numbers(&version) < OLDEST {
            return Err(CriuError::TooOld {
                program: shown,
                version,
            });
        }
        Ok(Criu {
            locks_by_nftables: locks_by_nftables(&program),
            program,
            version,
        })
    }

    /// Whether it can lock the network of a frozen task by nftables: in the same process, where iptables costs
    /// several program starts during the freeze and again during the restore.
    pub fn locks_by_nftables(&self) -> bool {
        self.locks_by_nftables
    }

    /// The program to run.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Its version as it writes it.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// A command with the options every use shares: nothing from configuration files, a log of its own.
    pub fn command(&self, action: &str, log: &Path) -> Vec<OsString> {
        vec![
            action.into(),
            "--no-default-config".into(),
            "--log-file".into(),
            log.into(),
            // Level 3 has the "Seized task" line the cutover is counted from; level 4 costs milliseconds.
            "-v3".into(),
        ]
    }
}

/// Asking also makes CRIU note what it finds out about the kernel in `/run/criu.kdat`, when that is on a tmpfs: tens of
/// milliseconds that the dump and, during the freeze, the restore then save.
fn locks_by_nftables(program: &Path) -> bool {
    Command::new(program)
        .args(["check", "--feature", "network_lock_nftables"])
        .output()
        .is_ok_and(|output| output.status.success())
}

/// The version in what `criu --version` writes.
pub fn parse_version(text: &str) -> Option<String> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Version: "))?;
    Some(line.trim().to_owned())
}

fn numbers(version: &str) -> (u32, u32) {
    let mut parts = version
        .split('.')
        .map(|part| part.parse().unwrap_or_default());
    (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    )
}

/// Whether images of the CRIU of `version` may hold what one of version `than` does not know. It reads those of older
/// ones, and nothing is known of a version that is no number.
pub fn is_newer(version: &str, than: &str) -> bool {
    numbers(version) > numbers(than)
}

/// The error lines of a CRIU log in one line, for an operator's error message.
pub fn quote_errors(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    match quoted(&String::from_utf8_lossy(&text)) {
        Some(quoted) => format!("its log says {quoted}"),
        None => format!("its log {} has no error line", log.display()),
    }
}

/// The first error lines of a log, in one line.
pub fn quoted(log: &str) -> Option<String> {
    let errors: Vec<&str> = log
        .lines()
        .filter_map(|line| line.split_once("Error ").map(|(_, error)| error.trim()))
        .collect();
    if errors.is_empty() {
        return None;
    }
    let skipped = errors.len().saturating_sub(QUOTED_LINES);
    let mut quoted: Vec<String> = errors
        .iter()
        .take(QUOTED_LINES)
        .map(|error| format!("\"{error}\""))
        .collect();
    if skipped > 0 {
        quoted.push(format!("and {skipped} more"));
    }
    Some(quoted.join(", "))
}

/// Whether a CRIU that wrote `log` came to its own end, a failed one included. One that was killed has let its tasks go
/// as they were.
pub fn ended_by_itself(log: &Path) -> bool {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    ["Dumping FAILED", "Dumping finished"]
        .iter()
        .any(|last_words| text.contains(last_words))
}

/// Seconds on CRIU's own clock, from its start, at which a line of its log was written.
pub fn log_time(line: &str) -> Option<f64> {
    let (time, _) = line.strip_prefix('(')?.split_once(')')?;
    time.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared() {
        let version = parse_version("Version: 4.2.1\nGitID: v4.2.1\n").expect("a version");
        assert_eq!(version, "4.2.1");
        assert!(numbers("4.10") >= OLDEST);
        assert!(numbers("4.1.1") < OLDEST);
        assert!(numbers("3.17.1") < OLDEST);
        assert!(is_newer("4.3", "4.2.1"));
        assert!(!is_newer("4.2.1", "4.2"));
        assert!(!is_newer("of the images", "4.2"));
    }

    #[test]
    fn error_lines_are_quoted_in_one_line() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("dump.log");
        fs::write(
            &log,
            "(00.010000) Seized task 7\n(00.020000) Error (criu/x.c:1): Can't get 1:16 opt\n",
        )
        .expect("written");
        assert_eq!(
            quote_errors(&log),
            "its log says \"(criu/x.c:1): Can't get 1:16 opt\""
        );
        assert!(quote_errors(&dir.path().join("none")).contains("no error line"));
    }

    #[test]
    fn log_times_are_seconds() {
        assert_eq!(log_time("(00.027321) Seized task 1"), Some(0.027321));
        assert_eq!(log_time("no time"), None);
    }

    #[test]
    fn a_missing_program_says_what_to_do() {
        let error = Criu::find(Some(Path::new("/nonexistent/criu"))).expect_err("not there");
        assert!(error.to_string().contains("--criu"));
    }
}
