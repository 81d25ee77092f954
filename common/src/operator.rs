//! Commands of the operator that run at a phase of the migration (`--on-frozen` and its like).

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::open_files;
use crate::proto::control::SessionId;
use crate::session::State;

/// Time a command has. The workload is frozen while it runs.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// What a command learns from its environment.
#[derive(Clone, Debug)]
pub struct Facts {
    /// `POSTCOPY_SESSION`.
    pub session: SessionId,
    /// `POSTCOPY_PID`: the workload's root task as this host numbers it, 0 while there is none.
    pub pid: u32,
    /// `POSTCOPY_PEER`: address of the other host.
    pub peer: String,
}

impl Facts {
    /// The environment of a command in `phase`.
    pub fn variables(&self, phase: State) -> [(&'static str, String); 4] {
        [
            ("POSTCOPY_PHASE", phase.name().to_owned()),
            ("POSTCOPY_SESSION", self.session.to_string()),
            ("POSTCOPY_PID", self.pid.to_string()),
            ("POSTCOPY_PEER", self.peer.clone()),
        ]
    }
}

/// Why a command did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// It cannot be started.
    #[error("the {flag} command cannot be started: {error}")]
    Start {
        /// Which command.
        flag: &'static str,
        /// The system's word.
        error: std::io::Error,
    },
    /// It failed.
    #[error("the {flag} command \"{command}\" failed ({status}): {stderr}")]
    Failed {
        /// Which command.
        flag: &'static str,
        /// Its text.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The end of what it wrote.
        stderr: String,
    },
    /// It takes too long.
    #[error("the {flag} command \"{command}\" did not end within {} s", COMMAND_TIMEOUT.as_secs())]
    TimedOut {
        /// Which command.
        flag: &'static str,
        /// Its text.
        command: String,
    },
}

/// Runs `command` by the shell and waits for its end; does nothing when there is no command.
pub async fn run(
    flag: &'static str,
    command: Option<&str>,
    phase: State,
    facts: &Facts,
) -> Result<(), OperatorError> {
    let Some(command) = command else {
        return Ok(());
    };
    let mut shell = Command::new("sh");
    open_files::as_found(shell.as_std_mut());
    let child = shell
        .args(["-c", command])
        .envs(facts.variables(phase))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| OperatorError::Start { flag, error })?;
    let output = match timeout(COMMAND_TIMEOUT, child.wait_with_output()).await {
        Err(_) => {
            return Err(OperatorError::TimedOut {
                flag,
                command: command.to_owned(),
            });
        }
        Ok(Err(error)) => return Err(OperatorError::Start { flag, error }),
        Ok(Ok(output)) => output,
    };
    if output.status.success() {
        return Ok(());
    }
    Err(OperatorError::Failed {
        flag,
        command: command.to_owned(),
        status: output.status,
        stderr: last_line(&output.stderr),
    })
}

fn last_line(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let line = text.lines().last().unwrap_or("it wrote nothing");
    line.chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_command(command: &str) -> Result<(), OperatorError> {
        let facts = Facts {
            session: SessionId([7; 16]),
            pid: 42,
            peer: "10.0.0.2:7000".into(),
        };
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(run("--on-frozen", Some(command), State::Freeze, &facts))
    }

    #[test]
    fn the_facts_are_in_the_environment() {
        let check =
            "[ \"$POSTCOPY_PHASE $POSTCOPY_PID $POSTCOPY_PEER\" = 'freeze 42 10.0.0.2:7000' ]";
        run_command(check).expect("all facts are there");
    }

    #[test]
    fn a_failure_quotes_the_command_and_its_last_words() {
        let error = run_command("echo no such address >&2; exit 3").expect_err("it fails");
        let text = error.to_string();
        assert!(text.contains("--on-frozen"), "{text}");
        assert!(text.contains("no such address"), "{text}");
    }
}
